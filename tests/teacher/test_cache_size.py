"""A cache of many chunks: what opening it takes in memory does not grow with what is in the chunks."""

import json
import shutil
import struct
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from helpers import fresh

from litgpt_akl.teacher.cache import TeacherCache

WIDTH = 64


def write_hollow_chunks(directory: Path, chunks: int, records: int, tokens: int) -> None:
    """In place of hidden states a file has a hole, which no disk holds and nobody is to read."""
    directory.mkdir(parents=True)
    index = np.zeros((records, 5), dtype=np.int64)
    index[:, 2], index[:, 3] = np.arange(records) * tokens, tokens
    rows = records * tokens
    places = {"index": [0, index.nbytes], "hidden": [index.nbytes, index.nbytes + rows * WIDTH * 4]}
    shapes = {"index": ("I64", index.shape), "hidden": ("F32", (rows, WIDTH))}
    header = json.dumps({n: {"dtype": d, "shape": s, "data_offsets": places[n]} for n, (d, s) in shapes.items()})
    for number in range(chunks):
        index[:, 0] = np.arange(records) + number * records
        path = directory / f"{xxhash.xxh3_128_hexdigest(index.tobytes())}.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header.encode() + index.tobytes())
            file.truncate(8 + len(header) + places["hidden"][1])


@pytest.mark.parametrize("tokens", [8, 2000])
def test_opening_takes_no_memory_for_what_is_in_the_chunks(tmp_path, tokens):
    chunks, records = 1500, 4
    write_hollow_chunks(tmp_path / "cache", chunks, records, tokens)
    tracemalloc.start()
    try:
        cache = TeacherCache(str(tmp_path / "cache"), chunks * records, torch.float32, WIDTH, writable=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache.present()) == chunks * records
    # beside what is read together
    assert peak < 128 * 2**16 + chunks * 4000


def resident() -> int:
    """MB of this process that are in memory now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def open_many(directory: Path, samples: int) -> None:
    TeacherCache(str(directory / "none"), 1, torch.float32, WIDTH, writable=False)
    before = resident()
    cache = TeacherCache(str(directory), samples, torch.float32, WIDTH, writable=False)
    # nothing that is freed on the way is more than what is read together
    print(len(cache.present()), resident() - before)


@pytest.mark.parametrize("records", [4, 100])
def test_twenty_thousand_chunks_are_opened_in_less_than_100_mb(tmp_path, records):
    chunks = 20_000
    write_hollow_chunks(tmp_path / "cache", chunks, records, tokens=8)
    found, megabytes = map(int, fresh.call(partial(open_many, tmp_path / "cache", chunks * records)).split())
    shutil.rmtree(tmp_path / "cache")
    assert found == chunks * records and megabytes < 100
