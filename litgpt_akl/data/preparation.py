"""Files of records become Arrow files of token ids: in one pass, once for the same data, and checked."""

import hashlib
import inspect
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from torch.utils.data import Dataset

from litgpt_akl.data.aligned_dataset import COLUMNS, Aligner
from litgpt_akl.data.encoding import Encoded, Encoder
from litgpt_akl.data.files import identify
from litgpt_akl.data.formats import NO_RESPONSE, asks_only
from litgpt_akl.data.records import TOO_DEEP, Record, is_too_deep, place, read
from litgpt_akl.data.workers import fetch
from litgpt_akl.files.changed_files import WAY_OUT, watch
from litgpt_akl.files.directories import check_name, explain_failure, write_directory
from litgpt_akl.files.manifest import damage, write_manifest
from litgpt_akl.messages import UserError, progress_bar, reason, say
from litgpt_akl.models.chat_template import ChatTemplate

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

FORMAT = 9
"""Goes into every fingerprint; to be raised when the same records become other rows."""
Portion = list[tuple[int, Record]]
"""Records, each with the number of its file."""
PORTION, PORTION_SIZE = 256, 2**22
"""Records that are encoded together: how many at most, and about how many bytes or characters of them."""
BATCH_BYTES = 2**22
"""Of rows that are written together: memory-mapped, each such batch takes some memory of its own."""
CANONICAL = json.JSONEncoder(sort_keys=True, default=repr)
"""Makes one text of equal records, by which they are drawn."""
ROWS = "preparation-train.arrow"
"""Holds all rows of prepared data."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
TOKENIZER_FILES += ("special_tokens_map.json",)


@cache
def row_schema(for_teacher: bool = False) -> "pa.Schema":
    """The columns of prepared data, a row for each record; beside them those of a teacher of another tokenizer."""
    from datasets import Features, List, Value  # slow to import, and only runs with records to read need it

    own = {name: List(Value("int32")) for name in COLUMNS} if for_teacher else {}
    columns = Features(
        {
            "input_ids": List(Value("int32")),
            "responses": List(Value("int32")),  # begin, end, begin, end, ...
            "length": Value("int32"),  # 0 for one that is bad or dropped
            "response_tokens": Value("int32"),
            "draw": Value("float64"),  # from the record's hash, even over [0, 1]: held out if below a fraction
            "file": Value("int32"),
            "line": Value("int64"),
            "error": Value("string"),  # why it is bad or dropped
            "dropped": Value("bool"),  # it is good and too long
            "said": Value("int32"),  # characters of what the assistant says, without white space
            "lost": Value("int32"),  # of these, how many the text has not
            "notes": Value("string"),  # of one line each
            "by_template": Value("bool"),  # whether a chat template wrote the text, and not a prompt style
            **own,
        }
    )
    return columns.arrow_schema


def probe(style: PromptStyle) -> list[str]:
    """What a prompt style does, by which two are compared: another version of LitGPT may have another text."""
    texts = []
    for fields in ({}, {"input": "input"}, {"sys_prompt": "system"}):
        try:
            texts.append(style.apply("probe", **fields))
        except (KeyError, TypeError) as error:
            # a style may need fields of its own
            texts.append(repr(error))
    return texts


def style_identity(style: PromptStyle) -> list:
    """What tells prompt styles apart: what they do, and their code and fields, which may do more than a probe shows."""
    code = []
    for kind in type(style).__mro__[:-1]:
        try:
            source = Path(inspect.getsourcefile(kind)).read_bytes()
        except (OSError, TypeError):
            source = b""
        code.append([f"{kind.__module__}.{kind.__qualname__}", xxhash.xxh3_128_hexdigest(source)])
    return [probe(style), code, repr(vars(style))]


class TooLong(ValueError):
    """A record has more tokens than a model may be given."""


@dataclass(frozen=True, eq=False)
class Settings:
    """All that decides what becomes of a record; plain data, since it goes to other processes."""

    checkpoint_dir: Path
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    max_seq_length: int | None
    context_length: int
    on_error: str
    cut_by: str
    """The command's option for ``max_seq_length``, for messages."""
    vocab_size: int | None = None
    """Ids that the models know; None for all that the tokenizer makes."""
    template: ChatTemplate | None = None
    """For chats, if there is one that the tokenizer can read."""
    too_long: Literal["drop", "cut", "error"] = "error"
    """What becomes of a record that has more tokens than ``limit``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further ones of :class:`Encoder`, plain data."""
    teacher: "Settings | None" = None
    """Those by which a teacher of another tokenizer reads the same records."""
    reader: str = ""
    """Whose tokens these are, in a message; empty for the student's."""

    other_cache: ClassVar[str] = "Give another directory with --data.cache_dir."
    """What to do where prepared data cannot be kept."""
    fewer_processes: ClassVar[str] = "Prepare in fewer processes than --data.num_proc {}, or free some memory."
    """What to do where so many do not fit."""
    refusal: ClassVar[str] = (
        "{place}: {error}.\n"
        "Mend or remove it, or leave bad records out with --data.on_error skip (long ones with --data.too_long drop)."
    )
    """What a user is told of a bad record."""

    @property
    def rules(self) -> list:
        """What decides beside the tokenizer and the prompt style, as plain data."""
        template = None if self.template is None else self.template.identity
        limits = [self.max_seq_length, self.context_length, self.vocab_size, self.on_error, self.too_long]
        others = [] if self.teacher is None else [self.teacher.fingerprint]
        return [self.tokenizer.use_bos, *limits, template, self.options, *others]

    @property
    def limit(self) -> int:
        """Tokens of a record, at most."""
        return min(self.max_seq_length or self.context_length, self.context_length)

    @cached_property
    def fingerprint(self) -> str:
        """Differs when what becomes of a record could differ: by the tokenizer, the prompt style or a length."""
        files = [self.checkpoint_dir / name for name in TOKENIZER_FILES]
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in files]
        return _hash([FORMAT, style_identity(self.prompt_style), hashes, self.rules])

    def check_ids(self, ids: list[int]) -> None:
        """See that a record's ids can be read; raises TooLong, or ValueError for one that nobody knows."""
        if (highest := max(ids)) >= (self.vocab_size or math.inf):
            token = self.tokenizer.decode(torch.tensor([highest]))
            raise ValueError(f"has the token {highest} ({token!r}), which the models do not both know")
        if len(ids) <= self.limit:
            return
        if self.max_seq_length is not None and self.max_seq_length < self.context_length:
            raise TooLong(f"has {len(ids):,} tokens{self.reader}; {self.cut_by} is {self.max_seq_length:,}")
        raise TooLong(f"has {len(ids):,} tokens{self.reader}; the pair reads {self.context_length:,}")

    def encoder(self) -> Encoder:
        """What makes token ids of records."""
        max_length = self.limit if self.too_long == "cut" else None
        return Encoder(self.tokenizer, self.prompt_style, self.template, max_length, **self.options)


class Source(Protocol):
    """Records in their order, and what is to be told of them. It is iterated over once, if at all."""

    identity: Any
    """Plain data that changes when the records do."""
    sizes: list[int]
    """Of each file, in ``unit``."""
    unit: str
    """"B", or " records" if the records lie in memory already; ``Record.bytes_read`` then counts them."""

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Each record and the number of its file."""

    def check_unchanged(self) -> None:
        """See that the records are still those that ``identity`` stands for; raises UserError."""

    def place(self, file: int, line: int, row: int) -> str:
        """Where a record is from: the ``row``-th of all, counted from 0."""


@dataclass
class FileRecords:
    """The records of files, one file after the other."""

    files: list[str]
    unit: ClassVar[str] = "B"

    def __post_init__(self) -> None:
        self.identity = identify(self.files)
        self.sizes = [identity[1] for identity in self.identity]

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        for number, file in enumerate(self.files):
            for record in read(file):
                yield number, record

    def check_unchanged(self) -> None:
        for before, now in zip(self.identity, identify(self.files, anew=True), strict=True):
            if before != now:
                raise UserError(f"{before[0]} was changed or replaced while its records were read.\n{WAY_OUT}")

    def place(self, file: int, line: int, row: int) -> str:
        return place(self.files[file], line)


@dataclass
class Rows(Dataset):
    """What becomes of some records; the place of this work is in other processes."""

    settings: Settings

    @cached_property
    def _encoder(self) -> Encoder:
        return self.settings.encoder()

    @cached_property
    def _teacher_encoder(self) -> Encoder:
        return self.settings.teacher.encoder()

    @cached_property
    def _aligner(self) -> Aligner:
        return Aligner(self.settings.tokenizer, self.settings.teacher.tokenizer)

    def __getitem__(self, packed: Portion | bytes) -> tuple[int, int, "pa.RecordBatch"]:
        """The number of the last record's file, how many of its bytes had been read, and the rows."""
        import pyarrow as pa

        portion = pickle.loads(packed) if isinstance(packed, bytes) else packed
        rows = [self._row(record) | {"file": file, "line": record.line} for file, record in portion]
        file, record = portion[-1]
        schema = row_schema(self.settings.teacher is not None)
        return file, record.bytes_read, pa.RecordBatch.from_pylist(rows, schema=schema)

    def _row(self, record: Record) -> dict:
        of_teacher = {}
        try:
            if record.error is not None:
                raise ValueError(record.error)
            encoded = self._encoder.encode(record.value)
            self.settings.check_ids(encoded.ids)
            if self.settings.teacher is not None:
                encoded, of_teacher = self._with_teacher(record, encoded)
        except TooLong as error:
            # kept on disk, this is read by commands that have other options
            return {**NOTHING, "error": str(error), "dropped": self.settings.too_long == "drop"}
        except (ValueError, RecursionError, MemoryError) as error:
            told = str(error) if isinstance(error, ValueError) else f"cannot be encoded: {error!r}"
            return {**NOTHING, "error": _printable(told), "dropped": False}
        begins, ends = encoded.spans[::2], encoded.spans[1::2]
        return {
            "input_ids": np.fromiter(encoded.ids, np.int32, len(encoded.ids)),
            "responses": np.array(encoded.spans, dtype=np.int32),
            "length": len(encoded.ids),
            # no token comes before the first of a sample, so nothing predicts it
            "response_tokens": sum(ends) - sum(max(begin, 1) for begin in begins),
            "draw": xxhash.xxh3_64_intdigest(CANONICAL.encode(record.value).encode()) / 2**64,
            "error": None,
            "dropped": False,
            "said": encoded.said,
            "lost": encoded.lost,
            "notes": _printable("\n".join(encoded.notes)),
            "by_template": encoded.by_template,
            **of_teacher,
        }

    def _with_teacher(self, record: Record, encoded: Encoded) -> tuple[Encoded, dict[str, Any]]:
        """The student's tokens, with notes on the teacher's; and the columns of these."""
        of_teacher = self._teacher_encoder.encode(record.value)
        self.settings.teacher.check_ids(of_teacher.ids)
        columns = self._aligner.columns(encoded, of_teacher)
        more = (f"for the teacher: {note}" for note in of_teacher.notes if note not in encoded.notes)
        return encoded._replace(notes=(*encoded.notes, *more)), columns


NOTHING = {"input_ids": [], "responses": [], "length": 0, "response_tokens": 0, "draw": 0.0, "said": 0, "lost": 0}
"""What a row has that is left out."""


def _printable(text: str) -> str:
    """Half a character has no place in an Arrow file."""
    return text.encode(errors="backslashreplace").decode()


def _write_rows(path: Path, source: Source, settings: Settings, num_proc: int) -> int:
    """Reads all records here, encodes them in other processes, writes the rows in their order; returns how many."""
    import pyarrow as pa

    starts, keys = list(accumulate(source.sizes, initial=0)), portions(source)
    schema = row_schema(settings.teacher is not None)
    batches, size, count = [], 0, 0
    with (
        progress_bar(total=starts[-1], desc="preparing data", unit=source.unit, unit_scale=True, leave=False) as bar,
        path.open("wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        fewer = settings.fewer_processes.format(num_proc)
        results = fetch(Rows(settings), map(_pack, keys) if num_proc > 0 else keys, num_proc, fewer)
        try:
            for number, bytes_read, rows in results:
                if settings.on_error == "stop":
                    check_rows(rows, count, source, settings)
                count += len(rows)
                bar.update(starts[number] + bytes_read - bar.n)
                batches.append(rows)
                size += rows.nbytes
                if size >= BATCH_BYTES:
                    writer.write_table(pa.Table.from_batches(batches).combine_chunks())
                    batches, size = [], 0
        finally:
            results.stop()
        writer.write_table(pa.Table.from_batches(batches, schema).combine_chunks())
    return count


def portions(source: Source) -> Iterator[Portion]:
    """The records, some together: each portion costs a message, whatever is in it, and may go on from file to file."""
    portion, size = [], 0
    for file, record in source:
        if record.error is None and is_too_deep(record.value):
            record = replace(record, value=None, error=TOO_DEEP)
        portion.append((file, record))
        size += record.size
        if len(portion) == PORTION or size >= PORTION_SIZE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _pack(portion: Portion) -> bytes:
    """For another process; a queue would drop what cannot be pickled, and it would be waited for without end."""
    # an object of a data module may fail in every way
    with suppress(Exception):
        return pickle.dumps(portion)
    return pickle.dumps([(file, _sendable(record)) for file, record in portion])


def _sendable(record: Record) -> Record:
    try:
        pickle.dumps(record)
    except Exception as error:
        told = f"cannot be handed to another process: {type(error).__name__}: {reason(error)}"
        return replace(record, value=None, error=told)
    return record


def check_rows(rows: "pa.RecordBatch", first_row: int, source: Source, settings: Settings) -> None:
    """See that no row is bad, of which the first is the ``first_row``-th of all; raises UserError."""
    dropped = rows["dropped"].to_numpy(zero_copy_only=False)
    for bad in np.flatnonzero((rows["length"].to_numpy() == 0) & ~dropped):
        row = rows.slice(bad, 1).to_pylist()[0]
        place = source.place(row["file"], row["line"], first_row + int(bad))
        if row["error"].endswith(NO_RESPONSE):
            raise UserError(_describe_missing(place, row["error"], source, settings))
        raise UserError(settings.refusal.format(place=place, error=row["error"]))


def _describe_missing(place: str, error: str, source: Source, settings: Settings) -> str:
    """What a user is told of prompts alone, of which there are seldom few."""
    columns = settings.options.get("columns")
    alone = [record.value is not None and asks_only(record.value, columns) for _, record in source]
    return (
        f"{sum(alone):,} of {len(alone):,} records have no response, the first is {place}: {error}.\n"
        "Have a teacher write them with `litgpt generate_responses`, train with --distill.on_policy 1, or remove those."
    )


def folder_of(source: Source, settings: Settings, cache_dir: Path) -> Path:
    """Where these records are kept once they are prepared by these settings."""
    return cache_dir / _hash([settings.fingerprint, source.identity])


RowsOf = Callable[[Source, Settings, Path, int], "datasets.Dataset"]
"""What makes rows of records, as :func:`prepare` does."""
LARGE = 2**30
"""Bytes of prepared data that take more than a second to read."""


def prepare(source: Source, settings: Settings, cache_dir: Path, num_proc: int) -> "datasets.Dataset":
    """One row for each record, in their order, memory-mapped; what was prepared before is found again.

    It is kept in a folder of ``cache_dir`` for each fingerprint of records and settings. So many processes encode; with
    ``num_proc`` 0 this one does. Raises UserError for a bad record, unless they are to be skipped, for files that are
    unreadable or change meanwhile, and for a full disk.
    """
    import datasets

    folder = folder_of(source, settings, cache_dir)
    check_name(folder.absolute(), "The directory for prepared data", settings.other_cache)
    with explain_failure(folder, settings.other_cache):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _in_turn(folder):
            flaw = _flaw(folder)
            if flaw is not None:
                say(f"The prepared data in {folder} is damaged ({flaw}): preparing it again.", file=sys.stderr)
            if flaw is not None or not folder.exists():
                with write_directory(folder, settings.other_cache) as partial:
                    rows = _write_rows(partial / ROWS, source, settings, num_proc)
                    source.check_unchanged()
                    write_manifest(partial, 0, None, rows=rows)
        watch([folder / ROWS], read_to_the_end=True)
        return datasets.Dataset.from_file(str(folder / ROWS))


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """While entered, no other process prepares what belongs into the folder."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"Waiting for another process, which prepares the same data in {folder.parent}.", file=sys.stderr)
        lock.acquire()
    except OSError:
        # where nobody can write, as in a cache that is shared for reading, nobody prepares
        if not folder.exists():
            raise
    try:
        yield
    finally:
        lock.release()


def _flaw(folder: Path) -> str | None:
    """What is wrong with prepared data, None if nothing is, or if there is none."""
    if not folder.exists():
        return None
    size = (folder / ROWS).stat().st_size if (folder / ROWS).exists() else 0
    if size > LARGE:
        say(f"Checking {size / 1e9:,.1f} GB of prepared data in {folder}.", file=sys.stderr)
    return damage(folder)


def _hash(content: list) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
