"""Progress lines that are calm where nobody watches them."""

import sys

from tqdm import tqdm

from litgpt_akl.display import quoted, shown


def progress_bar(*args, **options) -> tqdm:
    """A tqdm bar; a log file is no terminal: a line every ten seconds is enough there."""
    if "desc" in options:
        options["desc"] = quoted(options["desc"], 80)
    return tqdm(*args, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)


def tell(text: str) -> None:
    """Print lines above the progress lines that there are."""
    tqdm.write(shown(text), file=sys.stdout)
    sys.stdout.flush()
