"""Which samples make which optimizer step, and the micro-batches of each, fetched ahead."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset

from litgpt_akl.data.dataset import TokenizedDataset, sample_keys
from litgpt_akl.data.workers import SHARED_MEMORY, Fetched, available_cores, fetch, free_shared_memory, steps_ahead
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX

POOL = 512
"""Samples that are sorted by length together, or a global batch if that is more."""


@dataclass
class StepSampler:
    """The steps of every epoch over a dataset."""

    samples: int
    global_batch_size: int
    seed: int
    lengths: Callable[[np.ndarray], np.ndarray]
    """Tokens of each of the samples whose numbers are given."""
    chunk_ends: np.ndarray | None = None
    """``[chunks]``: where each chunk ends, of a dataset that is fetched chunk by chunk; its samples stay together."""

    def __post_init__(self) -> None:
        ends = [self.samples] if self.chunk_ends is None else self.chunk_ends
        self._chunk_sizes = np.diff(np.asarray(ends, dtype=np.int64), prepend=0)
        self._chunk_starts = np.asarray(ends, dtype=np.int64) - self._chunk_sizes
        self._last_pool: tuple[tuple[int, int], list[np.ndarray]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may be smaller."""
        return -(-self.samples // self.global_batch_size)

    @property
    def steps_per_pool(self) -> int:
        return max(1, POOL // self.global_batch_size)

    def step(self, epoch: int, step: int) -> np.ndarray:
        """The numbers of the samples of a step, shortest sample first."""
        pool, number = divmod(step, self.steps_per_pool)
        if self._last_pool is None or self._last_pool[0] != (epoch, pool):
            self._last_pool = (epoch, pool), self.pool(epoch, pool)
        return self._last_pool[1][number]

    def pool(self, epoch: int, pool: int) -> list[np.ndarray]:
        """The steps of one pool."""
        size = self.steps_per_pool * self.global_batch_size
        positions = np.arange(pool * size, min((pool + 1) * size, self.samples))
        numbers = self.order(epoch, positions)
        numbers = numbers[np.argsort(self.lengths(numbers), kind="stable")]
        random = np.random.default_rng((self.seed, epoch, pool))
        whole, left = divmod(len(numbers), self.global_batch_size)
        # the epoch's last step takes what is left over, from anywhere among the lengths
        start = int(random.integers(whole + 1)) * self.global_batch_size
        last, rest = numbers[start : start + left], np.delete(numbers, slice(start, start + left))
        steps = [rest[number * self.global_batch_size :][: self.global_batch_size] for number in range(whole)]
        return [*(steps[number] for number in random.permutation(whole)), *([last] if left else [])]

    def order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sample numbers at ``positions`` of an epoch's order: chunks in random order, and each chunk's samples."""
        chunks = np.argsort(permute(np.arange(len(self._chunk_sizes)), len(self._chunk_sizes), (self.seed, epoch, 0)))
        ends = np.cumsum(self._chunk_sizes[chunks])
        turn = np.searchsorted(ends, positions, side="right")
        within = positions - (ends - self._chunk_sizes[chunks])[turn]
        numbers = np.empty_like(positions)
        for chunk in np.unique(chunks[turn]):
            here = chunks[turn] == chunk
            key = (self.seed, epoch, 1, int(chunk))
            numbers[here] = self._chunk_starts[chunk] + permute(within[here], int(self._chunk_sizes[chunk]), key)
        return numbers


def permute(positions: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a random permutation of ``range(size)`` sends ``positions``, in memory that does not depend on ``size``.

    A Feistel network of eight rounds permutes the smallest square of a power of two that holds ``size`` numbers; what
    falls outside is sent through again until it is inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002).
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(8, np.uint64)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside[outside] = values[outside] >= size
    return values.astype(np.int64)


def _scramble(values: np.ndarray) -> np.ndarray:
    # the finalizer of SplitMix64 (Steele, Lea and Flood 2014)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


PART = 100_000
"""Samples whose lengths are asked for together."""


class HiddenStateCache(Protocol):
    """Holds the teacher's final hidden states of samples, or its distributions, packed."""

    bytes_of_token_in_memory: int
    """Of a hidden state once it is read."""

    def read(self, keys: np.ndarray) -> Tensor | tuple[Tensor | None, ...] | None:
        """Hidden states ``[n, D]`` of samples, if all are cached; ``keys`` ``[samples, 2]`` are numbers and digests.

        Of several teachers it is one tensor, or None, for each.
        """


@dataclass
class MicroBatch:
    """Samples that go through the models together, padded on the right."""

    input_ids: Tensor
    """``[batch, time]``."""
    positions: Tensor
    """``[n]``: flat positions in ``input_ids`` whose next token counts."""
    labels: Tensor
    """``[n]``: those next tokens."""
    keys: np.ndarray | None = None
    """``[batch, 2]``: number and digest of each sample, if there is a cache."""
    teacher_hidden: Tensor | tuple[Tensor | None, ...] | None = None
    """``[n, D]``: the teacher's final hidden states at the positions, or its distributions, packed, if cached; of
    several teachers one for each."""
    is_on_policy: bool = False
    """Whether the student wrote the responses."""

    @property
    def for_teacher(self) -> "MicroBatch":
        """What the teacher reads."""
        return self

    @property
    def counts(self) -> list[int]:
        """Positions of each sample."""
        rows = self.positions // self.input_ids.size(1)
        return torch.bincount(rows, minlength=len(self.input_ids)).tolist()


@dataclass
class StepBatch:
    """One optimizer step's data, as one rank sees it."""

    epoch: int
    step: int
    """Within the epoch."""
    numbers: np.ndarray
    """The samples of all ranks."""
    response_tokens: int
    """Of all ranks: what the sums of this step are divided by."""
    tokens: int
    """Of all ranks, without padding."""
    padded_tokens: int
    """Of all ranks, with padding."""
    micro_batches: list[MicroBatch]
    """Of this rank; every rank has as many, of which the last may be empty."""
    prompts: dict[int, Tensor] = field(default_factory=dict)
    """Of all ranks: the ids of prompts that the student is to respond to, ``[time]``, by the samples' numbers. Their
    recorded responses are not in the micro-batches, and not among the tokens."""

    def pin_memory(self) -> "StepBatch":
        return apply_to_collection(self, Tensor, Tensor.pin_memory)


@dataclass
class StepBatches(Dataset):
    """Step batches by their number, counted from the start of the run: a pure function, so that nothing is replayed."""

    dataset: TokenizedDataset
    sampler: StepSampler
    micro_batch_size: int
    micro_batch_tokens: int | None = None
    """If given, how many tokens a micro-batch may have, padding counted, in place of ``micro_batch_size``."""
    rank: int = 0
    world_size: int = 1
    cache: HiddenStateCache | None = None
    on_policy: float = 0.0
    """Share of the samples whose response the student writes."""
    longest_prompt: int = 0
    """Tokens of the longest prompt that it can respond to; a sample without such a prompt is taken as recorded."""

    def __getitem__(self, number: int) -> StepBatch:
        epoch, step = divmod(number, self.sampler.steps_per_epoch)
        numbers = self.sampler.step(epoch, step)
        prompts = self._draw_prompts(epoch, step, numbers)
        recorded = numbers[~np.isin(numbers, list(prompts))]
        lengths = self.dataset.lengths(recorded)
        cuts = cut(lengths, self.micro_batch_size, self.micro_batch_tokens)
        parts = (recorded[part] for part in turns(cuts, self.rank, self.world_size))
        return StepBatch(
            epoch,
            step,
            numbers,
            response_tokens=int(self.dataset.response_tokens(recorded).sum()),
            tokens=int(lengths.sum()),
            padded_tokens=padded(lengths, cuts),
            micro_batches=list(_read(self.dataset, parts, self.cache)),
            prompts=prompts,
        )

    def _draw_prompts(self, epoch: int, step: int, numbers: np.ndarray) -> dict[int, Tensor]:
        if self.on_policy == 0:
            return {}
        # a key of four numbers, so that the draws are not those of the step sampler
        random = np.random.default_rng((self.sampler.seed, epoch, step, 0))
        drawn = numbers[random.random(len(numbers)) < self.on_policy]
        lengths = self.dataset.prompt_lengths(drawn)
        fits = (lengths > 0) & (lengths <= self.longest_prompt)
        drawn, lengths = drawn[fits], lengths[fits]
        samples = self.dataset.read(drawn) if len(drawn) else []
        prompts = [sample["input_ids"][:length] for sample, length in zip(samples, lengths, strict=True)]
        return dict(zip(drawn.tolist(), prompts, strict=True))


def cut(lengths: np.ndarray, micro_batch_size: int, micro_batch_tokens: int | None = None) -> list[slice]:
    """Where to cut samples, ordered by length, into micro-batches."""
    if len(lengths) == 0:
        return []
    starts = [0]
    for end, longest in enumerate(lengths.tolist(), start=1):
        samples = end - starts[-1]
        if samples > micro_batch_size if micro_batch_tokens is None else samples * longest > micro_batch_tokens:
            starts.append(end - 1)
    return [slice(start, end) for start, end in pairwise([*starts, len(lengths)])]


def together(prompts: Sequence[Tensor], most: int, most_tokens: int | None) -> list[list[int]]:
    """The places of the prompts of each batch, those of like length together.

    A batch has at most ``most`` prompts, and ``most_tokens`` with padding; a longer prompt comes alone.
    """
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    parts = cut(np.array([len(prompts[place]) for place in order]), most, most_tokens)
    starts = [(start, part.stop) for part in parts for start in range(part.start, part.stop, most)]
    return [order[start : min(start + most, stop)] for start, stop in starts]


def padded(lengths: np.ndarray, cuts: list[slice]) -> int:
    """Tokens of micro-batches with padding."""
    return int(sum(lengths[part].max() * len(lengths[part]) for part in cuts))


def turns(cuts: list[slice], rank: int, world_size: int) -> Iterator[slice]:
    """A rank's micro-batches; as many as any other rank's, since sharded models only run together: one may be empty."""
    for turn in range(rank, math.ceil(len(cuts) / world_size) * world_size, world_size):
        yield cuts[turn] if turn < len(cuts) else slice(0, 0)


def _read(
    dataset: TokenizedDataset, parts: Iterable[np.ndarray], cache: HiddenStateCache | None
) -> Iterator[MicroBatch]:
    for own in parts:
        samples = dataset.read(own) if len(own) else []
        batch = (dataset.collate or collate)(samples)
        if cache is not None:
            of_teacher = batch.for_teacher
            of_teacher.keys = sample_keys(own, samples)
            of_teacher.teacher_hidden = cache.read(of_teacher.keys)
        yield batch


def collate(samples: list[dict[str, Tensor]]) -> MicroBatch:
    """Pads samples to the longest and finds the positions that count; one padding token stands for none."""
    if not samples:
        none = torch.empty(0, dtype=torch.int64)
        return MicroBatch(torch.zeros(1, 1, dtype=torch.int64), none, none)

    def pad(name: str, value: int) -> Tensor:
        columns = [sample[name] for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    input_ids = pad("input_ids", 0)
    # the hidden state at a position belongs to the label that follows it
    next_labels = torch.nn.functional.pad(pad("labels", IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (next_labels != IGNORE_INDEX).nonzero()[:, 0]
    return MicroBatch(input_ids, positions, next_labels[positions])


def in_order(
    dataset: TokenizedDataset,
    numbers: Sequence[int],
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    cache: HiddenStateCache | None = None,
) -> Iterator[MicroBatch]:
    """A rank's micro-batches of given samples, those of like length together; for validation."""
    numbers = np.asarray(numbers)
    lengths = dataset.lengths(numbers)
    order = np.argsort(lengths, kind="stable")
    cuts = cut(lengths[order], micro_batch_size, micro_batch_tokens)
    return _read(dataset, (numbers[order][part] for part in turns(cuts, rank, world_size)), cache)


def load(step_batches: StepBatches, numbers: Sequence[int], num_workers: int) -> Fetched:
    """Step batches of a run by their numbers, fetched ahead by ``num_workers`` processes.

    Where shared memory does not take as many, fewer processes fetch fewer step batches, which rank 0 prints.
    """
    workers = min(num_workers, available_cores(), len(numbers))
    wished, free = steps_ahead(0, workers, math.inf), free_shared_memory()
    size = most_bytes(step_batches, measure=False)
    if steps_ahead(size, workers, free) != wished:
        size = most_bytes(step_batches)
    fitting, prefetched = steps_ahead(size, workers, free)
    if (fitting, prefetched) != wished and step_batches.rank == 0:
        print(
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, and a step takes up to {size / 1e6:,.1f} MB of it:"
            f" {fitting * prefetched} of {math.prod(wished)} steps are fetched ahead, by {fitting} of {workers}"
            " processes. A larger one lifts this, in Docker by `docker run --shm-size 8g`."
        )
    fewer = f"Lower --data.num_workers {num_workers}; with 0 the run itself fetches, without such processes."
    return fetch(step_batches, numbers, fitting, fewer, prefetched)


def most_bytes(step_batches: StepBatches, measure: bool = True) -> int:
    """At most so many bytes are the tensors of a step, of all ranks together.

    Without ``measure``, which reads the lengths of all samples, it is as if the longest sample came all the time.
    """
    dataset, samples = step_batches.dataset, min(step_batches.sampler.global_batch_size, len(step_batches.dataset))
    lengths = counts = np.full(samples, dataset.longest)
    if measure:
        lengths, counts = (_largest(of, len(dataset), samples) for of in (dataset.lengths, dataset.response_tokens))
    tokens = padded(lengths, cut(lengths, step_batches.micro_batch_size, step_batches.micro_batch_tokens))
    hidden = 0 if step_batches.cache is None else step_batches.cache.bytes_of_token_in_memory
    # ids are of 8 bytes, each response token has a position and a label, and each rank has all prompts
    prompts = step_batches.world_size * int(lengths.sum()) if step_batches.on_policy > 0 else 0
    # a teacher's own tokens come beside them, each with its place in the alignment
    of_teacher = samples * dataset.longest_of_teacher
    return 8 * (tokens + prompts + of_teacher) + (int(counts.sum()) + of_teacher) * (16 + hidden) + 48 * of_teacher


def _largest(of: Callable[[np.ndarray], np.ndarray], samples: int, most: int) -> np.ndarray:
    """The largest values over all samples of a dataset, rising."""
    found = np.empty(0, dtype=np.int64)
    for start in range(0, samples, PART):
        found = np.sort(np.concatenate([found, of(np.arange(start, min(start + PART, samples)))]))[-most:]
    return found
