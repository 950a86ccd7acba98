"""Set-up of a run in each of its processes: directory, datasets, cache, models, optimizer, scheduler, resume."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor

from litgpt_akl.config.recipe import differences
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.workers import end_with_parent
from litgpt_akl.files.changed_files import WAY_OUT
from litgpt_akl.files.manifest import FINAL, RECIPE, damage
from litgpt_akl.memory import report_memory
from litgpt_akl.messages import UserError, say
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
from litgpt_akl.models.parallel import all_reduce_max_each, load_weights, return_freed_memory, wait_for_all
from litgpt_akl.models.vocabulary import config_without_padding, count_ids, without_padding
from litgpt_akl.models.weights import fingerprint, is_of, open_weights, weights_files
from litgpt_akl.teacher.cache import Caches, open_caches, read_head, write_head
from litgpt_akl.teacher.cache_identity import make_identity, needed_samples, read_identity
from litgpt_akl.teacher.cache_size import check_space, describe_saving, describe_space, response_tokens
from litgpt_akl.teacher.teacher import HeadOnly, Teacher
from litgpt_akl.training.checkpoint import draw_own_numbers, load_training_state, read_training_state
from litgpt_akl.training.metrics import MetricsMarker
from litgpt_akl.training.on_policy import OnPolicySamples, check_prompts
from litgpt_akl.training.optimizer import make_optimizer, make_scheduler
from litgpt_akl.training.out_dir import is_finished, open_out_dir
from litgpt_akl.training.run import (
    Day,
    Run,
    choose_day,
    longest_sample,
    step_sampler,
    total_steps,
    validation_records,
    warmup_steps,
)


def open_inputs(fabric: L.Fabric, run: Run) -> tuple[tuple[TokenizedDataset, TokenizedDataset], Caches] | None:
    """A run's datasets and its cache, if it has one; None if the run is finished already.

    What the run is about to take of memory and disk is printed.

    Raises:
        UserError: something is not as the run needs it, or it does not fit into memory or onto the disk.
    """
    if fabric.local_rank > 0:
        end_with_parent()
    if fabric.world_size > 1 and fabric.device.type == "cpu":
        return_freed_memory()
    asked = run.resume
    if run.teacher.cache_mode != "fill":
        _open_out_dir(fabric, run)
    pair, train = run.pair, run.train
    day = _choose_day(fabric, run, asked)
    # whatever is downloaded or prepared is then found by the other processes
    with fabric.rank_zero_first():
        options = pair.context_length, pair.student_dir
        splits = prepare_datasets(run.data, pair.tokenizer, train, *options, date=day.date)
    if getattr(run.data, "date", None):
        fabric.print(day)
    # its tokenizer and its chat template were read
    pair.check_unchanged("student")
    if asked and run.teacher.cache_mode != "fill" and _is_finished(fabric, run, asked, splits[0]):
        return None
    # a run that fills a cache has no student
    on_policy = run.distill.on_policy > 0 and run.teacher.cache_mode != "fill"
    if on_policy:
        fabric.print(_describe_prompts(run, splits[0]))
    written = longest_sample(run) if on_policy else 0
    run.memory = replace(run.memory, sequence_length=max(splits[0].longest, written))
    caches = Caches() if run.teacher.cache_dir is None else _open_cache(fabric, run, splits)
    if fabric.is_global_zero:
        report_memory(run.memory, run.device_memory)
    # no other process goes on if that is too much
    fabric.barrier()
    fabric.seed_everything(run.seed, verbose=False)
    return splits, caches


def _describe_prompts(run: Run, dataset: TokenizedDataset) -> str:
    steps = {
        "steps": total_steps(run.train, len(dataset)),
        "steps_per_epoch": step_sampler(run, dataset).steps_per_epoch,
    }
    return check_prompts(dataset, run.pair.student_config, run.distill, longest=longest_sample(run), **steps)


def _choose_day(fabric: L.Fabric, run: Run, asked: bool | str | Path | None) -> Day:
    """One for all processes, whatever their clocks say: of what the run goes on from, else of its cache, else today."""
    checkpoints = [run.resume] if isinstance(run.resume, Path) else [run.out_dir / FINAL] if asked else []
    return fabric.broadcast(choose_day(checkpoints, run.teacher.cache_dir) if fabric.is_global_zero else None)


def _open_cache(fabric: L.Fabric, run: Run, splits: tuple[TokenizedDataset, TokenizedDataset]) -> Caches:
    """A run's cache; whether it has all that the run needs decides whether the teacher will be loaded."""
    directory, writable = run.teacher.cache_dir, run.teacher.cache_mode != "read"
    dtype = run.teacher.dtype(fabric.device.type)
    recorded = (read_identity(directory) or {}).get("teacher_weights")
    # the first process on each machine, since not every directory is shared
    with fabric.rank_zero_first(local=True):
        identity = make_identity(
            run.pair, run.teacher, dtype, run.data, run.train.max_seq_length, splits, recorded=recorded
        )
        run.pair.check_unchanged("teacher")
        caches = open_caches(directory, identity, splits, writable)
        if run.teacher.cache_mode == "fill" and fabric.local_rank == 0:
            caches.training.verify()
            caches.validation.verify()
    needed = _needed_samples(run, splits)
    absent = [cache.absent(n) for cache, n in zip((caches.training, caches.validation), needed, strict=True)]
    counts = all_reduce_max_each(fabric, [len(numbers) for numbers in absent])
    if any(counts) and not writable:
        found = zip(counts, ("training", "validation"), strict=True)
        lacking = " and ".join(f"{count:,} {name} samples" for count, name in found if count)
        raise UserError(
            f"--teacher.cache_mode read, but {caches.directory} lacks {lacking} that this run needs.\n"
            "Fill it with --teacher.cache_mode fill, or use auto."
        )
    # no cache has what the student is about to write
    if not any(counts) and (run.distill.on_policy == 0 or run.teacher.cache_mode == "fill"):
        run.memory = replace(run.memory, teacher_role="cached")
    if fabric.is_global_zero:
        _report_cache(run, splits, caches, needed, absent)
    return caches


def _needed_samples(run: Run, splits: tuple[TokenizedDataset, TokenizedDataset]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training and of the validation samples that a run comes to; a filling one, to all of them."""
    sampler, steps = step_sampler(run, splits[0]), total_steps(run.train, len(splits[0]))
    validates = run.eval.initial_validation or run.eval.final_validation or run.eval.interval < steps
    validated = validation_records(run, splits[1]) if validates else range(0)
    if run.teacher.cache_mode == "fill":
        steps = sampler.steps_per_epoch
    return needed_samples(sampler, steps), np.array(validated, dtype=np.int64)


def _report_cache(
    run: Run,
    splits: tuple[TokenizedDataset, TokenizedDataset],
    caches: Caches,
    needed: Sequence[np.ndarray],
    absent: Sequence[np.ndarray],
) -> None:
    tokens, missing = (sum(map(response_tokens, splits, numbers)) for numbers in (needed, absent))
    size = caches.training.bytes_of_token
    to_write = missing * size // run.teacher.part()[1]
    if to_write:
        check_space(caches.directory, to_write)
    say(describe_space(caches.directory, size, tokens, to_write))
    if to_write:
        epochs = total_steps(run.train, len(splits[0])) / step_sampler(run, splits[0]).steps_per_epoch
        share = splits[0].all_response_tokens / splits[0].tokens
        say(describe_saving(*run.memory.sizes, share, None if run.teacher.cache_mode == "fill" else epochs))


def _open_out_dir(fabric: L.Fabric, run: Run) -> None:
    """See to what is there, and find what to resume, in one process for all."""
    if fabric.is_global_zero:
        run.resume = open_out_dir(run.out_dir, run.resume, run.overwrite, run.export_hf, tell=say)
    # all of a large checkpoint has been read
    wait_for_all()
    run.resume = fabric.broadcast(run.resume)


def _is_finished(fabric: L.Fabric, run: Run, asked: bool | str | Path, dataset: TokenizedDataset) -> bool:
    """Whether there is nothing left to train, which is said."""
    finished = False
    if fabric.is_global_zero and not run.overwrite:
        steps = total_steps(run.train, len(dataset))
        finished = is_finished(run.out_dir, asked, run.resume, steps, partial(_changes_of_finished, run, dataset))
    return fabric.broadcast(finished)


def _changes_of_finished(run: Run, dataset: TokenizedDataset, recipe: str, manifest: dict[str, Any]) -> list[str]:
    return [] if run.accept_changes else changes_since(run, recipe, manifest, identity(run, dataset))


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


def make_state(
    fabric: L.Fabric, run: Run, splits: tuple[TokenizedDataset, TokenizedDataset], caches: Caches
) -> dict[str, Any]:
    """Models, optimizer, scheduler and counters; with ``run.resume``, as they were when it was saved.

    Only process 0 reads weights.

    Raises:
        UserError: a checkpoint that cannot be read or does not fit, one of another run, or one that somebody changes.
    """
    config, weights, tied = _read_student(fabric, run)
    teacher = None if run.memory.shares_base else make_teacher(fabric, run, caches)
    student = _build_student(fabric, run, config, tied)
    optimizer = fabric.setup_optimizers(make_optimizer(run.optimizer, student, run.memory.optimizer_is_fused))
    steps, warmup = total_steps(run.train, len(splits[0])), warmup_steps(run.train, len(splits[0]))
    state = {
        "student": student,
        "teacher": Teacher(fabric, student) if teacher is None else teacher,
        "caches": caches,
        "dataset": splits[0],
        "validation_dataset": splits[1],
        "on_policy_samples": make_on_policy_samples(fabric, run, student),
        "optimizer": optimizer,
        "scheduler": make_scheduler(optimizer, warmup, steps, run.train.min_lr),
        "loss": run.distill.loss(),
        "vocab_size": run.pair.vocab_size,
        # merged into the head alone, its adapter makes two matrices of one
        "tied": tied and not run.lora.head,
        # one process reads what has to be read
        **fabric.broadcast(identity(run, splits[0], caches.teacher_weights) if fabric.is_global_zero else None),
        "steps": steps,
        **_counters(),
    }
    if run.lora.r is not None and weights is not None:
        weights = with_new_adapters(student, weights, run.seed)
    if run.resume is None or run.lora.r is not None:
        load_weights(student, weights)
    # setting models up has drawn some, how many depends on the number of processes; on GPUs all have the first one's
    draw_own_numbers(0)
    for role in run.pair.stamps:
        run.pair.check_unchanged(role)
    if run.resume is not None:
        resume(fabric, run, state)
    return state


def _counters() -> dict[str, Any]:
    """How far a run has come, before its first step."""
    return {
        "step_count": 0,
        "epoch": 0,
        "tokens": 0,
        "nonfinite_in_a_row": 0,
        "last_validation": -1,
        "saved_student": -1,
        "has_examples": False,
        "told_of_page": set(),
        "metrics_marker": MetricsMarker(),
    }


def _read_student(fabric: L.Fabric, run: Run) -> tuple[Config, dict[str, Tensor] | None, bool]:
    """The student's config without padding, its weights in process 0, and whether embeddings and LM head are tied."""
    pair, weights, tied = run.pair, None, None
    config = config_without_padding(pair.student_config, count_ids(pair.student_dir, pair.tokenizer))
    if fabric.is_global_zero:
        weights = open_weights(pair.student_dir, pair.student_config)
        weights = without_padding(weights, config.padded_vocab_size)
        tied = is_tied(pair.student_dir, weights, run.train.tie_embeddings)
    return config, weights, fabric.broadcast(tied)


def _build_student(fabric: L.Fabric, run: Run, config: Config, tied: bool) -> torch.nn.Module:
    """The student that is trained, with weights yet to be loaded."""
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
    return student


def make_on_policy_samples(fabric: L.Fabric, run: Run, student: torch.nn.Module) -> OnPolicySamples | None:
    """What lets the student write responses; None if all are taken as recorded."""
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
    """The teacher; of one whose hidden states are cached only the LM head is loaded.

    Raises:
        UserError: its weights cannot be read or do not fit.
    """
    load = partial(load_teacher, fabric, run, caches)
    if run.memory.teacher_role == "cached":
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
    """A cached teacher's LM head, sharded; None if it cannot be read from the cache."""
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
    changes = changes_since(run, (run.resume / RECIPE).read_text(encoding="utf-8"), saved, state)
    if changes:
        raise UserError(
            f"--resume: {run.resume} is of a run with another result: {'; '.join(changes)}.\n"
            "Give what it was started with, start anew without --resume, or accept this with --accept_changes true."
        )
