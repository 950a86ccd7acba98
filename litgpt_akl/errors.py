"""The one exception whose message is all that a user needs to see, and what others say in one line."""

import os
from pathlib import Path

from litgpt_akl.display import quoted, shown


def reason(error: BaseException) -> str:
    """What an exception of another library says, as one line of at most 300 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return quoted(" ".join(text.split()))


class UserError(Exception):
    """A mistake that the user can mend: one or two lines that name the thing, both values and the way out.

    The commands print it without a traceback and exit with status 1. Everything else keeps its traceback. What it
    quotes may come from data or a URL: it is made fit to be shown, and credentials are masked.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


def first_line(error: UserError) -> str:
    """What is wrong, without the way out."""
    return str(error).splitlines()[0]


def not_permitted(error: PermissionError, path: Path | str) -> UserError:
    """What a user is told who may not read a file, or a directory above it; ``path`` if the error names none."""
    place = os.fsdecode(error.filename or path)
    return UserError(
        f"{place} cannot be read: {error.strerror}.\nLet this user read it, or copy it to where it may be read."
    )
