"""Progress lines that are calm where nobody watches them."""

import sys

from tqdm import tqdm


def progress_bar(*args, **options) -> tqdm:
    """A tqdm bar; a log file is no terminal: a line every ten seconds is enough there."""
    return tqdm(*args, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)
