"""From what the command is asked for to a plan of its memory, with or without the models' files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from litgpt.args import TrainArgs
from litgpt.config import Config, configs
from litgpt.utils import extend_checkpoint_dir
from torch import nn

from litgpt_akl.config.args import DistillArgs, LoRAArgs, TeacherArgs
from litgpt_akl.data.workers import available_memory
from litgpt_akl.memory.memory_plan import MemoryPlan, try_optimizer
from litgpt_akl.memory.memory_report import GB
from litgpt_akl.messages import UserError
from litgpt_akl.models.generation import BATCH
from litgpt_akl.models.lora import lora_config
from litgpt_akl.models.pair import Pair, check_pair
from litgpt_akl.models.weights import is_said_to_be_tied, read_config


@dataclass(frozen=True)
class Models:
    """What is known of a pair of models without their weights."""

    student: Config
    teacher: Config
    vocab_size: int
    student_tied: bool
    teacher_tied: bool
    is_one: bool
    """Whether student and teacher are the same."""

    @property
    def context_length(self) -> int:
        """Tokens that both models can read."""
        return min(self.student.block_size, self.teacher.block_size)

    def name_shorter_context(self) -> str:
        """Whose context length it is that bounds the pair, for a message."""
        return "student" if self.student.block_size <= self.teacher.block_size else "teacher"


def find_models(checkpoint_dir: Path, teacher_checkpoint_dir: Path) -> Models:
    """What can be known of two models that may be there or not; nothing is downloaded.

    Args:
        checkpoint_dir: a checkpoint directory, or a name or model id that LitGPT knows.
        teacher_checkpoint_dir: likewise.

    Raises:
        UserError: neither a directory nor a name; or two directories whose models do not fit.
    """
    paths = {"student": checkpoint_dir, "teacher": teacher_checkpoint_dir}
    directories = {role: extend_checkpoint_dir(Path(path)) for role, path in paths.items()}
    found = {role: _find_config(paths[role], directory, role) for role, directory in directories.items()}
    if all(directory.is_dir() for directory in directories.values()):
        return models_of(check_pair(*directories.values()))
    return Models(
        student=found["student"],
        teacher=found["teacher"],
        vocab_size=min(config.padded_vocab_size for config in found.values()),
        student_tied=is_said_to_be_tied(directories["student"]) is True,
        teacher_tied=is_said_to_be_tied(directories["teacher"]) is True,
        is_one=directories["student"] == directories["teacher"],
    )


def models_of(pair: Pair) -> Models:
    """What is known of a pair that was checked."""
    return Models(
        student=pair.student_config,
        teacher=pair.teacher_config,
        vocab_size=pair.vocab_size,
        student_tied=is_said_to_be_tied(pair.student_dir) is True,
        teacher_tied=is_said_to_be_tied(pair.teacher_dir) is True,
        is_one=pair.is_one_model,
    )


def make_plan(
    models: Models,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    distill: DistillArgs,
    train: TrainArgs,
    data: Any,
    lora: LoRAArgs,
    teacher: TeacherArgs,
    *,
    precision: str,
    cuda: bool,
    **options: Any,
) -> MemoryPlan:
    """The plan of a run whose samples are as long as they may be.

    Args:
        models: from :func:`find_models`, or of a pair that was checked.
        make_optimizer: from a module to its optimizer.
        distill: of the command.
        train: of the command.
        data: a data module, or None.
        lora: of the command.
        teacher: of the command.
        precision: of the student.
        cuda: whether the devices are GPUs.
        options: other fields of :class:`MemoryPlan`.

    Raises:
        UserError: samples may be longer than the models read; or a teacher that is the student's base is to lie
            elsewhere.
    """
    if train.max_seq_length is not None and train.max_seq_length > models.context_length:
        raise UserError(
            f"--train.max_seq_length {train.max_seq_length} is more than the {models.context_length} tokens that the"
            f" {models.name_shorter_context()} reads. Set it to {models.context_length} or less."
        )
    plain = teacher.quantize is None and teacher.precision in (None, precision)
    shares_base = lora.r is not None and models.is_one and plain
    if shares_base and teacher.cpu_offload:
        raise UserError(
            "--teacher.cpu_offload true, but the teacher is the LoRA student's base, held in memory once, with it."
            " Leave it out."
        )
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    states, fused = try_optimizer(make_optimizer, dtype)
    return MemoryPlan(
        student=models.student if lora.r is None else lora_config(models.student, lora),
        teacher=models.teacher,
        student_tied=models.student_tied if train.tie_embeddings is None else train.tie_embeddings,
        teacher_tied=models.teacher_tied,
        teacher_dtype=teacher.dtype("cuda" if cuda else "cpu"),
        quantize=teacher.quantize,
        shares_base=shares_base,
        cpu_offload=teacher.cpu_offload,
        teacher_role=_role(teacher, distill),
        own_prompts=_own_prompts(train, distill, options["devices"] * options["num_nodes"]),
        vocab_size=models.vocab_size,
        loss=distill.loss(),
        device="cuda" if cuda else "cpu",
        precision=precision,
        optimizer_states=states,
        optimizer_is_fused=fused,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        micro_batch_tokens=getattr(data, "micro_batch_tokens", None),
        sequence_length=train.max_seq_length or models.context_length,
        **options,
    )


def _role(teacher: TeacherArgs, distill: DistillArgs) -> str:
    if teacher.cache_mode == "fill":
        return "alone"
    # no cache has what a student is about to answer
    return "remembered" if teacher.cache_mode == "read" and distill.on_policy == 0 else "live"


def _own_prompts(train: TrainArgs, distill: DistillArgs, processes: int) -> int:
    return min(BATCH, math.ceil(train.global_batch_size / processes)) if distill.on_policy > 0 else 0


def device_bytes(device_memory: float | None, cuda: bool, processes: int) -> float | None:
    """Bytes that a device has for this run, or None if there is no telling.

    Args:
        device_memory: in GB, as told.
        cuda: whether the devices are GPUs.
        processes: on this node; on a CPU they share what is free, of a container's limit if there is one.
    """
    if device_memory is not None:
        return device_memory * GB
    if not cuda:
        return available_memory() / processes
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _find_config(path: Path, directory: Path, role: str) -> Config:
    """Of a checkpoint, else of a name such as ``Llama-3.1-8B`` or a model id such as ``meta-llama/Llama-3.1-8B``."""
    if (directory / "model_config.yaml").is_file():
        return read_config(directory)
    names = {name for config in configs for name in (config["name"], config["hf_config"]["name"])}
    places = {".", *(config["hf_config"]["org"] for config in configs)}
    if path.name in names and str(path.parent) in places:
        return Config.from_name(path.name)
    raise UserError(
        f"The {role} {path} is neither a LitGPT checkpoint directory nor a model that LitGPT knows. Give one of"
        " `litgpt download list`, such as Llama-3.1-8B or meta-llama/Llama-3.1-8B."
    )
