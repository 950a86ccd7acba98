"""Samples of LitGPT's own data modules for finetuning, tokenised into memory."""

import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from litgpt.data import DataModule
from torch.utils.data import DataLoader, Dataset, Subset

from litgpt_akl.data.stores import MemoryStore
from litgpt_akl.errors import UserError
from litgpt_akl.head_loss import IGNORE_INDEX
from litgpt_akl.progress import progress_bar


def tokenise(
    data: DataModule, max_seq_length: int | None, context_length: int, cut_by: str
) -> tuple[MemoryStore, MemoryStore]:
    """The training and validation samples of a connected data module.

    ``cut_by`` is the command's option for ``max_seq_length``, for messages.

    Raises:
        UserError: unreadable data, a record without its fields, a response cut off entirely, a sample that is too long,
            no training samples. The message names file and line where there is one.
    """
    try:
        data.prepare_data()
        data.setup()
        if getattr(data, "train_dataset", None) is not None and len(data.train_dataset) == 0:
            raise UserError(f"{type(data).__name__} has no training samples. Check its path and its split fraction.")
        loaders = data.train_dataloader(), data.val_dataloader()
    except json.JSONDecodeError as error:
        raise UserError(_describe_bad_json(data, error)) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{type(data).__name__} cannot load its data: {error}") from error
    stores = []
    for split, loader in zip(("training", "validation"), loaders, strict=True):
        dataset = _map_style_dataset(loader, data)
        stores.append(_tokenise(dataset, split, data, max_seq_length, context_length, cut_by))
    return stores[0], stores[1]


def _map_style_dataset(loader: DataLoader, data: DataModule) -> Dataset:
    dataset = getattr(loader, "dataset", None)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"--data {type(data).__name__} has samples that cannot be read by number, which shuffling here needs.\n"
            "Give it a dataset with __len__ and __getitem__."
        )
    return dataset


def _tokenise(
    dataset: Dataset, split: str, data: DataModule, max_seq_length: int | None, context_length: int, cut_by: str
) -> MemoryStore:
    input_ids, labels, ends, end = [], [], [], 0
    for number in progress_bar(range(len(dataset)), desc=f"tokenising {split} samples", leave=False, delay=1):
        try:
            sample = dataset[number]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(_describe_bad_record(dataset, number, data, error)) from error
        _check_sample(sample, number, dataset, data, max_seq_length, context_length, cut_by)
        end += len(sample["input_ids"])
        input_ids.append(sample["input_ids"].numpy().astype(np.int32))
        labels.append(sample["labels"].numpy().astype(np.int32))
        ends.append(end)
    none = [np.empty(0, dtype=np.int32)]
    arrays = np.concatenate(input_ids or none), np.concatenate(labels or none), np.array(ends, dtype=np.int64)
    return MemoryStore(*arrays, place=partial(_place, dataset, data=data))


def _check_sample(
    sample: dict,
    number: int,
    dataset: Dataset,
    data: DataModule,
    max_seq_length: int | None,
    context_length: int,
    cut_by: str,
) -> None:
    length = len(sample["input_ids"])
    if length > context_length:
        raise UserError(
            f"{_place(dataset, number, data)} has {length} tokens; the pair reads {context_length}.\n"
            f"Set {cut_by} {context_length} to cut such samples."
        )
    if bool((sample["labels"][1:] == IGNORE_INDEX).all()):
        cut = max_seq_length is not None and length >= max_seq_length
        reason = f"{cut_by} {max_seq_length} cuts its response off" if cut else "it has no response"
        raise UserError(
            f"{_place(dataset, number, data)} has no token to learn from: {reason}.\n"
            + (f"Raise {cut_by}, or drop the record." if cut else "Drop the record or give it a response.")
        )


def _place(dataset: Dataset, number: int, data: DataModule) -> str:
    """Where a sample comes from: file and line for the JSON module, else the module and the record's number."""
    records = getattr(dataset, "data", None)
    if isinstance(records, Subset):
        number = records.indices[number]
    path = getattr(data, "json_path", None)
    if path is not None and path.is_dir():
        split = "train" if dataset is getattr(data, "train_dataset", None) else "val"
        path = data.find_split(split)
    if path is None:
        return f"{type(data).__name__}: record {number}"
    line = number + 1 if path.suffix == ".jsonl" else _lines_of_records(path, path.stat().st_mtime_ns)[number]
    return f"{path}, line {line} (record {number})"


@lru_cache(maxsize=2)
def _lines_of_records(path: Path, changed: int) -> list[int]:
    """The line on which each record of a JSON list begins; found once, since all of a step's may be asked for."""
    text, decoder, lines, line, before = path.read_text(encoding="utf-8"), json.JSONDecoder(), [], 1, 0
    position = text.index("[") + 1
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return lines
        line, before = line + text.count("\n", before, position), position
        lines.append(line)
        _, position = decoder.raw_decode(text, position)


def _describe_bad_record(dataset: Dataset, number: int, data: DataModule, error: Exception) -> str:
    missing = f"has no field {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
    return (
        f"{_place(dataset, number, data)} {missing}.\n"
        "A record needs 'instruction' and 'output', both text, and may have 'input'."
    )


def _describe_bad_json(data: DataModule, error: json.JSONDecodeError) -> str:
    path = getattr(data, "json_path", None)
    if path is None:
        return f"{type(data).__name__}: not valid JSON: {error}"
    files = [path] if path.is_file() else [data.find_split("train"), data.find_split("val")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        if text.strip() == "":
            return f"{file} is empty. It needs records with 'instruction' and 'output'."
        # a line of a .jsonl file is a text of its own, whose error says line 1
        for number, part in enumerate(text.splitlines() if file.suffix == ".jsonl" else [text], start=1):
            try:
                json.loads(part)
            except json.JSONDecodeError as found:
                line = number if file.suffix == ".jsonl" else found.lineno
                return f"{file}, line {line} is not valid JSON: {found.msg} at column {found.colno}."
    return f"{path} is not valid JSON: {error}"
