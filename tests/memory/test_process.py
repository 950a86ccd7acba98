"""What is said of a CPU process's memory is what the estimate predicts: nothing that a file backs."""

import time

import numpy as np
import pytest
from helpers.memory_runs import held

from litgpt_akl.memory.process import MemoryWatch, anonymous_memory

SIZE = 64_000_000


def test_mapped_files_are_not_memory_of_a_process_and_what_was_freed_was_its_peak(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(SIZE))
    before = held()
    mapped = np.memmap(tmp_path / "weights", mode="r")
    assert mapped.sum() == 0 and anonymous_memory() - before < 0.1 * SIZE
    watch = MemoryWatch()
    try:
        array = np.ones(SIZE, np.uint8)
        while watch.highest - before < 0.9 * SIZE:
            time.sleep(0.001)
        del array
        assert anonymous_memory() - before < 0.1 * SIZE
    finally:
        watch.close()
    assert watch.look() - before == pytest.approx(SIZE, rel=0.1)
