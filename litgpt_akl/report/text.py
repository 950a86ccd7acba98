"""Text of models and files, made fit to be shown: it may hold anything."""

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


def printable(text: str) -> str:
    """The same text; what controls a terminal or a writing direction, and half characters, as replacement signs."""
    return CONTROL.sub("\ufffd", text.replace("\r\n", "\n")).encode("utf-8", "replace").decode("utf-8")


def one_line(text: str, length: int) -> str:
    """A token's text, at most ``length`` characters, with its white space visible."""
    text = "".join(VISIBLE.get(character, character) for character in printable(text))
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
