"""A file of records that grows over a long time: what is there is whole, and the same command goes on with it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.reading import explain_damage, with_checksum, without_checksum
from litgpt_akl.messages import UserError

REPLACE = "Give --overwrite true to replace it, or another --out."
AGAIN = "Give --overwrite true to begin anew, or another --out."


@dataclass
class Progress:
    """How far a file has come."""

    records: int = 0
    """Of the data, from the first on, that need not be read again."""
    size: int = 0
    """Bytes that are written for them."""
    counts: dict[str, int] = field(default_factory=dict)
    """What became of the records."""


class ResponseFile:
    """Lines of JSON under a name of their own until all are there; what they were made with stays beside it.

    ``path`` is the file in the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made_with: dict[str, Any] = {}
        self.partial = path.with_name(f"{path.name}.part")
        self._state = path.with_name(f"{path.name}.part.json")
        # no name by which a folder's data are found
        self._finished = path.with_name(f".{path.name}.made_with")
        self.is_finished = False
        """Whether an earlier call has made all of it."""

    def begun(self, overwrite: bool) -> tuple[dict[str, Any], Progress] | None:
        """What an earlier call was made with and how far it has come; None if there is nothing to go on with.

        Raises:
            UserError: the file is finished, and not to be replaced; or what stands beside it is damaged.
        """
        if overwrite:
            self._state.unlink(missing_ok=True)
        elif self.path.exists():
            self.is_finished = self._finished.exists()
            if not self.is_finished:
                raise UserError(f"{self.path} is there already.\n{REPLACE}")
            self._state.unlink(missing_ok=True)
        state = self._finished if self.is_finished else self._state
        if not state.exists():
            return None
        with explain_damage(state, "how far the file beside it has come", AGAIN):
            content = without_checksum(json.loads(state.read_text(encoding="utf-8")), required=True)
            return dict(content["made_with"]), Progress(**content["progress"])

    def open(self, made_with: dict[str, Any], begun: tuple[dict[str, Any], Progress] | None) -> Progress:
        """How far the file has come, to be gone on with.

        Args:
            made_with: plain data; a file that was begun with something else is not gone on with.
            begun: from :meth:`begun`.

        Raises:
            UserError: the file was begun with something else, or is shorter than it was.
        """
        self.made_with = made_with
        if begun is None:
            return Progress()
        before, progress = begun
        # as it was written: tuples are lists there
        now = json.loads(json.dumps(made_with))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                file, way_out = (self.path, REPLACE) if self.is_finished else (self.partial, AGAIN)
                made = "made" if self.is_finished else "begun"
                raise UserError(
                    f"{file} was {made} with another {name}: {before.get(name)!r} -> {now.get(name)!r}.\n{way_out}"
                )
        if self.is_finished:
            if (size := self.path.stat().st_size) != progress.size:
                raise UserError(f"{self.path} has {size:,} bytes, and had {progress.size:,} at its end.\n{REPLACE}")
            return progress
        size = self.partial.stat().st_size if self.partial.is_file() else 0
        if size < progress.size:
            raise UserError(f"{self.partial} has {size:,} bytes, and had {progress.size:,} before.\n{AGAIN}")
        return progress

    def append(self, lines: str, progress: Progress) -> None:
        """Write lines behind what ``progress`` tells of; it is moved on by the caller but for its size.

        Raises:
            UserError: the disk does not take them.
        """
        data = lines.encode("utf-8")
        with explain_failure(self.path), open(self.partial, "r+b", opener=_create) as file:
            # what a killed call has written behind it is not told of
            file.truncate(progress.size)
            file.seek(progress.size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            progress.size += len(data)
            content = {"made_with": self.made_with, "progress": vars(progress)}
            write_file(self._state, json.dumps(with_checksum(content)).encode("utf-8"))

    def discard(self) -> None:
        """Remove what is written, and what stands beside it; raises UserError if that cannot be."""
        with explain_failure(self.path):
            self.partial.unlink(missing_ok=True)
            self._state.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the file its name; raises UserError if that cannot be."""
        with explain_failure(self.path):
            # killed between two of these, the same command goes on to here, or finds the file finished
            write_file(self._finished, self._state.read_bytes())
            os.replace(self.partial, self.path)
            self._state.unlink()


def _create(path: str, flags: int) -> int:
    """Opens a file that may not be there yet, and that is not to be emptied if it is."""
    return os.open(path, flags | os.O_CREAT, 0o666)
