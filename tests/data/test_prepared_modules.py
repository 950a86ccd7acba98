"""What LitGPT's finetuning modules hold is prepared once, in files, and is what their SFTDataset gives."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import in_processes
from litgpt.args import TrainArgs
from litgpt.data import FLAN, JSON, LIMA, Alpaca, Alpaca2k, AlpacaGPT4, DataModule, Deita, LongForm, SFTDataset
from litgpt.prompts import Default, PromptStyle
from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader

from litgpt_akl.data import preparation
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import ArrowDataset
from litgpt_akl.messages import UserError

ROWS = [{"instruction": f"count to {n}", "input": "aloud" * (n % 2), "output": "one two " * (n % 5)} for n in range(30)]
TALKS = [[f"count to {n}", "one two", "go on", "three " * (1 + n % 4)] for n in range(30)]
SUBSETS = ("aeslc_10templates", "cb_10templates")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nothing was prepared yet."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path / "datasets" / "litgpt_akl"


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    # a file that is written again is another one
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def write_hub_dataset(folder: Path, **splits: list) -> str:
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    entries = [f"  - split: {name}\n    path: {name}.jsonl\n" for name in splits]
    for name, rows in splits.items():
        write(folder / f"{name}.jsonl", rows)
    (folder / "README.md").write_text(head + "".join(entries) + "---\n")
    return str(folder)


def json_file(folder: Path, **options) -> JSON:
    return JSON(write(folder / "all.json", ROWS), **{"val_split_fraction": 0.2, **options})


def json_lines(folder: Path, **options) -> JSON:
    return JSON(write(folder / "all.jsonl", ROWS), **{"val_split_fraction": 0.2, **options})


def json_folder(folder: Path, **options) -> JSON:
    write(folder / "both" / "val.jsonl", ROWS[20:])
    return JSON(write(folder / "both" / "train.json", ROWS[:20]).parent, **options)


def alpaca(kind: type[Alpaca], folder: Path, **options) -> Alpaca:
    data = kind(download_dir=folder, **{"val_split_fraction": 0.2, **options})
    write(folder / data.file_name, ROWS)
    return data


def alpaca_2k(folder: Path, **options) -> Alpaca2k:
    options = {"val_split_fraction": 0.2, **options}
    return Alpaca2k(download_dir=folder / "2k", repo_id=write_hub_dataset(folder / "hub", train=ROWS), **options)


def lima(folder: Path, **options) -> LIMA:
    repo_id = write_hub_dataset(folder / "hub", train=[{"conversations": talk} for talk in TALKS])
    return LIMA(repo_id=repo_id, access_token="none", **options)


def deita(folder: Path, **options) -> Deita:
    talks = [{"messages": [{"content": text} for text in talk]} for talk in TALKS]
    repo_id = write_hub_dataset(folder / "hub", train_sft=talks[:20], test_sft=talks[20:])
    return Deita(download_dir=folder / "deita", repo_id=repo_id, **options)


def long_form(folder: Path, **options) -> LongForm:
    rows = [{"input": row["instruction"], "output": row["output"]} for row in ROWS]
    write(folder / "val.json", rows[20:])
    return LongForm(download_dir=write(folder / "train.json", rows[:20]).parent, **options)


def flan(folder: Path, **options) -> FLAN:
    rows = [{"inputs": row["instruction"], "targets": row["output"]} for row in ROWS]
    for number, subset in enumerate(SUBSETS):
        write(folder / f"{subset}_train.jsonl", rows[number : number + 20])
        write(folder / f"{subset}_test.jsonl", rows[number + 20 :])
    return FLAN(download_dir=folder, **{"subsets": ",".join(SUBSETS), **options})


@dataclass
class OwnStyle(PromptStyle):
    """A style that needs a field which no probe has."""

    mark: str

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        return f"{prompt} {self.mark} {kwargs['input']}"


COMMON = [{"mask_prompt": True}, {"prompt_style": Default()}, {"seed": 1}]
SPLIT = [{"val_split_fraction": 0.5}]
TURNS = [{"include_multiturn_conversations": True}]
MODULES: dict[str, tuple[Callable[..., DataModule], list[dict]]] = {
    "JSON file": (json_file, [*COMMON, *SPLIT, {"prompt_style": OwnStyle("!")}, {"prompt_style": OwnStyle("?")}]),
    "JSON lines": (json_lines, [*COMMON, *SPLIT]),
    "JSON folder": (json_folder, COMMON),
    "Alpaca": (lambda folder, **options: alpaca(Alpaca, folder, **options), [*COMMON, *SPLIT]),
    "AlpacaGPT4": (lambda folder, **options: alpaca(AlpacaGPT4, folder, **options), COMMON[:1]),
    "Alpaca2k": (alpaca_2k, [*COMMON, *SPLIT]),
    "LIMA": (lima, [*COMMON, {"val_split_fraction": 0.5}, *TURNS]),
    "Deita": (deita, [*COMMON, *TURNS]),
    "LongForm": (long_form, COMMON),
    "FLAN": (flan, [*COMMON, {"subsets": SUBSETS[1]}]),
}


def splits(data: DataModule, tokenizer_dir: Path, max_seq_length: int | None = None):
    train = TrainArgs(lr_warmup_steps=None, max_seq_length=max_seq_length)
    return prepare_datasets(data, Tokenizer(tokenizer_dir), train, 512, tokenizer_dir)


def litgpts_samples(data: DataModule, tokenizer_dir: Path, max_seq_length: int | None) -> list[list[dict]]:
    data.connect(tokenizer=Tokenizer(tokenizer_dir), max_seq_length=max_seq_length)
    data.prepare_data()
    data.setup()
    datasets = (data.train_dataloader().dataset, data.val_dataloader().dataset)
    for dataset in datasets:
        style = dataset.prompt_style
        if style.apply("a", input="b") == style.apply("a", input=""):
            # what LitGPT would leave out stands after the instruction
            dataset.transform = partial(with_input_in_instruction, dataset.transform or dict)
    return [[dataset[number] for number in range(len(dataset))] for dataset in datasets]


def with_input_in_instruction(transform: Callable[[dict], dict], record: dict) -> dict:
    record = transform(dict(record))
    return record | {"instruction": "\n\n".join(filter(None, (record["instruction"], record.get("input"))))}


@pytest.mark.parametrize("name", MODULES)
def test_samples_are_those_of_litgpts_own_dataset(tmp_path, teacher_dir, name):
    make, changes = MODULES[name]
    seen = []
    for changed in ({}, *changes, {"max_seq_length": 40}, {"max_seq_length": 40, "mask_prompt": True}):
        options = {"num_workers": 0, **changed}
        limit = options.pop("max_seq_length", None)
        if limit is not None:
            # else the prompt alone is as long, and no token counts
            options["prompt_style"] = Default()
        expected = litgpts_samples(make(tmp_path / "data", **options), teacher_dir, limit)
        found = splits(make(tmp_path / "data", **options), teacher_dir, limit)
        for samples, dataset in zip(expected, found, strict=True):
            assert isinstance(dataset, ArrowDataset) and len(dataset) == len(samples)
            numbers = np.arange(len(dataset))
            for sample, read in zip(samples, dataset.read(numbers), strict=True):
                assert all(torch.equal(read[name], sample[name]) for name in ("input_ids", "labels"))
            assert dataset.lengths(numbers).tolist() == [len(sample["input_ids"]) for sample in samples]
            prompts = [int((sample["labels"] == -100).sum()) for sample in samples]
            assert dataset.prompt_lengths(numbers).tolist() == prompts
            assert [len(dataset.prompt(number)) for number in numbers if prompts[number]] == list(filter(None, prompts))
            counted = [int((sample["labels"][1:] != -100).sum()) for sample in dataset.read(numbers)]
            assert dataset.response_tokens(numbers).tolist() == counted
            assert dataset.all_response_tokens == sum(counted) and dataset.tokens == dataset.lengths(numbers).sum()
        seen.append([[sample["input_ids"].tolist() for sample in samples] for samples in expected])
    assert not all(ids == seen[0] for ids in seen)


@pytest.mark.parametrize("name", MODULES)
def test_they_are_prepared_once(tmp_path, teacher_dir, name, monkeypatch):
    make, _ = MODULES[name]
    first = splits(make(tmp_path / "data"), teacher_dir)
    # the other processes of a run, and later runs, have nothing to tokenise
    monkeypatch.setattr(SFTDataset, "__getitem__", None)
    data = make(tmp_path / "data")
    again = splits(data, teacher_dir)
    assert [dataset.fingerprint for dataset in again] == [dataset.fingerprint for dataset in first]
    assert not any(isinstance(value, SFTDataset) for value in vars(data).values()), "its records stay in memory"


@pytest.mark.parametrize("name", ["JSON file", "Alpaca"])
def test_of_two_processes_one_prepares_what_both_open(tmp_path, teacher_dir, name, monkeypatch):
    data = MODULES[name][0](tmp_path / "data")
    fetch, together = preparation.fetch, multiprocessing.Barrier(2)

    def slow_fetch(*args):
        (tmp_path / f"fetched {os.getpid()} {time.monotonic_ns()}").touch()
        time.sleep(1)
        return fetch(*args)

    def work():
        together.wait()
        found = splits(data, teacher_dir)
        read = [sample["input_ids"].tolist() for dataset in found for sample in dataset.read(range(len(dataset)))]
        (tmp_path / f"read {os.getpid()}").write_text(json.dumps([[dataset.fingerprint for dataset in found], read]))

    monkeypatch.setattr(preparation, "fetch", slow_fetch)
    in_processes(2, work)
    # a file, or a split of a module
    assert len(list(tmp_path.glob("fetched *"))) == (1 if name == "JSON file" else 2)
    one, other = (json.loads(path.read_text()) for path in tmp_path.glob("read *"))
    assert one == other and len(one[1]) == len(ROWS)


def test_they_are_prepared_again_when_something_differs(tmp_path, teacher_dir, cache_dir):
    def folders() -> int:
        return sum(entry.is_dir() for entry in cache_dir.iterdir())

    splits(json_lines(tmp_path), teacher_dir)
    for number, options in enumerate(({"mask_prompt": True}, {"prompt_style": Default()}), start=2):
        splits(json_lines(tmp_path, **options), teacher_dir)
        assert folders() == number
    splits(json_lines(tmp_path, prompt_style=Default()), teacher_dir, max_seq_length=40)
    assert folders() == 4
    # which are held out needs no new preparation
    for options in ({}, {"seed": 1}, {"val_split_fraction": 0.5}):
        splits(json_lines(tmp_path, **options), teacher_dir)
        assert folders() == 4
    path = tmp_path / "all.jsonl"
    path.write_text(path.read_text().replace("two", "tow"))
    splits(JSON(path, val_split_fraction=0.2), teacher_dir)
    assert folders() == 5
    for mark in "!?":
        splits(JSON(path, val_split_fraction=0.2, prompt_style=OwnStyle(mark)), teacher_dir)
    assert folders() == 7


class OwnDataset(SFTDataset):
    """What it makes of a record is its own affair."""


class OwnModule(Alpaca):
    """A module whose dataset is of a class of its own."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._own(self.train_dataset))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._own(self.test_dataset))

    def _own(self, dataset: SFTDataset) -> OwnDataset:
        return OwnDataset(dataset.data, self.tokenizer, Default(), mask_prompt=True)


def test_a_dataset_of_another_class_is_read_one_by_one(tmp_path, teacher_dir, cache_dir, capsys):
    data = alpaca(OwnModule, tmp_path)
    train, validation = splits(data, teacher_dir)
    assert not isinstance(train, ArrowDataset) and not cache_dir.exists()
    expected = OwnDataset(list(data.test_dataset.data), Tokenizer(teacher_dir), Default(), mask_prompt=True)
    for number, sample in enumerate(validation.read(range(len(validation)))):
        assert all(torch.equal(sample[name], expected[number][name]) for name in ("input_ids", "labels"))
    assert "tokenising training samples of OwnModule:   0%" in capsys.readouterr().err


def test_progress_is_shown_at_once_and_several_processes_prepare(tmp_path, teacher_dir, capsys, monkeypatch):
    rows = [row | {"output": "one two three " * 40} for row in ROWS] * 80
    used = []
    fetch = preparation.fetch
    monkeypatch.setattr(preparation, "fetch", lambda *args: used.append(args[2]) or fetch(*args))
    monkeypatch.setattr("litgpt_akl.data.litgpt_modules.available_cores", lambda: 2)
    train, _ = splits(JSON(write(tmp_path / "all.json", rows), val_split_fraction=0.1), teacher_dir)
    assert len(train) == 2160 and used == [2]
    assert "preparing data:   0%" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_told(tmp_path, teacher_dir, monkeypatch):
    data = json_file(tmp_path)
    # a file stands where a folder would have to be
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(data.json_path))
    with pytest.raises(UserError, match="Set the environment variable HF_DATASETS_CACHE to another directory"):
        splits(data, teacher_dir)
    # as that variable does
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "other" / "folder"))
    assert len(splits(data, teacher_dir)[0]) == 24


def test_a_record_that_a_prompt_style_cannot_read_is_named(tmp_path, teacher_dir):
    data = JSON(write(tmp_path / "all.jsonl", [{"instruction": "a", "output": "b"}] * 9), val_split_fraction=0.2)
    data.prompt_style = OwnStyle("!")
    with pytest.raises(UserError, match=r"all.jsonl, line 1 \(record 0\) has no field 'input'"):
        splits(data, teacher_dir)
