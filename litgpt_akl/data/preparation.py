"""Files of records become Arrow files of token ids: in one pass, once for the same data, and checked."""

import hashlib
import inspect
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets.builder import Key
from filelock import FileLock, Timeout
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from torch.utils.data import Dataset

from litgpt_akl.data.encoding import Encoder
from litgpt_akl.data.files import identify
from litgpt_akl.data.records import TOO_DEEP, Record, is_too_deep, place, read
from litgpt_akl.data.workers import fetch
from litgpt_akl.files.changed_files import WAY_OUT, watch
from litgpt_akl.files.directories import check_name, explain_failure, write_directory
from litgpt_akl.files.manifest import damage, read_manifest, write_manifest
from litgpt_akl.messages import UserError, progress_bar, reason, say
from litgpt_akl.models.chat_template import ChatTemplate

FORMAT = 3
"""Goes into every fingerprint; to be raised when the same records become other rows."""
Portion = list[tuple[int, Record]]
"""Records, each with the number of its file."""
PORTION, PORTION_SIZE = 256, 2**22
"""Records that are encoded together: how many at most, and about how many bytes or characters of them."""
BATCH_BYTES = 2**22
"""Of rows that are written together: memory-mapped, each such batch takes some memory of its own."""
COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "responses": datasets.List(datasets.Value("int32")),  # begin, end, begin, end, ...
        "length": datasets.Value("int32"),  # 0 for a bad record
        "response_tokens": datasets.Value("int32"),
        "draw": datasets.Value("float32"),  # from the record's hash, even over [0, 1]: held out if below a fraction
        "file": datasets.Value("int32"),
        "line": datasets.Value("int64"),
        "error": datasets.Value("string"),
    }
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def probe(style: PromptStyle) -> list[str]:
    """What a prompt style does, by which two are compared: another version of LitGPT may have another text."""
    probes: list[dict[str, str]] = [{}, {"input": "input"}, {"sys_prompt": "system"}]
    texts = []
    for fields in probes:
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
    date: str | None = None
    """The day that the chat template writes, if it writes any."""

    other_cache: ClassVar[str] = "Give another directory with --data.cache_dir."
    """What to do where prepared data cannot be kept."""
    fewer_processes: ClassVar[str] = "Prepare in fewer processes than --data.num_proc {}, or free some memory."
    """What to do where so many do not fit."""

    @property
    def rules(self) -> list:
        """What decides beside the tokenizer and the prompt style, as plain data."""
        rules = [self.tokenizer.use_bos, self.max_seq_length, self.context_length, self.on_error]
        return rules if self.date is None else [*rules, self.date]

    @cached_property
    def fingerprint(self) -> str:
        """Differs when what becomes of a record could differ: by the tokenizer, the prompt style or a length."""
        tokenizer_files = [self.checkpoint_dir / name for name in TOKENIZER_FILES]
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in tokenizer_files]
        return xxhash.xxh3_128_hexdigest(
            json.dumps([FORMAT, style_identity(self.prompt_style), hashes, self.rules]).encode()
        )

    def encoder(self) -> "RecordEncoder":
        """What makes token ids of records."""
        template = (
            ChatTemplate.find(self.checkpoint_dir, self.date) if self.tokenizer.backend == "huggingface" else None
        )
        return Encoder(self.tokenizer, self.prompt_style, template, self.max_seq_length)


class RecordEncoder(Protocol):
    """Makes token ids of records; see :class:`Encoder`."""

    def encode(self, record: dict) -> tuple[list[int], list[int]]:
        """A record's token ids and the spans of its responses; raises ValueError if it cannot be used."""


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

    def refusal(self, file: int, line: int, row: int, error: str, cut_by: str) -> UserError:
        """What a user is told of a bad record: the ``row``-th of all, counted from 0; ``cut_by`` cuts long ones."""


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

    def refusal(self, file: int, line: int, row: int, error: str, cut_by: str) -> UserError:
        return UserError(
            f"{place(self.files[file], line)}: {error}.\n"
            f"Mend or remove it ({cut_by} cuts long ones), or leave bad records out with --data.on_error skip."
        )


@dataclass
class Rows(Dataset):
    """What becomes of some records; the place of this work is in other processes."""

    settings: Settings

    @cached_property
    def _encoder(self) -> RecordEncoder:
        return self.settings.encoder()

    def __getitem__(self, packed: Portion | bytes) -> tuple[int, int, pa.RecordBatch]:
        """The number of the last record's file, how many of its bytes had been read, and the rows."""
        portion = pickle.loads(packed) if isinstance(packed, bytes) else packed
        rows = [self._row(record) | {"file": file, "line": record.line} for file, record in portion]
        file, record = portion[-1]
        return file, record.bytes_read, pa.RecordBatch.from_pylist(rows, schema=COLUMNS.arrow_schema)

    def _row(self, record: Record) -> dict:
        try:
            if record.error is not None:
                raise ValueError(record.error)
            input_ids, responses = self._encoder.encode(record.value)
            context_length = self.settings.context_length
            if len(input_ids) > context_length:
                # kept on disk, this is read by commands that have other options
                raise ValueError(f"has {len(input_ids):,} tokens; the pair reads {context_length:,}")
        except (ValueError, RecursionError, MemoryError) as error:
            told = str(error) if isinstance(error, ValueError) else f"cannot be encoded: {error!r}"
            # half a character has no place in an Arrow file
            told = told.encode(errors="backslashreplace").decode()
            return {"input_ids": [], "responses": [], "length": 0, "response_tokens": 0, "draw": 0, "error": told}
        begins, ends = np.reshape(responses, (-1, 2)).T
        return {
            "input_ids": np.array(input_ids, dtype=np.int32),
            "responses": np.array(responses, dtype=np.int32),
            "length": len(input_ids),
            # no token comes before the first of a sample, so nothing predicts it
            "response_tokens": int((ends - np.maximum(begins, 1)).sum()),
            "draw": xxhash.xxh3_64_intdigest(json.dumps(record.value, sort_keys=True, default=repr).encode()) / 2**64,
            "error": None,
        }


@dataclass
class PreparationConfig(datasets.BuilderConfig):
    """What a :class:`Preparation` works on."""

    source: Source | None = None
    settings: Settings | None = None
    num_proc: int = 1


class Preparation(datasets.ArrowBasedBuilder):
    """Reads all records in one process, encodes them in others, and writes the rows in the records' order."""

    BUILDER_CONFIG_CLASS = PreparationConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=COLUMNS)

    def _split_generators(self, download_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train")]

    def _generate_tables(self) -> Iterator[tuple[Key, pa.Table]]:
        config = self.config
        starts = list(accumulate(config.source.sizes, initial=0))
        options = {"unit": config.source.unit, "unit_scale": True, "leave": False}
        with progress_bar(total=starts[-1], desc="preparing data", **options) as bar:
            fewer = config.settings.fewer_processes.format(config.num_proc)
            keys = _portions(config.source)
            if config.num_proc > 0:
                keys = map(_pack, keys)
            portions = fetch(Rows(config.settings), keys, config.num_proc, fewer)
            batches: list[pa.RecordBatch] = []
            size = first_row = 0
            try:
                for number, (file, bytes_read, rows) in enumerate(portions):
                    if config.settings.on_error == "stop":
                        _check(rows, first_row, config.source, config.settings.cut_by)
                    first_row += len(rows)
                    bar.update(starts[file] + bytes_read - bar.n)
                    batches.append(rows)
                    size += rows.nbytes
                    if size >= BATCH_BYTES:
                        yield Key(0, number), pa.Table.from_batches(batches).combine_chunks()
                        batches, size = [], 0
                if batches:
                    yield Key(0, number + 1), pa.Table.from_batches(batches).combine_chunks()
            finally:
                portions.stop()


def _portions(source: Source) -> Iterator[Portion]:
    # a portion goes on from file to file: each costs a message, whatever is in it
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
    try:
        return pickle.dumps(portion)
    except Exception:
        # an object of a data module may fail in every way
        return pickle.dumps([(file, _sendable(record)) for file, record in portion])


def _sendable(record: Record) -> Record:
    try:
        pickle.dumps(record)
    except Exception as error:
        told = f"cannot be handed to another process: {type(error).__name__}: {reason(error)}"
        return replace(record, value=None, error=told)
    return record


def _check(rows: pa.RecordBatch, first_row: int, source: Source, cut_by: str) -> None:
    bad = np.flatnonzero(rows["length"].to_numpy() == 0)
    if len(bad):
        row = rows.slice(bad[0], 1).to_pylist()[0]
        raise source.refusal(row["file"], row["line"], first_row + int(bad[0]), row["error"], cut_by)


LARGE = 2**30
"""Bytes of prepared data that take more than a second to read."""


def prepare(source: Source, settings: Settings, cache_dir: Path, num_proc: int) -> datasets.Dataset:
    """One row for each record, in their order, memory-mapped; what was prepared before is found again.

    Args:
        source: the records.
        settings: what to make of them.
        cache_dir: where prepared data is kept, in a folder for each fingerprint of records and settings.
        num_proc: processes that encode; with 0 this one does.

    Raises:
        UserError: a bad record, unless they are to be skipped; unreadable files, or such as change meanwhile; a full
            disk.
    """
    # preparation has a progress line of its own, with an end in sight
    datasets.disable_progress_bars()
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([settings.fingerprint, source.identity]).encode())
    folder = cache_dir / fingerprint
    check_name(folder.absolute(), "The directory for prepared data", settings.other_cache)
    if "::" in str(folder.absolute()):
        raise UserError(
            f"Data cannot be prepared in {folder}: fsspec, which writes it, takes '::' for a chain of URLs.\n"
            f"{settings.other_cache}"
        )
    with explain_failure(folder, settings.other_cache):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _in_turn(folder):
            flaw = _flaw(folder)
            if flaw is not None:
                say(f"The prepared data in {folder} is damaged ({flaw}): preparing it again.", file=sys.stderr)
            if flaw is not None or not folder.exists():
                _write(folder, source, settings, num_proc)
        return _open(folder)


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
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    if size > LARGE:
        say(f"Checking {size / 1e9:,.1f} GB of prepared data in {folder}.", file=sys.stderr)
    return damage(folder)


def _write(folder: Path, source: Source, settings: Settings, num_proc: int) -> None:
    with write_directory(folder, settings.other_cache) as partial:
        place = partial / "being-written"
        # without an id, the package would make one by pickling all records that lie in memory
        options = {"config_id": "rows", "source": source, "settings": settings, "num_proc": num_proc}
        builder = Preparation(cache_dir=str(place), **options)
        try:
            builder.download_and_prepare()
        except datasets.exceptions.DatasetGenerationError as error:
            raise _cause(error) from error
        source.check_unchanged()
        # what else the package writes it would read only if it were to look for the data itself
        for path in place.rglob("*.arrow"):
            path.rename(partial / path.name)
        shutil.rmtree(place)
        write_manifest(partial, 0, None, rows=builder.info.splits["train"].num_examples)


def _cause(error: BaseException) -> BaseException:
    """What a user is to be told about: the package that prepares the data wraps what went wrong."""
    while not isinstance(error, (UserError, OSError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _open(folder: Path) -> datasets.Dataset:
    # of no rows at all the package writes no file
    rows, paths = read_manifest(folder)["rows"], sorted(folder.glob("*.arrow"))
    if rows == 0:
        return datasets.Dataset.from_dict({name: [] for name in COLUMNS}, features=COLUMNS)
    watch(paths, read_to_the_end=True)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
