"""Records and files that would take all memory, or never end: told with their place, and the rest is read."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from litgpt.args import TrainArgs
from litgpt.data import JSON
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from pyarrow import parquet

from litgpt_akl.data import StreamingSFT, litgpt_modules, preparation
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.preparation import Settings, prepare
from litgpt_akl.data.records import DEEPEST, Record, read
from litgpt_akl.messages import UserError

GOOD = {"instruction": "count", "output": "one two three"}
DEEP = "nested too deeply: in more than 256 levels"


def nested(levels: int, letter: str = "[") -> str:
    """A record whose other field has that many levels, itself included."""
    inner = "[" * levels + "]" * levels if letter == "[" else '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)
    return json.dumps(GOOD)[:-1] + f', "other": {inner}}}'


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("[" + ",\n".join(texts) + "]" if path.suffix == ".json" else "".join(f"{text}\n" for text in texts))
    return path


def open_stores(kind: str, path: Path, num_proc: int, teacher_dir: Path, cache_dir: Path, **options) -> tuple:
    if kind == "JSON":
        data = JSON(path, mask_prompt=True, prompt_style=Default(), val_split_fraction=0.0, num_workers=num_proc)
    else:
        options = {"prompt_style": Default(), "num_proc": num_proc, **options}
        data = StreamingSFT(str(path), cache_dir=cache_dir, val_split_fraction=0.0, **options)
    return prepare_datasets(data, Tokenizer(teacher_dir), TrainArgs(lr_warmup_steps=None), 512, teacher_dir)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("kind", ["JSON", "StreamingSFT"])
def test_records_that_are_nested_too_deeply_have_their_place(
    tmp_path, monkeypatch, teacher_dir, kind, suffix, num_proc
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    if num_proc == 2:
        # small files are not worth other processes
        monkeypatch.setattr(litgpt_modules, "SMALL", {"B": 0})
    good = [json.dumps(GOOD)] * 3
    for number, (levels, letter) in enumerate([(256, "["), (500, "{"), (950, "["), (9_000, "{"), (200_000, "[")]):
        path = write(tmp_path / f"{number}{suffix}", [*good, nested(levels, letter), *good])
        with pytest.raises(UserError, match=rf"{path.name}, line 4.*{DEEP}"):
            open_stores(kind, path, num_proc, teacher_dir, tmp_path / "cache")
    path = write(tmp_path / f"good{suffix}", [*good, nested(DEEPEST - 1), nested(DEEPEST - 1, "{")])
    assert len(open_stores(kind, path, num_proc, teacher_dir, tmp_path / "cache")[0]) == 5


class Stubborn:
    def __reduce__(self):
        raise RecursionError("there is no end to it")


def itself() -> dict:
    value = dict(GOOD)
    value["other"] = [value] * 3
    return value


class Values:
    """Records that lie in memory already."""

    unit = " records"

    def __init__(self, values: list) -> None:
        self.identity, self.sizes = repr([type(value.get("other")) for value in values]), [len(values)]
        self.values = values

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        for number, value in enumerate(self.values):
            yield 0, Record(number, value, None, number + 1)

    def check_unchanged(self) -> None:
        pass

    def place(self, file: int, line: int, row: int) -> str:
        return f"record {row}"


UNSENDABLE = {
    "a function": (lambda: GOOD | {"other": lambda: None}, "cannot be handed to another process: .*lambda"),
    "a generator": (lambda: GOOD | {"other": (n for n in "ab")}, "cannot be handed to another process: TypeError"),
    "an object": (
        lambda: GOOD | {"other": Stubborn()},
        "cannot be handed to another process: RecursionError: there is",
    ),
    "itself": (itself, DEEP),
}


@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_another_process_cannot_be_given_is_told_by_record(tmp_path, teacher_dir, name):
    make, error = UNSENDABLE[name]
    source = Values([GOOD] * 300 + [make()] + [GOOD] * 300)
    settings = Settings(teacher_dir, Tokenizer(teacher_dir), Default(), None, 512, "stop", "--train.max_seq_length")
    with pytest.raises(UserError, match=f"record 300: (is )?{error}"):
        prepare(source, settings, tmp_path, 2)


def bomb(path: Path, size: int, what: bytes) -> Path:
    """A small file that becomes ``size`` bytes of one value between two good lines."""
    line = json.dumps(GOOD).encode() + b"\n"
    if path.suffix == ".gz":
        file = gzip.open(path, "wb", compresslevel=6)
    else:
        file = zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=3))
    with file:
        file.write(line)
        for _ in range(size // 2**20):
            file.write(what * (2**20 // len(what)))
        file.write(b"\n" + line)
    assert path.stat().st_size < size / 500
    return path


READ = """
import resource, sys
from litgpt_akl.data.records import read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    found = [record.error for record in read(path)]
    print(len(found), *set(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sep="|")
"""


def read_in_a_process(*paths: Path) -> list[tuple[int, set[str], float]]:
    """How many records each file has, what is wrong with them, and how many MiB it took at most until then."""
    done = subprocess.run([sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return [(int(count), set(errors), int(kilobytes) / 1024) for count, *errors, kilobytes in rows]


def test_a_bomb_of_one_record_takes_little_memory(tmp_path, pytestconfig):
    suffixes, found = (".jsonl.gz", ".json.zst"), {b"a": (3, {"None", "is longer than 32 MiB"}), b"\n": (2, {"None"})}
    # each empty line is looked at, which takes its time
    sizes = {b"a": 200 * 2**20, b"\n": 20 * 2**20}
    cases = list(product(suffixes, found) if pytestconfig.option.all else zip(suffixes, found, strict=True))
    paths = [bomb(tmp_path / f"{n}{suffix}", sizes[what], what) for n, (suffix, what) in enumerate(cases)]
    for (_, what), (count, errors, taken) in zip(cases, read_in_a_process(*paths), strict=True):
        assert (count, errors) == found[what]
        assert taken < 200


def test_a_window_that_takes_much_memory_is_refused(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    path = tmp_path / "wide.jsonl.zst"
    with zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(compression_params=parameters)) as file:
        file.write(json.dumps(GOOD).encode())
    with pytest.raises(UserError, match="window of more than 128 MiB.*\n.*--long=27"):
        list(read(str(path)))


def test_a_large_row_of_parquet_is_a_bad_record(tmp_path):
    texts = ["one two", "x" * (33 * 2**20), "three", "y" * (3 * 2**20)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"instruction": ["count"] * 4, "output": texts}), path)
    found = list(read(str(path)))
    assert [record.error for record in found] == [None, "is longer than 32 MiB", None, None]
    assert [record.value["output"] for record in found if record.value] == [texts[0], texts[2], texts[3]]


def test_portions_are_cut_by_size_as_well_as_by_number(tmp_path):
    texts = [json.dumps(GOOD | {"other": "x" * (2**18 * (n % 5))}) for n in range(700)]
    source = preparation.FileRecords([str(write(tmp_path / "large.jsonl", texts))])
    portions = [[record.size for _, record in portion] for portion in preparation.portions(source)]
    assert sum(map(len, portions)) == 700 and max(map(len, portions)) <= preparation.PORTION
    assert max(sum(sizes[:-1]) for sizes in portions) < preparation.PORTION_SIZE
    small = preparation.FileRecords([str(write(tmp_path / "small.jsonl", [json.dumps(GOOD)] * 600))])
    assert [len(portion) for portion in preparation.portions(small)] == [256, 256, 88]
