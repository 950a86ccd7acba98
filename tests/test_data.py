"""Store, plan and windows."""

import json

import numpy as np
import pytest
import torch
from litgpt.args import TrainArgs
from litgpt.data import JSON, Alpaca, TextFiles
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from runs import alice

from litgpt_akl.data import plan_epoch, prepare_stores, window, windows_from
from litgpt_akl.errors import UserError


def stores(data, tokenizer_dir, context_length=128, **train):
    return prepare_stores(
        data, Tokenizer(tokenizer_dir), TrainArgs(**{"lr_warmup_steps": None, **train}), context_length
    )


def write(path, records) -> JSON:
    text = json.dumps(records, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, records))
    path.write_text(text)
    return JSON(json_path=path, mask_prompt=True, val_split_fraction=0.25, prompt_style=Default(), num_workers=0)


def records(count, **fields):
    return [{"instruction": f"count to {n}", "output": "one two three " * n, **fields} for n in range(1, count + 1)]


@pytest.fixture(scope="module")
def alice_stores(alice_json, teacher_dir):
    return stores(alice(alice_json), teacher_dir)


def test_the_store_holds_what_litgpts_dataset_gives(alice_json, teacher_dir, alice_stores):
    data = alice(alice_json)
    data.connect(tokenizer=Tokenizer(teacher_dir))
    data.setup()
    for store, dataset in zip(alice_stores, (data.train_dataset, data.test_dataset), strict=True):
        assert len(store) == len(dataset)
        for number in range(len(store)):
            for name in ("input_ids", "labels"):
                assert torch.equal(store[number][name], dataset[number][name])
            assert store.lengths[number] == len(dataset[number]["input_ids"])


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 64])
def test_every_sample_once_per_epoch(samples):
    for epoch in range(3):
        plan = plan_epoch(5, epoch, samples, 8)
        assert sorted(np.concatenate(plan)) == list(range(samples))
        assert [len(step) for step in plan[:-1]] == [8] * (len(plan) - 1)
        assert all(np.array_equal(a, b) for a, b in zip(plan, plan_epoch(5, epoch, samples, 8), strict=True))
    if samples > 8:
        assert not np.array_equal(plan_epoch(5, 0, samples, 8)[0], plan_epoch(5, 1, samples, 8)[0])
        assert not np.array_equal(plan_epoch(5, 0, samples, 8)[0], plan_epoch(6, 0, samples, 8)[0])


def test_a_window_pairs_each_response_token_with_the_position_before_it(alice_stores):
    store, numbers = alice_stores[0], [11, 3, 8, 20, 5]
    micro_batches, tokens = window(store, numbers, 2)
    assert [len(batch.input_ids) for batch in micro_batches] == [2, 2, 1]
    longest = [batch.input_ids.size(1) for batch in micro_batches]
    assert longest == sorted(longest), "samples of like length share a micro-batch"
    found = []
    for batch in micro_batches:
        flat = batch.input_ids.flatten()
        assert torch.equal(flat[batch.positions + 1], batch.labels)
        found += batch.labels.tolist()
    # the first response token counts, and so does the last; nothing after it does
    expected = [label for number in numbers for label in store[number]["labels"][1:].tolist() if label != -100]
    assert sorted(found) == sorted(expected) and len(expected) == tokens
    assert sum(batch.tokens for batch in micro_batches) == store.lengths[numbers].sum()


def test_windows_go_on_from_any_position(alice_stores):
    options = dict(seed=3, global_batch_size=60, micro_batch_size=60)
    from_start = windows_from(alice_stores[0], epoch=0, step=0, **options)
    seen = [next(from_start) for _ in range(9)]
    assert [(epoch, step) for epoch, step, *_ in seen] == [(e, s) for e in (0, 1, 2) for s in range(4)][:9]
    again = windows_from(alice_stores[0], epoch=1, step=2, **options)
    for epoch, step, batches, tokens in seen[6:]:
        other = next(again)
        assert (epoch, step, tokens) == (other[0], other[1], other[3])
        assert torch.equal(batches[0].input_ids, other[2][0].input_ids)


def test_truncation_and_context(tmp_path, teacher_dir):
    data = write(tmp_path / "data.json", records(12))
    train, _ = stores(data, teacher_dir, max_seq_length=20)
    assert train.lengths.max() == 20
    with pytest.raises(UserError, match=r"has \d+ tokens; the pair reads 30.*\n.*--train.max_seq_length 30"):
        stores(data, teacher_dir, context_length=30)


@pytest.mark.parametrize(("name", "line"), [("data.json", 14), ("data.jsonl", 4)])
def test_a_record_without_its_fields_is_named(tmp_path, teacher_dir, name, line):
    rows = records(8)
    del rows[3]["output"]
    with pytest.raises(UserError, match=rf"{name}, line {line} \(record 3\) has no field 'output'"):
        stores(write(tmp_path / name, rows), teacher_dir)
    rows[3]["output"] = None
    with pytest.raises(UserError, match=rf"{name}, line {line} \(record 3\) cannot be read"):
        stores(write(tmp_path / name, rows), teacher_dir)
    rows[3] = "text"
    with pytest.raises(UserError, match=rf"{name}, line {line} \(record 3\) cannot be read"):
        stores(write(tmp_path / name, rows), teacher_dir)


def test_a_response_that_truncation_removes_is_named(tmp_path, teacher_dir):
    rows = records(8)
    rows[5]["instruction"] = "say it " * 40
    data = write(tmp_path / "data.json", rows)
    message = r"line 22 \(record 5\) has no token to learn from: --train.max_seq_length 30 cuts its response off"
    with pytest.raises(UserError, match=message):
        stores(data, teacher_dir, max_seq_length=30)


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
        stores(JSON(json_path=tmp_path / name, val_split_fraction=0.1, num_workers=0), teacher_dir)


def test_other_modules(tmp_path, teacher_dir):
    (tmp_path / "alpaca_data_cleaned_archive.json").write_text(json.dumps(records(20, input="")))
    data = Alpaca(download_dir=tmp_path, mask_prompt=True, val_split_fraction=0.2, num_workers=0)
    train, validation = stores(data, teacher_dir, context_length=300)
    assert (len(train), len(validation)) == (16, 4)
    del data, train
    rows = records(20)
    del rows[7]["instruction"]
    (tmp_path / "alpaca_data_cleaned_archive.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"Alpaca: record \d+ has no field 'instruction'"):
        stores(Alpaca(download_dir=tmp_path, num_workers=0), teacher_dir, context_length=300)


def test_a_module_for_pretraining_is_refused(tmp_path, teacher_dir):
    data = TextFiles(train_data_path=tmp_path)
    with pytest.raises(UserError, match="TextFiles is made for pretraining"):
        stores(data, teacher_dir)
