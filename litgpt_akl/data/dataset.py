"""Stores: tokenised samples that are read by number."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from litgpt_akl.loss.head_loss import IGNORE_INDEX


class Store(Protocol):
    """Tokenised samples, read by number."""

    fingerprint: str
    """Equal for equal samples."""
    tokens: int
    """Of all samples together."""
    longest: int
    """Tokens of the longest sample."""
    all_response_tokens: int
    """Of all samples together: what :meth:`response_tokens` adds up to."""
    chunk_ends: np.ndarray | None
    """``[chunks]``: where each chunk ends, if reading a sample means fetching the chunk that it lies in."""

    def __len__(self) -> int: ...

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each sample, ``[n]``."""

    def response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each sample that a token before them predicts and that count in the loss, ``[n]``."""

    def prompt_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each sample before the first that counts, ``[n]``."""

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """``input_ids`` and ``labels`` of each, both ``[length]`` int64, labels not shifted, -100 where not counted."""

    def place(self, number: int) -> str:
        """Where a sample comes from, for a person."""


def digest(sample: dict[str, Tensor]) -> int:
    """Tells samples apart, by their ids and by which of these count: a signed number of 64 bits."""
    found = xxhash.xxh3_64(sample["input_ids"].numpy().tobytes())
    found.update((sample["labels"] != IGNORE_INDEX).numpy().tobytes())
    return int.from_bytes(found.digest(), "big", signed=True)


class MemoryStore:
    """Samples in two flat arrays."""

    chunk_ends = None

    def __init__(
        self, input_ids: np.ndarray, labels: np.ndarray, ends: np.ndarray, place: Callable[[int], str]
    ) -> None:
        self._input_ids, self._labels, self._ends, self.place = input_ids, labels, ends, place
        self._lengths = np.diff(ends, prepend=0)
        self.tokens, self.longest = int(self._lengths.sum()), int(self._lengths.max(initial=0))
        counted = labels != IGNORE_INDEX
        # no token comes before the first of a sample, so nothing predicts it
        counted[(ends - self._lengths)] = False
        counts = np.cumsum(counted, dtype=np.int64)
        self._response_tokens = np.diff(counts[ends - 1], prepend=0)
        self.all_response_tokens = int(self._response_tokens.sum())
        self.fingerprint = xxhash.xxh3_128_hexdigest(b"".join(map(np.ascontiguousarray, (input_ids, labels, ends))))

    def __len__(self) -> int:
        return len(self._ends)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self._lengths[numbers]

    def response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        return self._response_tokens[numbers]

    def prompt_lengths(self, numbers: np.ndarray) -> np.ndarray:
        ends = self._ends[numbers]
        labels = (self._labels[end - length : end] for end, length in zip(ends, self._lengths[numbers], strict=True))
        return np.fromiter((int((of != IGNORE_INDEX).argmax()) for of in labels), dtype=np.int64, count=len(ends))

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        return [self._sample(slice(self._ends[n] - self._lengths[n], self._ends[n])) for n in numbers]

    def _sample(self, span: slice) -> dict[str, Tensor]:
        return {
            "input_ids": torch.from_numpy(self._input_ids[span].astype(np.int64)),
            "labels": torch.from_numpy(self._labels[span].astype(np.int64)),
        }
