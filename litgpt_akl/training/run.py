"""One run of the command: what it was asked for, and which samples, day and export follow from that."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.utils import instantiate_torch_optimizer

from litgpt_akl.config.args import DistillArgs, LoRAArgs, TeacherArgs
from litgpt_akl.config.recipe import differences
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import Memory, MicroBatch, StepBatches, StepSampler, in_order, load
from litgpt_akl.data.workers import Fetched
from litgpt_akl.files.manifest import Damaged, read_manifest
from litgpt_akl.memory.memory_plan import MemoryPlan
from litgpt_akl.messages import UserError
from litgpt_akl.models import chat_template
from litgpt_akl.models.pair import Pair
from litgpt_akl.models.weights import fingerprint, is_of, weights_files
from litgpt_akl.teacher.identity import read_identity


class Day(NamedTuple):
    """A day, and where it was found."""

    date: str
    """As 2026-11-27, wherever the clock is."""
    recorded_in: str | None
    """A checkpoint or a teacher cache; None if it is the day of this call."""

    def __str__(self) -> str:
        source = "the day of this call" if self.recorded_in is None else f"as {self.recorded_in} was made with"
        return f"The chat template writes a date into the prompts: {self.date}, {source}"


def choose_day(checkpoints: Iterable[Path], cache_dir: str | None = None) -> Day:
    """The day that one of some checkpoints, or else a teacher cache, was made with, or else that of this call.

    Raises:
        UserError: the cache is there and cannot be read.
    """
    for directory in checkpoints:
        with suppress(Damaged):
            if found := _date_of(read_manifest(directory).get("data")):
                return Day(found, str(directory))
    if cache_dir is not None and (found := _date_of(read_identity(cache_dir))):
        return Day(found, cache_dir)
    return Day(chat_template.today(), None)


def _date_of(entries: Any) -> str | None:
    with suppress(ValueError, TypeError, AttributeError):
        return date.fromisoformat(entries.get("date")).isoformat()
    return None


@dataclass
class Run:
    """One call of the command, checked."""

    pair: Pair
    plan: MemoryPlan
    """Its memory, with samples as long as they may be."""
    device_memory: float | None
    """GB, as told."""
    options: list[str]
    """Names of the command's options."""
    data: DataModule
    distill: DistillArgs
    lora: LoRAArgs
    teacher: TeacherArgs
    activation_checkpointing: bool
    compile: bool
    train: TrainArgs
    eval: EvalArgs
    optimizer: str | dict
    seed: int
    resume: bool | Literal["auto"] | Path | None
    """What was asked for, and in :func:`~litgpt_akl.training.state.make_state` the directory that it means."""
    accept_changes: bool
    overwrite: bool
    save_minutes: float | None
    keep_last: int | None
    export_hf: bool
    on_nonfinite: Literal["stop", "skip"]
    out_dir: Path
    recipe: str

    @property
    def micro_batch(self) -> tuple[int, int | None]:
        """Samples that go through a model together, and if told, the tokens that count in their place."""
        return self.train.micro_batch_size, getattr(self.data, "micro_batch_tokens", None)


HOW_IT_WORKS = {"fused", "foreach", "capturable", "differentiable"}
"""Options of an optimizer that PyTorch can fuse, which do not go with each other."""


def make_optimizer(optimizer: str | dict, student: torch.nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """LitGPT's way from a name or a config to an optimizer; raises UserError if there is none such.

    Args:
        optimizer: a name, or class_path and init_args.
        student: has the parameters.
        fused: whether one that PyTorch has fused is fused, unless its config says how it is to work: on a CPU a fused
            AdamW takes a fifth of the time. For where it cannot be, see ``optimizer_trial.check_optimizer``.
    """
    told = isinstance(optimizer, dict) and not HOW_IT_WORKS.isdisjoint(optimizer["init_args"])
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if isinstance(optimizer, dict):
        # LitGPT writes into them
        optimizer = {**optimizer, "init_args": {**optimizer["init_args"]}}
    try:
        return instantiate_torch_optimizer(optimizer, trained, **({"fused": True} if fused and not told else {}))
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--optimizer {optimizer!r} cannot be made: {error}.\nGive a class of torch.optim, such as AdamW, or its"
            " class_path and init_args."
        ) from error


def step_sampler(run: Run, dataset: TokenizedDataset) -> StepSampler:
    """Which samples make which optimizer step."""
    return StepSampler(len(dataset), run.train.global_batch_size, run.seed, dataset.lengths, dataset.chunk_ends)


def make_step_batches(fabric: L.Fabric, run: Run, dataset: TokenizedDataset, memory: Memory | None) -> StepBatches:
    """This process's share of every step's samples, all of them as they were recorded."""
    share = fabric.global_rank, fabric.world_size
    return StepBatches(dataset, step_sampler(run, dataset), *run.micro_batch, *share, memory)


def validation_records(run: Run, dataset: TokenizedDataset) -> range:
    """The numbers of the samples that every validation reads."""
    return range(min(len(dataset), run.eval.max_iters * run.train.micro_batch_size))


def validation_batches(
    fabric: L.Fabric, run: Run, dataset: TokenizedDataset, memory: Memory | None
) -> Iterator[MicroBatch]:
    """This process's share of them."""
    share = fabric.global_rank, fabric.world_size
    return in_order(dataset, validation_records(run, dataset), *run.micro_batch, *share, memory)


def load_step_batches(run: Run, step_batches: StepBatches, numbers: Sequence[int]) -> Fetched:
    """The windows of those numbers, fetched ahead; to be stopped in the end."""
    return load(step_batches, numbers, getattr(run.data, "num_workers", 0))


def identity(run: Run, dataset: TokenizedDataset, teacher_weights: str | None = None) -> dict[str, Any]:
    """What is trained on what, as a checkpoint keeps it; ``teacher_weights`` is told where they need not be there."""
    student, teacher = run.pair.student_dir, run.pair.teacher_dir
    models = {"student": fingerprint(student)}
    if teacher_weights or weights_files(teacher):
        models["teacher"] = teacher_weights or fingerprint(teacher)
    data = {"samples": len(dataset), "fingerprint": dataset.fingerprint}
    if date := getattr(run.data, "date", None):
        data["date"] = date
    return {"data": data, "models": models}


def changes_since(run: Run, recipe: str, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What changes a run's result, between one that was saved and this one.

    Args:
        run: This one.
        recipe: The saved one's, as YAML.
        saved: Its :func:`identity`, and maybe more.
        current: This run's.
    """
    changes = differences(recipe, run.recipe)
    for role, weights in current["models"].items():
        recorded = saved["models"].get(role, weights)
        if recorded != weights and not is_of(recorded, run.pair.directories[role]):
            changes.append(f"the {role} has other weights")
    if saved["data"] != current["data"]:
        samples = [f"{data['samples']:,}" for data in (saved["data"], current["data"])]
        dates = [data.get("date") for data in (saved["data"], current["data"])]
        written = f", prompts of {dates[0] or 'an unknown day'} -> {dates[1]}" if dates[0] != dates[1] else ""
        changes.append(f"other training samples ({samples[0]} -> {samples[1]}{written})")
    return changes


def longest_sample(run: Run) -> int:
    """Tokens that a prompt with the student's own answer may have."""
    limits = (run.pair.context_length, run.train.max_seq_length, run.micro_batch[1])
    return min(limit for limit in limits if limit is not None)


def export_options(run: Run, state: dict) -> dict[str, Any]:
    """What lies beside the weights of this run's students."""
    return {
        "model_files": run.pair.student_files,
        "tied": state["tied"],
        "prompt_style": getattr(run.data, "prompt_style", None),
        "recipe": run.recipe,
        "ids": state["student"].config.padded_vocab_size,
    }
