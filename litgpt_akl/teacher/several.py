"""Several teachers and their caches, as training meets them: like one whose hidden states are one tensor for each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import lightning as L
import numpy as np
from torch import Tensor

from litgpt_akl.data.steps import MicroBatch
from litgpt_akl.models.several import TeacherMixture
from litgpt_akl.teacher.cache import Caches, TeacherCache
from litgpt_akl.teacher.teacher import Teacher


class JointCache:
    """The caches of several teachers for the samples of one dataset; None for a teacher that has none."""

    def __init__(self, parts: Sequence[TeacherCache | None]) -> None:
        self.parts = parts
        self.bytes_of_token_in_memory = sum(part.bytes_of_token_in_memory for part in parts if part is not None)

    def read(self, keys: np.ndarray) -> tuple[Tensor | None, ...]:
        """Each teacher's hidden states ``[tokens, D_i]`` of samples, None where not all are there."""
        return tuple(None if part is None else part.read(keys) for part in self.parts)


class SeveralCaches:
    """The caches of several teachers, some of whom may have none."""

    def __init__(self, of_each: Sequence[Caches]) -> None:
        self.of_each = of_each
        has_some = any(caches.training is not None for caches in of_each)
        self.training, self.validation = (
            JointCache([getattr(caches, name) for caches in of_each]) if has_some else None
            for name in ("training", "validation")
        )

    def flush(self) -> None:
        """Write what was added; raises UserError if the disk does not take it."""
        for caches in self.of_each:
            caches.flush()

    def share(self, fabric: L.Fabric) -> None:
        """From now on all processes know what each has added; all must call this together."""
        for caches in self.of_each:
            caches.share(fabric)


class SeveralTeachers:
    """Teachers that read the same micro-batches one after the other, each live or cached, and are averaged."""

    def __init__(self, of_each: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.of_each, self.weights = of_each, weights

    @property
    def model(self) -> TeacherMixture:
        """What the loss reads the heads of. What is not cached after all may have let whole teachers be loaded."""
        return TeacherMixture([teacher.model for teacher in self.of_each], self.weights)

    def hidden_states(
        self, batches: list[MicroBatch], cache: JointCache | None = None
    ) -> Iterator[tuple[MicroBatch, tuple[Tensor, ...]]]:
        """Micro-batches on the device, each with every teacher's final hidden states ``[n, D_i]`` at its positions.

        As of one teacher, what the caches lack is added to them, and all processes must ask together.
        """
        parts = [None] * len(self.of_each) if cache is None else cache.parts
        answers = [
            teacher.hidden_states([_for_one(batch, number) for batch in batches], part)
            for number, (teacher, part) in enumerate(zip(self.of_each, parts, strict=True))
        ]
        for found in zip(*answers, strict=True):
            yield found[0][0], tuple(hidden for _, hidden in found)


def _for_one(batch: MicroBatch, number: int) -> MicroBatch:
    """The micro-batch as one of the teachers meets it."""
    return replace(batch, teacher_hidden=None if batch.teacher_hidden is None else batch.teacher_hidden[number])
