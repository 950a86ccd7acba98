"""Samples of LitGPT's own data modules for finetuning: the ids and labels of its ``SFTDataset``, prepared once.

They are prepared as those of ``StreamingSFT`` are: by several processes, in files that are found again. The records of
``JSON`` are read one after another; other modules hold theirs in memory until they are prepared.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import xxhash
from litgpt.data import JSON, DataModule, SFTDataset
from torch.utils.data import Dataset, random_split

from litgpt_akl.data.accounting import tell_what_is_left_out
from litgpt_akl.data.dataset import ArrowDataset, InMemoryDataset, TokenizedDataset
from litgpt_akl.data.encoding import Encoded, StyledInstruction
from litgpt_akl.data.formats import Instruction
from litgpt_akl.data.preparation import FileRecords, RowsOf, Settings, prepare
from litgpt_akl.data.records import Record, place
from litgpt_akl.data.workers import available_cores
from litgpt_akl.files.directories import default_cache_dir
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.messages import UserError, progress_bar

SMALL = {"B": 2**20, " records": 2000}
"""What one process has prepared before others would have started."""


@dataclass(frozen=True, eq=False)
class SFTSettings(Settings):
    """All that decides what an ``SFTDataset`` makes of a record."""

    mask_prompt: bool = True

    other_cache: ClassVar[str] = "Set the environment variable HF_DATASETS_CACHE to another directory."
    fewer_processes: ClassVar[str] = "Free some memory, or allow fewer than {} cores."
    refusal: ClassVar[str] = "{place} {error}"

    @property
    def rules(self) -> list:
        return [*super().rules, "SFTDataset", version("litgpt"), version("tokenizers"), self.mask_prompt]

    def encoder(self) -> "SFTEncoder":
        return SFTEncoder(self)


class SFTEncoder:
    """Makes token ids of records as ``SFTDataset`` does."""

    def __init__(self, settings: SFTSettings) -> None:
        self._settings = settings
        limit = settings.max_seq_length or -1
        self._dataset = SFTDataset([], settings.tokenizer, settings.prompt_style, limit, True, IGNORE_INDEX)
        self._styled = StyledInstruction(settings.prompt_style)

    def encode(self, record: dict) -> Encoded:
        """Its ids, and where its response begins and ends, unless that is cut off and the prompt counts too.

        Raises ValueError, of two lines, if the record lacks a field, cannot be read or is too long, or no token counts.
        """
        if isinstance(record, dict) and "messages" in record and not {"instruction", "output"} & record.keys():
            raise ValueError("is a chat, which this data module does not read.\nUse --data StreamingSFT for chats.")
        try:
            fields, notes = self._fit(record)
            self._dataset.data = [fields]
            sample = self._dataset[0]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(_describe_bad_record(error)) from error
        length = len(sample["input_ids"])
        begin = int((sample["labels"] == IGNORE_INDEX).sum())
        learns = length > max(begin if self._settings.mask_prompt else 0, 1)
        if flaw := _flaw(length, learns, self._settings):
            raise ValueError(flaw)
        return Encoded(sample["input_ids"].tolist(), [begin, length] if begin < length else [], notes=notes)

    def _fit(self, record: dict) -> tuple[dict, tuple[str, ...]]:
        try:
            return self._styled.fit(Instruction(record))
        except ValueError as error:
            raise ValueError(f"{error}.\nRemove the field, or choose another --data.prompt_style.") from error


def _describe_bad_record(error: Exception) -> str:
    missing = f"has no field {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
    return f"{missing}.\nA record needs 'instruction' and 'output', both text, and may have 'input'."


def _flaw(length: int, learns: bool, settings: SFTSettings) -> str | None:
    """Why a sample of ``length`` tokens cannot be used, in two lines, if it cannot: it ``learns`` if a token counts."""
    limit, cut_by = settings.max_seq_length, settings.cut_by
    if length > settings.context_length:
        told = f"has {length:,} tokens; the pair reads {settings.context_length:,}."
        return f"{told}\nSet {cut_by} {settings.context_length} to cut such samples."
    if learns:
        return None
    if limit is not None and length >= limit:
        told = f"has no token to learn from: {cut_by} {limit} cuts its response off."
        return f"{told}\nRaise {cut_by}, or drop the record."
    return "has no token to learn from: it has no response.\nDrop the record or give it a response."


class JSONRecords(FileRecords):
    """The records of one file of LitGPT's ``JSON`` module, all of which must be good."""

    @property
    def name(self) -> str:
        return self.files[0]

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        (file,) = self.files
        for row, (number, record) in enumerate(super().__iter__()):
            if record.error == "the file is empty":
                raise UserError(f"{file} is empty. It needs records with 'instruction' and 'output'.")
            # "is not valid JSON: ..." is of the file, "is a text, not an object" is of one record
            if record.error is not None and record.error.startswith("is not"):
                raise UserError(f"{place(file, record.line)} {record.error}.")
            if record.error is not None:
                raise UserError(f"{self.place(0, record.line, row)} cannot be read: it {record.error}.")
            yield number, record

    def place(self, file: int, line: int, row: int) -> str:
        return f"{super().place(file, line, row)} (record {row})"


class ModuleRecords:
    """Records that a data module holds in memory."""

    unit = " records"

    def __init__(self, module: str, records: Sequence[dict], transform: Callable[[dict], dict] | None) -> None:
        self.name, self._records, self._transform = module, records, transform
        self.sizes = [len(records)]
        digest = xxhash.xxh3_128()
        for number, record in self:
            try:
                digest.update(json.dumps(record.value, default=repr).encode(errors="backslashreplace"))
            except (RecursionError, ValueError):
                # nested too deeply or in itself: whatever it holds, it is refused
                digest.update(f"nested {number}".encode())
        self.identity = digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        for number in range(len(self._records)):
            value = self._records[number]
            if self._transform is not None:
                # LitGPT's own ones take fields out of what they are given
                value = self._transform(dict(value))
            yield 0, Record(number, value, None, bytes_read=number + 1)

    def check_unchanged(self) -> None:
        """Nobody else has what lies in this process's memory."""

    def place(self, file: int, line: int, row: int) -> str:
        return f"{self.name}: record {row}"


def open_module(
    data: DataModule, settings: SFTSettings, rows_of: RowsOf = prepare
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """The training and validation samples of a connected data module; ``rows_of`` makes rows of the records of JSON.

    Raises UserError for unreadable data, a record without its fields, a response cut off entirely, a sample that is too
    long, or no training samples, with file and line where there is one.
    """
    if type(data) is JSON:
        splits = _open_json(data, replace(settings, mask_prompt=data.mask_prompt), rows_of)
    else:
        splits = [_open(data, split, dataset, settings) for split, dataset in _load(data).items()]
        if all(isinstance(dataset, ArrowDataset) for dataset in splits):
            # let go of records that were prepared, which a module holds as Python objects
            for name in [name for name, value in vars(data).items() if type(value) is SFTDataset]:
                setattr(data, name, None)
    if len(splits[0]) == 0:
        raise UserError(f"{type(data).__name__} has no training samples. Check its path and its split fraction.")
    return splits[0], splits[1]


def _open_json(data: JSON, settings: SFTSettings, rows_of: RowsOf) -> list[ArrowDataset]:
    if data.json_path.is_dir():
        files = [data.find_split(split) for split in ("train", "val")]
        if None in files:
            raise UserError(
                f"--data.json_path {data.json_path} lacks train.json or val.json (or .jsonl).\n"
                "Add them, or give one file."
            )
        return [_prepared(_json_records(file), settings, rows_of=rows_of)[0] for file in files]
    shares = [1.0 - data.val_split_fraction, data.val_split_fraction]

    def split(samples: int) -> list[np.ndarray]:
        try:
            parts = random_split(range(samples), shares, generator=torch.Generator().manual_seed(data.seed))
        except ValueError as error:
            raise UserError(f"JSON cannot split its data by --data.val_split_fraction {shares[1]}: {error}") from error
        return [np.array(part.indices, dtype=np.int64) for part in parts]

    return _prepared(_json_records(data.json_path), settings, split, rows_of)


def _json_records(file: Path) -> JSONRecords:
    if file.suffix not in (".json", ".jsonl"):
        raise UserError(
            f"--data.json_path {file} cannot be read: Unsupported file format: {file.suffix}. Expected .json or .jsonl."
        )
    return JSONRecords([str(file.absolute())])


def _open(data: DataModule, split: str, dataset: Dataset, settings: SFTSettings) -> TokenizedDataset:
    if type(dataset) is not SFTDataset or dataset.tokenizer is not settings.tokenizer:
        return _tokenise(dataset, split, data, settings)
    own = {"prompt_style": dataset.prompt_style, "mask_prompt": dataset.mask_prompt}
    settings = replace(settings, max_seq_length=max(0, dataset.max_seq_length) or None, **own)
    return _prepared(ModuleRecords(type(data).__name__, dataset.data, dataset.transform), settings)[0]


def _prepared(
    records: JSONRecords | ModuleRecords,
    settings: SFTSettings,
    split: Callable[[int], list[np.ndarray | None]] = lambda samples: [None],
    rows_of: RowsOf = prepare,
) -> list[ArrowDataset]:
    """A dataset of each part of the records, whose numbers ``split`` tells, or None for all."""
    num_proc = available_cores() if sum(records.sizes) > SMALL[records.unit] else 0
    rows = rows_of(records, settings, default_cache_dir(), num_proc)
    tell_what_is_left_out(rows, records.name, records.place, settings.cut_by, may_be_bad=False)
    common = {"mask_prompt": settings.mask_prompt, "settings": settings.fingerprint, "place": records.place}
    return [ArrowDataset(rows, numbers=numbers, **common) for numbers in split(len(rows))]


def _load(data: DataModule) -> dict[str, Dataset]:
    try:
        data.prepare_data()
        data.setup()
        loaders = {"training": data.train_dataloader(), "validation": data.val_dataloader()}
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{type(data).__name__} cannot load its data: {error}") from error
    datasets = {split: getattr(loader, "dataset", None) for split, loader in loaders.items()}
    if not all(hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") for dataset in datasets.values()):
        raise UserError(
            f"--data {type(data).__name__} has samples that cannot be read by number, which shuffling here needs.\n"
            "Give it a dataset with __len__ and __getitem__."
        )
    return datasets


def _tokenise(dataset: Dataset, split: str, data: DataModule, settings: SFTSettings) -> InMemoryDataset:
    """The samples of a dataset of another class, one by one: nobody knows when they would change."""
    input_ids, labels, ends, end = [], [], [], 0
    name = type(data).__name__
    for number in progress_bar(range(len(dataset)), desc=f"tokenising {split} samples of {name}", leave=False):
        try:
            sample = dataset[number]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name}: record {number} {_describe_bad_record(error)}") from error
        learns = bool((sample["labels"][1:] != IGNORE_INDEX).any())
        if flaw := _flaw(len(sample["input_ids"]), learns, settings):
            raise UserError(f"{name}: record {number} {flaw}")
        end += len(sample["input_ids"])
        input_ids.append(sample["input_ids"].numpy().astype(np.int32))
        labels.append(sample["labels"].numpy().astype(np.int32))
        ends.append(end)
    none = [np.empty(0, dtype=np.int32)]
    arrays = np.concatenate(input_ids or none), np.concatenate(labels or none), np.array(ends, dtype=np.int64)
    return InMemoryDataset(*arrays, place=lambda number: f"{name}: record {number}")
