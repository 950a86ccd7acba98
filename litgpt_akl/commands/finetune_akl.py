"""`litgpt finetune_akl`: its signature is the whole configuration."""

import math
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.types import LoggerChoice
from litgpt.utils import init_out_dir

from litgpt_akl.config.args import LoRAArgs, Options, TeacherArgs
from litgpt_akl.config.checks import OPTIMIZER, check_options, optimizer_config, without_student
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.config.recipe import check_masked, given, recipe_as_yaml
from litgpt_akl.config.teachers import ListedTeacher
from litgpt_akl.memory.estimate import MemoryEstimate, make_estimate, with_lengths
from litgpt_akl.memory.fit import report_memory, wrapped
from litgpt_akl.memory.samples import Samples, look_at_samples, why_unknown
from litgpt_akl.messages import say
from litgpt_akl.models.export import check_export
from litgpt_akl.models.gpt import check_quantization
from litgpt_akl.models.pair import Models, Pair
from litgpt_akl.models.several import check_pairs, find_models_of
from litgpt_akl.teacher.cache_identity import stored_type
from litgpt_akl.teacher.cache_size import bytes_of_token, describe_saving, describe_whole, describe_without_data
from litgpt_akl.teacher.chunk_file import DTYPES
from litgpt_akl.training.launch import start
from litgpt_akl.training.logging import make_loggers, silence_known_noise
from litgpt_akl.training.main import fill, main
from litgpt_akl.training.optimizer import check_optimizer, make_optimizer
from litgpt_akl.training.out_dir import check_places, default_out_dir
from litgpt_akl.training.run import Run, choose_day, describe_steps, total_steps
from litgpt_akl.training.sample_text import describe_format, describe_mask

OTHER_TOKENIZER = " Or let them be compared on what they share, by --teacher.tokenizer other."
NOT_IN_RECIPE = ("access_token", "dry_run", "overwrite")
"""Options that a repeated run is not to have."""


def setup(
    checkpoint_dir: Path,
    *,
    teacher_checkpoint_dir: Path | None = None,
    teachers: list[ListedTeacher] | None = None,
    data: DataModule | None = None,
    optimizer: str | dict = OPTIMIZER,
    out_dir: Path | None = None,
    precision: str | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    hybrid_sharding: bool = False,
    activation_checkpointing: bool = False,
    compile: bool = False,
    resume: bool | Literal["auto"] | Path = False,
    accept_changes: bool = False,
    overwrite: bool = False,
    save_minutes: float | None = 15.0,
    keep_last: int | None = None,
    export_hf: bool = False,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    teacher: TeacherArgs = TeacherArgs(),
    lora: LoRAArgs = LoRAArgs(),
    distill: DistillArgs = DistillArgs(),
    train: TrainArgs = TrainArgs(
        save_interval=1000,
        log_interval=1,
        global_batch_size=16,
        micro_batch_size=4,
        lr_warmup_steps=None,
        epochs=5,
        max_norm=1.0,
        min_lr=0.0,
    ),
    eval: EvalArgs = EvalArgs(interval=600, max_new_tokens=100, max_iters=100, initial_validation=True),
    log: LogArgs = LogArgs(),
    logger_name: LoggerChoice = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    dry_run: bool = False,
    device_memory: float | None = None,
) -> None:
    r"""Distil a teacher into a student: finetune the student on the teacher's whole output distribution.

    What a run needs:
      checkpoint_dir            the student
      --teacher_checkpoint_dir  the teacher, which has the student's tokenizer,
                                unless you give --teacher.tokenizer other
      --data, --data.path       the records: a class that reads them, and a file
      --optimizer.lr            the learning rate: 2e-5 for a student of the
                                teacher's family, 1e-3 for one of make_student,
                                3e-4 if that has most of its parameters
      --out_dir                 where to write; final/ in it is the student

    Example:
      litgpt finetune_akl checkpoints/Qwen/Qwen3-0.6B \
          --teacher_checkpoint_dir checkpoints/Qwen/Qwen3-8B \
          --data StreamingSFT --data.path records.jsonl --data.mask_prompt true \
          --optimizer.lr 2e-5 --out_dir out/qwen3

    Add --dry_run true to see what memory it takes, and nothing else happens.

    Arguments:
        checkpoint_dir: The student's checkpoint directory, or a model id that LitGPT can download.
        teacher_checkpoint_dir: The teacher's checkpoint directory, or a model id; it must have the student's tokenizer,
            unless ``--teacher.tokenizer other`` lets the two be compared on what they share.
            If it is a LoRA student's own, both share their weights in memory. ``--teacher.use_base true`` in its place
            means just that.
        teachers: Several teachers in place of one, such as ``'[{directory: A, weight: 2}, {directory: B}]'``: the
            student learns the average of their distributions, here 2/3 and 1/3. Each may have a ``cache_dir``; the
            other options of a teacher are for all.
        data: A class that reads records, and its options, which ``--data.help CLASS`` lists. ``StreamingSFT`` reads
            JSON, JSONL and Parquet. With ``--data.mask_prompt true`` the loss is on responses alone.
        optimizer: The name of a class, which for one of ``torch.optim`` is enough; its options beside it, such as
            ``--optimizer SGD --optimizer.momentum 0.9``. ``--optimizer.lr`` alone is AdamW's. With more than one device
            it must step on sharded parameters as on whole ones, which of PyTorch's own Adafactor, Muon and Rprop do
            not.
        out_dir: Directory in which to save checkpoints and logs; ``final/`` in it is the trained student (default:
            out/akl/STUDENT-from-TEACHER, by the names of their directories). If running in a Lightning Studio Job, look
            for it in /teamspace/jobs/<job-name>/share.
        precision: The precision to use: "32-true", "bf16-true" or "bf16-mixed" (default: bf16-mixed on a GPU, 32-true
            on a CPU).
        devices: How many devices to use on each node. With more than one in all, teacher and student are sharded.
        num_nodes: How many nodes the code is being run on.
        hybrid_sharding: Whether every node holds whole models, sharded over its own devices only: more memory, less
            traffic between nodes.
        activation_checkpointing: Whether the student's blocks keep only their inputs for the backward and run twice:
            less memory, about a third more time.
        compile: Whether torch.compile fuses what is in the blocks of both models.
        resume: Path to a ``step-...`` directory of an interrupted run to go on from, ``true`` for the latest one in
            ``out_dir``, or ``auto`` for the latest one if there is one. A damaged one is skipped. A
            finished run is left as it is.
        accept_changes: Whether a resumed run may differ from the interrupted one in what changes its result.
        overwrite: Whether the student and the checkpoints of another run in ``out_dir`` may be replaced: its later
            ``step-...`` are removed at the start, ``final/`` stays until the new one is written.
        save_minutes: Minutes between checkpoints that are saved beside those of ``train.save_interval``, so that a run
            that is killed or fails loses no more. Only the newest of them is kept. None saves none.
        keep_last: How many ``step-...`` directories to keep, beside the one with the lowest validation loss (default:
            all). The newest of ``save_minutes`` does not count.
        export_hf: Whether the trained student is also written for Transformers, vLLM and llama.cpp, to ``final-hf/``
            in ``out_dir``, as ``litgpt export_hf`` would.
        on_nonfinite: What to do when the loss or the gradient is not finite: ``stop``, or ``skip`` the step, but not
            more than two in a row. The samples are listed in a file in ``out_dir``.
        teacher: Teacher-related arguments. See ``litgpt_akl.config.args.TeacherArgs`` for details.
        lora: LoRA-related arguments. See ``litgpt_akl.config.args.LoRAArgs`` for details.
        distill: Distillation-related arguments. See ``litgpt_akl.config.distillation.DistillArgs`` for details.
        train: Training-related arguments. See ``litgpt.args.TrainArgs`` for details. An iteration is an optimizer step
            here. Without ``lr_warmup_steps`` or ``lr_warmup_fraction``, a tenth of the run warms up, at most 100 steps.
        eval: Evaluation-related arguments. See ``litgpt.args.EvalArgs`` for details. Every validation reads the same
            ``max_iters`` micro-batches, so that they can be compared.
        log: Logging-related arguments. See ``litgpt.args.LogArgs`` for details.
        logger_name: The name of the logger to send metrics to. A CSV file has them in any case.
        seed: The random seed to use for reproducibility.
        access_token: Optional API token to access models with restrictions.
        dry_run: Whether to check the options, print how much memory the run would take on each device, and end. Nothing
            is loaded, downloaded or written. Of records on this machine some or all are encoded, to know how long they
            are. Neither the models nor the devices need to be there: the models may be names that LitGPT knows, such as
            ``Llama-3.1-8B``.
        device_memory: Memory of a device in GB that a run may take; one that needs more is refused (default: what a GPU
            has; on a CPU what is free, within a container's limit, shared out among the processes). With ``dry_run`` it
            stands for GPUs that are not here.
    """
    options = Options(**locals())
    options.optimizer = optimizer_config(optimizer)
    options.out_dir = out_dir or default_out_dir(options.checkpoint_dir, *options.teacher_dirs)
    arguments = {name: value for name, value in vars(options).items() if name not in NOT_IN_RECIPE}
    check_masked(arguments)
    recipe = recipe_as_yaml(arguments)
    silence_known_noise()
    check_options(options)
    if out_dir is None and not dry_run:
        rank_zero_only(say)(f"Everything is written to {options.out_dir}; --out_dir names another place.")
    fused = check_optimizer(
        options.optimizer,
        min_lr=train.min_lr,
        vectors=lora.r is None,
        dtype=torch.bfloat16 if options.precision == "bf16-true" else torch.float32,
        devices=options.devices,
        num_nodes=num_nodes,
        cuda=options.cuda,
    )
    if teacher.quantize is not None:
        check_quantization(teacher.quantize, options.processes, needed=not dry_run)
    pair = None if dry_run else find_pair(options)
    models = find_models_of(options.checkpoint_dir, options.teacher_dirs, pair)
    memory = make_estimate(options, models, partial(make_optimizer, options.optimizer, fused=fused))
    if pair is None:
        tell_memory(options, models, memory)
        return
    launch(Run(**vars(options), pair=pair, memory=memory, recipe=recipe))


def find_pair(options: Options) -> Pair:
    """Both models, downloaded if need be, and the run's directory; raises UserError if they do not go together."""
    teachers = options.args_of_teachers
    weights_needed = [args.cache_dir is None or options.distill.on_policy > 0 for args in teachers]
    known = {"other_tokenizer": options.teacher.tokenizer == "other", "way_out": OTHER_TOKENIZER}
    pair = check_pairs(options.checkpoint_dir, options.teacher_dirs, options.access_token, weights_needed, **known)
    if options.export_hf:
        check_export(pair.student_dir, pair.student_config)
    options.out_dir = init_out_dir(options.out_dir)
    for args, of in zip(teachers, pair.of_each, strict=True):
        check_places(options.out_dir, args, of)
    return pair


def tell_memory(options: Options, models: Models, memory: MemoryEstimate) -> None:
    """Print what a dry run would take of disk and memory; raises UserError if it does not fit."""
    samples, unknown = None, why_unknown(options)
    if unknown is None:
        samples = look_at_samples(
            options, models, memory, choose_day((), *(args.cache_dir for args in options.args_of_teachers)).date
        )
        memory = with_lengths(memory, samples.training, samples.validation, options.distill)
        texts = describe_format(options.data, samples.looks[0].records)
        told = f"{samples}\nTexts: {texts}{describe_mask(options.data)}."
        if options.teacher.cache_mode != "fill":
            told += f"\nLength: {describe_steps(options.train, samples.training.samples)}."
    else:
        told = f"Data: each sample is taken for {memory.longest_sample:,} tokens, since {unknown}."
        told += "" if options.train.max_seq_length else " Say by --train.max_seq_length how long they are at most."
    say(wrapped(told))
    for args, of in zip(options.args_of_teachers, memory.of_each, strict=True):
        if args.cache_dir is not None:
            _tell_cache(options, args, of, samples)
    report_memory(memory, options.device_memory, in_full=True)


def _tell_cache(options: Options, teacher: TeacherArgs, memory: MemoryEstimate, samples: Samples | None) -> None:
    fills = teacher.cache_mode == "fill"
    if memory.top_k is None:
        dtype = DTYPES[stored_type(teacher.cache_dtype, memory.teacher_dtype)]
        size = bytes_of_token(memory.teacher.n_embd, dtype)
    else:
        size = memory.top_k.bytes_of_token
    if samples is None:
        options = size, memory.cached_head, *memory.sizes, None if fills else options.train.epochs
        say(wrapped(describe_without_data(teacher.cache_dir, *options, reads_head=memory.top_k is None)))
        return
    found, per_epoch = samples.training, math.ceil(samples.training.samples / options.train.global_batch_size)
    epochs = total_steps(options.train, found.samples) / per_epoch
    tokens = math.ceil(found.response_tokens * (1 if fills else min(1, epochs))) + samples.validation.response_tokens
    share, epochs = found.response_tokens / max(1, found.tokens), None if fills else epochs
    saving = describe_saving(*memory.sizes, share, epochs, reads_head=memory.top_k is None)
    say(wrapped(f"{describe_whole(teacher.cache_dir, size, tokens, memory.cached_head)}\n{saving}"))


def launch(run: Run) -> None:
    """Start the processes of a run that trains, or of one that fills a cache."""
    if run.teacher.cache_mode == "fill":
        unused = without_student(given(run.recipe, setup))
        if unused is not None:
            rank_zero_only(print)(unused)
        start(fill, run, run.teacher.cpu_offload)
        return
    options = {"log_interval": run.train.log_interval, "log": run.log, "resume": bool(run.resume)}
    name = f"distill-{run.pair.student_config.name}"
    loggers = make_loggers(run.logger_name, run.out_dir, name=name, **options)
    start(main, run, run.teacher.cpu_offload, loggers)
