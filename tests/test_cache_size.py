"""A cache of many chunks: what opening it takes in memory does not grow with what is in the chunks."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from litgpt_akl.cache.cache import TeacherCache

WIDTH, RECORDS = 64, 4


def write_hollow_chunks(directory: Path, chunks: int, tokens: int) -> None:
    """Each of four records; in place of hidden states a file has a hole, which no disk holds and nobody is to read."""
    directory.mkdir(parents=True)
    index = np.zeros((RECORDS, 5), dtype=np.int64)
    index[:, 2], index[:, 3] = np.arange(RECORDS) * tokens, tokens
    rows = RECORDS * tokens
    places = {"index": [0, index.nbytes], "hidden": [index.nbytes, index.nbytes + rows * WIDTH * 4]}
    shapes = {"index": ("I64", index.shape), "hidden": ("F32", (rows, WIDTH))}
    header = json.dumps({n: {"dtype": d, "shape": s, "data_offsets": places[n]} for n, (d, s) in shapes.items()})
    for number in range(chunks):
        index[:, 0] = np.arange(RECORDS) + number * RECORDS
        path = directory / f"{xxhash.xxh3_128_hexdigest(index.tobytes())}.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header.encode() + index.tobytes())
            file.truncate(8 + len(header) + places["hidden"][1])


@pytest.mark.parametrize("tokens", [8, 2000])
def test_opening_takes_no_memory_for_what_is_in_the_chunks(tmp_path, tokens):
    chunks = 1500
    write_hollow_chunks(tmp_path / "cache", chunks, tokens)
    tracemalloc.start()
    try:
        cache = TeacherCache(str(tmp_path / "cache"), chunks * RECORDS, torch.float32, WIDTH, writable=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache.present()) == chunks * RECORDS
    # beside what is read together, of 20,000 chunks less than 100 MB
    assert peak < 128 * 2**16 + chunks * 4000
