"""A log of metrics that is written when it can be: whatever becomes of its file, its folder or its disk."""

import csv
import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt_akl.files.directories import set_aside
from litgpt_akl.messages import reason

ROWS_KEPT = 10_000
"""Rows that wait for a file that cannot be written; of more, the oldest go."""
LONGEST_HEADER = 2**20


class MetricsFile:
    """Rows of metrics and the CSV file that they are added to, whose header names all columns there are.

    Nothing that happens to the file is an error: it is told once, and what could not be written is tried again at the
    next call of :meth:`save`. The file is whole at any moment: checkpoints have no copy of it.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self.columns: list[str] = []
        """Of the file, as far as it is known here."""
        self.metrics: list[dict[str, Any]] = []
        """Rows that are still to be written, the oldest first."""
        self._size, self._lost, self._told, self._tell = 0, 0, set[str](), tell

    def begin_with(self, columns: list[str]) -> None:
        """The file is there already, with these columns; with none if there are none."""
        self.columns = columns
        self._size = self.path.stat().st_size if columns else 0

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Add a row, for :meth:`save` to write."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.metrics.append({**values, "step": step})

    def save(self) -> None:
        """Write the rows that wait, if it can be done."""
        if not self.metrics:
            return
        columns = sorted({*self.columns, *(name for row in self.metrics for name in row)})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_there():
                self._write_anew([], columns)
            elif columns == self.columns:
                self._append()
            else:
                self._add_columns(columns)
            self._size = self.path.stat().st_size
        except OSError as error:
            self._tell_once(f"cannot be written ({reason(error)}). Its rows are kept for when it can be.")
            self._lost += max(0, len(self.metrics) - ROWS_KEPT)
            del self.metrics[:-ROWS_KEPT]
        else:
            self.columns, self.metrics = columns, []

    def tell_losses(self) -> None:
        """Tell how many rows are in no file, if the last try has left any, or some had to be given up."""
        lost = self._lost + len(self.metrics)
        if lost:
            self._tell_once(f"lacks {lost:,} rows, which could not be written.")

    def _tell_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._tell(f"{self.path} {what} The training itself goes on as if nothing had happened.")

    def _is_there(self) -> bool:
        """Whether the file is there to be added to; what is not as it was is told, and what is another's set aside."""
        if os.path.lexists(self.path) and not self.path.is_file():
            raise FileExistsError(errno.EEXIST, "something else has its name")
        try:
            with self.path.open("rb") as file:
                header, size = file.readline(LONGEST_HEADER), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            if self._size:
                self._tell_once("is gone, with the rows in it. A new one begins.")
            return False
        if size == 0 and self._size:
            self._tell_once("was emptied. It begins anew.")
        elif size and (not self.columns or names_in(header) != self.columns):
            self._tell_once(f"is not what this run has written: it is renamed to {set_aside(self.path).name}.")
            return False
        elif size < self._size:
            self._tell_once("was cut, and lacks rows.")
        return size > 0

    def _append(self) -> None:
        """Add the rows; if not all can be added, none is."""
        with self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(end - 1)
            # what was cut within a row must not become a part of the next one
            cut = file.read(1) != b"\n"
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write("\r\n" if cut else "")
                csv.DictWriter(file, self.columns).writerows(self.metrics)
        except OSError:
            # there may be room for some of them
            with suppress(OSError):
                os.truncate(self.path, end)
            raise

    def _add_columns(self, columns: list[str]) -> None:
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            file.readline()
            try:
                self._write_anew(csv.reader(file), columns)
            except csv.Error:
                self._tell_once(f"is no table any more: it is renamed to {set_aside(self.path).name}.")
                self._write_anew([], columns)

    def _write_anew(self, rows: Iterable[list[str]], columns: list[str]) -> None:
        """Write rows of the columns so far, and those that wait; the file is replaced whole or not at all."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                # a row that something has cut or doubled is none of the run's
                sound = (row for row in rows if len(row) == len(self.columns))
                writer.writerows(dict(zip(self.columns, row, strict=True)) for row in sound)
                writer.writerows(self.metrics)
            partial.replace(self.path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def names_in(header: bytes) -> list[str]:
    """The columns that the first line of a CSV file names."""
    try:
        return next(csv.reader([header.decode(errors="replace")]), [])
    except csv.Error:
        return []
