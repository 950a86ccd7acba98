"""Samples for a student and a teacher of other tokenizers: each reads the record in its own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from litgpt.tokenizer import Tokenizer
from torch import Tensor

from litgpt_akl.data.alignment import align_response
from litgpt_akl.data.dataset import ArrowDataset, split_lists
from litgpt_akl.data.encoding import Encoded, make_labels
from litgpt_akl.data.steps import MicroBatch, collate
from litgpt_akl.loss.aligned_loss import NONE, Alignment
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.models.shared_vocabulary import token_bytes

if TYPE_CHECKING:
    import datasets

COLUMNS = ("teacher_input_ids", "teacher_responses", "chunks")
"""Of prepared data, beside those of the student: the teacher's ids, where its responses lie in them, and the chunks of
all responses in order, each the number of the student's tokens and that of the teacher's."""
SEEN = 256
"""Samples by which it is seen how much of two models' tokens is aligned."""


class OtherTokenizer(NamedTuple):
    """A teacher that has another tokenizer, as far as data goes."""

    checkpoint_dir: Path
    tokenizer: Tokenizer
    vocab_size: int
    """Ids that it has."""
    context_length: int
    """Tokens that it can read."""


class Aligner:
    """Aligns what two encoders make of a record."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer) -> None:
        self._tokens = [(token_bytes(of), of.special_ids | {of.eos_id}) for of in (student, teacher)]

    def columns(self, student: Encoded, teacher: Encoded) -> dict[str, Any]:
        """The :data:`COLUMNS` of a record.

        Raises:
            ValueError: its responses are not the same text in both models' tokens.
        """
        if len(student.spans) != len(teacher.spans):
            counts = len(student.spans) // 2, len(teacher.spans) // 2
            raise ValueError(f"has {counts[0]} responses in the student's form and {counts[1]} in the teacher's")
        chunks: list[int] = []
        for place in range(0, len(student.spans), 2):
            sides, ends = [], []
            for encoded, (known, special) in zip((student, teacher), self._tokens, strict=True):
                ids = encoded.ids[slice(*encoded.spans[place : place + 2])]
                sides.append([known.get(id, b"") for id in ids])
                ends.append(ids[-1] in special)
            chunks += [count for chunk in align_response(*sides, *ends) for count in chunk]
        responses = np.array(teacher.spans, dtype=np.int32)
        return dict(zip(COLUMNS, (teacher.ids, responses, np.array(chunks, dtype=np.int32)), strict=True))


@dataclass
class AlignedBatch(MicroBatch):
    """A micro-batch of the student's tokens, with the teacher's of the same records."""

    of_teacher: MicroBatch | None = None
    alignment: Alignment | None = None

    @property
    def for_teacher(self) -> MicroBatch:
        return self.of_teacher


class AlignedDataset(ArrowDataset):
    """Rows that also hold the teacher's tokens; which ids stand for the same is told before any batch is made."""

    partners: np.ndarray | None = None
    """The teacher's id, or -1, for each of the student's ids, ``[ids]``."""

    def __init__(self, dataset: "datasets.Dataset", *arguments, **options) -> None:
        super().__init__(dataset, *arguments, **options)
        self._views[COLUMNS] = dataset.with_format("arrow").select_columns([*COLUMNS])
        self._teacher_tokens = self._teacher_count = self._longest_of_teacher = 0
        for start in range(0, len(self), 10_000):
            lengths, counts = self._teacher_counts(np.arange(start, min(start + 10_000, len(self))))
            self._teacher_tokens += int(lengths.sum())
            self._teacher_count += int(counts.sum())
            self._longest_of_teacher = max(self._longest_of_teacher, int(lengths.max(initial=0)))

    @property
    def teacher_tokens(self) -> int:
        return self._teacher_tokens

    @property
    def teacher_response_count(self) -> int:
        return self._teacher_count

    @property
    def longest_of_teacher(self) -> int:
        return self._longest_of_teacher

    def _teacher_counts(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, responses, _ = map(split_lists, self._columns(numbers, *COLUMNS))
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        counts = (int((spans[1::2] - spans[::2]).sum()) for spans in responses)
        return lengths, np.fromiter(counts, dtype=np.int64, count=len(ids))

    def teacher_response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        return self._teacher_counts(numbers)[1]

    def read(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        columns = map(split_lists, self._columns(numbers, *COLUMNS))
        samples = super().read(numbers)
        for sample, ids, responses, chunks in zip(samples, *columns, strict=True):
            input_ids = torch.from_numpy(ids.astype(np.int64))
            sample["teacher"] = {"input_ids": input_ids, "labels": make_labels(input_ids, responses)}
            sample["chunks"] = chunks.reshape(-1, 2)
        return samples

    def collate(self, samples: list[dict[str, Any]]) -> AlignedBatch:
        own, of_teacher = collate(samples), collate([sample["teacher"] for sample in samples])
        alignment = align_batch([sample["chunks"] for sample in samples], own.labels, of_teacher.labels, self.partners)
        return AlignedBatch(own.input_ids, own.positions, own.labels, of_teacher=of_teacher, alignment=alignment)

    def ends(self, special: tuple[set[int], set[int]]) -> list[tuple[int, int]]:
        """Pairs of the student's and the teacher's special tokens that end the first samples' responses."""
        found: dict[tuple[int, int], None] = {}
        for sample in self.read(range(min(SEEN, len(self)))):
            labels = [of["labels"][of["labels"] != IGNORE_INDEX].tolist() for of in (sample, sample["teacher"])]
            at = np.cumsum(sample["chunks"], axis=0) - 1
            for chunk, places in zip(sample["chunks"].tolist(), at.tolist(), strict=True):
                ids = tuple(of[place] for of, place in zip(labels, places, strict=True))
                if chunk == [1, 1] and all(id in some for id, some in zip(ids, special, strict=True)):
                    found[ids] = None
        return [*found]

    def shares(self) -> dict[str, float]:
        """How the first samples' response tokens of the student are compared: shares of all of them, by name."""
        numbers = range(min(SEEN, len(self)))
        alignment = self.collate(self.read(numbers)).alignment
        positions, others = len(alignment.student_positions), alignment.student_chunks
        total = max(1, positions + len(others))
        alone = int((others == NONE).sum())
        return {"aligned": positions / total, "chunks": (len(others) - alone) / total, "alone": alone / total}


def align_batch(chunks: list[np.ndarray], labels: Tensor, teacher_labels: Tensor, partners: np.ndarray) -> Alignment:
    """How the response tokens of samples, with ``chunks`` ``[k, 2]`` each, belong together.

    ``labels`` ``[n]`` and ``teacher_labels`` ``[n']`` are the ids of all samples' responses, one after the other.
    """
    counts = np.concatenate([np.empty((0, 2), dtype=np.int64), *chunks]).astype(np.int64)
    ends = np.cumsum(counts, axis=0)
    starts, ids, other_ids = ends - counts, labels.numpy(), teacher_labels.numpy()
    single = (counts == 1).all(axis=1)
    is_position = single.copy()
    is_position[single] = partners[ids[starts[single, 0]]] == other_ids[starts[single, 1]]
    # numbers of those chunks that have tokens of both and are no position
    both = ~is_position & (counts > 0).all(axis=1)
    numbers = np.where(both, np.cumsum(both) - 1, NONE)
    of_tokens = [np.repeat(numbers, counts[:, side]) for side in (0, 1)]
    others = np.flatnonzero(np.repeat(~is_position, counts[:, 0]))
    teacher_others = np.flatnonzero(of_tokens[1] != NONE)
    arrays = starts[is_position, 0], starts[is_position, 1], others, of_tokens[0][others]
    arrays += teacher_others, of_tokens[1][teacher_others]
    return Alignment(*map(torch.from_numpy, arrays), int(both.sum()))
