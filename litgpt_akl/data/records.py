"""The records of data files, read one after another in little memory; a bad one is told with its place."""

import codecs
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import chain, islice
from typing import NamedTuple

from litgpt_akl.data.files import Chunks, count_rows, file_format, read_chunks, read_rows
from litgpt_akl.messages import quoted

LARGEST = 32 * 2**20
"""Bytes or characters of a record; whatever is longer is taken for broken."""
DEEPEST = 256
"""Levels of lists and objects in each other; Python's own ways of handling values end at about a thousand."""
TOO_DEEP = f"is nested too deeply: in more than {DEEPEST} levels"

SEVERAL_LINES = "begins a JSON object of several lines: a file has a list of records, or one record in each line"

BLANK = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
NAMES = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number", type(None): "null"}


@dataclass(frozen=True)
class Record:
    """A record or what is wrong with it."""

    line: int
    """The line, or the row of a Parquet file, counted from 1."""
    value: dict | None
    """None if it is bad."""
    error: str | None
    """Why it is bad, to follow its place: "is not valid JSON: Expecting value at column 7"."""
    bytes_read: int
    """How many of the file's bytes, as they are stored, had been read by then; about all of them at the last record.

    It is never more than the bytes that ``identify`` tells, unless a server does not tell them.
    """
    size: int = 0
    """About how many bytes or characters it has, where it may be large."""


class _Decoder(json.JSONDecoder):
    """Python's own, which notes where it would lose a value: a name that an object has twice."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._make_object)
        self.repeated: str | None = None

    def _make_object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            self.repeated = next(name for name in names if names.count(name) > 1)
        return value

    def raw_decode(self, s: str, idx: int = 0) -> tuple[object, int]:
        self.repeated = None
        return super().raw_decode(s, idx)


DECODER = _Decoder()


def is_too_deep(value: object) -> bool:
    """Whether lists and objects lie in each other in more than ``DEEPEST`` levels."""
    level = {id(value): value} if isinstance(value, (dict, list)) else {}
    for _ in range(DEEPEST):
        if not level:
            return False
        # what is met more than once, as in an object that holds itself, counts once on each level
        level = {
            id(inner): inner
            for outer in level.values()
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        }
    return bool(level)


def read(path: str) -> Iterator[Record]:
    """The records of a file, bad ones among them.

    A broken list of records ends with one bad record, as there is no telling where the next one would begin. Raises
    UserError if the file is of an unknown format, cannot be read, or is broken by its compression or as Parquet.
    """
    form, _ = file_format(path)
    if form == "parquet":
        for line, row in enumerate(read_rows(path, LARGEST), start=1):
            yield _of_row(*row, line)
    else:
        # a list of records often has the name of a file of lines, and the other way round
        is_list, chunks = _peek(read_chunks(path))
        yield from _read_list(chunks) if is_list else _read_lines(chunks)


def _of_row(value: dict | None, size: int, bytes_read: int, line: int) -> Record:
    error = _too_long() if value is None else None
    return Record(line, None if value is None else _without_nulls(value), error, bytes_read, size)


class Part(NamedTuple):
    """Some records of a file."""

    records: list[Record]
    """Their lines and rows are not those of the file."""
    all: float
    """How many records the file has, about."""


def read_part(path: str, places: int, number: int) -> Part:
    """So many records at each of some places, evenly spread over a local file; its first ones if it must be read on.

    Only Parquet and uncompressed lines can be read from their middle. Raises UserError as :func:`read` does.
    """
    if file_format(path)[0] == "parquet":
        groups = count_rows(path)
        each = math.ceil(places / len(groups)) * number if groups else 0
        chosen = range(0, len(groups), max(1, len(groups) // places))
        rows = [islice(read_rows(path, LARGEST, group), each) for group in chosen]
        return Part([_of_row(*row, line) for line, row in enumerate(chain(*rows), start=1)], sum(groups))
    size = os.stat(path).st_size
    if has_plain_lines(path):
        found = []
        for place in range(places):
            end = 0
            for record in islice(_read_lines(_lines_after(path, place * size // places)), number):
                found.append(record)
                end += record.size + 1
                # where the next place begins
                if end >= size // places:
                    break
        # a place within the last line has none behind it
        records = [record for record in found if record.size > 0] or found
        return Part(records, size * len(records) / sum(record.size + 1 for record in records))
    records, counted = [], 0
    for counted, record in enumerate(read(path), start=1):
        if counted <= places * number:
            records.append(record)
        elif record.bytes_read > records[-1].bytes_read:
            # what was read for the last of them has no more records
            return Part(records, (counted - 1) * size / records[-1].bytes_read)
    return Part(records, counted)


def has_plain_lines(path: str) -> bool:
    """Whether a file has one record in each line, and is not compressed."""
    form, compression = file_format(path)
    return compression is None and form != "parquet" and not _peek(read_chunks(path))[0]


def read_longest_lines(path: str, number: int) -> list[Record]:
    """The records of a file's longest lines, all of which are read, but not parsed; they have no line's number."""
    lines = nlargest(number, (line for line, _ in _lines(read_chunks(path))), key=len)
    return [Record(0, *_parse(line), 0, len(line)) for line in lines]


def _lines_after(path: str, start: int) -> Chunks:
    """A file's bytes behind the first line's end from byte ``start`` on; all of them from 0 on."""
    chunks, is_within = read_chunks(path, start), start == 0
    for chunk, bytes_read in chunks:
        if not is_within:
            _, newline, chunk = chunk.partition(b"\n")
            is_within = bool(newline)
        yield chunk, bytes_read


def _without_nulls(row: dict) -> dict:
    """The row of a Parquet file as it was before it was written there.

    All objects of a column have the same fields then, null in those that had none: a tool's arguments would be told to
    a chat template with all the arguments of the other tools.
    """
    if is_too_deep(row):
        return row
    return {name: _strip(value) for name, value in row.items()}


def _strip(value: object) -> object:
    if isinstance(value, dict):
        return {name: _strip(inner) for name, inner in value.items() if inner is not None}
    return [_strip(inner) for inner in value] if isinstance(value, list) else value


def place(path: str, line: int) -> str:
    """Where a record stands: ``PATH, line 17`` or ``PATH, row 17``."""
    return f"{quoted(path)}, {'row' if file_format(path)[0] == 'parquet' else 'line'} {line}"


def _peek(chunks: Chunks) -> tuple[bool, Chunks]:
    """Whether the first character is the bracket of a list, and the same chunks again."""
    seen, head = [], b""
    for chunk in chunks:
        seen.append(chunk)
        head += chunk[0]
        if len(head) >= len(codecs.BOM_UTF8) and head.removeprefix(codecs.BOM_UTF8).strip():
            break
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["), chain(seen, chunks)


def _read_lines(chunks: Chunks) -> Iterator[Record]:
    empty, opening = True, None
    for number, (line, bytes_read) in enumerate(_lines(chunks), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line or line.isspace():
            continue
        record = Record(number, *_parse(line), bytes_read, len(line))
        if opening is not None and record.error is not None:
            yield replace(opening, error=SEVERAL_LINES)
            return
        if opening is not None:
            yield opening
        # a line of an object that goes on is told from a broken one by the next
        opening = record if empty and record.error is not None and line.lstrip().startswith(b"{") else None
        empty = False
        if opening is None:
            yield record
    if opening is not None:
        yield opening
    if empty:
        yield Record(1, None, "the file is empty", bytes_read)


def _lines(chunks: Chunks) -> Iterator[tuple[bytes, int]]:
    """At least one line; of one that is longer than ``LARGEST`` a part is left out."""
    size, pieces, bytes_read = 0, [], 0
    for chunk, bytes_read in chunks:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            pieces.append(piece)
            yield b"".join(pieces), bytes_read
            size, pieces = 0, []
        if rest and size <= LARGEST:
            pieces.append(rest)
            size += len(rest)
    yield b"".join(pieces), bytes_read


def _parse(line: bytes) -> tuple[dict | None, str | None]:
    """A line's value and error, one of which is None."""
    if len(line) > LARGEST:
        return None, _too_long()
    try:
        text = line.decode()
        value = DECODER.decode(text)
    except UnicodeDecodeError as error:
        return None, f"is not valid UTF-8 at byte {error.start + 1}"
    except (ValueError, RecursionError) as error:
        return None, _describe(error, getattr(error, "colno", 1))
    error = _find_fault(value, text)
    return (None, error) if error else (value, None)


def _too_long() -> str:
    return f"is longer than {LARGEST >> 20} MiB"


def _describe(error: ValueError | RecursionError, column: int) -> str:
    if isinstance(error, RecursionError):
        return TOO_DEEP
    # the decoder's own message goes on with line, column and character
    reason = error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else str(error)
    return f"is not valid JSON: {reason} at column {column}"


def _find_fault(value: object, text: str) -> str | None:
    """Why valid JSON is no record; ``text`` is what ``value`` was read from."""
    if not isinstance(value, dict):
        return f"is {NAMES[type(value)]}, not an object"
    if is_too_deep(value):
        return TOO_DEEP
    if DECODER.repeated is not None:
        return f"has the field '{quoted(DECODER.repeated, 40)}' twice in one object"
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            return f"has {half}, half of a surrogate pair, which is no character"
    return None


def _read_list(chunks: Chunks) -> Iterator[Record]:
    text = _Text(chunks)
    try:
        for value, end in _items(text):
            line, source = text.line, text.text[text.position : end]
            error = _too_long() if len(source) > LARGEST else _find_fault(value, source)
            # bytes that are not UTF-8 were decoded to characters that cannot be encoded
            invalid = None if source.isascii() else re.search("[\udc80-\udcff]", source)
            if invalid:
                text.advance(text.position + invalid.start())
                line, error = text.line, f"is not valid UTF-8 at column {text.column}"
            yield Record(line, None if error else value, error, text.bytes_read, len(source))
            text.advance(end)
    except (ValueError, RecursionError) as error:
        text.advance(getattr(error, "pos", text.position))
        yield Record(text.line, None, _describe(error, text.column), text.bytes_read)


def _items(text: "_Text") -> Iterator[tuple[object, int]]:
    """A list's values and where their text ends; it begins at the text's position, which the caller moves to the end.

    Raises ValueError if the list is not valid JSON, RecursionError if a value is nested too deeply.
    """
    text.next_character()
    text.advance(text.position + 1)
    if text.next_character() != "]":
        while True:
            yield _decode_value(text)
            separator = text.next_character()
            if separator == "]":
                break
            if separator != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position)
            text.advance(text.position + 1)
            text.next_character()
    text.advance(text.position + 1)
    if text.next_character():
        raise json.JSONDecodeError("Extra data", text.text, text.position)


def _decode_value(text: "_Text") -> tuple[object, int]:
    while True:
        try:
            value, end = DECODER.raw_decode(text.text, text.position)
        except json.JSONDecodeError as error:
            # where text is cut off, the error stands at the token that is cut, all of which but strings are short
            cut = error.msg.startswith("Unterminated string") or error.pos > len(text.text) - 16
            if cut and len(text.text) - text.position > LARGEST:
                message = f"no record ends within {LARGEST >> 20} MiB"
                raise json.JSONDecodeError(message, text.text, text.position) from error
            if not cut or not text.grow():
                raise
        else:
            if end < len(text.text) or not text.grow():
                return value, end


class _Text:
    """Decoded text that grows at its end and is dropped at its start, and where in the file its position is."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text, self.position, self.bytes_read = "", 0, 0
        self.line, self._line_start = 1, 0

    @property
    def column(self) -> int:
        return self.position - self._line_start + 1

    def advance(self, position: int) -> None:
        """Move forward to a position in the text."""
        newline = self.text.rfind("\n", self.position, position)
        if newline >= 0:
            self.line += self.text.count("\n", self.position, position)
            self._line_start = newline + 1
        self.position = position

    def next_character(self) -> str:
        """Move over blank space and return the character there, or "" at the end."""
        while True:
            self.advance(BLANK.match(self.text, self.position).end())
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def grow(self) -> bool:
        """Drop what lies before the position and read at least as much as is left; False, and no change, at the end."""
        rest = self.text[self.position :]
        pieces, size = [], 0
        for chunk, bytes_read in self._chunks:
            self.bytes_read = bytes_read
            pieces.append(self._decoder.decode(chunk))
            size += len(pieces[-1])
            if size > len(rest):
                break
        else:
            pieces.append(self._decoder.decode(b"", final=True))
        grown = "".join(pieces)
        if not grown:
            return False
        self._line_start -= self.position
        self.text, self.position = rest + grown, 0
        return True
