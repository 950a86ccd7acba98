"""Which options go together, and which of LitGPT's arguments this package honours; asked before anything is loaded."""

import json
import os
import re
from dataclasses import fields
from typing import Any, Literal

import torch
import yaml
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule, LitData, MicroLlama, OpenWebText, TextFiles, TinyLlama, TinyStories
from litgpt.utils import parse_devices

from litgpt_akl.config.args import GenerationArgs, Options
from litgpt_akl.config.refusals import changed, check_at_least_one, refuse_changed
from litgpt_akl.config.teachers import check_listed
from litgpt_akl.loss.top_k_loss import DEFINED, why_undefined
from litgpt_akl.messages import UserError

OPTIMIZER = "AdamW"
"""The class of an optimizer of which only options are given."""
PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
FOR_PRETRAINING = (MicroLlama, OpenWebText, TextFiles, TinyLlama, TinyStories)
PROCESSES_OF_A_CORE = 4
OF_STUDENT = re.compile(
    r"(resume|accept_changes|keep_last|export_hf|on_nonfinite|activation_checkpointing|logger_name)"
    r"|optimizer(\..*)?|(lora|distill|log)\..*|eval\.(max_new_tokens|evaluate_example)"
    r"|train\.(save_interval|log_interval|max_time|max_norm|min_lr|lr_warmup_.*|tie_embeddings|epochs|max_steps)"
)
"""Options that only a student takes; those that a cache's samples depend on are not among them."""
OF_WANDB = {"project", "run", "group"}
OF_LOGGERS = {"wandb": OF_WANDB, "litlogger": {field.name for field in fields(LogArgs)} - OF_WANDB}
"""The members of ``log`` that each logger uses; other loggers use none."""


def check_options(options: Options) -> None:
    """See that ``finetune_akl``'s options go together, and choose its precision and devices; raises UserError."""
    check_training_args(options.train, options.eval)
    _check_beginning(options)
    _check_teacher(options)
    _check_top_k(options)
    _check_no_effect(options)
    options.precision = choose_precision(options.precision, options.cuda)
    options.devices = count_devices(options.devices, options.num_nodes, needed=not options.dry_run)
    check_hybrid_sharding(options.hybrid_sharding, options.devices, options.num_nodes)
    _check_cpu_offload(options)
    _check_on_policy(options)
    _check_other_tokenizer(options)
    _check_others(options)


def _check_others(options: Options) -> None:
    """See that numbers of their own can be, and that there is data; raises UserError."""
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be from 0 to {2**32 - 1}, got {options.seed}.")
    if options.device_memory is not None and not options.device_memory > 0:
        raise UserError(
            f"--device_memory must be above 0, got {options.device_memory}. Leave it out for what the device has."
        )
    if options.data is None and not options.dry_run:
        raise UserError(no_data())


def no_data() -> str:
    """What a user is told who names no data."""
    return (
        "--data is missing. For files of your own give --data StreamingSFT --data.path FILE_OR_FOLDER.\n"
        "--data Alpaca downloads the 52,000 records that LitGPT takes by default."
    )


def _check_teacher(options: Options) -> None:
    """See that there is one teacher, and that adapters and other options agree."""
    teacher, lora, teacher_dir = options.teacher, options.lora, options.teacher_checkpoint_dir
    if options.teachers is not None:
        _check_several(options)
    elif teacher.cache_dir is None:
        refuse_changed("teacher", teacher, "cache_", "without --teacher.cache_dir", "Give it")
    if teacher.use_base and lora.r is None:
        raise UserError(
            "--teacher.use_base true without --lora.r: all of the student is trained, so no base is left to teach it.\n"
            "Give --lora.r, or a --teacher_checkpoint_dir."
        )
    if teacher.use_base and teacher_dir is not None:
        raise UserError(
            f"--teacher.use_base true and --teacher_checkpoint_dir {teacher_dir} are two teachers."
            " Leave one of them out."
        )
    if options.teacher_dir is None:
        raise UserError(
            "--teacher_checkpoint_dir is missing. Only with --lora.r can the student's base be the teacher: ask for it"
            " by --teacher.use_base true."
        )
    if lora.head and options.train.tie_embeddings:
        raise UserError(
            "--train.tie_embeddings true with --lora.head true: trained embeddings and head are not one matrix."
            " Leave one of them out."
        )


def _check_top_k(options: Options) -> None:
    """See that the objective is defined on what the cache keeps; raises UserError. Without a student there is none."""
    k, distill = options.teacher.k, options.distill
    if k is None or options.teacher.cache_mode == "fill":
        return
    for loss in map(distill.loss, (0.0, 1.0)):
        undefined = why_undefined(loss, k)
        if undefined is None:
            continue
        keyword, why = undefined
        name = "tad.top_k" if keyword == "top_k" else keyword
        given = f"{name} {getattr(loss, keyword)}"
        if keyword in distill.schedule.given:
            given = f"schedule.{keyword} {distill.schedule.given[keyword]}"
        ways = {
            "divergence": f"--distill.divergence {', '.join(DEFINED[:-1])} or {DEFINED[-1]}",
            "temperature": "--distill.temperature 1",
            "top_k": f"--teacher.cache_dtype topk:{max(64, loss.top_k + 1)}",
        }
        raise UserError(
            f"--distill.{given} with --teacher.cache_dtype topk:{k}: {why}.\n"
            f"Use {ways[keyword]}, or leave cache_dtype out to keep hidden states."
        )


def _check_several(options: Options) -> None:
    """See that a list of teachers stands alone, and that each of them can be one."""
    teacher, teacher_dir = options.teacher, options.teacher_checkpoint_dir
    others = {"teacher_checkpoint_dir": teacher_dir, "teacher.use_base": "true" if teacher.use_base else None}
    for name, value in others.items():
        if value is not None:
            raise UserError(
                f"--teachers and --{name} {value} both name teachers.\nLeave one of them out; the list takes several."
            )
    if teacher.cache_dir is not None:
        raise UserError(
            f"--teacher.cache_dir {teacher.cache_dir} with --teachers: each teacher has a cache of its own.\n"
            "Give cache_dir in --teachers, beside the directory, in its place."
        )
    if teacher.tokenizer == "other":
        raise UserError(
            "--teacher.tokenizer other with --teachers: distributions are averaged over the same ids.\n"
            "Leave it out, or give one teacher."
        )
    if teacher.k is not None:
        raise UserError(
            f"--teacher.cache_dtype {teacher.cache_dtype} with --teachers: of an average the most probable ids are not"
            " those of each teacher.\nLeave cache_dtype out to keep hidden states, or give one teacher."
        )
    if not any(of.cache_dir for of in options.teachers):
        refuse_changed("teacher", teacher, "cache_", "without a cache_dir in --teachers", "Give one")
    check_listed(options.teachers, teacher.cache_mode)


def without_prompts(data: DataModule | None) -> tuple[str, str] | None:
    """Why a data module cannot tell prompts from responses, and what to give in its place.

    None if it can, or if only its samples will show; ``data`` is None in a dry run that is told none.
    """
    name = type(data).__name__
    if isinstance(data, (LitData, *FOR_PRETRAINING)):
        others = "--data StreamingSFT or another module for finetuning, with --data.mask_prompt true"
        return f"--data {name} has tokens to read on, and no prompts", others
    if getattr(data, "mask_prompt", True):
        return None
    return f"--data {name} without mask_prompt: of a record all of it counts as a response", "--data.mask_prompt true"


def _check_on_policy(options: Options) -> None:
    """See that a student can answer prompts itself: the data tells them, and a cache would be of use."""
    on_policy, unknown = options.distill.on_policy, without_prompts(options.data)
    if on_policy > 0 and unknown is not None:
        why, other = unknown
        raise UserError(
            f"--distill.on_policy {on_policy} needs to know what is a prompt: give {other}.\n{why}; else leave"
            " on_policy out."
        )
    if on_policy == 1 and any(args.cache_dir for args in options.args_of_teachers):
        raise UserError(
            "--distill.on_policy 1.0 with --teacher.cache_dir: a cache knows recorded responses, and none is read."
            " Leave one of them out."
        )


def _check_other_tokenizer(options: Options) -> None:
    """Refuse what does not go with a teacher of another tokenizer."""
    teacher, data = options.teacher, options.data
    if teacher.tokenizer == "same":
        return
    kind, too_long = type(data).__name__, getattr(data, "too_long", "drop")
    found = {
        "--dry_run true": options.dry_run and "neither model is read then. Start the run",
        f"--distill.on_policy {options.distill.on_policy}": options.distill.on_policy > 0
        and "the student's responses are no tokens of the teacher. Leave on_policy out",
        "--teacher.use_base true": teacher.use_base and "a student's base has its tokenizer. Leave tokenizer out",
        f"--data {kind}": kind != "StreamingSFT" and "its records come as tokens. Use --data StreamingSFT",
        "--data.mask_prompt false": not getattr(data, "mask_prompt", True)
        and "prompts are other texts in another template. Give --data.mask_prompt true",
        f"--data.too_long {too_long}": too_long == "cut"
        and "both models would be cut off at other places. Use --data.too_long drop",
        "--data.micro_batch_tokens": getattr(data, "micro_batch_tokens", None) is not None
        and "the teacher's tokens are not counted. Use --train.micro_batch_size",
        f"--teacher.quantize {teacher.quantize}": teacher.quantize is not None
        and "what it costs is measured over one vocabulary. Leave quantize out",
        f"--teacher.cache_dtype {teacher.cache_dtype}": teacher.cache_dtype is not None
        and "what it costs is measured over one vocabulary. Leave cache_dtype out",
    }
    for what, why in found.items():
        if why:
            raise UserError(f"--teacher.tokenizer other with {what}: {why}.")


def check_questions(data: DataModule | None, generation: GenerationArgs) -> None:
    """See that there are prompts to answer, if answers are to be rated; raises UserError if there cannot be."""
    unknown = without_prompts(data)
    if generation.seeds and unknown is not None:
        why, other = unknown
        raise UserError(
            f"{why}, so there is no prompt to answer.\nGive {other}, or leave answers out with --generation.seeds '[]'."
        )


def _check_no_effect(options: Options) -> None:
    """Refuse options that others leave without effect."""
    teacher, eval, data, distill = options.teacher, options.eval, options.data, options.distill
    logger = f"--logger_name {options.logger_name}"
    used = OF_LOGGERS.get(options.logger_name, ())
    found = [(f"log.{name}", value, logger) for name, value in changed(options.log).items() if name not in used]
    if options.accept_changes and not options.resume:
        found.append(("accept_changes", "true", "a run that does not resume"))
    if options.overwrite and teacher.cache_mode == "fill":
        found.append(("overwrite", "true", "--teacher.cache_mode fill"))
    if teacher.cpu_offload and teacher.cache_mode == "read" and options.distill.on_policy == 0:
        found.append(("teacher.cpu_offload", "true", "--teacher.cache_mode read"))
    if teacher.k is not None and teacher.cache_mode != "fill" and distill.compile and distill.on_policy == 0:
        found.append(("distill.compile", "true", f"--teacher.cache_dtype {teacher.cache_dtype}"))
    if eval.max_new_tokens is None and eval.evaluate_example != "first":
        found.append(("eval.evaluate_example", eval.evaluate_example, "--eval.max_new_tokens null"))
    if isinstance(data, LitData) and data.seed != LitData().seed:
        found.append(("data.seed", data.seed, "--data LitData, whose order --seed chooses"))
    if found:
        name, value, other = found[0]
        raise UserError(f"--{name} {value} has no effect with {other}; remove it.")


def without_student(given: dict[str, Any]) -> str | None:
    """What to say of options that only a student takes, if there are any, in a run that fills a cache.

    ``given`` has those that are not as they are by default, with their values.
    """
    # true and null as on a command line
    found = [
        f"--{name} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in given.items()
        if OF_STUDENT.fullmatch(name)
    ]
    if not found:
        return None
    one = " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
    return f"--teacher.cache_mode fill trains no student, so {one} {'has' if len(found) == 1 else 'have'} no effect."


def _check_cpu_offload(options: Options) -> None:
    """Refuse to hold a teacher in CPU memory where that cannot be had or saves nothing."""
    teacher = options.teacher
    if not teacher.cpu_offload:
        return
    if teacher.quantize is not None:
        raise UserError(
            f"--teacher.cpu_offload true with --teacher.quantize {teacher.quantize}: a teacher is held in few bits on"
            " one device, or in CPU memory for several. Leave one of them out."
        )
    if not options.cuda:
        raise UserError(
            "--teacher.cpu_offload true is for GPUs, and this run is on a CPU, whose memory the teacher takes anyway."
            " Leave it out."
        )
    if options.processes == 1:
        raise UserError(
            "--teacher.cpu_offload true is for several devices, and this run has 1. Use --teacher.quantize int8 or nf4,"
            " or more --devices."
        )


def check_training_args(train: TrainArgs, eval: EvalArgs) -> None:
    """Refuse by name what this command does not do and what cannot be meant; raises UserError."""
    if train.max_tokens is not None:
        raise UserError(
            f"--train.max_tokens {train.max_tokens} is not supported: the schedule needs the number of steps.\n"
            "Use --train.max_steps, --train.epochs or --train.max_time."
        )
    if train.epochs is None and train.max_steps is None:
        raise UserError("--train.epochs and --train.max_steps are both null: the run would never end. Set one of them.")
    sizes = "global_batch_size micro_batch_size max_seq_length log_interval save_interval epochs max_steps".split()
    check_at_least_one("train.", **{name: getattr(train, name) for name in sizes})
    check_at_least_one("eval.", **{name: getattr(eval, name) for name in ("interval", "max_iters", "max_new_tokens")})
    for name in ("max_norm", "max_time"):
        value = getattr(train, name)
        if value is not None and not value > 0:
            raise UserError(f"--train.{name} must be above 0, got {value}. Leave it out (null) for no limit.")
    for name in ("min_lr", "lr_warmup_steps"):
        value = getattr(train, name)
        if value is not None and not value >= 0:
            raise UserError(f"--train.{name} must not be negative, got {value}.")
    example = str(eval.evaluate_example)
    if example not in ("first", "random") and not example.isdigit():
        raise UserError(
            f"--eval.evaluate_example must be first, random or the number of a record, got {eval.evaluate_example!r}."
        )


def _check_beginning(options: Options) -> None:
    """See that a run does not both go on and begin anew, and that it can keep what it saves."""
    resume, save_minutes, keep_last = options.resume, options.save_minutes, options.keep_last
    if options.overwrite and (resume is True or resume == "auto"):
        raise UserError(
            f"--overwrite true begins anew, and --resume {str(resume).lower()} goes on with what is there."
            " Leave one of them out."
        )
    if save_minutes is not None and not save_minutes > 0:
        raise UserError(
            f"--save_minutes must be above 0, got {save_minutes}. Leave it out for the default, or give null for none."
        )
    if keep_last is not None and keep_last < 1:
        raise UserError(f"--keep_last must be at least 1, got {keep_last}. Leave it out (null) to keep all.")


def count_devices(devices: int | str, num_nodes: int, needed: bool = True) -> int:
    """How many devices a node has; raises UserError if that cannot be, or if they are needed and not there."""
    check_at_least_one(num_nodes=num_nodes)
    try:
        count = parse_devices(devices)
    except ValueError:
        raise UserError(
            f"--devices must be a number from 1 on, or auto for every GPU there is, got {devices}.\nGive --devices 1."
        ) from None
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    # more processes than cores make sense in tests only
    if needed and count > (gpus or PROCESSES_OF_A_CORE * cores):
        there = f"this machine has {gpus} GPUs" if gpus else f"without a GPU each is a process, for {cores} CPU cores"
        raise UserError(f"--devices {count}: {there}.\nGive --devices {gpus or cores}, or fewer.")
    return count


def check_hybrid_sharding(hybrid_sharding: bool, devices: int, num_nodes: int) -> None:
    """See that there are several nodes with several devices each, if that is asked for; raises UserError."""
    if hybrid_sharding and (num_nodes == 1 or devices == 1):
        raise UserError(
            f"--hybrid_sharding true with --num_nodes {num_nodes} --devices {devices}: it is for several nodes with"
            " several devices each. Leave it out."
        )


def choose_precision(precision: str | None, cuda: bool) -> Literal["32-true", "bf16-true", "bf16-mixed"]:
    """The precision to train in, by default LitGPT's on a GPU, float32 on a CPU, where bf16 is slow; or UserError."""
    if precision is None:
        return "bf16-mixed" if cuda else "32-true"
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision} is not supported: fp16 and its loss scaling would change which steps are taken.\n"
            f"Use one of {', '.join(PRECISIONS)}."
        )
    return precision


def optimizer_config(optimizer: str | dict) -> str | dict:
    """An optimizer as LitGPT's function for it takes it: a name, or class_path and init_args.

    jsonargparse hands ``--optimizer.lr 1e-4`` over as ``{"lr": "1e-4"}``, beside a class_path if there is one.
    """
    if isinstance(optimizer, str):
        return optimizer
    class_path = optimizer.get("class_path", OPTIMIZER)
    init_args = {**optimizer.get("init_args", {})}
    init_args.update({name: value for name, value in optimizer.items() if name not in ("class_path", "init_args")})
    if not init_args:
        return class_path.removeprefix("torch.optim.")
    return {
        "class_path": class_path if "." in class_path else f"torch.optim.{class_path}",
        "init_args": {name: _number(value) for name, value in init_args.items()},
    }


def _number(value: Any) -> Any:
    # YAML reads 1e-4, without a point, as text
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return yaml.safe_load(value)
