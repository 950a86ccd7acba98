"""What a run trains, from the start or from a checkpoint: models, optimizer, scheduler and counters."""

from functools import partial
from typing import Any

import lightning as L
import torch
from litgpt.model import GPT

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.files.changes import WAY_OUT
from litgpt_akl.files.manifest import damage
from litgpt_akl.messages import UserError
from litgpt_akl.models.generation import stop_sequences
from litgpt_akl.models.gpt import (
    build_model,
    checkpoint_activations,
    compile_blocks,
    empty_weights,
    is_tied,
    load_frozen,
    set_up_teacher,
)
from litgpt_akl.models.lora import lora_config, with_new_adapters
from litgpt_akl.models.padding import config_without_padding, count_ids, without_padding
from litgpt_akl.models.parallel import load_weights
from litgpt_akl.models.weights import open_weights
from litgpt_akl.teacher.cache import Caches, read_head, write_head
from litgpt_akl.teacher.teacher import HeadOnly, Teacher
from litgpt_akl.training.checkpoint import draw_own_numbers, load_training_state, read_training_state
from litgpt_akl.training.on_policy import OnPolicySamples
from litgpt_akl.training.run import Run, changes_since, identity, longest_sample, make_optimizer
from litgpt_akl.training.train import make_scheduler, total_steps, warmup_steps


def make_state(fabric: L.Fabric, run: Run, dataset: TokenizedDataset, caches: Caches) -> dict[str, Any]:
    """Models, optimizer, scheduler and counters; with ``run.resume``, as they were when it was saved.

    Only process 0 reads weights.

    Raises:
        UserError: a checkpoint that cannot be read or does not fit, one of another run, or one that somebody changes.
    """
    pair, weights, tied = run.pair, None, None
    config = config_without_padding(pair.student_config, count_ids(pair.student_dir, pair.tokenizer))
    if fabric.is_global_zero:
        weights = open_weights(pair.student_dir, pair.student_config)
        weights = without_padding(weights, config.padded_vocab_size)
        tied = is_tied(pair.student_dir, weights, run.train.tie_embeddings)
    tied = fabric.broadcast(tied)
    teacher = None if run.plan.shares_base else make_teacher(fabric, run, caches)
    with empty_weights(fabric):
        student = build_model(config if run.lora.r is None else lora_config(config, run.lora), tied)
    if run.compile:
        compile_blocks(student)
    if run.activation_checkpointing:
        checkpoint_activations(student)
    student = fabric.setup_module(student)
    # Fabric makes the tables of positions as coarse as half-precision weights
    student.module.reset_parameters()
    student.train()
    optimizer = fabric.setup_optimizers(make_optimizer(run.optimizer, student, run.plan.optimizer_is_fused))
    steps, warmup = total_steps(run.train, len(dataset)), warmup_steps(run.train, len(dataset))
    state = {
        "student": student,
        "teacher": Teacher(fabric, student) if teacher is None else teacher,
        "caches": caches,
        "on_policy_samples": make_on_policy_samples(fabric, run, student),
        "optimizer": optimizer,
        "scheduler": make_scheduler(optimizer, warmup, steps, run.train.min_lr),
        "loss": run.distill.loss(),
        "vocab_size": pair.vocab_size,
        # merged into the head alone, its adapter makes two matrices of one
        "tied": tied and not run.lora.head,
        # one process reads what has to be read
        **fabric.broadcast(identity(run, dataset, caches.teacher_weights) if fabric.is_global_zero else None),
        "step_count": 0,
        "epoch": 0,
        "tokens": 0,
        "nonfinite_in_a_row": 0,
        "last_validation": -1,
        "saved_student": -1,
        "has_examples": False,
        "told_of_page": set(),
    }
    if run.lora.r is not None and weights is not None:
        weights = with_new_adapters(student, weights, run.seed)
    if run.resume is None or run.lora.r is not None:
        load_weights(student, weights)
    # setting models up has drawn some, how many depends on the number of processes; on GPUs all have the first one's
    draw_own_numbers(0)
    for role in pair.stamps:
        pair.check_unchanged(role)
    if run.resume is not None:
        resume(fabric, run, state)
    return state


def make_on_policy_samples(fabric: L.Fabric, run: Run, student: torch.nn.Module) -> OnPolicySamples | None:
    """What lets the student answer; None if all is taken as it was recorded."""
    if run.distill.on_policy == 0:
        return None
    return OnPolicySamples(
        fabric,
        student,
        run.distill,
        stop=stop_sequences(run.pair.tokenizer, getattr(run.data, "prompt_style", None)),
        vocab_size=run.pair.vocab_size,
        longest=longest_sample(run),
        seed=run.seed,
    )


def make_teacher(fabric: L.Fabric, run: Run, caches: Caches) -> Teacher:
    """The teacher; of one whose hidden states are remembered only the LM head is loaded.

    Raises:
        UserError: its weights cannot be read or do not fit.
    """
    load = partial(load_teacher, fabric, run, caches)
    if run.plan.teacher_role == "remembered":
        head = load_head(fabric, run, caches)
        if head is not None:
            return Teacher(fabric, head, load)
        if not caches.writable:
            raise UserError(
                f"The teacher's LM head in --teacher.cache_dir {caches.directory} is missing or damaged."
                " Use --teacher.cache_mode auto or fill."
            )
    return Teacher(fabric, load())


def load_head(fabric: L.Fabric, run: Run, caches: Caches) -> HeadOnly | None:
    """A remembered teacher's head, sharded; None if it cannot be read from the cache."""
    weights = read_head(caches.directory) if fabric.is_global_zero else None
    if not fabric.broadcast(weights is not None):
        return None
    with empty_weights(fabric, run.teacher.dtype(fabric.device.type)):
        head = HeadOnly(run.pair.teacher_config)
    head = set_up_teacher(fabric, head)
    load_weights(head, weights)
    return head


def load_teacher(fabric: L.Fabric, run: Run, caches: Caches) -> GPT:
    """The frozen teacher; its head goes into a cache that is being filled.

    Raises:
        UserError: its weights cannot be read or do not fit, or somebody changes them.
    """
    directory, config = run.pair.teacher_dir, run.pair.teacher_config
    dtype = run.teacher.dtype(fabric.device.type)
    if fabric.is_global_zero and caches.writable:
        weights = open_weights(directory, config)
        names = [name for name in ("lm_head.weight", "lm_head.bias") if name in weights]
        head = {name: weights[name].to(dtype, copy=True) for name in names}
        # a cache must not get a head of other weights than those that it is named after
        run.pair.check_unchanged("teacher")
        write_head(caches.directory, head)
    model = load_frozen(fabric, directory, config, dtype, quantize=run.teacher.quantize, compile=run.compile)
    run.pair.check_unchanged("teacher")
    return model


def resume(fabric: L.Fabric, run: Run, state: dict) -> None:
    """Set ``state`` to what was saved, if it is of the same run; an optimizer's settings are those of the recipe.

    Raises:
        UserError: the run differs in what changes its result, and that was not accepted; or somebody changes what
            was saved.
    """
    if fabric.is_global_zero and not run.accept_changes:
        _refuse_changes(run, state)
    optimizer, scheduler = state["optimizer"], state["scheduler"]
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    base_rates = scheduler.base_lrs
    load_training_state(run.resume, state)
    if fabric.is_global_zero and (what := damage(run.resume)):
        raise UserError(f"{run.resume} was changed while this command was reading it: {what}.\n{WAY_OUT}")
    scheduler.base_lrs = base_rates
    for group, values, rate, factor in zip(
        optimizer.param_groups, settings, base_rates, scheduler.lr_lambdas, strict=True
    ):
        group.update(values, lr=rate * factor(scheduler.last_epoch))


def _refuse_changes(run: Run, state: dict) -> None:
    saved = read_training_state(run.resume)
    changes = changes_since(run, (run.resume / "hyperparameters.yaml").read_text(encoding="utf-8"), saved, state)
    if changes:
        raise UserError(
            f"--resume: {run.resume} is of a run with another result: {'; '.join(changes)}.\n"
            "Give what it was started with, start anew without --resume, or accept this with --accept_changes true."
        )
