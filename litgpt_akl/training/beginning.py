"""What a run does in each of its processes before a model is loaded: its directory, its data, its cache, its memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.prepare import prepare_datasets
from litgpt_akl.data.workers import end_with_parent
from litgpt_akl.files.manifest import FINAL
from litgpt_akl.memory.memory_report import report_memory
from litgpt_akl.memory.planning import device_bytes
from litgpt_akl.messages import UserError, say
from litgpt_akl.models.parallel import all_reduce_max_each, return_freed_memory, wait_for_all
from litgpt_akl.teacher.cache import Caches, open_caches
from litgpt_akl.teacher.identity import make_identity, needed_samples, read_identity
from litgpt_akl.teacher.space import check_space, describe_saving, describe_space, response_tokens
from litgpt_akl.training.on_policy import check_prompts
from litgpt_akl.training.out_dir import is_finished, open_out_dir
from litgpt_akl.training.run import (
    Day,
    Run,
    changes_since,
    choose_day,
    identity,
    longest_sample,
    step_sampler,
    validation_records,
)
from litgpt_akl.training.train import total_steps


def begin(fabric: L.Fabric, run: Run) -> tuple[tuple[TokenizedDataset, TokenizedDataset], Caches] | None:
    """A run's stores and its cache, if it has one; what it is about to take is printed. None if it is finished already.

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
    answered = longest_sample(run) if on_policy else 0
    run.plan = replace(run.plan, sequence_length=max(splits[0].longest, answered))
    caches = Caches() if run.teacher.cache_dir is None else _open_cache(fabric, run, splits)
    if fabric.is_global_zero:
        limit = device_bytes(run.device_memory, run.plan.device == "cuda", run.plan.devices)
        report_memory(run.plan, limit, run.options)
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
    # no cache has what the student is about to answer
    if not any(counts) and (run.distill.on_policy == 0 or run.teacher.cache_mode == "fill"):
        run.plan = replace(run.plan, teacher_role="remembered")
    if fabric.is_global_zero:
        _report_cache(run, splits, caches, needed, absent)
    return caches


def _needed_samples(run: Run, splits: tuple[TokenizedDataset, TokenizedDataset]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training and of the validation samples that a run comes to; a filling one, to all of them."""
    plan, steps = step_sampler(run, splits[0]), total_steps(run.train, len(splits[0]))
    validates = run.eval.initial_validation or run.eval.final_validation or run.eval.interval < steps
    validated = validation_records(run, splits[1]) if validates else range(0)
    if run.teacher.cache_mode == "fill":
        steps = plan.steps_per_epoch
    return needed_samples(plan, steps), np.array(validated, dtype=np.int64)


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
        say(describe_saving(run.plan, splits[0].all_response_tokens / splits[0].tokens, epochs))


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

        def changes(recipe: str, manifest: dict[str, Any]) -> list[str]:
            return [] if run.accept_changes else changes_since(run, recipe, manifest, identity(run, dataset))

        steps = total_steps(run.train, len(dataset))
        finished = is_finished(run.out_dir, asked, run.resume, steps, changes)
    return fabric.broadcast(finished)
