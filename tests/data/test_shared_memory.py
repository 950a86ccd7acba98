"""Steps fetched ahead by other processes lie in /dev/shm, of which a container has 64 MB."""

import ctypes
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import in_processes
from test_step_batches import make_store, step_batches_of

from litgpt_akl.data.dataset import digest
from litgpt_akl.data.steps import StepBatches, load, most_bytes
from litgpt_akl.data.workers import SHARE, Fetched, free_shared_memory, steps_ahead
from litgpt_akl.teacher.cache import TeacherCache
from litgpt_akl.teacher.chunk_file import Record

CAN_MOUNT = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
WIDTH = 512


def cached(directory: Path, dtype: torch.dtype = torch.float32, **options) -> StepBatches:
    """Windows of 12 samples whose hidden states are in a cache: all numbers of one are the sample's number."""
    dataset = make_store(48)
    cache = TeacherCache(str(directory), len(dataset), dtype, WIDTH, writable=True)
    counts = dataset.response_tokens(np.arange(len(dataset)))
    if len(cache.present()) == 0:
        samples = enumerate(zip(dataset.read(range(len(dataset))), counts, strict=True))
        cache.add([Record(n, digest(sample), torch.full((count, WIDTH), float(n))) for n, (sample, count) in samples])
        cache.flush()
    return step_batches_of(dataset, 12, cache=cache, **options)


def small_shared_memory(size: str) -> None:
    """From now on this process and its children see another, empty /dev/shm."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()) == 0


def read_all(directory: Path, size: str, expected: tuple[int, int]) -> None:
    small_shared_memory(size)
    step_batches = cached(directory)
    fetched = load(step_batches, range(8), 2)
    try:
        check_fetched(fetched, step_batches, expected)
    finally:
        fetched.stop()


def check_fetched(fetched: Fetched, step_batches: StepBatches, expected: tuple[int, int]) -> None:
    singly = [step_batches[number] for number in range(8)]
    assert (fetched.loader.num_workers, fetched.loader.prefetch_factor or 0) == expected
    free, least = free_shared_memory(), np.inf
    for step_batch, other in zip(fetched, singly, strict=True):
        time.sleep(0.05)
        least = min(least, free_shared_memory())
        for batch, again in zip(step_batch.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(batch.teacher_hidden, again.teacher_hidden)
            assert torch.equal(batch.teacher_hidden[:, 0], batch.input_ids.flatten()[batch.positions].float())
    workers, prefetched = expected
    assert free - least <= (workers * prefetched + 2) * most_bytes(step_batches)
    # or nothing would have been there
    assert least < free or workers == 0


@pytest.mark.skipif(not CAN_MOUNT, reason="only root can mount")
@pytest.mark.parametrize(
    ("size", "expected", "words"),
    [
        ("64m", (2, 2), None),
        ("7m", (2, 1), "7.3 MB free, and a step takes up to 0.9 MB of it: 2 of 4 steps are fetched ahead, by 2 of 2"),
        ("1m", (0, 0), "1.0 MB free, and a step takes up to 0.9 MB of it: 0 of 4 steps are fetched ahead, by 0 of 2"),
    ],
)
def test_no_more_is_fetched_ahead_than_shared_memory_takes(tmp_path, capfd, size, expected, words):
    cached(tmp_path)
    in_processes(1, read_all, tmp_path, size, expected)
    printed = capfd.readouterr().out
    assert printed.count("/dev/shm") == (words is not None) and (words or "") in printed


@pytest.mark.parametrize(
    ("size", "workers", "free", "expected"),
    [
        (10, 4, 200, (4, 2)),
        (10, 4, 199, (4, 1)),
        (10, 4, 119, (3, 1)),
        (10, 4, 60, (1, 1)),
        (10, 4, 59, (0, 0)),
        (200, 1, 64, (0, 0)),
        (200, 1, np.inf, (1, 2)),
        (0, 3, 0, (3, 2)),
        (10, 0, 1000, (0, 0)),
    ],
)
def test_as_many_steps_ahead_as_fit_into_half_of_what_is_free(size, workers, free, expected):
    assert SHARE == 0.5
    assert steps_ahead(size, workers, free) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 300}, {"micro_batch_size": 1}])
def test_no_step_is_larger_than_foretold(tmp_path, dtype, options):
    step_batches = cached(tmp_path, dtype, **options)
    sizes = []
    for number in range(12):
        batches = step_batches[number].micro_batches
        tensors = [(b.input_ids, b.positions, b.labels, b.teacher_hidden) for b in batches]
        sizes.append(sum(tensor.nbytes for group in tensors for tensor in group))
    assert max(sizes) <= most_bytes(step_batches) < 3 * max(sizes)
    assert most_bytes(step_batches) <= most_bytes(step_batches, measure=False)
