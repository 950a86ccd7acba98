"""Which options go together, and which of LitGPT's arguments this package honours; asked before anything is loaded."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import Alpaca, DataModule, LitData, MicroLlama, OpenWebText, TextFiles, TinyLlama, TinyStories

from litgpt_akl.config.args import DistillArgs, GenerationArgs, LoRAArgs, TeacherArgs
from litgpt_akl.messages import UserError

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
FOR_PRETRAINING = (MicroLlama, OpenWebText, TextFiles, TinyLlama, TinyStories)
OF_STUDENT = re.compile(
    r"(resume|accept_changes|keep_last|export_hf|on_nonfinite|activation_checkpointing|logger_name)"
    r"|optimizer(\..*)?|(lora|distill|log)\..*|eval\.(max_new_tokens|evaluate_example)"
    r"|train\.(save_interval|log_interval|max_time|max_norm|min_lr|lr_warmup_.*|tie_embeddings|epochs|max_steps)"
)
"""Options that only a student takes; those that a cache's samples depend on are not among them."""


def check_lora_args(
    teacher_checkpoint_dir: Path | None, teacher: TeacherArgs, lora: LoRAArgs, train: TrainArgs
) -> None:
    """See that there is one teacher, and that adapters and other options agree.

    Raises:
        UserError: names the options and the way out.
    """
    if teacher.use_base and lora.r is None:
        raise UserError(
            "--teacher.use_base true without --lora.r: all of the student is trained, so no base is left to teach it.\n"
            "Give --lora.r, or a --teacher_checkpoint_dir."
        )
    if teacher.use_base and teacher_checkpoint_dir is not None:
        raise UserError(
            f"--teacher.use_base true and --teacher_checkpoint_dir {teacher_checkpoint_dir} are two teachers."
            " Leave one of them out."
        )
    if not teacher.use_base and teacher_checkpoint_dir is None:
        raise UserError(
            "--teacher_checkpoint_dir is missing. Only with --lora.r can the student's base be the teacher: ask for it"
            " by --teacher.use_base true."
        )
    if lora.head and train.tie_embeddings:
        raise UserError(
            "--train.tie_embeddings true with --lora.head true: trained embeddings and head are not one matrix."
            " Leave one of them out."
        )


def without_prompts(data: DataModule | None) -> tuple[str, str] | None:
    """Why a data module cannot tell prompts from responses, and what to give in its place.

    None if it can, or if only its samples will show; ``data`` is None for the default, Alpaca.
    """
    name = "Alpaca" if data is None else type(data).__name__
    if isinstance(data, (LitData, *FOR_PRETRAINING)):
        others = "--data StreamingSFT or another module for finetuning, with --data.mask_prompt true"
        return f"--data {name} has tokens to read on, and no prompts", others
    if getattr(Alpaca if data is None else data, "mask_prompt", True):
        return None
    # an option of a data module needs the module's name
    chosen = "--data Alpaca " if data is None else ""
    return f"--data {name} without mask_prompt: of a record all of it counts as a response", (
        f"{chosen}--data.mask_prompt true"
    )


def check_on_policy(distill: DistillArgs, data: DataModule | None, teacher: TeacherArgs) -> None:
    """See that a student can answer prompts itself.

    Raises:
        UserError: the data does not tell prompts from responses, or a cache would be of no use.
    """
    unknown = without_prompts(data)
    if distill.on_policy > 0 and unknown is not None:
        why, other = unknown
        raise UserError(
            f"--distill.on_policy {distill.on_policy} needs to know what is a prompt: give {other}.\n{why}; else leave"
            " on_policy out."
        )
    if distill.on_policy == 1 and teacher.cache_dir is not None:
        raise UserError(
            "--distill.on_policy 1.0 with --teacher.cache_dir: a cache knows recorded responses, and none is read."
            " Leave one of them out."
        )


def check_questions(data: DataModule | None, generation: GenerationArgs) -> None:
    """See that there are prompts to answer, if answers are to be rated; raises UserError if there cannot be."""
    unknown = without_prompts(data)
    if generation.seeds and unknown is not None:
        why, other = unknown
        raise UserError(
            f"{why}, so there is no prompt to answer.\nGive {other}, or leave answers out with --generation.seeds '[]'."
        )


def check_no_effect(
    data: DataModule | None,
    teacher: TeacherArgs,
    distill: DistillArgs,
    eval: EvalArgs,
    log: LogArgs,
    *,
    logger_name: str,
    resume: bool | str | Path,
    accept_changes: bool,
) -> None:
    """Refuse options that others leave without effect.

    Raises:
        UserError: names both.
    """
    logger = f"--logger_name {logger_name}"
    found = [(f"log.{name}", value, logger) for name, value in _unused_log_args(logger_name, log)]
    if accept_changes and not resume:
        found.append(("accept_changes", "true", "a run that does not resume"))
    if teacher.cpu_offload and teacher.cache_mode == "read" and distill.on_policy == 0:
        found.append(("teacher.cpu_offload", "true", "--teacher.cache_mode read"))
    if eval.max_new_tokens is None and eval.evaluate_example != "first":
        found.append(("eval.evaluate_example", eval.evaluate_example, "--eval.max_new_tokens null"))
    if isinstance(data, LitData) and data.seed != LitData().seed:
        found.append(("data.seed", data.seed, "--data LitData, whose order --seed chooses"))
    if found:
        name, value, other = found[0]
        raise UserError(f"--{name} {value} has no effect with {other}; remove it.")


def _unused_log_args(logger_name: str, log: LogArgs) -> list[tuple[str, Any]]:
    used = {"wandb": {"project", "run", "group"}}
    used["litlogger"] = {field.name for field in fields(LogArgs)} - used["wandb"]
    changed = [field.name for field in fields(log) if getattr(log, field.name) != field.default]
    return [(name, getattr(log, name)) for name in changed if name not in used.get(logger_name, ())]


def without_student(given: dict[str, Any]) -> str | None:
    """What to say of options that only a student takes, in a run that fills a cache; None if there are none.

    Args:
        given: options that are not as they are by default, with their values.
    """
    # true and null as on a command line
    texts = {
        name: json.dumps(value) if value is None or isinstance(value, bool) else value for name, value in given.items()
    }
    found = [f"--{name} {text}" for name, text in texts.items() if OF_STUDENT.fullmatch(name)]
    if not found:
        return None
    one = " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
    return f"--teacher.cache_mode fill trains no student, so {one} {'has' if len(found) == 1 else 'have'} no effect."


def check_cpu_offload(teacher: TeacherArgs, processes: int, cuda: bool) -> None:
    """Refuse to hold a teacher in CPU memory where that cannot be had or saves nothing.

    Raises:
        UserError: it is quantized, the run is on a CPU, or there is only one process.
    """
    if not teacher.cpu_offload:
        return
    if teacher.quantize is not None:
        raise UserError(
            f"--teacher.cpu_offload true with --teacher.quantize {teacher.quantize}: a teacher is held in few bits on"
            " one device, or in CPU memory for several. Leave one of them out."
        )
    if not cuda:
        raise UserError(
            "--teacher.cpu_offload true is for GPUs, and this run is on a CPU, whose memory the teacher takes anyway."
            " Leave it out."
        )
    if processes == 1:
        raise UserError(
            "--teacher.cpu_offload true is for several devices, and this run has 1. Use --teacher.quantize int8 or nf4,"
            " or more --devices."
        )


def check_training_args(train: TrainArgs, eval: EvalArgs) -> None:
    """Refuse by name what this command does not do and what cannot be meant.

    Raises:
        UserError: names the option, its value and the way out.
    """
    if train.max_tokens is not None:
        raise UserError(
            f"--train.max_tokens {train.max_tokens} is not supported: the schedule needs the number of steps.\n"
            "Use --train.max_steps, --train.epochs or --train.max_time."
        )
    if train.epochs is None and train.max_steps is None:
        raise UserError("--train.epochs and --train.max_steps are both null: the run would never end. Set one of them.")
    sizes = ("global_batch_size", "micro_batch_size", "max_seq_length", "log_interval", "save_interval")
    counts = {
        "train": (train, (*sizes, "epochs", "max_steps")),
        "eval": (eval, ("interval", "max_iters", "max_new_tokens")),
    }
    for group, (args, names) in counts.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UserError(f"--{group}.{name} must be at least 1, got {value}.")
    for name in ("max_norm", "max_time"):
        value = getattr(train, name)
        if value is not None and value <= 0:
            raise UserError(f"--train.{name} must be above 0, got {value}. Leave it out (null) for no limit.")
    for name in ("min_lr", "lr_warmup_steps"):
        value = getattr(train, name)
        if value is not None and value < 0:
            raise UserError(f"--train.{name} must not be negative, got {value}.")
    example = str(eval.evaluate_example)
    if example not in ("first", "random") and not example.isdigit():
        raise UserError(
            f"--eval.evaluate_example must be first, random or the number of a record, got {eval.evaluate_example!r}."
        )


def check_overwrite(overwrite: bool, resume: bool | Literal["auto"] | Path, teacher: TeacherArgs) -> None:
    """See that a run does not both go on and begin anew; raises UserError."""
    if overwrite and (resume is True or resume == "auto"):
        raise UserError(
            f"--overwrite true begins anew, and --resume {str(resume).lower()} goes on with what is there."
            " Leave one of them out."
        )
    if overwrite and teacher.cache_mode == "fill":
        raise UserError("--overwrite true has no effect with --teacher.cache_mode fill; remove it.")


def check_run_args(
    devices: int,
    num_nodes: int,
    hybrid_sharding: bool,
    keep_last: int | None = None,
    save_minutes: float | None = None,
) -> None:
    """Refuse what cannot be meant among the options that stand in no group; raises UserError."""
    if save_minutes is not None and save_minutes <= 0:
        raise UserError(
            f"--save_minutes must be above 0, got {save_minutes}. Leave it out for the default, or give null for none."
        )
    if keep_last is not None and keep_last < 1:
        raise UserError(f"--keep_last must be at least 1, got {keep_last}. Leave it out (null) to keep all.")
    if hybrid_sharding and (num_nodes == 1 or devices == 1):
        raise UserError(
            f"--hybrid_sharding true with --num_nodes {num_nodes} --devices {devices}: it is for several nodes with"
            " several devices each. Leave it out."
        )


def choose_precision(precision: str | None, cuda: bool) -> Literal["32-true", "bf16-true", "bf16-mixed"]:
    """The precision to train in: LitGPT's default on a GPU; float32 on a CPU, where bf16 products are slow.

    Raises:
        UserError: a precision that distillation does not support.
    """
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

    jsonargparse hands ``--optimizer.init_args.lr 1e-4`` over as ``{"lr": "1e-4"}`` beside the class_path.

    Raises:
        UserError: options without a class: jsonargparse drops the name in ``--optimizer SGD --optimizer.lr 0.1``.
    """
    if isinstance(optimizer, str):
        return optimizer
    if "class_path" not in optimizer:
        raise UserError(
            f"--optimizer has options ({', '.join(optimizer)}) but no class. Name it by its class_path:"
            " --optimizer.class_path AdamW --optimizer.lr 1e-4."
        )
    class_path = optimizer["class_path"]
    init_args = {**optimizer.get("init_args", {})}
    init_args.update({name: value for name, value in optimizer.items() if name not in ("class_path", "init_args")})
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
