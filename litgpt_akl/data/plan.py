"""Which samples make which optimizer step: a pure function of seed, epoch and lengths, in little memory at any size.

An epoch's order is a permutation that is computed position by position, so no list of all samples is ever made. From
it, pools of some hundred samples are taken in turn; each is sorted by length and cut into optimizer steps, which come
in a random order. So a step's samples are of like length (little is padding), every sample comes once per epoch, and a
position in training is two integers (epoch, step).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

POOL = 512
"""Samples that are sorted by length together, or a global batch if that is more."""


@dataclass
class Plan:
    """The steps of every epoch over a store of samples."""

    samples: int
    global_batch_size: int
    seed: int
    lengths: Callable[[np.ndarray], np.ndarray]
    """Tokens of each of the samples whose numbers are given."""
    chunk_ends: np.ndarray | None = None
    """``[chunks]``: where each chunk ends, of a store that is fetched chunk by chunk; its samples stay together."""

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
        return self._cut(epoch, pool, numbers)

    def _cut(self, epoch: int, pool: int, numbers: np.ndarray) -> list[np.ndarray]:
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
