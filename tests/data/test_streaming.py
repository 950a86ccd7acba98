"""StreamingSFT: files of records become stores, once, and every fault has its place."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers.commands import Command, fork
from litgpt.args import TrainArgs
from litgpt.data import JSON
from litgpt.prompts import ChatML, Default
from litgpt.tokenizer import Tokenizer

from litgpt_akl.cli.main import without_traceback
from litgpt_akl.data import StreamingSFT
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.files.manifest import MANIFEST
from litgpt_akl.messages import UserError


def records(count: int, first: int = 0) -> list[dict]:
    return [
        {"instruction": f"count to {n}", "input": "aloud" * (n % 2), "output": "one two three " * (n % 7 + 1)}
        for n in range(first, first + count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def splits(path, tokenizer_dir, cache_dir, *, max_seq_length=None, context_length=512, **options):
    options = {"mask_prompt": True, "prompt_style": Default(), "num_proc": 1, **options}
    data = StreamingSFT(str(path), cache_dir=cache_dir, **options)
    train = TrainArgs(lr_warmup_steps=None, max_seq_length=max_seq_length)
    return prepare_datasets(data, Tokenizer(tokenizer_dir), train, context_length, tokenizer_dir)


def samples(dataset) -> list[dict[str, list[int]]]:
    return [{name: ids.tolist() for name, ids in sample.items()} for sample in dataset.read(np.arange(len(dataset)))]


def prepared_files(cache_dir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*-train*.arrow")}


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("max_seq_length", [None, 40])
def test_the_samples_are_those_of_litgpts_json_module(tmp_path, teacher_dir, mask_prompt, max_seq_length):
    rows = records(60)
    (tmp_path / "all.json").write_text(json.dumps(rows))
    write(tmp_path / "all.jsonl", rows)
    options = {"mask_prompt": mask_prompt, "prompt_style": "alpaca" if max_seq_length is None else Default()}
    data = JSON(tmp_path / "all.json", val_split_fraction=0.0, num_workers=0, **options)
    train = TrainArgs(lr_warmup_steps=None, max_seq_length=max_seq_length)
    expected = prepare_datasets(data, Tokenizer(teacher_dir), train, 512, teacher_dir)[0]
    expected = sorted(samples(expected), key=str)
    for name, num_proc in (("all.json", 1), ("all.jsonl", 1), ("all.json*", 2)):
        cache_dir = tmp_path / f"cache-{num_proc}"
        options |= {"max_seq_length": max_seq_length, "val_split_fraction": 0.0, "num_proc": num_proc}
        dataset, validation = splits(tmp_path / name, teacher_dir, cache_dir, **options)
        assert len(validation) == 0
        assert sorted(samples(dataset), key=str) == (expected if name != "all.json*" else sorted(expected * 2, key=str))
        numbers = np.arange(len(dataset))
        read = dataset.read(numbers)
        assert dataset.lengths(numbers).tolist() == [len(sample["input_ids"]) for sample in read]
        assert dataset.tokens == dataset.lengths(numbers).sum() and dataset.longest == dataset.lengths(numbers).max()
        counted = [int((sample["labels"][1:] != -100).sum()) for sample in read]
        assert dataset.response_tokens(numbers).tolist() == counted
        starts = [int((sample["labels"] != -100).int().argmax()) for sample in read]
        assert dataset.prompt_lengths(numbers).tolist() == starts
        some = np.array([17, 3, 3, 59])
        assert dataset.prompt_lengths(some).tolist() == [starts[number] for number in some]
        for sample, number in zip(dataset.read(some), some, strict=True):
            assert torch.equal(sample["input_ids"], read[number]["input_ids"])


def test_prepared_data_is_found_again_and_never_when_something_differs(tmp_path, teacher_dir):
    path, cache_dir = write(tmp_path / "data.jsonl", records(30)), tmp_path / "cache"
    first = splits(path, teacher_dir, cache_dir)
    files = prepared_files(cache_dir)
    # how samples are read, and which are held out, needs no new preparation
    for options in ({}, {"mask_prompt": False}, {"val_split_fraction": 0.3}, {"micro_batch_tokens": 600}):
        splits(path, teacher_dir, cache_dir, **options)
        assert prepared_files(cache_dir) == files
    assert samples(splits(path, teacher_dir, cache_dir)[0]) == samples(first[0])
    other_tokenizer = shutil.copytree(teacher_dir, tmp_path / "other")
    config = json.loads((other_tokenizer / "tokenizer_config.json").read_text())
    (other_tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    changes = [
        {"prompt_style": "alpaca"},
        {"max_seq_length": 50},
        {"context_length": 400},
        {"on_error": "skip"},
        {"tokenizer_dir": other_tokenizer},
    ]
    fingerprints = {first[0].fingerprint}
    for number, options in enumerate(changes, start=2):
        options = {"tokenizer_dir": teacher_dir, **options}
        fingerprints.add(splits(path, cache_dir=cache_dir, **options)[0].fingerprint)
        assert len(prepared_files(cache_dir)) == number
    assert len(fingerprints) == 6
    # the same size, one letter other
    path.write_text(path.read_text().replace("two", "tow"))
    changed = splits(path, teacher_dir, cache_dir)[0]
    assert samples(changed) != samples(first[0]) and changed.fingerprint not in fingerprints
    # the same records elsewhere are the same data
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    assert splits(copy, teacher_dir, cache_dir)[0].fingerprint == changed.fingerprint


def test_held_out_records_stay_held_out(tmp_path, teacher_dir):
    sides = []
    for count in (400, 600):
        path = write(tmp_path / f"{count}.jsonl", records(count)[::-1] if count == 600 else records(count))
        parts = [samples(dataset) for dataset in splits(path, teacher_dir, tmp_path / "cache", val_split_fraction=0.2)]
        assert sum(map(len, parts)) == count
        sides.append([set(map(str, part)) for part in parts])
    assert sides[0][0] <= sides[1][0] and sides[0][1] <= sides[1][1]
    assert 0.1 < len(sides[1][1]) / 600 < 0.3
    train, validation = splits(path, teacher_dir, tmp_path / "cache", val_path=str(tmp_path / "400.jsonl"))
    assert (len(train), len(validation)) == (600, 400)


@pytest.mark.parametrize("suffix", ["json", "jsonl.gz", "parquet"])
def test_small_files_take_about_as_long_as_one(tmp_path, teacher_dir, suffix):
    rows = records(1200)
    for number, row in enumerate(rows):
        write_as(tmp_path / "many" / f"{number:04}.{suffix}", [row])
    write_as(tmp_path / "one" / f"all.{suffix}", rows)
    write_as(tmp_path / "first" / f"first.{suffix}", rows[:1])
    seconds, found = {}, {}
    # what is imported or started once is not what is compared
    for name in ("first", "one", "many"):
        begin = processor_seconds()
        found[name] = splits(tmp_path / name, teacher_dir, tmp_path / "cache", val_split_fraction=0.0)[0]
        seconds[name] = processor_seconds() - begin
    assert samples(found["many"]) == samples(found["one"])
    assert found["many"].place(1199).startswith(str(tmp_path / "many" / f"1199.{suffix}"))
    assert seconds["many"] < 3 * seconds["one"], seconds
    some = splits(tmp_path / "many", teacher_dir, tmp_path / "cache", val_split_fraction=0.2)
    assert sorted(map(len, some)) != [0, 1200] and sum(map(len, some)) == 1200


def write_as(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    else:
        path.write_text(json.dumps(rows))


def processor_seconds() -> float:
    """Of this process and of those that it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(times.ru_utime + times.ru_stime for times in used)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_bad_record_stops_or_is_left_out(tmp_path, teacher_dir, capsys, num_proc):
    lines = [json.dumps(row) for row in records(3000)]
    lines[1700] = '{"instruction": "a", "output": }'
    lines[2000] = '{"instruction": "a", "output": " "}'
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    options = {"num_proc": num_proc, "cache_dir": tmp_path / "cache", "val_split_fraction": 0.0}
    with pytest.raises(UserError, match=r"data.jsonl, line (1701: is not valid JSON|2001: its response is empty)"):
        splits(path, teacher_dir, **options)
    for _ in range(2):
        dataset = splits(path, teacher_dir, on_error="skip", **options)[0]
        assert len(dataset) == 2998
        told = capsys.readouterr().err
        assert "data.jsonl, line 1701: is not valid JSON" in told and "line 2001: its response is empty" in told
        assert "Left out 2 bad records of 3,000" in told
    assert dataset.place(1700).endswith("line 1702") and dataset.place(2997).endswith("line 3000")
    for number in range(100, 140):
        lines[number] = "{}"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"42 of 3,000 records in .* are bad \(1.4%\), more than 1 %"):
        splits(path, teacher_dir, on_error="skip", **options)
    assert capsys.readouterr().err.count("Left out: ") == 10


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"instruction": "a", "output": "b\xff"}\n', "line 1: .*UTF-8"),
        (b"", "line 1: the file is empty"),
        (b'{"instruction": "a", "output": ""}\n', "line 1: its response is empty"),
        (b'{"instruction": "a", "output": "b"}\n[1]\n', "line 2: is a list, not an object"),
        (b'{"instruction": "a", "output": "' + b"one two " * 250_000 + b'"}', r"line 1: has [\d,]+ tokens; the pair"),
        (b'{"instruction": "' + b"a " * 1000 + b'", "output": "b"}', "line 1: has .* tokens; the pair reads 512"),
    ],
)
def test_faults_in_records(tmp_path, teacher_dir, content, reason):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"data.jsonl, {reason}"):
        splits(tmp_path / "data.jsonl", teacher_dir, tmp_path / "cache", too_long="error")


@pytest.mark.parametrize(
    "alone", [{"instruction": "a"}, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}]
)
def test_records_without_a_response_are_counted(tmp_path, teacher_dir, alone):
    """Each way out is tried."""
    rows = [alone if number in (60, 130) else row for number, row in enumerate(records(200))]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"cache_dir": tmp_path / "cache", "prompt_style": ChatML()}
    told = (
        r"2 of 200 records have no response, the first is .*data.jsonl, line 61: has no .*generate_responses`.*policy 1"
    )
    with pytest.raises(UserError, match=re.compile(told, re.DOTALL)) as caught:
        splits(path, teacher_dir, **options)
    assert len(str(caught.value).splitlines()) == 2
    data = StreamingSFT(str(path), num_proc=1, **options)
    data.connect(Tokenizer(teacher_dir))
    assert sum(map(len, data.prepare(teacher_dir, 512, prompts_alone=True))) == 200
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row != alone))
    assert sum(map(len, splits(path, teacher_dir, **options))) == 198


def test_what_only_looks_like_a_fault(tmp_path, teacher_dir):
    rows = [
        {"instruction": "open C:\\Users\\new\\table.txt", "output": "done\r\nnow"},
        {"instruction": "a", "output": "b"},
    ]
    text = "\r\n".join(json.dumps(row) for row in rows)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    dataset = splits(tmp_path / "data.jsonl", teacher_dir, tmp_path / "cache", val_split_fraction=0.0)[0]
    prompts = [Tokenizer(teacher_dir).encode(row["instruction"]).tolist() for row in rows]
    assert [dataset.prompt(number).tolist() for number in range(len(dataset))] == prompts
    # a record of most of a megabyte is cut as any other sample is
    path = write(tmp_path / "long.jsonl", [{"instruction": "a", "output": "one two " * 100_000}])
    options = {"max_seq_length": 64, "val_split_fraction": 0.0, "too_long": "cut"}
    dataset = splits(path, teacher_dir, tmp_path / "cache", **options)[0]
    assert dataset.lengths(np.array([0])).tolist() == [64]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, CHATML])
def test_chat_labels_are_the_assistants_turns(tmp_path, teacher_dir, template):
    import tokenizers

    checkpoint_dir = shutil.copytree(teacher_dir, tmp_path / "checkpoint")
    processor = tokenizers.Tokenizer.from_file(str(checkpoint_dir / "tokenizer.json"))
    processor.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    processor.save(str(checkpoint_dir / "tokenizer.json"))
    if template is not None:
        (checkpoint_dir / "chat_template.jinja").write_text(template)
    turns = [
        ("system", "be brief"),
        ("user", "hello"),
        ("assistant", "good day"),
        ("user", "who?"),
        ("assistant", "me"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write(tmp_path / "chat.jsonl", [{"messages": messages}, {"messages": messages[1:3]}, *records(1)])
    dataset = splits(path, checkpoint_dir, tmp_path / "cache", val_split_fraction=0.0)[0]
    tokenizer = Tokenizer(checkpoint_dir)
    end = tokenizer.eos_id if template is None else tokenizer.token_to_id("<|im_end|>")
    answers = [["good day", "me"], ["good day"]]
    for sample, expected in zip(dataset.read(np.arange(2)), answers, strict=True):
        labels = sample["labels"].tolist()
        found, turn = [], []
        for label in labels:
            if label == end:
                found.append(tokenizer.decode(torch.tensor(turn)))
                turn = []
            elif label != -100:
                turn.append(label)
        assert [text.strip() for text in found] == expected and turn == []
    whole = tokenizer.processor.decode(dataset.read([0])[0]["input_ids"].tolist(), skip_special_tokens=False)
    assert "be brief" in whole and ("<|im_start|>" in whole) == (template is not None)


def test_wrong_arguments(tmp_path, teacher_dir):
    path = write(tmp_path / "data.jsonl", records(30))
    with pytest.raises(UserError, match="val_path .* and --data.val_split_fraction 0.1 both"):
        StreamingSFT(str(path), val_path=str(path), val_split_fraction=0.1)
    for options in ({"val_split_fraction": 1.0}, {"num_workers": -1}, {"micro_batch_tokens": 0}, {"num_proc": 0}):
        with pytest.raises(UserError, match=f"--data.{next(iter(options))} must be at least"):
            StreamingSFT(str(path), **options)
    with pytest.raises(UserError, match=r"--data.micro_batch_tokens 20 is less than the \d+ tokens of the longest"):
        splits(path, teacher_dir, tmp_path / "cache", micro_batch_tokens=20)
    with pytest.raises(UserError, match="does not exist"):
        splits(tmp_path / "nothing.jsonl", teacher_dir, tmp_path / "cache")


def prepare_in_a_process(
    path: Path, checkpoint_dir: Path, cache_dir: Path, errors: Path, limit: int = resource.RLIM_INFINITY
) -> Command:
    """Prepares the records in a copy of this process, which writes no file beyond ``limit`` bytes."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        without_traceback(splits)(path, checkpoint_dir, cache_dir, num_proc=2, val_split_fraction=0.0)

    return fork(work, errors)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_preparation_is_never_taken_for_whole(tmp_path, teacher_dir, number):
    path, cache_dir = write(tmp_path / "data.jsonl", records(20_000)), tmp_path / "cache"
    process = prepare_in_a_process(path, teacher_dir, cache_dir, tmp_path / "errors")
    deadline = time.monotonic() + 60
    while not any(cache_dir.rglob("*.arrow")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    # some records later
    time.sleep(0.3)
    os.kill(process.pid, number)
    process.wait(timeout=60)
    if number == signal.SIGINT:
        errors = (tmp_path / "errors").read_text()
        assert process.returncode == 130 and "Traceback" not in errors and "Interrupted." in errors
    assert not list(cache_dir.rglob(MANIFEST))
    dataset = splits(path, teacher_dir, cache_dir, val_split_fraction=0.0)[0]
    assert len(dataset) == 20_000 and dataset.place(19_999).endswith("line 20000")


@pytest.mark.parametrize("damage", ["missing", "truncated", "cut between batches", "empty"])
def test_damaged_prepared_data_is_prepared_again(tmp_path, teacher_dir, capsys, damage):
    path, cache_dir = write(tmp_path / "data.jsonl", records(3000)), tmp_path / "cache"
    expected = samples(splits(path, teacher_dir, cache_dir)[0])
    file = next(iter(prepared_files(cache_dir)))
    if damage == "missing":
        file.unlink()
    elif damage == "cut between batches":
        rows = datasets.Dataset.from_file(str(file)).select(range(2000))
        rows.flatten_indices().save_to_disk(str(tmp_path / "short"))
        shutil.copy(next((tmp_path / "short").glob("*.arrow")), file)
    else:
        os.truncate(file, file.stat().st_size * 2 // 3 if damage == "truncated" else 0)
    assert samples(splits(path, teacher_dir, cache_dir)[0]) == expected
    assert "is damaged" in capsys.readouterr().err


def test_a_full_disk_is_told(tmp_path, teacher_dir):
    path, cache_dir = write(tmp_path / "data.jsonl", records(5000)), tmp_path / "cache"
    process = prepare_in_a_process(path, teacher_dir, cache_dir, tmp_path / "errors", limit=100_000)
    assert process.wait(timeout=60) == 1
    errors = (tmp_path / "errors").read_text()
    assert "Traceback" not in errors
    assert "cannot be written" in errors and "--data.cache_dir" in errors and "File too large" in errors
    assert not list(cache_dir.rglob(MANIFEST))
    assert len(splits(path, teacher_dir, cache_dir, val_split_fraction=0.0)[0]) == 5000


CUT_OFF = """
import sys
from pathlib import Path
from litgpt.prompts import ChatML, Default
from litgpt.tokenizer import Tokenizer
from litgpt.args import TrainArgs
from litgpt_akl.cli.main import without_traceback
from litgpt_akl.data import StreamingSFT
from litgpt_akl.data.data_module import prepare_datasets
path, tokenizer_dir, cache_dir = map(Path, sys.argv[1:])
data = StreamingSFT(str(path), cache_dir=cache_dir, mask_prompt=True, prompt_style=Default(), num_proc=2)
train = TrainArgs(lr_warmup_steps=None)
without_traceback(prepare_datasets)(data, Tokenizer(tokenizer_dir), train, 512, tokenizer_dir)
"""


def test_a_file_that_is_cut_off_ends_the_process(tmp_path, teacher_dir):
    """The reader fails while the loader's workers are being started, which nobody but Python's exit can end then."""
    whole = gzip.compress(write(tmp_path / "data.jsonl", records(3000)).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 8])
    words = [sys.executable, "-c", CUT_OFF, tmp_path / "cut.jsonl.gz", teacher_dir, tmp_path / "cache"]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr and "cut.jsonl.gz" in finished.stderr
