"""The day that a chat template writes into its prompts: one for a whole run, and for all that goes on with it."""

from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from litgpt_akl.files.manifest import Damaged, read_manifest
from litgpt_akl.models import chat_template
from litgpt_akl.teacher.identity import read_identity


class Day(NamedTuple):
    """A day, and where it was found."""

    date: str
    """As 2026-11-27, wherever the clock is."""
    recorded_in: str | None
    """A checkpoint or a teacher cache; None if it is the day of this call."""

    def __str__(self) -> str:
        source = "the day of this call" if self.recorded_in is None else f"as {self.recorded_in} was made with"
        return f"The chat template writes a date into the prompts: {self.date}, {source}"


def choose_day(checkpoints: Iterable[Path], cache_dir: str | None = None) -> Day:
    """The day that one of some checkpoints, or else a teacher cache, was made with, or else that of this call.

    Raises:
        UserError: the cache is there and cannot be read.
    """
    for directory in checkpoints:
        with suppress(Damaged):
            if found := _date_of(read_manifest(directory).get("data")):
                return Day(found, str(directory))
    if cache_dir is not None and (found := _date_of(read_identity(cache_dir))):
        return Day(found, cache_dir)
    return Day(chat_template.today(), None)


def _date_of(entries: Any) -> str | None:
    with suppress(ValueError, TypeError, AttributeError):
        return date.fromisoformat(entries.get("date")).isoformat()
    return None
