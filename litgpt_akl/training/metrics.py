"""The log of metrics: written when it can be, and which of its rows belong to a checkpoint."""

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from torch import Tensor

from litgpt_akl.files.directories import set_aside
from litgpt_akl.files.manifest import METRICS_COPY, METRICS_MARK
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


BLOCK = 2**20
"""Bytes that are read at once."""


class MetricsMarker:
    """Follows a log that grows: of what was marked before nothing is read again, unless the log was written anew."""

    def __init__(self) -> None:
        self._begin(None, b"")

    def _begin(self, inode: int | None, header: bytes) -> None:
        self._inode, self._header = inode, header
        self._bytes, self._rows, self._digest = len(header), 0, xxhash.xxh3_128(header)

    def mark(self, log: Path, directory: Path) -> dict[str, Any]:
        """What a checkpoint keeps: columns, rows, bytes and checksum of a flushed log as it is now.

        A log that cannot be read counts as it was at the last call. It is named from the ``directory`` of all
        checkpoints, so that both can be moved together.
        """
        # an error is the logger's to tell, and whoever goes on from the mark will be told
        with suppress(OSError):
            self._follow(log)
        return {
            "file": Path(os.path.relpath(log, directory)).as_posix(),
            "columns": names_in(self._header),
            "rows": self._rows,
            "bytes": self._bytes,
            "xxh3_128": self._digest.hexdigest(),
        }

    def _follow(self, log: Path) -> None:
        with log.open("rb") as file:
            header, found = file.readline(BLOCK), os.fstat(file.fileno())
            if header != self._header or found.st_ino != self._inode or found.st_size < self._bytes:
                self._begin(found.st_ino, header)
            file.seek(self._bytes)
            while block := file.read(BLOCK):
                self._digest.update(block)
                self._bytes += len(block)
                self._rows += block.count(b"\n")
            os.fsync(file.fileno())


def copy_marked_rows(checkpoint: Path, step: int, log: Path) -> tuple[list[str], str | None]:
    """Let a new log begin with the rows that a checkpoint of that step has behind it: none is missing or comes twice.

    There is no log if the checkpoint, which is whole, has no rows behind it, or none of them was found. Raises OSError
    if ``log`` cannot be written.

    Returns:
        The log's columns, if any; and what is to be told if its rows are not those that the checkpoint was saved with.
    """
    if (checkpoint / METRICS_COPY).is_file():
        shutil.copyfile(checkpoint / METRICS_COPY, log)
        with log.open("rb") as file:
            return names_in(file.readline()), None
    if not (checkpoint / METRICS_MARK).is_file():
        return [], None
    mark = json.loads((checkpoint / METRICS_MARK).read_text(encoding="utf-8"))
    if mark["rows"] == 0:
        return [], None
    source, written = checkpoint.parent / mark["file"], 0
    try:
        opened = source.open("rb")
    except FileNotFoundError:
        what = "is gone"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    else:
        with opened:
            if _copy_text(opened, mark, log):
                return mark["columns"], None
        what, written = "is not as it was then", _copy_sound_rows(source, step, mark, log)
    if written == 0:
        log.unlink(missing_ok=True)
    told = (
        f"{source} {what}: of the {mark['rows']:,} rows of metrics up to step {step}, {written:,} are taken over.\n"
        "The training itself goes on as if nothing had happened."
    )
    return mark["columns"] if written else [], told


def _copy_text(source: BinaryIO, mark: dict[str, Any], log: Path) -> bool:
    """Copy what was marked; whether it is what was marked."""
    digest = xxhash.xxh3_128()
    try:
        with log.open("wb") as file:
            for block in _marked_text(source, mark):
                digest.update(block)
                file.write(block)
    except (ValueError, csv.Error):
        return False
    return digest.hexdigest() == mark["xxh3_128"]


def _marked_text(source: BinaryIO, mark: dict[str, Any]) -> Iterator[bytes]:
    """The log's beginning as it was when it was marked: columns that have come since are left out again."""
    columns = names_in(source.readline(BLOCK))
    if columns == mark["columns"]:
        source.seek(0)
        left = mark["bytes"]
        while block := source.read(min(BLOCK, left)):
            yield block
            left -= len(block)
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, mark["columns"], extrasaction="ignore")
    writer.writeheader()
    rows = csv.DictReader(io.TextIOWrapper(source, encoding="utf-8", newline=""), columns)
    for row in islice(rows, mark["rows"]):
        writer.writerow(row)
        if text.tell() > BLOCK:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()


def _copy_sound_rows(source: Path, step: int, mark: dict[str, Any], log: Path) -> int:
    """Copy a changed log's rows of numbers in order, up to a step, in the columns that were marked; how many it is."""
    written = last = 0
    options = {"encoding": "utf-8", "newline": ""}
    # what follows upon an error is no table any more
    with source.open(errors="replace", **options) as old, log.open("w", **options) as new, suppress(csv.Error):
        reader, writer = csv.reader(old), csv.DictWriter(new, mark["columns"], extrasaction="ignore")
        writer.writeheader()
        columns = next(reader, [])
        if "step" not in columns or len(set(columns)) < len(columns):
            return 0
        for cells in reader:
            row = dict(zip(columns, cells, strict=False))
            if len(cells) == len(columns) and _is_sound(row) and last <= int(row["step"]) <= step:
                writer.writerow(row)
                written, last = written + 1, int(row["step"])
            if written == mark["rows"]:
                break
    return written


def _is_sound(row: dict[str, str]) -> bool:
    try:
        return int(row["step"]) >= 0 and all(cell == "" or isinstance(float(cell), float) for cell in row.values())
    except ValueError:
        return False
