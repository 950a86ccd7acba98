"""What people read: errors that are theirs to mend, values made fit to be shown, credentials masked, progress."""

import os
import re
import sys
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, TextIO

from tqdm import tqdm

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
"""What controls a terminal or a writing direction, or has no look; halves of characters. Not newline, tab, joiners."""
WIDTH = 80
"""Columns of a terminal that are used at most."""
INDENT = 11
"""Columns of a label, and of what follows below it."""
LENGTH = 300
"""Characters of a value within a message."""

MASK = "***"

USER = re.compile(r"(?<=://)[^\s'\"<>/?#:]*:[^\s'\"<>/?#]*@|(?:(?<=\bhttp://)|(?<=\bhttps://))[^\s'\"<>/?#:]+@")
"""``user:password@``, and a token in its place; before the @ of abfs:// stands the name of a container."""
TELLING = (
    r"(?:[\w.%-]{0,40}(?:token|secret|passw|pwd|signature|credential|api[_-]?key|access[_-]?key|accessid|jwt)[\w.%-]{0,40}"
    r"|(?:[\w.%-]{0,40}[_-])?auth(?:orization)?|sig|key-pair-id)"
)
"""Names of a URL's parameters whose values give access."""
PARAMETER = re.compile(
    r"([?&;](?i:" + TELLING + r"|key|pass|policy)=)[^\s&'\"<>#]*[^\s&'\"<>#.,;:)\]]",
)
SIGNED = re.compile(r"(?i)x-(?:amz|goog|oss|cos)-.*|" + TELLING)
"""Parameters that change when a URL is signed anew, and the file does not."""
WITH_SIGNATURE = {"sv", "ss", "srt", "st", "se", "sr", "sp", "spr", "sip", "expires", "algorithm", "skoid", "sktid"}
WITH_SIGNATURE |= {"skt", "ske", "sks", "skv", "policy"}
"""The same under the names of Azure, CloudFront and older signatures; without one they may mean something else."""

HF_TOKEN = re.compile(r"\bhf_(?:(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{8,}|[A-Za-z0-9]{20,})")
HEADER = re.compile(r"(?i)(\b(?:bearer|authorization['\"]?\s*[:=]\s*['\"]?(?:basic|token))\s+)[\w.~+/=-]{8,}")
ASSIGNED = re.compile(
    r"(?i)(\b[\w-]{0,40}(?:passwd|password|secret|api[_-]?key|access[_-]?key|(?:access|auth|session|security|hf)[_-]?token)"
    r"[\w-]{0,40}['\"]?\s*[=:]\s*['\"]?)(?!None\b|null\b)[^\s'\",;&})\]]+"
)
"""As options of a file system are quoted: ``secret='...'``, ``"api_key": "..."``."""

SECRET_NAME = re.compile(r"(?i)(?:.*[_.-])?(?:token|secret|password|passwd|key|credentials?|signature|sas)")
HARMLESS_NAME = re.compile(
    r"(?i)(?:.*[_.-])?(?:bos|eos|pad|unk|sep|cls|mask|sort|image|text|input|output|column)[_.-].*",
)


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


def visible(text: str) -> str:
    """The same text with escapes such as ``\\x1b`` in place of control characters; lines and tabs stay."""
    text = text.replace("\r\n", "\n")
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def shown(text: object) -> str:
    """What may be printed of a text of several lines: visible, and without credentials."""
    return masked(visible(str(text)))


def quoted(text: object, length: int = LENGTH) -> str:
    """What may be printed of a value within one line: with escapes for new lines, too, and cut to a length."""
    text = shown(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def say(text: object, file: TextIO | None = None) -> None:
    """Print a message; ``file`` is the standard output if it is not told."""
    file = sys.stdout if file is None else file
    print(fitted(shown(text), file), file=file, flush=True)


def fitted(text: str, file: TextIO, indent: int = 0) -> str:
    """A text as a file shows it: lines but the first are indented, and on a terminal those that are too long broken."""
    lines = text.split("\n")
    if file.isatty():
        # a terminal that does not tell how wide it is counts as one of the usual width
        width = min(WIDTH, get_terminal_size((WIDTH, 24)).columns) - indent
        options = {"break_long_words": False, "break_on_hyphens": False}
        lines = [part for line in lines for part in (wrap(line, width, **options) if len(line) > width else [line])]
    return f"\n{'':{indent}}".join(lines)


def entry(label: str, text: object) -> None:
    """Print a text right of its label, above the progress lines that there are."""
    tqdm.write(f"{label:<{INDENT}}{fitted(shown(text), sys.stdout, INDENT)}", file=sys.stdout)
    sys.stdout.flush()


def progress_bar(*args, **options) -> tqdm:
    """A tqdm bar; a log file is no terminal: a line every ten seconds is enough there."""
    if "desc" in options:
        options["desc"] = quoted(options["desc"], 80)
    return tqdm(*args, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)


def tell(text: str) -> None:
    """Print lines above the progress lines that there are."""
    tqdm.write(fitted(shown(text), sys.stdout), file=sys.stdout)
    sys.stdout.flush()


def masked(value: Any) -> Any:
    """The same text, or list or mapping of texts, with a mask in place of what gives access to something.

    Masked is what a URL has as ``user:password@`` or as a token or a signature in its query, wherever in a text it
    stands; the tokens of Hugging Face; and texts whose key says that they are secret, such as ``api_key``.
    """
    if isinstance(value, str):
        text = PARAMETER.sub(rf"\1{MASK}", USER.sub(f"{MASK}@", value))
        return HF_TOKEN.sub(MASK, HEADER.sub(rf"\1{MASK}", ASSIGNED.sub(rf"\1{MASK}", text)))
    if isinstance(value, dict):
        return {key: MASK if item and is_secret(key, item) else masked(item) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, list) else value


def is_secret(name: Any, value: Any) -> bool:
    """Whether an option of that name holds what nobody may read."""
    says_so = isinstance(name, str) and SECRET_NAME.fullmatch(name) and not HARMLESS_NAME.fullmatch(name)
    return bool(says_so) and isinstance(value, (str, bytes))


def is_masked(value: Any) -> bool:
    """Whether something in a value was masked before: it cannot be used."""
    if isinstance(value, str):
        return value == MASK or bool(re.search(rf"://\S*{re.escape(MASK)}", value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(is_masked, parts))


def without_credentials(url: str) -> str:
    """What a URL names, whoever asks for it and until when it may be asked: by this two are compared."""
    address, mark, query = USER.sub("", url).partition("?")
    if "://" not in url or not mark:
        return address + mark + query
    parameters = [(part.partition("=")[0], part) for part in query.split("&")]
    secret = {name for name, _ in parameters if SIGNED.fullmatch(name)}
    if any("sig" in name.lower() for name in secret):
        secret |= {name for name, _ in parameters if name.lower() in WITH_SIGNATURE}
    kept = "&".join(part for name, part in parameters if name not in secret)
    return f"{address}?{kept}" if kept else address
