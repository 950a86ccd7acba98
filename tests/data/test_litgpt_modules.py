"""LitGPT's own data modules as stores."""

import json

import numpy as np
import pytest
import torch
from helpers.runs import alice
from litgpt.args import TrainArgs
from litgpt.data import JSON, Alpaca, TextFiles
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer

from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.messages import UserError


def splits(data, tokenizer_dir, context_length=128, **train):
    train = TrainArgs(**{"lr_warmup_steps": None, **train})
    return prepare_datasets(data, Tokenizer(tokenizer_dir), train, context_length, tokenizer_dir)


def write(path, records) -> JSON:
    text = json.dumps(records, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, records))
    path.write_text(text)
    return JSON(json_path=path, mask_prompt=True, val_split_fraction=0.25, prompt_style=Default(), num_workers=0)


def records(count, **fields):
    return [{"instruction": f"count to {n}", "output": "one two three " * n, **fields} for n in range(1, count + 1)]


@pytest.fixture(scope="module")
def alice_stores(alice_json, teacher_dir):
    return splits(alice(alice_json), teacher_dir)


def test_the_store_holds_what_litgpts_dataset_gives(alice_json, teacher_dir, alice_stores):
    data = alice(alice_json)
    data.connect(tokenizer=Tokenizer(teacher_dir))
    data.setup()
    for dataset, module_dataset in zip(alice_stores, (data.train_dataset, data.test_dataset), strict=True):
        assert len(dataset) == len(module_dataset)
        numbers = np.arange(len(dataset))
        samples = [module_dataset[number] for number in range(len(module_dataset))]
        for sample, read in zip(samples, dataset.read(numbers), strict=True):
            assert all(torch.equal(read[name], sample[name]) for name in ("input_ids", "labels"))
        assert dataset.lengths(numbers).tolist() == [len(sample["input_ids"]) for sample in samples]
        assert dataset.tokens == dataset.lengths(numbers).sum() and dataset.longest == dataset.lengths(numbers).max()
        counted = [int((sample["labels"][1:] != -100).sum()) for sample in samples]
        assert dataset.response_tokens(numbers).tolist() == counted
        assert dataset.fingerprint == splits(alice(alice_json), teacher_dir)[dataset is alice_stores[1]].fingerprint
    assert alice_stores[0].fingerprint != alice_stores[1].fingerprint
    assert alice_stores[0].place(3).endswith("train.json, line 17 (record 3)")


def test_truncation_and_context(tmp_path, teacher_dir):
    data = write(tmp_path / "data.json", records(12))
    train, _ = splits(data, teacher_dir, max_seq_length=20)
    assert train.lengths(np.arange(len(train))).max() == 20
    with pytest.raises(UserError, match=r"has \d+ tokens; the pair reads 30.*\n.*--train.max_seq_length 30"):
        splits(data, teacher_dir, context_length=30)


@pytest.mark.parametrize(("name", "line"), [("data.json", 14), ("data.jsonl", 4)])
def test_a_record_without_its_fields_is_named(tmp_path, teacher_dir, name, line):
    rows = records(8)
    del rows[3]["output"]
    with pytest.raises(UserError, match=rf"{name}, line {line} \(record 3\) has no field 'output'"):
        splits(write(tmp_path / name, rows), teacher_dir)
    rows[3]["output"] = None
    with pytest.raises(UserError, match=rf"{name}, line {line} \(record 3\) cannot be read"):
        splits(write(tmp_path / name, rows), teacher_dir)
    rows[3] = "text"
    with pytest.raises(UserError, match=rf"{name}, line {line} \(record 3\) cannot be read"):
        splits(write(tmp_path / name, rows), teacher_dir)


def test_a_chat_is_sent_to_the_module_that_reads_chats(tmp_path, teacher_dir):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Alice."}]
    with pytest.raises(UserError, match="is a chat, which this data module does not read.\nUse --data StreamingSFT"):
        splits(write(tmp_path / "data.json", [{"messages": chat}] * 8), teacher_dir)


def test_a_response_that_truncation_removes_is_named(tmp_path, teacher_dir):
    rows = records(8)
    rows[5]["instruction"] = "say it " * 40
    data = write(tmp_path / "data.json", rows)
    message = r"line 22 \(record 5\) has no token to learn from: --train.max_seq_length 30 cuts its response off"
    with pytest.raises(UserError, match=message):
        splits(data, teacher_dir, max_seq_length=30)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.json", "", "data.json is empty"),
        (
            "data.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": "a" "output"}\n',
            "data.jsonl, line 2 is not",
        ),
        (
            "data.json",
            '[\n{"instruction": "a", "output": "b"},\n{"instruction": }\n]',
            "data.json, line 3 is not valid JSON",
        ),
        ("data.json", "[]", "has no training samples"),
        ("data.txt", "[]", "Unsupported file format"),
    ],
)
def test_unreadable_data_is_named(tmp_path, teacher_dir, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        splits(JSON(json_path=tmp_path / name, val_split_fraction=0.1, num_workers=0), teacher_dir)


def test_other_modules(tmp_path, teacher_dir):
    (tmp_path / "alpaca_data_cleaned_archive.json").write_text(json.dumps(records(20, input="")))
    data = Alpaca(download_dir=tmp_path, mask_prompt=True, val_split_fraction=0.2, num_workers=0)
    train, validation = splits(data, teacher_dir, context_length=300)
    assert (len(train), len(validation)) == (16, 4)
    del data, train
    rows = records(20)
    del rows[7]["instruction"]
    (tmp_path / "alpaca_data_cleaned_archive.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"Alpaca: record \d+ has no field 'instruction'"):
        splits(Alpaca(download_dir=tmp_path, num_workers=0), teacher_dir, context_length=300)


def test_a_module_for_pretraining_is_refused(tmp_path, teacher_dir):
    data = TextFiles(train_data_path=tmp_path)
    with pytest.raises(UserError, match="TextFiles is made for pretraining"):
        splits(data, teacher_dir)
