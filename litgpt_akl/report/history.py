"""What a run has logged, read back from its CSV file, damaged or not."""

import codecs
import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, AnyStr

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from litgpt_akl.files.manifest import RECIPE
from litgpt_akl.files.reading import explain_damage, read_yaml
from litgpt_akl.messages import UserError, first_line, quoted, say

EMPTY_CELLS = ("", "None")
HIGHEST_STEP = 2**31 - 1
"""Plots have steps as 32-bit integers."""
ENCODINGS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
ENCODINGS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF8: "UTF-8-SIG"}
"""By their first bytes, the longer ones first."""


def read_table(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the columns of a log, ``[rows]`` each, NaN where nothing was logged.

    Returns:
        The columns, of which one is ``step``; and what is not as it was written, with what became of it.

    Raises:
        UserError: no number is left of it.
    """
    with explain_damage(path, "a table of numbers", "Name another run, or mend the file."):
        if not path.is_file():
            raise ValueError("it is no file")
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        columns, notes = _whole_columns(path), []
        if columns is None:
            columns, notes = _columns_left(path)
        if "step" not in columns:
            raise ValueError("it has no column step, as a log of litgpt finetune_akl has")
        steps = columns["step"]
        # NaN is none of these
        sound = (steps >= 0) & (steps <= HIGHEST_STEP) & (steps == np.floor(steps))
        if not sound.all():
            notes.append(f"{np.count_nonzero(~sound):,} rows without a step are left out")
        columns = {name: column[sound] for name, column in columns.items()}
        for column in columns.values():
            # infinite is what single precision, in which plots have it, cannot hold
            column[np.abs(column) > np.finfo(np.float32).max] *= np.inf
        if not any(np.isfinite(column).any() for name, column in columns.items() if name != "step"):
            raise ValueError("it holds no rows of numbers")
        return columns, notes


def _whole_columns(path: Path) -> dict[str, np.ndarray] | None:
    """The columns of a table of numbers; None if it is not all of that."""
    with path.open("rb") as file:
        file.seek(-1, io.SEEK_END)
        is_ended = file.read(1) == b"\n"
    source = path if is_ended else pa.BufferReader(_ended(path.read_bytes(), b"\n"))
    numbers = arrow_csv.ConvertOptions(null_values=[*EMPTY_CELLS])
    try:
        table = arrow_csv.read_csv(source, convert_options=numbers)
        names = table.column_names
    except ValueError:
        # Arrow's own for what is no table, Python's for a name that is no UTF-8
        return None
    are_numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    is_whole = all(any(is_number(kind) for is_number in are_numbers) for kind in table.schema.types)
    if not is_whole or "step" not in names or len({*names}) < len(names):
        return None
    return {name: table[name].cast(pa.float64()).to_numpy() for name in names}


def _ended(content: AnyStr, newline: AnyStr) -> AnyStr:
    """All whole lines: the last one may be in the middle of being written."""
    return content[: content.rfind(newline) + 1]


def _columns_left(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The numbers of a table that holds something else, too; and what else it is."""
    content = path.read_bytes()
    encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "UTF-8")
    if encoding == "UTF-8" and b"\0" in content[:2]:
        encoding = "UTF-16-BE" if content[:1] == b"\0" else "UTF-16-LE"
    notes = [] if encoding.startswith("UTF-8") else [f"it is read as {encoding}"]
    text = _ended(content.decode(encoding, errors="replace").replace("\0", "\ufffd"), "\n")
    reader, rows = csv.reader(io.StringIO(text, newline="")), []
    try:
        rows.extend(row for row in reader if row)
    except csv.Error:
        notes.append(f"what follows line {reader.line_num:,} is no table")
    header, rows = (rows[0], rows[1:]) if rows else ([], [])
    whole = [row for row in rows if len(row) == len(header)]
    if len(whole) < len(rows):
        notes.append(f"{len(rows) - len(whole):,} rows of another length are left out")
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        notes.append(f"of columns named twice ({quoted(', '.join(doubled), 80)}) the first is shown")
    places = {name: header.index(name) for name in header}
    columns = {name: [_number(row[place]) for row in whole] for name, place in places.items()}
    if words := sum(values.count(None) for values in columns.values()):
        notes.append(f"{words:,} cells that are no numbers are left out")
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}, notes


def _number(cell: str) -> float | None:
    """A cell's value, NaN if nothing was logged; None if it is something else."""
    try:
        return np.nan if cell in EMPTY_CELLS else float(cell)
    except ValueError:
        return None


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


def read_history(run_dir: Path, tell: Callable[[str], None] = say) -> History:
    """Read what ``finetune_akl`` wrote into its ``out_dir``; ``tell`` is told in a line for each file what is damaged.

    Raises:
        UserError: it is no such directory, or nothing that was logged can be read.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory. Give the --out_dir of a run of litgpt finetune_akl.")
    columns = _read_newest(find_logs(run_dir, tell), tell)
    if columns is None:
        raise UserError(
            f"{run_dir} holds no metrics (logs/csv/version_*/metrics.csv).\n"
            "Give the --out_dir of a run of litgpt finetune_akl that has logged a step or a validation."
        )
    step, of_validation = columns["step"], [name for name in columns if name.startswith("val_")]
    validated = np.any([np.zeros(len(step)), *(np.isfinite(columns[name]) for name in of_validation)], axis=0)
    validation = {name.removeprefix("val_"): columns[name][validated] for name in of_validation}
    training = {name: columns[name][~validated] for name in columns if name not in of_validation}
    validation["step"] = step[validated]
    return History(run_dir.resolve().name, read_recipe(run_dir, tell), training, validation)


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


def _read_newest(logs: Sequence[Path], tell: Callable[[str], None]) -> dict[str, np.ndarray] | None:
    """The newest log that can be read; None if there is none at all. Raises UserError if none can be read."""
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
        return columns
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
