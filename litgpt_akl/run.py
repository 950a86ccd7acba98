"""One run of the command: what it was asked for, and what it trains, from the start or from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.utils import instantiate_torch_optimizer

from litgpt_akl.args import DistillArgs
from litgpt_akl.checkpoint import load_training_state, read_training_state
from litgpt_akl.data.stores import Store
from litgpt_akl.errors import UserError
from litgpt_akl.memory_plan import MemoryPlan
from litgpt_akl.models import build_model, is_tied, set_up_teacher
from litgpt_akl.pair import Pair
from litgpt_akl.recipe import differences
from litgpt_akl.sharding import load_weights
from litgpt_akl.train import make_scheduler, total_steps, warmup_steps
from litgpt_akl.weights import fingerprint, open_weights


@dataclass
class Run:
    """One call of the command, checked."""

    pair: Pair
    plan: MemoryPlan
    """Its memory, with samples as long as they may be."""
    device_memory: float | None
    """GB, as told."""
    data: DataModule
    distill: DistillArgs
    teacher_dtype: torch.dtype
    train: TrainArgs
    eval: EvalArgs
    optimizer: str | dict
    seed: int
    resume: bool | Literal["auto"] | Path | None
    """What was asked for, and in :func:`make_state` the directory that it means."""
    accept_changes: bool
    keep_last: int | None
    on_nonfinite: Literal["stop", "skip"]
    out_dir: Path
    recipe: str


def make_optimizer(optimizer: str | dict, student: torch.nn.Module) -> torch.optim.Optimizer:
    """LitGPT's way from a name or a config to an optimizer; raises UserError if there is none such."""
    try:
        return instantiate_torch_optimizer(optimizer, student.parameters())
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--optimizer {optimizer!r} cannot be made: {error}.\nGive a class of torch.optim, such as AdamW, or its"
            " class_path and init_args."
        ) from error


def make_state(fabric: L.Fabric, run: Run, store: Store) -> dict[str, Any]:
    """Models, optimizer, scheduler and counters; with ``run.resume``, as they were when it was saved.

    Only process 0 reads weights.

    Raises:
        UserError: a checkpoint that cannot be read or does not fit, or one of another run.
    """
    pair, weights, tied = run.pair, {}, {}
    if fabric.is_global_zero:
        weights["student"] = open_weights(pair.student_dir, pair.student_config)
        weights["teacher"] = open_weights(pair.teacher_dir, pair.teacher_config)
        tied["student"] = is_tied(pair.student_dir, weights["student"], run.train.tie_embeddings)
        tied["teacher"] = is_tied(pair.teacher_dir, weights["teacher"], None)
    tied = fabric.broadcast(tied)
    student = build_model(fabric, pair.student_config, tied["student"])
    teacher = build_model(fabric, pair.teacher_config, tied["teacher"])
    teacher = set_up_teacher(fabric, teacher, run.teacher_dtype)
    student = fabric.setup_module(student)
    student.train()
    optimizer = fabric.setup_optimizers(make_optimizer(run.optimizer, student))
    steps, warmup = total_steps(run.train, len(store)), warmup_steps(run.train, len(store))
    state = {
        "student": student,
        "teacher": teacher,
        "optimizer": optimizer,
        "scheduler": make_scheduler(optimizer, warmup, steps, run.train.min_lr),
        "loss": run.distill.loss(),
        "vocab_size": pair.vocab_size,
        "tied": tied["student"],
        "data": {"samples": len(store), "fingerprint": store.fingerprint},
        "models": {role: fingerprint(directory) for role, directory in pair.directories.items()},
        "step_count": 0,
        "epoch": 0,
        "tokens": 0,
        "nonfinite_in_a_row": 0,
        "last_validation": -1,
    }
    load_weights(teacher, weights.get("teacher"))
    if run.resume is None:
        load_weights(student, weights.get("student"))
    else:
        resume(fabric, run, state)
    return state


def resume(fabric: L.Fabric, run: Run, state: dict) -> None:
    """Set ``state`` to what was saved, if it is of the same run; an optimizer's settings are those of the recipe.

    Raises:
        UserError: the run differs in what changes its result, and that was not accepted.
    """
    if fabric.is_global_zero and not run.accept_changes:
        _refuse_changes(run, state)
    optimizer, scheduler = state["optimizer"], state["scheduler"]
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    base_rates = scheduler.base_lrs
    load_training_state(run.resume, state)
    scheduler.base_lrs = base_rates
    for group, values, rate, factor in zip(
        optimizer.param_groups, settings, base_rates, scheduler.lr_lambdas, strict=True
    ):
        group.update(values, lr=rate * factor(scheduler.last_epoch))


def _refuse_changes(run: Run, state: dict) -> None:
    saved = read_training_state(run.resume)
    changes = differences((run.resume / "hyperparameters.yaml").read_text(encoding="utf-8"), run.recipe)
    for role, identity in state["models"].items():
        if saved["models"][role] != identity:
            changes.append(f"the {role} has other weights")
    if saved["data"] != state["data"]:
        samples = [f"{data['samples']:,}" for data in (saved["data"], state["data"])]
        changes.append(f"other training samples ({samples[0]} -> {samples[1]})")
    if changes:
        raise UserError(
            f"--resume: {run.resume} is of a run with another result: {'; '.join(changes)}.\n"
            "Give what it was started with, start anew without --resume, or accept this with --accept_changes true."
        )


def export_options(run: Run, state: dict) -> dict[str, Any]:
    """What lies beside the weights of this run's students."""
    return {
        "source_dir": run.pair.student_dir,
        "tied": state["tied"],
        "prompt_style": getattr(run.data, "prompt_style", None),
        "recipe": run.recipe,
    }
