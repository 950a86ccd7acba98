"""Set-up of a run in each of its processes: directory, datasets, cache, models, optimizer, scheduler, resume."""

import time
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

from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import turn_ends
from litgpt_akl.data.workers import end_with_parent
from litgpt_akl.files.changed_files import WAY_OUT
from litgpt_akl.files.manifest import FINAL, RECIPE, damage
from litgpt_akl.memory.process import anonymous_memory
from litgpt_akl.memory.samples import with_samples
from litgpt_akl.messages import UserError
from litgpt_akl.models import gpt
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.generation import stop_sequences
from litgpt_akl.models.lora import lora_config, with_new_adapters
from litgpt_akl.models.parallel import all_reduce_max_each, load_weights, return_freed_memory, wait_for_all
from litgpt_akl.models.prompt_format import READ_BY_TRANSFORMERS, Learnt, PromptFormat, trained_format
from litgpt_akl.models.vocabulary import config_without_padding, count_ids, without_padding
from litgpt_akl.models.weights import open_weights
from litgpt_akl.teacher.cache import Caches, head_bytes, open_caches, read_head, write_head
from litgpt_akl.teacher.cache_identity import make_identity, needed_samples, read_identity
from litgpt_akl.teacher.cache_size import check_space, describe_saving, describe_space, response_tokens
from litgpt_akl.teacher.several import SeveralCaches
from litgpt_akl.teacher.teacher import HeadOnly, Teacher
from litgpt_akl.training.checkpoint import draw_own_numbers, load_training_state, read_training_state
from litgpt_akl.training.metrics import MetricsMarker
from litgpt_akl.training.on_policy import OnPolicySamples, check_prompts
from litgpt_akl.training.optimizer import make_optimizer, make_scheduler
from litgpt_akl.training.other_tokenizer import make_aligned, share_vocabulary, teacher_of_data
from litgpt_akl.training.out_dir import changes_since, identity, is_finished, open_out_dir
from litgpt_akl.training.run import Run, Splits, choose_day, total_steps, warmup_steps
from litgpt_akl.training.sample_text import describe_sample
from litgpt_akl.training.summary import announce
from litgpt_akl.training.teachers import caches_of_each, make_teachers, open_caches_of


def open_inputs(fabric: L.Fabric, run: Run) -> tuple[Splits, Caches | SeveralCaches] | None:
    """A run's datasets and its cache, if it has one; None if the run is finished already.

    What the run is about to take of memory and disk is printed. Raises UserError if it does not fit there, or if
    something else is not as the run needs it.
    """
    if fabric.local_rank > 0:
        end_with_parent()
    if fabric.world_size > 1 and fabric.device.type == "cpu":
        return_freed_memory()
    cache_dirs = [args.cache_dir for args in run.args_of_teachers]
    asked, fills, pair = run.resume, run.teacher.cache_mode == "fill", run.pair
    if not fills:
        if fabric.is_global_zero:
            run.resume = open_out_dir(run.out_dir, run.resume, run.overwrite, run.export_hf)
        # all of a large checkpoint has been read
        wait_for_all()
        run.resume = fabric.broadcast(run.resume)
    # one day for all processes, whatever their clocks say
    checkpoints = [run.resume] if isinstance(run.resume, Path) else [run.out_dir / FINAL] if asked else []
    day = fabric.broadcast(choose_day(checkpoints, *cache_dirs) if fabric.is_global_zero else None)
    # whatever is downloaded or prepared is then found by the other processes
    with fabric.rank_zero_first():
        options = pair.context_length, pair.student_dir
        known = {"date": day.date, "teacher_dir": pair.teacher_dir, "vocab_size": pair.vocab_size}
        known |= {"prompts_alone": run.distill.on_policy == 1 and not fills, "teacher": teacher_of_data(run)}
        splits = prepare_datasets(run.data, pair.tokenizer, run.train, *options, **known)
    run.shared_ids, shared = share_vocabulary(run, splits)
    ends = turn_ends(splits[0], pair.tokenizer.special_ids)
    ends += [id for id in getattr(run.data, "ends", ()) if id in pair.tokenizer.special_ids and id not in ends]
    run.stop = stop_sequences(pair.tokenizer, run.prompt_style, ends)
    run.prompt_format, notes = _find_format(run, ends)
    dated = str(day) if getattr(run.data, "date", None) else ""
    # its tokenizer and its chat template were read
    pair.check_unchanged("student")
    if asked and not fills and not run.overwrite:
        if fabric.broadcast(fabric.is_global_zero and is_finished(run, asked, splits[0])):
            if dated:
                fabric.print(dated)
            return None
    told = {"notes": [*pair.notes, *shared, *notes], "day": dated, "on_policy": "", "cache": ""}
    # a run that fills a cache has no student
    if run.distill.on_policy > 0 and not fills:
        options = {"longest": run.longest_sample, "steps": total_steps(run.train, len(splits[0]))}
        options["steps_per_epoch"] = run.step_sampler(splits[0]).steps_per_epoch
        told["on_policy"] = check_prompts(splits[0], pair.student_config, run.distill, **options)
    run.memory = with_samples(run.memory, splits, run.distill)
    if run.shared_ids is not None and not run.shared_ids.are_all:
        run.memory = replace(run.memory, shared_ids=len(run.shared_ids.student))
    caches, told["cache"] = open_caches_of(fabric, run, splits, _open_cache)
    if fabric.is_global_zero:
        run.sample = describe_sample(run.data, splits[0], pair.tokenizer, run.stop)
        announce(run, splits, **told)
    # no other process goes on if that is too much
    fabric.barrier()
    fabric.seed_everything(run.seed, verbose=False)
    return splits, caches


def _find_format(run: Run, ends: list[int]) -> tuple[PromptFormat, list[str]]:
    """How the student is asked, for its files; and what a user is to know of that."""
    template, tokenizer = getattr(run.data, "template", None), run.pair.tokenizer
    has_written = template is not None and run.data.by_template > 0
    if not has_written and tokenizer.backend == "huggingface":
        template = ChatTemplate.find(run.pair.student_dir)
    learnt = Learnt(
        style=run.prompt_style,
        template=template,
        has_written=has_written,
        is_own=not has_written or (run.data.chat_template is None and template.path.name in READ_BY_TRANSFORMERS),
        keywords=(run.data.chat_template_kwargs or {}) if has_written else {},
        ends=tuple(ends),
        stop=tuple(sequence[0] for sequence in run.stop if len(sequence) == 1),
    )
    return trained_format(learnt, tokenizer)


def _open_cache(fabric: L.Fabric, run: Run, splits: Splits) -> tuple[Caches, str]:
    """A run's cache, and in process 0 what it holds and takes, in words.

    Whether it has all that the run needs decides whether the teacher will be loaded.
    """
    directory, mode, dtype = run.teacher.cache_dir, run.teacher.cache_mode, run.teacher.dtype(fabric.device.type)
    recorded = (read_identity(directory) or {}).get("teacher_weights")
    # the first process on each machine, since not every directory is shared
    with fabric.rank_zero_first(local=True):
        options = run.pair, run.teacher, dtype, run.data, run.train.max_seq_length, splits
        identity = make_identity(*options, recorded=recorded)
        run.pair.check_unchanged("teacher")
        caches = open_caches(directory, identity, splits, mode != "read")
        if mode == "fill" and fabric.local_rank == 0:
            caches.training.verify()
            caches.validation.verify()
    sampler, steps = run.step_sampler(splits[0]), total_steps(run.train, len(splits[0]))
    validates = run.eval.initial_validation or run.eval.final_validation or run.eval.interval < steps
    validated = run.validation_records(splits[1]) if validates else range(0)
    to_come = sampler.steps_per_epoch if mode == "fill" else steps
    needed = needed_samples(sampler, to_come), np.array(validated, dtype=np.int64)
    absent = [cache.absent(n) for cache, n in zip((caches.training, caches.validation), needed, strict=True)]
    counts = all_reduce_max_each(fabric, [len(numbers) for numbers in absent])
    if any(counts) and mode == "read":
        found = zip(counts, ("training", "validation"), strict=True)
        lacking = " and ".join(f"{count:,} {name} samples" for count, name in found if count)
        raise UserError(
            f"--teacher.cache_mode read, but {caches.directory} lacks {lacking} that this run needs.\n"
            "Fill it with --teacher.cache_mode fill, or use auto."
        )
    # no cache has what the student is about to write
    if not any(counts) and (run.distill.on_policy == 0 or mode == "fill"):
        run.memory = replace(run.memory, teacher_role="cached")
    return caches, _describe_cache(run, splits, caches, needed, absent) if fabric.is_global_zero else ""


def _describe_cache(
    run: Run, splits: Splits, caches: Caches, needed: Sequence[np.ndarray], absent: Sequence[np.ndarray]
) -> str:
    """What a cache holds and will take, in words; raises UserError if there is no room for that."""
    tokens, missing = (sum(map(response_tokens, splits, numbers)) for numbers in (needed, absent))
    size, stored = caches.training.bytes_of_token, head_bytes(caches.directory)
    head = run.memory.cached_head and (stored or run.memory.cached_head)
    to_write = missing * size // run.teacher.part()[1] + (0 if stored or not caches.writable else head)
    if to_write:
        check_space(caches.directory, to_write)
    text = describe_space(caches.directory, size, tokens, head, to_write)
    if missing == 0:
        return text
    epochs = total_steps(run.train, len(splits[0])) / run.step_sampler(splits[0]).steps_per_epoch
    share = splits[0].all_response_tokens / splits[0].tokens
    epochs = None if run.teacher.cache_mode == "fill" else epochs
    saving = describe_saving(*run.memory.sizes, share, epochs, reads_head=run.memory.top_k is None)
    return f"{text} {saving}"


def make_state(fabric: L.Fabric, run: Run, splits: Splits, caches: Caches | SeveralCaches) -> dict[str, Any]:
    """Models, optimizer, scheduler and counters; with ``run.resume``, as they were when it was saved.

    Only process 0 reads weights. Raises UserError if a checkpoint cannot be read, does not fit, is of another run, or
    is being changed by somebody.
    """
    memory_before = anonymous_memory()
    config, weights, tied = _read_student(fabric, run)
    teacher = None if run.memory.shares_base else make_teachers(fabric, run, caches, make_teacher)
    student = _build_student(fabric, run, config, tied)
    optimizer = fabric.setup_optimizers(make_optimizer(run.optimizer, student, run.memory.optimizer_is_fused))
    steps, warmup = total_steps(run.train, len(splits[0])), warmup_steps(run.train, len(splits[0]))
    options = {"vocab_size": run.pair.vocab_size, "longest": run.longest_sample, "seed": run.seed}
    options["stop"] = run.stop
    weights_of_teachers = [of.teacher_weights for of in caches_of_each(caches)]
    own = OnPolicySamples(fabric, student, run.distill, **options) if run.distill.on_policy > 0 else None
    state = {
        "student": student,
        "teacher": Teacher(fabric, student) if teacher is None else teacher,
        "caches": caches,
        "dataset": splits[0],
        "validation_dataset": splits[1],
        "on_policy_samples": own,
        "optimizer": optimizer,
        "scheduler": make_scheduler(optimizer, warmup, steps, run.train.min_lr),
        # of the next step
        "loss": run.distill.loss(0.0),
        "vocab_size": run.pair.vocab_size,
        "aligned": make_aligned(run, run.shared_ids, fabric.device),
        # merged into the head alone, its adapter makes two matrices of one
        "tied": tied and not run.lora.head,
        # one process reads what has to be read
        **fabric.broadcast(identity(run, splits[0], weights_of_teachers) if fabric.is_global_zero else None),
        "steps": steps,
        # how far the run has come
        **dict.fromkeys(("step_count", "epoch", "tokens", "nonfinite_in_a_row"), 0),
        **{"last_validation": -1, "saved_student": -1, "metrics_marker": MetricsMarker()},
        # what was shown and said
        **{"has_examples": False, "sample": run.sample, "teacher_answers": {}, "teacher_is_doubted": False},
        "top_k_cost": None,
        # what Python and its packages took is not in the estimate either
        "memory_before": memory_before,
        **{"told_of_page": set(), "page_drawn": time.monotonic()},
    }
    if run.lora.r is not None and weights is not None:
        weights = with_new_adapters(student, weights, run.seed)
    if run.resume is None or run.lora.r is not None:
        load_weights(student, weights)
    # setting models up has drawn some, how many depends on the number of processes; on GPUs all have the first one's
    draw_own_numbers(0)
    for pair in run.pair.of_each:
        for role in pair.stamps:
            pair.check_unchanged(role)
    if run.resume is not None:
        _resume(fabric, run, state)
    return state


def _read_student(fabric: L.Fabric, run: Run) -> tuple[Config, dict[str, Tensor] | None, bool]:
    """The student's config without padding, its weights in process 0, and whether embeddings and LM head are tied."""
    pair, weights, tied = run.pair, None, None
    config = config_without_padding(pair.student_config, count_ids(pair.student_dir, pair.tokenizer))
    if fabric.is_global_zero:
        weights = open_weights(pair.student_dir, pair.student_config)
        weights = without_padding(weights, config.padded_vocab_size)
        tied = gpt.is_tied(pair.student_dir, weights, run.train.tie_embeddings)
    return config, weights, fabric.broadcast(tied)


def _build_student(fabric: L.Fabric, run: Run, config: Config, tied: bool) -> torch.nn.Module:
    """The student that is trained, with weights yet to be loaded."""
    with gpt.empty_weights(fabric):
        student = gpt.build_model(config if run.lora.r is None else lora_config(config, run.lora), tied)
    if run.compile:
        gpt.compile_blocks(student)
    if run.activation_checkpointing:
        gpt.checkpoint_activations(student)
    student = fabric.setup_module(student)
    # Fabric makes the tables of positions as coarse as half-precision weights
    student.module.reset_parameters()
    student.train()
    return student


def make_teacher(fabric: L.Fabric, run: Run, caches: Caches) -> Teacher:
    """The teacher, or if its hidden states are cached its LM head alone; UserError if its weights cannot be read.

    If its distributions are cached there is nothing of it.
    """
    load = partial(_load_teacher, fabric, run, caches)
    if run.memory.teacher_role == "cached" and run.memory.top_k is not None:
        return Teacher(fabric, HeadOnly(run.pair.teacher_config, has_head=False), load)
    if run.memory.teacher_role == "cached":
        if head := _load_head(fabric, run, caches):
            return Teacher(fabric, head, load)
        if not caches.writable:
            raise UserError(
                f"The teacher's LM head in --teacher.cache_dir {caches.directory} is missing or damaged."
                " Use --teacher.cache_mode auto or fill."
            )
    return Teacher(fabric, load())


def _load_head(fabric: L.Fabric, run: Run, caches: Caches) -> HeadOnly | None:
    """A cached teacher's LM head, sharded; None if it cannot be read from the cache."""
    weights = read_head(caches.directory) if fabric.is_global_zero else None
    if not fabric.broadcast(weights is not None):
        return None
    with gpt.empty_weights(fabric, run.teacher.dtype(fabric.device.type)):
        head = HeadOnly(run.pair.teacher_config)
    head = gpt.set_up_teacher(fabric, head)
    load_weights(head, weights)
    return head


def _load_teacher(fabric: L.Fabric, run: Run, caches: Caches) -> GPT:
    """The frozen teacher; its head goes into a cache of hidden states that is being filled."""
    directory, config = run.pair.teacher_dir, run.pair.teacher_config
    dtype = run.teacher.dtype(fabric.device.type)
    if fabric.is_global_zero and caches.writable and run.memory.top_k is None:
        weights = open_weights(directory, config)
        names = [name for name in ("lm_head.weight", "lm_head.bias") if name in weights]
        head = {name: weights[name].to(dtype, copy=True) for name in names}
        # a cache must not get a head of other weights than those that it is named after
        run.pair.check_unchanged("teacher")
        write_head(caches.directory, head)
    model = gpt.load_frozen(fabric, directory, config, dtype, quantize=run.teacher.quantize, compile=run.compile)
    run.pair.check_unchanged("teacher")
    return model


def _resume(fabric: L.Fabric, run: Run, state: dict) -> None:
    """Set ``state`` to what was saved; an optimizer's settings are those of the recipe.

    Raises UserError if the run differs in what changes its result, unless that was accepted; or if what was saved is
    being changed by somebody.
    """
    if fabric.is_global_zero and not run.accept_changes:
        recipe, saved = (run.resume / RECIPE).read_text(encoding="utf-8"), read_training_state(run.resume)
        if changes := changes_since(run, recipe, saved, state):
            raise UserError(
                f"--resume: {run.resume} is of a run with another result: {'; '.join(changes)}.\n"
                "Give what it was started with, start anew without --resume, or accept this with --accept_changes true."
            )
    optimizer, scheduler = state["optimizer"], state["scheduler"]
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    base_rates = scheduler.base_lrs
    load_training_state(run.resume, state)
    if fabric.is_global_zero and (what := damage(run.resume)):
        raise UserError(f"{run.resume} was changed while this command was reading it: {what}.\n{WAY_OUT}")
    scheduler.base_lrs = base_rates
    groups = zip(optimizer.param_groups, settings, base_rates, scheduler.lr_lambdas, strict=True)
    for group, values, rate, factor in groups:
        group.update(values, lr=rate * factor(scheduler.last_epoch))
