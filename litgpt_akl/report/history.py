"""What a run has logged, read back from its directory, damaged or not."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_akl.config.recipe import options_of
from litgpt_akl.files.manifest import RECIPE
from litgpt_akl.files.reading import explain_damage, read_yaml
from litgpt_akl.files.table import read_table
from litgpt_akl.loss.top_k import k_of
from litgpt_akl.messages import UserError, first_line, quoted, say

POINTS = 1000
"""A line has at most as many points; a plot is not wider on most screens."""
BINS_OF_MEAN = 50
"""The running mean is over a window of this part of a series."""


@dataclass(eq=False)
class History:
    """A run as its files tell it."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    """``hyperparameters.yaml``."""
    training: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns of the training steps' rows, ``[rows]`` each, NaN where nothing was logged."""
    validation: dict[str, np.ndarray] = field(default_factory=dict)
    """The same of the validations' rows, under the names of training: without ``val_``."""
    logged: datetime | None = None
    """When the last row was written."""

    @property
    def kept_ids(self) -> int | None:
        """How many of the teacher's ids its cache keeps, with all others as one; None if it knows all."""
        return k_of((self.recipe.get("teacher") or {}).get("cache_dtype"))

    @property
    def divergence(self) -> str | None:
        """What the run minimises beside the cross-entropy, as far as it is known."""
        return (self.recipe.get("distill") or {}).get("divergence")


def read_history(run_dir: Path, tell: Callable[[str], None] = say) -> History:
    """Read what ``finetune_akl`` wrote into its ``out_dir``; ``tell`` is told in a line for each file what is damaged.

    Raises:
        UserError: it is no such directory, or nothing that was logged can be read.
    """
    if not run_dir.is_dir():
        raise UserError(f"The run {run_dir} is not a directory. Give the --out_dir of a run of litgpt finetune_akl.")
    found = _read_newest(find_logs(run_dir, tell), tell)
    if found is None:
        raise UserError(
            f"{run_dir} holds no metrics (logs/csv/version_*/metrics.csv).\n"
            "Give the --out_dir of a run of litgpt finetune_akl that has logged a step or a validation."
        )
    log, columns = found
    step, of_validation = columns["step"], [name for name in columns if name.startswith("val_")]
    validated = np.any([np.zeros(len(step)), *(np.isfinite(columns[name]) for name in of_validation)], axis=0)
    validation = {name.removeprefix("val_"): columns[name][validated] for name in of_validation}
    training = {name: columns[name][~validated] for name in columns if name not in of_validation}
    validation["step"] = step[validated]
    logged = datetime.fromtimestamp(log.stat().st_mtime).astimezone()
    return History(run_dir.resolve().name, read_recipe(run_dir, tell), training, validation, logged)


def find_logs(run_dir: Path, tell: Callable[[str], None]) -> list[Path]:
    """The logs of a run, the newest first; ``tell`` is told of what only looks like one."""
    logs, others = {}, []
    directory = run_dir / "logs" / "csv"
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        number = re.fullmatch(r"version_([0-9]+)", path.name)
        if number and path.is_dir():
            logs[int(number[1])] = path / "metrics.csv"
        else:
            others.append(path.name)
    if others:
        tell(f"{directory}: skipped {quoted(', '.join(others))}, which no run has named so.")
    return [logs[number] for number in sorted(logs, reverse=True)]


def _read_newest(logs: Sequence[Path], tell: Callable[[str], None]) -> tuple[Path, dict[str, np.ndarray]] | None:
    """The newest log that can be read, and its columns; None if there is none at all.

    Raises UserError if none can be read.
    """
    failed: list[UserError] = []
    for log in logs:
        if not os.path.lexists(log):
            failed.append(UserError(f"{log} is missing.\nName another run."))
            continue
        try:
            columns, notes = read_table(log)
        except UserError as error:
            failed.append(error)
            continue
        for error in failed:
            tell(f"{first_line(error)} An older log is shown: {log}.")
        if notes:
            tell(f"{log} was damaged: {'; '.join(notes)}. The rest is shown.")
        return log, columns
    if failed:
        raise failed[0]
    return None


def read_recipe(run_dir: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """The options of a run; none if it has kept none, or if they cannot be read, which is told."""
    path = run_dir / RECIPE
    if not os.path.lexists(path):
        return {}
    try:
        with explain_damage(path, "the recipe of a run"):
            if not path.is_file():
                raise ValueError("it is no file")
            recipe = read_yaml(path)
            sections = [recipe.get(name) or {} for name in ("distill", "train", "data")]
            sections.append(dict(sections[2]).get("init_args") or {})
            if not all(isinstance(section, dict) for section in sections):
                raise ValueError("its sections are no entries")
            if not isinstance(sections[0].get("kd_ratio", 0.5), int | float):
                raise ValueError("its kd_ratio is no number")
            options_of(recipe)
    except UserError as error:
        tell(f"{first_line(error)} The page is without the options of this run.")
        return {}
    return recipe


def finite(x: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows in which all values are finite."""
    kept = np.isfinite([x, *values]).all(axis=0)
    return x[kept], *(column[kept] for column in values)


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` of the points of a line: its ends, and the lowest and the highest in each of equal parts."""
    if len(x) <= points:
        return x, y
    kept = {0, len(x) - 1}
    edges = np.linspace(0, len(x), (points - 2) // 2 + 1, dtype=np.int64)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    order = np.array(sorted(kept))
    return x[order], y[order]


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean around each value, as many on both sides of it: towards the ends ever fewer."""
    count = len(values)
    index = np.arange(count)
    reach = np.minimum(np.minimum(index, index[::-1]), count // BINS_OF_MEAN // 2)
    sums = np.concatenate(([0.0], values.cumsum(dtype=np.float64)))
    return ((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)).astype(values.dtype)


def unique_names(runs: list[Path]) -> list[str]:
    """The directories' names, with as many of the directories above as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(path[-depth:]) for path in parts]
