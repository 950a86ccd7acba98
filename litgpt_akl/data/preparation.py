"""Files of records become memory-mapped Arrow files of token ids: in one pass, once for the same data and settings."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets.builder import Key
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from torch.utils.data import Dataset

from litgpt_akl.data.chat_template import ChatTemplate
from litgpt_akl.data.encoding import Encoder
from litgpt_akl.data.records import Record, place, read
from litgpt_akl.data.workers import fetch
from litgpt_akl.errors import UserError
from litgpt_akl.progress import progress_bar

FORMAT = 2
"""Goes into every fingerprint; to be raised when the same records become other rows."""
PORTION = 256
"""Records that are encoded together."""
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
    return [style.apply("probe"), style.apply("probe", input="input"), style.apply("probe", sys_prompt="system")]


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

    @cached_property
    def fingerprint(self) -> str:
        """Differs when what becomes of a record could differ: by the tokenizer, the prompt style or a length."""
        probes = probe(self.prompt_style)
        tokenizer_files = [self.checkpoint_dir / name for name in TOKENIZER_FILES]
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in tokenizer_files]
        rules = [self.tokenizer.use_bos, self.max_seq_length, self.context_length, self.on_error]
        return xxhash.xxh3_128_hexdigest(json.dumps([FORMAT, probes, hashes, rules]).encode())


@dataclass
class Rows(Dataset):
    """What becomes of some records of a file; the place of this work is in other processes."""

    settings: Settings

    @cached_property
    def _encoder(self) -> Encoder:
        settings, tokenizer = self.settings, self.settings.tokenizer
        template = ChatTemplate.find(settings.checkpoint_dir) if tokenizer.backend == "huggingface" else None
        return Encoder(tokenizer, settings.prompt_style, template, settings.max_seq_length)

    def __getitem__(self, work: tuple[int, list[Record]]) -> tuple[int, int, pa.RecordBatch]:
        """The number of the file, how many of its bytes had been read, and the rows."""
        file, records = work
        rows = [self._row(record) | {"file": file, "line": record.line} for record in records]
        return file, records[-1].bytes_read, pa.RecordBatch.from_pylist(rows, schema=COLUMNS.arrow_schema)

    def _row(self, record: Record) -> dict:
        try:
            if record.error is not None:
                raise ValueError(record.error)
            input_ids, responses = self._encoder.encode(record.value)
            context_length = self.settings.context_length
            if len(input_ids) > context_length:
                # kept on disk, this is read by commands that have other options
                raise ValueError(f"has {len(input_ids):,} tokens; the pair reads {context_length:,}")
        except ValueError as error:
            return {"input_ids": [], "responses": [], "length": 0, "response_tokens": 0, "draw": 0, "error": str(error)}
        begins, ends = np.reshape(responses, (-1, 2)).T
        return {
            "input_ids": np.array(input_ids, dtype=np.int32),
            "responses": np.array(responses, dtype=np.int32),
            "length": len(input_ids),
            # no token comes before the first of a sample, so nothing predicts it
            "response_tokens": int((ends - np.maximum(begins, 1)).sum()),
            "draw": xxhash.xxh3_64_intdigest(json.dumps(record.value, sort_keys=True).encode()) / 2**64,
            "error": None,
        }


@dataclass
class PreparationConfig(datasets.BuilderConfig):
    """What a :class:`Preparation` works on."""

    files: list[str] | None = None
    sizes: list[int] | None = None
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
        starts = list(accumulate(config.sizes, initial=0))
        options = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1}
        with progress_bar(total=starts[-1], desc="preparing data", **options) as bar:
            fewer = f"Prepare in fewer processes than --data.num_proc {config.num_proc}, or free some memory."
            portions = fetch(Rows(config.settings), _portions(config.files), config.num_proc, fewer)
            batches: list[pa.RecordBatch] = []
            try:
                for number, (file, bytes_read, rows) in enumerate(portions):
                    if config.settings.on_error == "stop":
                        _check(rows, config.files[file], config.settings.cut_by)
                    bar.update(starts[file] + bytes_read - bar.n)
                    batches.append(rows)
                    if sum(batch.nbytes for batch in batches) >= BATCH_BYTES:
                        yield Key(0, number), pa.Table.from_batches(batches).combine_chunks()
                        batches = []
                if batches:
                    yield Key(0, number + 1), pa.Table.from_batches(batches).combine_chunks()
            finally:
                portions.stop()


def _portions(files: list[str]) -> Iterator[tuple[int, list[Record]]]:
    for number, file in enumerate(files):
        portion = []
        for record in read(file):
            portion.append(record)
            if len(portion) == PORTION:
                yield number, portion
                portion = []
        if portion:
            yield number, portion


def _check(rows: pa.RecordBatch, file: str, cut_by: str) -> None:
    for length, line, error in zip(*(rows[name].to_pylist() for name in ("length", "line", "error")), strict=True):
        if length == 0:
            raise UserError(
                f"{place(file, line)}: {error}.\n"
                f"Mend or remove it ({cut_by} cuts long ones), or leave bad records out with --data.on_error skip."
            )


def prepare(
    files: list[str], identities: list, settings: Settings, cache_dir: Path, num_proc: int
) -> tuple[datasets.Dataset, str]:
    """One row for each record, in their order, and their fingerprint; what was prepared before is found again.

    Args:
        files: what to read.
        identities: path, size and more of each file: plain data that changes when the file does.
        settings: what to make of the records.
        cache_dir: where prepared data is kept, in a folder for each fingerprint.
        num_proc: processes that encode.

    Raises:
        UserError: a bad record, unless they are to be skipped; unreadable files; a full disk.
    """
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([settings.fingerprint, identities]).encode())
    folder = cache_dir / fingerprint
    found = any(folder.glob("**/dataset_info.json"))
    builder = Preparation(
        cache_dir=str(folder),
        config_id=fingerprint,
        files=files,
        sizes=[identity[1] for identity in identities],
        settings=settings,
        num_proc=num_proc,
    )
    try:
        return _build(builder), fingerprint
    except (OSError, ValueError, pa.ArrowException) as error:
        if not found:
            raise
        print(f"The prepared data in {folder} is damaged ({_first_line(error)}): preparing it again.", file=sys.stderr)
        shutil.rmtree(folder)
    return _build(builder), fingerprint


def _build(builder: Preparation) -> datasets.Dataset:
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        raise _cause(error, Path(builder.cache_dir)) from error
    rows = builder.info.splits["train"].num_examples
    if rows == 0:
        raise UserError(f"There are no records in {', '.join(builder.config.files[:3])}. Give a file that has some.")
    dataset = builder.as_dataset(split="train")
    if len(dataset) != rows:
        raise ValueError(f"{len(dataset):,} rows instead of {rows:,}")
    return dataset


def _cause(error: BaseException, folder: Path) -> Exception:
    """What a user is to be told about: the package that prepares the data wraps what went wrong."""
    while not isinstance(error, (UserError, OSError)) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError):
        free = shutil.disk_usage(folder.parent).free
        return UserError(
            f"The data cannot be prepared in {folder}: {_first_line(error)} ({free / 1e9:,.1f} GB are free).\n"
            "Give another directory with --data.cache_dir."
        )
    return error


def _first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
