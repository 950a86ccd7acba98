"""What the memory of a run depends on, and what there is in it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from litgpt.config import Config
from torch import Tensor, nn

from litgpt_akl.loss.head_loss import DistillationLoss

STUDENT, GRADIENTS, OPTIMIZER, TEACHER = "student weights", "gradients", "optimizer", "teacher weights"
GATHERED, COPIES, ACTIVATIONS = "heads and blocks gathered", "weights in another type", "activations"
LOSS, TABLES, STREAM = "loss blocks", "position tables", "teacher's stream"
PARTS = (STUDENT, GRADIENTS, OPTIMIZER, TEACHER, GATHERED, COPIES, ACTIVATIONS, LOSS, TABLES, STREAM)
"""What memory is needed for; the rows of a table."""


@dataclass(frozen=True)
class MemoryPlan:
    """What the memory of a run depends on."""

    student: Config
    """LitGPT's; one of ``litgpt.lora`` if LoRA is trained."""
    teacher: Config
    student_tied: bool
    """Whether embeddings and LM head are one matrix."""
    teacher_tied: bool
    vocab_size: int
    """Ids that tokenizer and both heads have."""
    loss: DistillationLoss
    device: Literal["cpu", "cuda"]
    devices: int
    """On each node."""
    num_nodes: int
    hybrid_sharding: bool
    precision: Literal["32-true", "bf16-true", "bf16-mixed"]
    teacher_dtype: torch.dtype
    optimizer_states: float
    """Numbers that the optimizer keeps for a parameter; see :func:`try_optimizer`."""
    optimizer_is_fused: bool
    """Whether it steps without copies of parameters."""
    global_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None
    sequence_length: int
    """Tokens of the longest sample."""
    activation_checkpointing: bool = False
    shares_base: bool = False
    """Whether the teacher is the base of a LoRA student, held once."""
    quantize: Literal["int8", "nf4"] | None = None
    """How the weights of the teacher's blocks are held."""
    cpu_offload: bool = False
    """Whether the teacher's shards lie in CPU memory."""
    teacher_role: Literal["live", "remembered", "alone"] = "live"
    """Whether it computes hidden states for the student, is not loaded since a cache has them, or computes them for a
    cache without a student."""
    own_prompts: int = 0
    """That the student answers together in a process."""

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    @property
    def shards(self) -> int:
        """Processes that a model is spread over."""
        return self.devices if self.hybrid_sharding else self.processes

    @property
    def samples(self) -> int:
        """In a micro-batch of the longest ones."""
        if self.micro_batch_tokens is not None:
            return max(1, min(self.micro_batch_tokens // self.sequence_length, self.global_batch_size))
        return min(self.micro_batch_size, self.global_batch_size)

    @property
    def accumulates(self) -> bool:
        """Whether a process has several micro-batches in a step, and gradients in memory from the second on."""
        return math.ceil(self.global_batch_size / self.samples) > self.processes

    @property
    def teacher_runs_ahead(self) -> bool:
        """Whether the teacher works on a stream of its own, whose memory serves nothing else when it is free."""
        return self.device == "cuda" and self.processes == 1 and self.accumulates and self.teacher_role == "live"

    @property
    def mixed(self) -> bool:
        return self.precision == "bf16-mixed"

    @property
    def student_dtype(self) -> torch.dtype:
        """Of weights, gradients and optimizer."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32


@dataclass(frozen=True)
class Moment:
    """One of the moments at which much is in memory."""

    name: str
    parts: dict[str, float]
    """Bytes of one device by :data:`PARTS`; what is left out is 0."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def try_optimizer(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype
) -> tuple[float, bool]:
    """Take a step on a small matrix.

    Returns:
        How many numbers the optimizer keeps for each parameter, in the parameter's type: 2 for AdamW, 0 for plain SGD;
        and whether it is fused.
    """
    matrix = nn.Linear(256, 256, bias=False, dtype=dtype)
    optimizer = make_optimizer(matrix)
    matrix.weight.grad = torch.ones_like(matrix.weight)
    optimizer.step()
    kept = [value.nbytes for value in optimizer.state[matrix.weight].values() if isinstance(value, Tensor)]
    return sum(kept) / matrix.weight.nbytes, bool(optimizer.defaults.get("fused"))
