"""Text of models and files, made fit for a page: it may hold anything."""

from litgpt_akl.messages import CONTROL, masked

VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


def printable(text: str) -> str:
    """The same text without credentials; what controls a writing direction or a terminal as replacement signs."""
    return masked(CONTROL.sub("\ufffd", text.replace("\r\n", "\n")))


def one_line(text: str, length: int) -> str:
    """A token's text, at most ``length`` characters, with its white space visible."""
    text = "".join(VISIBLE.get(character, character) for character in printable(text))
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
