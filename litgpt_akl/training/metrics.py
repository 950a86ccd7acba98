"""Which rows of ``metrics.csv`` belong to a checkpoint: marked when it is saved, found when a run goes on from it."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from litgpt_akl.files.names import METRICS_COPY, METRICS_MARK
from litgpt_akl.training.metrics_file import names_in

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
        """What a checkpoint keeps: columns, rows, bytes and checksum of the log as it is now, which is flushed.

        Args:
            log: All metrics so far. One that cannot be read counts as it was at the last call.
            directory: Of all checkpoints; the log is named from there, so that both can be moved together.
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
    """Let a new log begin with the rows that a checkpoint has behind it, so that none is missing or comes twice.

    Args:
        checkpoint: Whole, as its manifest says.
        step: Its.
        log: To be written; there is none if the checkpoint has no rows behind it, or none of them was found.

    Returns:
        The log's columns, if any; and what is to be told if its rows are not those that the checkpoint was saved with.

    Raises:
        OSError: ``log`` cannot be written.
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
    """Copy what is left of a log that something has changed, in the columns that were marked; how many rows it is."""
    written = 0
    with log.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, mark["columns"], extrasaction="ignore")
        writer.writeheader()
        for row in islice(_sound_rows(source, step), mark["rows"]):
            writer.writerow(row)
            written += 1
    return written


def _sound_rows(source: Path, step: int) -> Iterator[dict[str, str]]:
    """The rows up to a step, as far as they are rows of numbers in order."""
    last = 0
    with source.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file)
        try:
            columns = next(reader, [])
            if "step" not in columns or len(set(columns)) < len(columns):
                return
            for cells in reader:
                row = dict(zip(columns, cells, strict=False))
                if len(cells) == len(columns) and _is_sound(row) and last <= int(row["step"]) <= step:
                    last = int(row["step"])
                    yield row
        except csv.Error:
            # what follows is no table any more
            return


def _is_sound(row: dict[str, str]) -> bool:
    try:
        return int(row["step"]) >= 0 and all(cell == "" or isinstance(float(cell), float) for cell in row.values())
    except ValueError:
        return False
