"""Windows: exactly once per epoch, the same steps however they are shared and cut, and little padding."""

import numpy as np
import pytest
import torch

from litgpt_akl.data.dataset import InMemoryDataset
from litgpt_akl.data.steps import StepBatches, StepSampler, cut, in_order, load


def make_store(samples: int, longest: int = 60) -> InMemoryDataset:
    """Samples whose ids all are their number; the first third of each is a prompt."""
    lengths = np.random.default_rng(1).integers(3, longest, samples)
    ends = np.cumsum(lengths)
    input_ids = np.repeat(np.arange(samples), lengths)
    within = np.arange(len(input_ids)) - np.repeat(ends - lengths, lengths)
    labels = np.where(within < np.repeat(lengths // 3, lengths), -100, input_ids)
    return InMemoryDataset(input_ids.astype(np.int32), labels.astype(np.int32), ends, "sample {}".format)


def step_batches_of(dataset: InMemoryDataset, global_batch_size: int, **options) -> StepBatches:
    plan = StepSampler(len(dataset), global_batch_size, 3, dataset.lengths)
    return StepBatches(dataset, plan, **{"micro_batch_size": 4, **options})


def samples_in(step_batch) -> list[int]:
    return [int(row[0]) for batch in step_batch.micro_batches if len(batch.labels) for row in batch.input_ids]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("samples", "global_batch_size"), [(48, 12), (53, 12), (5, 12), (700, 24)])
def test_every_sample_once_per_epoch(monkeypatch, samples, global_batch_size, ranks, workers):
    # as many workers as are asked for, also on a machine with fewer cores
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    dataset = make_store(samples)
    steps = -(-samples // global_batch_size)
    seen = {epoch: [] for epoch in range(2)}
    for rank in range(ranks):
        step_batches = step_batches_of(dataset, global_batch_size, rank=rank, world_size=ranks)
        for step_batch in load(step_batches, range(2 * steps), workers):
            seen[step_batch.epoch] += samples_in(step_batch)
    assert all(sorted(numbers) == list(range(samples)) for numbers in seen.values())


def test_the_samples_of_a_step_do_not_depend_on_how_it_is_cut_and_shared():
    dataset = make_store(100)
    expected = [sorted(step_batch.numbers) for step_batch in load(step_batches_of(dataset, 16), range(14), 0)]
    counts = [int((dataset.response_tokens(np.array(numbers))).sum()) for numbers in expected]
    for options in ({"micro_batch_size": 1}, {"micro_batch_size": 16}, {"micro_batch_tokens": 70}):
        for ranks in (1, 2):
            shares = [
                load(step_batches_of(dataset, 16, rank=rank, world_size=ranks, **options), range(14), 0)
                for rank in range(ranks)
            ]
            for numbers, count, step_batches in zip(expected, counts, zip(*shares, strict=True), strict=True):
                assert sorted(sum(map(samples_in, step_batches), [])) == numbers
                assert {step_batch.response_tokens for step_batch in step_batches} == {count}
                assert (
                    sum(len(batch.labels) for step_batch in step_batches for batch in step_batch.micro_batches) == count
                )


def test_a_micro_batch_pairs_each_response_token_with_the_position_before_it():
    dataset = make_store(40)
    step_batch = step_batches_of(dataset, 10)[1]
    assert [len(batch.input_ids) for batch in step_batch.micro_batches] == [4, 4, 2]
    found = []
    for batch in step_batch.micro_batches:
        assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.labels)
        found += batch.labels.tolist()
    # the first response token counts, and so does the last; nothing after it does
    samples = dataset.read(step_batch.numbers)
    expected = [label for sample in samples for label in sample["labels"][1:].tolist() if label != -100]
    assert sorted(found) == sorted(expected) and len(expected) == step_batch.response_tokens
    assert step_batch.tokens == dataset.lengths(step_batch.numbers).sum()
    assert step_batch.padded_tokens == sum(batch.input_ids.numel() for batch in step_batch.micro_batches)


def test_step_batches_go_on_from_any_position():
    dataset = make_store(100)
    whole = list(load(step_batches_of(dataset, 16), range(20), 0))
    for workers in (0, 2):
        for step_batch, other in zip(whole[9:], load(step_batches_of(dataset, 16), range(9, 20), workers), strict=True):
            assert (step_batch.epoch, step_batch.step, step_batch.response_tokens) == (
                other.epoch,
                other.step,
                other.response_tokens,
            )
            for batch, again in zip(step_batch.micro_batches, other.micro_batches, strict=True):
                assert torch.equal(batch.input_ids, again.input_ids) and torch.equal(batch.labels, again.labels)


def test_a_loader_leaves_trainings_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(load(step_batches_of(make_store(40), 10), range(4), 2))
    assert torch.equal(torch.rand(3), expected)


def test_cuts_by_padded_tokens():
    numbers, lengths = np.arange(7), np.array([2, 3, 3, 5, 9, 10, 10])
    assert [numbers[part].tolist() for part in cut(lengths, 1, 10)] == [[0, 1, 2], [3], [4], [5], [6]]
    for cap in range(10, 80):
        parts = cut(lengths, 1, cap)
        assert np.concatenate([numbers[part] for part in parts]).tolist() == numbers.tolist()
        assert all(len(lengths[part]) * lengths[part].max() <= cap for part in parts)
    assert [numbers[part].tolist() for part in cut(lengths, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_rank_has_as_many_micro_batches(ranks):
    dataset = make_store(100)
    shares = [step_batches_of(dataset, 14, rank=rank, world_size=ranks)[2] for rank in range(ranks)]
    assert {len(step_batch.micro_batches) for step_batch in shares} == {-(-4 // ranks)}
    assert (
        len({(step_batch.tokens, step_batch.padded_tokens, step_batch.response_tokens) for step_batch in shares}) == 1
    )
    empty = [batch for step_batch in shares for batch in step_batch.micro_batches if len(batch.labels) == 0]
    assert len(empty) == -4 % ranks and all(batch.input_ids.shape == (1, 1) for batch in empty)


def test_little_is_padding():
    dataset = make_store(5000, longest=400)
    for options in ({"micro_batch_size": 8}, {"micro_batch_tokens": 3000}):
        step_batches = step_batches_of(dataset, 16, **options)
        loaded = list(load(step_batches, range(300), 0))
        assert (
            1 - sum(step_batch.tokens for step_batch in loaded) / sum(step_batch.padded_tokens for step_batch in loaded)
            < 0.04
        )


def test_validation_reads_like_lengths_together():
    dataset = make_store(50)
    batches = list(in_order(dataset, range(30), 4))
    assert sorted(int(row[0]) for batch in batches for row in batch.input_ids) == list(range(30))
    widths = [batch.input_ids.size(1) for batch in batches]
    assert widths == sorted(widths)
