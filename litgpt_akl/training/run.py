"""One run of the command: what it was asked for, and which steps, samples and day follow from that."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from litgpt.args import TrainArgs
from litgpt.prompts import PromptStyle

from litgpt_akl.config.args import Options
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import HiddenStateCache, MicroBatch, StepBatches, StepSampler, in_order, load
from litgpt_akl.data.workers import Fetched
from litgpt_akl.files.manifest import Damaged, read_manifest
from litgpt_akl.loss.aligned_loss import SharedIds
from litgpt_akl.memory.estimate import MemoryEstimate
from litgpt_akl.models import chat_template
from litgpt_akl.models.pair import Pair
from litgpt_akl.models.prompt_format import PromptFormat
from litgpt_akl.teacher.cache_identity import read_identity

Splits = tuple[TokenizedDataset, TokenizedDataset]
"""A run's training samples and its validation samples."""


class Day(NamedTuple):
    """A day, and where it was found."""

    date: str
    """As 2026-11-27, wherever the clock is."""
    recorded_in: str | None
    """A checkpoint or a teacher cache; None if it is the day of this call."""

    def __str__(self) -> str:
        source = "the day of this call" if self.recorded_in is None else f"as {self.recorded_in} was made with"
        return f"The chat template writes a date into the prompts: {self.date}, {source}"


def choose_day(checkpoints: Iterable[Path], *cache_dirs: str | None) -> Day:
    """The day that one of some checkpoints, or else a teacher cache, was made with, or else that of this call.

    Raises UserError if a cache is there and cannot be read.
    """
    for directory in checkpoints:
        with suppress(Damaged):
            if found := _date_of(read_manifest(directory).get("data")):
                return Day(found, str(directory))
    for cache_dir in cache_dirs:
        if cache_dir is not None and (found := _date_of(read_identity(cache_dir))):
            return Day(found, cache_dir)
    return Day(chat_template.today(), None)


def _date_of(entries: Any) -> str | None:
    with suppress(ValueError, TypeError, AttributeError):
        return date.fromisoformat(entries.get("date")).isoformat()
    return None


@dataclass
class Run(Options):
    """One call of the command, checked.

    ``precision``, ``devices``, ``data`` and ``optimizer`` are chosen. In the processes that train, ``resume`` is the
    directory that was asked for, or None.
    """

    pair: Pair
    memory: MemoryEstimate
    """With samples as long as they may be."""
    recipe: str
    """The options as YAML."""
    prompt_format: PromptFormat = PromptFormat()
    """How the student is asked; known once the data is read."""
    stop: list[list[int]] = field(default_factory=list)
    """What ends a response, wherever one is generated; known once the data is read."""
    shared_ids: SharedIds | None = None
    """Those of a student and a teacher of other tokenizers; known once the data is read."""
    sample: dict[str, Any] | None = None
    """The first training sample, as it is shown; in process 0, once the data is read."""

    @property
    def micro_batch(self) -> tuple[int, int | None]:
        """Samples that go through a model together, and if told, the tokens that count in their place."""
        return self.train.micro_batch_size, getattr(self.data, "micro_batch_tokens", None)

    @property
    def prompt_style(self) -> PromptStyle | None:
        """What the prompts are made with, if the data module tells."""
        return getattr(self.data, "prompt_style", None)

    @property
    def longest_sample(self) -> int:
        """Tokens that a prompt with the student's response may have."""
        limits = (self.pair.context_length, self.train.max_seq_length, self.micro_batch[1])
        return min(limit for limit in limits if limit is not None)

    def step_sampler(self, dataset: TokenizedDataset) -> StepSampler:
        """Which samples make which optimizer step."""
        return StepSampler(len(dataset), self.train.global_batch_size, self.seed, dataset.lengths, dataset.chunk_ends)

    def step_batches(self, fabric: L.Fabric, dataset: TokenizedDataset, cache: HiddenStateCache | None) -> StepBatches:
        """This process's share of every step's samples, all of them as they were recorded."""
        share = fabric.global_rank, fabric.world_size
        return StepBatches(dataset, self.step_sampler(dataset), *self.micro_batch, *share, cache)

    def fetch(self, step_batches: StepBatches, numbers: Sequence[int]) -> Fetched:
        """The step batches of those numbers, fetched ahead; to be stopped in the end."""
        return load(step_batches, numbers, getattr(self.data, "num_workers", 0))

    def validation_records(self, dataset: TokenizedDataset) -> range:
        """The numbers of the samples that every validation reads."""
        return range(min(len(dataset), self.eval.max_iters * self.train.micro_batch_size))

    def validation_batches(
        self, fabric: L.Fabric, dataset: TokenizedDataset, cache: HiddenStateCache | None
    ) -> Iterator[MicroBatch]:
        """This process's share of these samples."""
        share = fabric.global_rank, fabric.world_size
        return in_order(dataset, self.validation_records(dataset), *self.micro_batch, *share, cache)

    def beside_weights(self, state: dict) -> dict[str, Any]:
        """What lies beside the weights of this run's students, as ``write_student`` takes it."""
        described = {"prompt_format": self.prompt_format, "recipe": self.recipe, "tied": state["tied"]}
        return {**described, "model_files": self.pair.student_files, "ids": state["student"].config.padded_vocab_size}


def total_steps(train: TrainArgs, samples: int) -> int:
    """Optimizer steps of the whole run."""
    limits = [train.max_steps]
    if train.epochs is not None:
        limits.append(train.epochs * math.ceil(samples / train.global_batch_size))
    return min(limit for limit in limits if limit is not None)


def describe_steps(train: TrainArgs, samples: int) -> str:
    """The length of a run, for people."""
    steps = total_steps(train, samples)
    epochs = steps / math.ceil(samples / train.global_batch_size)
    return f"{steps:,} steps of {train.global_batch_size:,} records, {epochs:.2g} epochs"


def warmup_steps(train: TrainArgs, samples: int) -> int:
    """Optimizer steps with a rising learning rate; if nothing is set, a tenth of the run and at most 100."""
    steps = total_steps(train, samples)
    if train.lr_warmup_fraction is not None:
        return min(steps, math.ceil(train.lr_warmup_fraction * samples / train.global_batch_size))
    if train.lr_warmup_steps is not None:
        return min(steps, train.lr_warmup_steps)
    return min(100, steps // 10)
