"""The plan: every sample once per epoch, whatever the sizes; little padding; little memory."""

import itertools
import tracemalloc

import numpy as np
import pytest

from litgpt_akl.data.steps import StepSampler, permute

LENGTHS = np.random.default_rng(0).integers(3, 400, size=100_000)


def plan(samples: int, global_batch_size: int = 8, seed: int = 5, chunk_ends: list[int] | None = None) -> StepSampler:
    return StepSampler(samples, global_batch_size, seed, LENGTHS.__getitem__, chunk_ends and np.array(chunk_ends))


def epoch_of(plan: StepSampler, epoch: int) -> list[np.ndarray]:
    return [plan.step(epoch, step) for step in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 64, 511, 512, 513, 2000])
@pytest.mark.parametrize("global_batch_size", [1, 8, 100, 600])
def test_every_sample_once_per_epoch(samples, global_batch_size):
    for epoch in range(3):
        steps = epoch_of(plan(samples, global_batch_size), epoch)
        assert sorted(np.concatenate(steps)) == list(range(samples))
        assert {len(step) for step in steps[:-1]} <= {global_batch_size}
        again = epoch_of(plan(samples, global_batch_size), epoch)
        assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True))


def test_epochs_and_seeds_have_orders_of_their_own():
    runs = itertools.product((5, 6), (0, 1))
    orders = [plan(1000, seed=seed).order(epoch, np.arange(1000)) for seed, epoch in runs]
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(one == other) < 0.02
        # not the same order from another starting point, either
        assert len(set(zip(one, one[1:], strict=False)) & set(zip(other, other[1:], strict=False))) < 20


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 1000, 4097])
def test_a_permutation_is_one(size):
    assert sorted(permute(np.arange(size), size, (1, 2))) == list(range(size))
    some = np.array([0, size - 1, size // 2])
    assert np.array_equal(permute(some, size, (1, 2)), permute(np.arange(size), size, (1, 2))[some])


def test_permutations_are_evenly_distributed():
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for seed in range(2400):
        counts[tuple(permute(np.arange(4), 4, (seed,)).tolist())] += 1
    # chi-squared with 23 degrees of freedom: 1 in 10,000 lies above 57
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 57
    order = permute(np.arange(100_000), 100_000, (3,))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_the_samples_of_a_step_are_of_like_length():
    steps = epoch_of(plan(5000), 0)[:-1]
    spread = np.mean([np.ptp(LENGTHS[step]) for step in steps])
    assert spread < 0.05 * np.ptp(LENGTHS[:5000])
    assert all(np.all(np.diff(LENGTHS[step]) >= 0) for step in steps)
    # but the steps are not: their order says nothing of their length
    means = np.array([LENGTHS[step].mean() for step in steps])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1


def test_chunks_are_taken_one_after_another():
    ends = [700, 701, 1500, 3000]
    for epoch in range(4):
        order = plan(3000, chunk_ends=ends).order(epoch, np.arange(3000))
        assert sorted(order) == list(range(3000))
        chunks = np.searchsorted(ends, order, side="right")
        assert np.count_nonzero(np.diff(chunks)) == 3
        assert np.mean(np.diff(order) == 1) < 0.02
    firsts = {
        int(np.searchsorted(ends, plan(3000, chunk_ends=ends).order(e, np.arange(1)), side="right")[0])
        for e in range(30)
    }
    assert firsts == {0, 1, 2, 3}


def test_a_billion_samples_need_little_memory():
    big = StepSampler(10**9, 16, 1, lambda numbers: numbers % 100)
    tracemalloc.start()
    steps = [big.step(0, step) for step in (0, 1, big.steps_per_epoch // 2, big.steps_per_epoch - 1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert len(set(np.concatenate(steps))) == 64
