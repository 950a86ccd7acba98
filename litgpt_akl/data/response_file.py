"""A file of records that grows over a long time: what is there is whole, and the same command goes on with it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.reading import explain_damage, with_checksum, without_checksum
from litgpt_akl.messages import UserError

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
    """Lines of JSON under a name of their own until all are there; beside it stands what they were made with.

    Args:
        path: the file in the end.
        made_with: plain data; a file that was begun with something else is not gone on with.
    """

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        self.path, self.made_with = path, made_with
        self.partial = path.with_name(f"{path.name}.part")
        self._state = path.with_name(f"{path.name}.part.json")

    def open(self, overwrite: bool) -> Progress:
        """How far an earlier call has come; nothing is there if it began anew.

        Raises:
            UserError: the file is finished, or was begun with something else, or is damaged.
        """
        if overwrite:
            self._state.unlink(missing_ok=True)
        elif self.path.exists():
            raise UserError(f"{self.path} is there already.\nGive --overwrite true to replace it, or another --out.")
        if not self._state.exists():
            with explain_failure(self.path):
                self.partial.write_bytes(b"")
            return Progress()
        with explain_damage(self._state, "how far the file beside it has come", AGAIN):
            content = without_checksum(json.loads(self._state.read_text(encoding="utf-8")), required=True)
            progress = Progress(**content["progress"])
            before = content["made_with"]
        # as it was written: tuples are lists there
        now = json.loads(json.dumps(self.made_with))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{self.partial} was begun with another {name}: {before.get(name)!r} -> {now.get(name)!r}.\n{AGAIN}"
                )
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
        with explain_failure(self.path), self.partial.open("r+b") as file:
            # what a killed call has written behind it is not told of
            file.truncate(progress.size)
            file.seek(progress.size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            progress.size += len(data)
            content = {"made_with": self.made_with, "progress": vars(progress)}
            write_file(self._state, json.dumps(with_checksum(content)).encode("utf-8"))

    def finish(self) -> None:
        """Give the file its name; raises UserError if that cannot be."""
        with explain_failure(self.path):
            os.replace(self.partial, self.path)
            self._state.unlink()
