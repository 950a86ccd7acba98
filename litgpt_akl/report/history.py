"""What a run has logged, read back from its CSV file, and how many points of it a plot can show."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from litgpt_akl.errors import UserError
from litgpt_akl.reading import explain_damage, read_yaml

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


def read_history(run_dir: Path) -> History:
    """Read what ``finetune_akl`` wrote into its ``out_dir``.

    Raises:
        UserError: it is no such directory, or nothing was logged yet.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory. Give the --out_dir of a run of litgpt finetune_akl.")
    logs = {int(path.parent.name.split("_")[1]): path for path in run_dir.glob("logs/csv/version_[0-9]*/metrics.csv")}
    if not logs:
        raise UserError(
            f"{run_dir} holds no metrics (logs/csv/version_*/metrics.csv).\n"
            "Give the --out_dir of a run of litgpt finetune_akl that has logged a step or a validation."
        )
    columns = _read_columns(logs[max(logs)])
    recipe_file, recipe = run_dir / "hyperparameters.yaml", {}
    if recipe_file.is_file():
        recipe = read_yaml(recipe_file)
        with explain_damage(recipe_file, "the recipe of a run"):
            distill, *_ = (dict(recipe.get(name) or {}) for name in ("distill", "train", "data"))
            float(distill.get("kd_ratio", 0.5))
    validated = np.zeros(len(columns["step"]), dtype=bool)
    for name, column in columns.items():
        if name.startswith("val_"):
            validated |= np.isfinite(column)
    validation = {name.removeprefix("val_"): c[validated] for name, c in columns.items() if name.startswith("val_")}
    training = {name: column[~validated] for name, column in columns.items() if not name.startswith("val_")}
    validation["step"] = columns["step"][validated]
    return History(run_dir.resolve().name, recipe, training, validation)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    # the last row may be in the middle of being written
    options = csv.ParseOptions(invalid_row_handler=lambda row: "skip")
    numbers = csv.ConvertOptions(null_values=["", "None"])
    with explain_damage(path, "a table of numbers", "Name another run, or mend the file."):
        table = csv.read_csv(path, parse_options=options, convert_options=numbers)
        columns = {name: table[name].cast(pa.float64()).to_numpy() for name in table.column_names}
    if "step" not in columns:
        raise UserError(f"{path} has no column step: it is not a log of litgpt finetune_akl. Name another run.")
    return columns


def finite(x: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The rows in which all values are finite."""
    kept = np.isfinite(x)
    for column in values:
        kept &= np.isfinite(column)
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
