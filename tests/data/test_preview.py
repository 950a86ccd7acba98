"""A look at data that nobody has prepared says what preparing it would say, exactly or nearly, and writes nothing."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from litgpt.args import TrainArgs
from litgpt.data import JSON
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer

from litgpt_akl.data import StreamingSFT, preview
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.preview import AT_ONCE, LARGEST, MARGIN, Lengths, Look, Preview, measure
from litgpt_akl.data.records import read, read_part
from litgpt_akl.messages import UserError


def records(count: int, spread: float = 0.8) -> list[dict]:
    """Whose lengths spread as those of real data do: their logarithms are about normal."""
    lengths = np.random.default_rng(1).lognormal(2.5, spread, count).astype(int) + 1
    return [{"instruction": f"count to {n}", "output": "one " * length} for n, length in enumerate(lengths)]


MANY = records(1500, spread=0.5)


def write(path: Path, rows: list[dict]) -> Path:
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.suffix == ".parquet":
        # a row group is as large as Hugging Face's datasets make it
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows, indent=2) if path.suffix == ".json" else lines)
    return path


def open_splits(data, tokenizer_dir, max_seq_length=None, **options):
    train = TrainArgs(lr_warmup_steps=None, max_seq_length=max_seq_length)
    return prepare_datasets(data, Tokenizer(tokenizer_dir), train, 512, tokenizer_dir, **options)


def streaming(path: Path, cache_dir: Path, **options) -> StreamingSFT:
    return StreamingSFT(
        str(path), cache_dir=cache_dir, **{"mask_prompt": True, "prompt_style": Default(), "num_proc": 1, **options}
    )


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.jsonl.gz", "data.parquet"])
@pytest.mark.parametrize(("max_seq_length", "options"), [(None, {}), (30, {"too_long": "cut", "mask_prompt": False})])
def test_all_records_are_those_that_are_prepared(name, max_seq_length, options, teacher_dir, tmp_path):
    data = streaming(write(tmp_path / name, records(100)), tmp_path / "prepared", **options)
    # where time is short, the longest come first
    look_at_all = Preview(seconds=600)
    seen = open_splits(data, teacher_dir, max_seq_length, rows_of=look_at_all)
    assert not (tmp_path / "prepared").exists()
    prepared = open_splits(data, teacher_dir, max_seq_length)
    again = Preview(seconds=0)
    found = open_splits(data, teacher_dir, max_seq_length, rows_of=again)
    assert ([look.how for look in look_at_all.looks], [look.how for look in again.looks]) == (["all"], ["prepared"])
    for one, other, expected in zip(seen, found, prepared, strict=True):
        assert one.fingerprint == other.fingerprint == expected.fingerprint
        numbers = np.arange(len(expected))
        assert np.array_equal(one.lengths(numbers), expected.lengths(numbers))
        assert measure(one, look_at_all.looks[0], answerable=9) == measure(expected, answerable=9)


def test_the_split_of_litgpts_json_is_the_runs(teacher_dir, tmp_path):
    path = write(tmp_path / "data.json", records(60))
    found = []
    for options in ({"rows_of": Preview(seconds=600)}, {}):
        data = JSON(json_path=path, mask_prompt=True, val_split_fraction=0.3, prompt_style=Default(), num_workers=0)
        found.append([split.fingerprint for split in open_splits(data, teacher_dir, **options)])
    assert found[0] == found[1]


def test_each_file_of_training_and_validation_is_looked_at(teacher_dir, tmp_path):
    path, other = write(tmp_path / "data.jsonl", records(30)), write(tmp_path / "other.jsonl", records(9))
    look = Preview()
    splits = open_splits(streaming(path, tmp_path, val_path=str(other)), teacher_dir, rows_of=look)
    assert [len(split) for split in splits] == [each.records for each in look.looks] == [30, 9]


@pytest.fixture(scope="module")
def lengths_of_all(teacher_dir, tmp_path_factory) -> Lengths:
    """What preparing them says of the training samples."""
    folder = tmp_path_factory.mktemp("all")
    return measure(open_splits(streaming(write(folder / "data.jsonl", MANY), folder), teacher_dir)[0])


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_where_time_is_short_the_longest_are_looked_at_first(name, teacher_dir, tmp_path, lengths_of_all):
    look, expected = Preview(seconds=0), lengths_of_all
    data = streaming(write(tmp_path / name, MANY), tmp_path / "p")
    seen = open_splits(data, teacher_dir, rows_of=look)[0]
    assert look.looks == [Look("largest", LARGEST + AT_ONCE, len(MANY))]
    found = measure(seen, look.looks[0], limit=512)
    assert expected.longest < 512 / MARGIN
    assert expected.longest <= found.longest <= 1.1 * expected.longest + 1
    assert found.tokens == pytest.approx(expected.tokens, rel=0.1)
    assert found.response_tokens == pytest.approx(expected.response_tokens, rel=0.15)
    assert found.samples == pytest.approx(expected.samples, rel=0.05)
    assert measure(seen, look.looks[0], limit=100).longest == 100


@pytest.mark.parametrize(
    ("name", "files"), [("data.jsonl", 1), ("data.json", 1), ("data.jsonl.gz", 1), ("data.parquet", 1), ("a.jsonl", 40)]
)
def test_of_many_records_some_here_and_there_are_looked_at(
    name, files, teacher_dir, tmp_path, monkeypatch, lengths_of_all
):
    monkeypatch.setattr(preview, "WHOLE", 1000)
    monkeypatch.setattr(preview, "PLACES", 30)
    folder, expected = tmp_path / "data", lengths_of_all
    folder.mkdir()
    for number in range(files):
        write(folder / f"{number}-{name}", MANY[number::files])
    look = Preview(seconds=600)
    seen = open_splits(streaming(folder, tmp_path / "p"), teacher_dir, rows_of=look)[0]
    (found,) = look.looks
    # the longest lines are found without parsing all
    is_found = name.endswith(".jsonl")
    assert found.how == ("largest" if is_found else "spread")
    assert 300 <= found.records - LARGEST * is_found <= 400
    assert found.all == pytest.approx(len(MANY), rel=0.1)
    lengths = measure(seen, found, limit=512)
    assert lengths.samples == pytest.approx(expected.samples, rel=0.1)
    assert lengths.tokens == pytest.approx(expected.tokens, rel=0.15)
    assert seen.longest < lengths.longest < (1.1 if is_found else 1.5) * expected.longest + 1
    assert lengths.longest >= (1.0 if is_found else 0.7) * expected.longest


def test_a_part_of_a_file_is_read_at_evenly_spread_places(tmp_path):
    rows = [{"number": number} for number in range(10_000)]
    path = write(tmp_path / "data.jsonl", rows)
    part = read_part(str(path), 10, 3)
    numbers = np.array([record.value["number"] for record in part.records]).reshape(10, 3)
    assert (np.diff(numbers) == 1).all() and abs(np.diff(numbers[:, 0]) - 1000).max() < 120
    assert part.all == pytest.approx(10_000, rel=0.05)
    # more places than lines
    for count in (1, 2):
        write(path, rows[:count])
        part = read_part(str(path), 5, 1)
        assert part.all == count and all(record.error is None for record in part.records)
    whole = [record.value for record in read(str(path))]
    assert [record.value for record in part.records if record.value is not None][0] in whole


def test_bad_records_end_a_look_as_they_would_end_the_run(teacher_dir, tmp_path, monkeypatch, capsys):
    rows = records(60)
    rows[20:40] = [{"instruction": "nobody is told", "output": 3}] * 20
    for data in (
        streaming(write(tmp_path / "data.jsonl", rows), tmp_path / "p"),
        JSON(json_path=write(tmp_path / "data.json", rows), prompt_style=Default(), val_split_fraction=0.1),
    ):
        messages = []
        for options in ({"rows_of": Preview(seconds=600)}, {}):
            with pytest.raises(UserError) as error:
                open_splits(data, teacher_dir, **options)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    monkeypatch.setattr(preview, "WHOLE", 1000)
    monkeypatch.setattr(preview, "PLACES", 3)
    monkeypatch.setattr(preview, "SCANNED", 0)
    open_splits(streaming(tmp_path / "data.jsonl", tmp_path / "p"), teacher_dir, rows_of=Preview(seconds=600))
    told = r"\d+ of 30 records that were looked at cannot be used\. The first error: 'output' is a number, not text\.\n"
    assert re.fullmatch(told, capsys.readouterr().out)
