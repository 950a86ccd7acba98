"""Tokenised samples that are read by number: in memory, or from memory-mapped Arrow files."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from litgpt_akl.data.encoding import make_labels
from litgpt_akl.files.directories import explain_failure
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SEEN = 256
"""Samples by which it is seen how responses end."""


class TokenizedDataset:
    """Tokenised samples, read by number; by default every token of them counts."""

    fingerprint: str
    """Equal for equal samples."""
    tokens: int
    """Of all samples together."""
    longest: int
    """Tokens of the longest sample."""
    all_response_tokens: int
    """Of all samples together: what :meth:`response_tokens` adds up to."""
    chunk_ends: np.ndarray | None = None
    """``[chunks]``: where each chunk ends, if reading a sample means fetching the chunk that it lies in."""
    place: Callable[[int], str]
    """Where a sample comes from, for a person."""
    collate: Callable[[list[dict[str, Tensor]]], Any] | None = None
    """What makes a micro-batch of samples, if they are not padded as usual."""

    def __len__(self) -> int:
        raise NotImplementedError

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each sample, ``[n]``."""
        raise NotImplementedError

    def response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each sample that a token before them predicts and that count in the loss, ``[n]``."""
        return self.lengths(numbers) - 1

    def teacher_response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each sample that a teacher's hidden states stand before, ``[n]``."""
        return self.response_tokens(numbers)

    @property
    def teacher_tokens(self) -> int:
        """Of all samples together, as the teacher reads them."""
        return self.tokens

    @property
    def teacher_response_count(self) -> int:
        """Those of all samples together."""
        return self.all_response_tokens

    @property
    def longest_of_teacher(self) -> int:
        """Tokens of the longest sample that the teacher reads in tokens of its own; 0 if these are the student's."""
        return 0

    def prompt_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each sample before the first that counts, ``[n]``."""
        return np.zeros(len(numbers), dtype=np.int64)

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """``input_ids`` and ``labels`` of each, both ``[length]`` int64, labels not shifted, -100 where not counted."""
        raise NotImplementedError


def digest(sample: dict[str, Tensor]) -> int:
    """Tells samples apart, by their ids and by which of these count: a signed number of 64 bits."""
    found = xxhash.xxh3_64(sample["input_ids"].numpy().tobytes())
    found.update((sample["labels"] != IGNORE_INDEX).numpy().tobytes())
    return int.from_bytes(found.digest(), "big", signed=True)


def sample_keys(numbers: Sequence[int], samples: list[dict[str, Tensor]]) -> np.ndarray:
    """The number and the digest of each sample, ``[samples, 2]``: by these a cache knows them."""
    # a teacher of another tokenizer reads ids of its own
    keys = [(number, digest(sample.get("teacher", sample))) for number, sample in zip(numbers, samples, strict=True)]
    return np.array(keys, dtype=np.int64).reshape(-1, 2)


def turn_ends(dataset: TokenizedDataset, special_ids: set[int]) -> list[int]:
    """The special tokens that end responses in the first samples of a dataset, as a model learns to end them."""
    found: dict[int, None] = {}
    for sample in dataset.read(range(min(SEEN, len(dataset)))):
        counted = sample["labels"] != IGNORE_INDEX
        last = counted & ~torch.cat((counted[1:], counted.new_zeros(1)))
        found |= dict.fromkeys(sample["input_ids"][last].tolist())
    return [id for id in found if id in special_ids]


class InMemoryDataset(TokenizedDataset):
    """Samples in two flat arrays."""

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
        arrays = {"input_ids": self._input_ids, "labels": self._labels}
        spans = [slice(self._ends[n] - self._lengths[n], self._ends[n]) for n in numbers]
        return [{name: torch.from_numpy(ids[span].astype(np.int64)) for name, ids in arrays.items()} for span in spans]


ALL = (0.0, math.inf)
"""Of the draws of records."""


class ArrowDataset(TokenizedDataset):
    """Rows of a prepared dataset, all of them good; see ``preparation.row_schema``.

    Given are the ends ``[low, high)`` between which their draws lie, or the rows' numbers, ``[samples]``, in order.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        draws: tuple[float, float] = ALL,
        *,
        numbers: np.ndarray | None = None,
        least_response: int = 0,
        mask_prompt: bool,
        settings: str,
        place: Callable[[int, int, int], str],
    ) -> None:
        """Reads the rows' lengths, a hundred thousand at a time; ``place`` tells of a file, a line and a row.

        Rows of fewer response tokens than ``least_response`` are left out.
        """
        dataset, (low, high) = dataset.with_format("arrow"), draws
        self._mask_prompt, self._place, self._numbers = mask_prompt, place, numbers
        self.tokens = self.longest = self.all_response_tokens = samples = first = 0
        digest = xxhash.xxh3_128(f"{settings} {mask_prompt}".encode())
        is_meant = None
        if numbers is not None:
            digest.update(numbers)
            is_meant = np.zeros(len(dataset), dtype=bool)
            is_meant[numbers] = True
        # before any rows are chosen, since reading two million chosen ones takes ten seconds
        for table in dataset.select_columns(CHOSEN_BY).iter(100_000):
            length, draw, count = (table[name].to_numpy() for name in CHOSEN_BY)
            chosen = _choose(table, low, high, least_response)
            if is_meant is not None:
                chosen &= is_meant[first : first + len(length)]
            first += len(length)
            length, draw, count = length[chosen], draw[chosen], count[chosen]
            samples += len(length)
            self.tokens += int(length.sum())
            self.all_response_tokens += int((count if mask_prompt else length - 1).sum())
            self.longest = max(self.longest, int(length.max(initial=0)))
            # a draw comes from the hash of its record
            digest.update(length)
            digest.update(draw)
        self.fingerprint = digest.hexdigest()
        if numbers is None and samples < len(dataset):
            self._numbers = (
                _numbers_between(dataset, low, high, least_response) if samples else np.empty(0, dtype=np.int64)
            )
        # a choice of columns is made once, as it copies the dataset's description
        views = (("length",), ("response_tokens",), ("responses",), ("input_ids", "responses"), ("file", "line"))
        self._views = {names: dataset.select_columns([*names]) for names in views}

    def __len__(self) -> int:
        return len(self._views[("length",)]) if self._numbers is None else len(self._numbers)

    def _columns(self, numbers: Sequence[int], *names: str) -> list["pa.ChunkedArray"]:
        rows = self._views[names][numbers if self._numbers is None else self._numbers[numbers]]
        return [rows[name] for name in names]

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self._columns(numbers, "length")[0].to_numpy()

    def response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        if not self._mask_prompt:
            return super().response_tokens(numbers)
        return self._columns(numbers, "response_tokens")[0].to_numpy()

    def prompt_lengths(self, numbers: np.ndarray) -> np.ndarray:
        if not self._mask_prompt:
            return super().prompt_lengths(numbers)
        responses = self._columns(numbers, "responses")[0].combine_chunks()
        # every sample has one, and the first number of its list is where the first one begins
        return responses.values.to_numpy()[responses.offsets.to_numpy()[:-1]].astype(np.int64)

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        columns = map(split_lists, self._columns(numbers, "input_ids", "responses"))
        return [self._sample(ids, responses) for ids, responses in zip(*columns, strict=True)]

    def _sample(self, input_ids: np.ndarray, responses: np.ndarray) -> dict[str, Tensor]:
        input_ids = torch.from_numpy(input_ids.astype(np.int64))
        labels = make_labels(input_ids, responses) if self._mask_prompt else input_ids
        return {"input_ids": input_ids, "labels": labels}

    def prompt(self, number: int) -> Tensor:
        """The ids of a sample before its first response."""
        ids, responses = (split_lists(column)[0] for column in self._columns([number], "input_ids", "responses"))
        # where whole samples count, a response may be cut off entirely
        return torch.from_numpy(ids[: responses[0] if len(responses) else None].astype(np.int64))

    def place(self, number: int) -> str:
        file, line = (column[0].as_py() for column in self._columns([number], "file", "line"))
        return self._place(file, line, int(number if self._numbers is None else self._numbers[number]))


def split_lists(column: "pa.ChunkedArray") -> list[np.ndarray]:
    """The lists of a column, one for each row."""
    lists = column.combine_chunks()
    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    return np.split(values[: offsets[-1]], offsets[:-1])[1:]


CHOSEN_BY = ["length", "draw", "response_tokens"]
"""Columns."""


def _choose(table: "pa.Table", low: float, high: float, least_response: int) -> np.ndarray:
    """Which rows are meant. What has no response can be answered, and not be held against one: it is never held out."""
    length, draw, count = (table[name].to_numpy() for name in CHOSEN_BY)
    is_between = (low <= draw) & (draw < high)
    return (length > 0) & (is_between & (count >= least_response) | (count == 0) & (least_response == 0))


def _numbers_between(dataset: "datasets.Dataset", low: float, high: float, least_response: int) -> np.ndarray:
    """Memory-mapped, since they may be more than memory holds; raises UserError if the disk does not take them."""
    directory = Path(gettempdir())
    way_out = "Make room there, or name another directory by the environment variable TMPDIR."
    # nameless, so that nobody else can change it, and gone when this process is
    with explain_failure(directory, way_out), TemporaryFile(dir=directory) as file:
        first = 0
        for table in dataset.select_columns(CHOSEN_BY).iter(100_000):
            chosen = _choose(table, low, high, least_response)
            file.write(first + np.flatnonzero(chosen))
            first += len(chosen)
        file.flush()
        return np.memmap(file, dtype=np.int64, mode="r")
