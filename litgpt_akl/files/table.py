"""A table of numbers in a CSV file that may be damaged, of another encoding, or in the middle of being written."""

import codecs
import csv
import io
from pathlib import Path
from typing import AnyStr

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from litgpt_akl.files.reading import explain_damage
from litgpt_akl.messages import quoted

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
