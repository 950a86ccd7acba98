"""Text of data, models and files made fit to be shown: it may hold anything, and a terminal obeys what it is told."""

import re
import sys
from typing import TextIO

from litgpt_akl.credentials import masked

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
"""What controls a terminal or a writing direction, or has no look; halves of characters. Not newline, tab, joiners."""
LENGTH = 300
"""Characters of a value within a message."""


def visible(text: str) -> str:
    """The same text with escapes such as ``\\x1b`` in place of control characters; lines and tabs stay."""
    return CONTROL.sub(_escape, text.replace("\r\n", "\n"))


def _escape(found: re.Match) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def shown(text: object) -> str:
    """What may be printed of a text of several lines: visible, and without credentials."""
    return masked(visible(str(text)))


def quoted(text: object, length: int = LENGTH) -> str:
    """What may be printed of a value within one line: with escapes for new lines, too, and cut to a length."""
    text = shown(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def say(text: object, file: TextIO | None = None) -> None:
    """Print a message; ``file`` is the standard output if it is not told."""
    print(shown(text), file=sys.stdout if file is None else file, flush=True)
