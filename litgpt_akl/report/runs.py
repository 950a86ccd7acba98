"""A run as its directory tells it: what is left of its log, its recipe and its examples."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from litgpt_akl.files.examples import read_examples
from litgpt_akl.files.manifest import EXAMPLES, RECIPE
from litgpt_akl.messages import UserError, first_line
from litgpt_akl.report.history import History, read_history, read_recipe
from litgpt_akl.report.page import Shown


def read_run(run_dir: Path, tell: Callable[[str], None]) -> Shown:
    """What a page can show of a run; ``tell`` is told, in one line for each file, what cannot be shown.

    Raises:
        UserError: there is neither a row of metrics nor an example.
    """
    examples = None
    try:
        examples = read_examples(run_dir)
    except UserError as error:
        tell(f"{first_line(error)} The page is without these examples.")
    try:
        return Shown(read_history(run_dir, tell), examples)
    except UserError as error:
        if examples is None:
            raise
        tell(f"{first_line(error)} The page is without metrics of this run.")
    nothing = {"step": np.empty(0)}
    return Shown(History(run_dir.resolve().name, read_recipe(run_dir, tell), nothing, nothing), examples)


def read_runs(runs: Sequence[Path], tell: Callable[[str], None]) -> dict[Path, Shown]:
    """What there is to show of each run; one that is damaged is told of and left out if there is another.

    Raises:
        UserError: one is no run, or nothing of any can be shown.
    """
    found, failed = {}, []
    for run in runs:
        try:
            found[run] = read_run(run, tell)
        except UserError as error:
            # whoever names what never was a run means another directory
            if not any(os.path.lexists(run / name) for name in ("logs", RECIPE, EXAMPLES)):
                raise
            failed.append(error)
    if not found:
        raise failed[0]
    for error in failed:
        tell(f"{first_line(error)} This run is left out.")
    return found
