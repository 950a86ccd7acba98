"""What each of the teachers of a run takes of a device's memory."""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from litgpt.config import Config

from litgpt_akl.models.model_size import measure_blocks, measure_size

if TYPE_CHECKING:
    from litgpt_akl.memory.estimate import MemoryEstimate

FLOAT32 = 4
"""Bytes."""
QUANTIZED = {"int8": 1, "nf4": 0.5 + 4 / 64}
"""Bytes of a weight; for nf4 with a float32 scale for every 64."""


class TeacherModel(NamedTuple):
    """One of several teachers, as far as memory depends on it."""

    config: Config
    tied: bool
    """Whether embeddings and LM head are one matrix."""
    role: Literal["live", "cached", "fill"]


def is_packed(estimate: "MemoryEstimate") -> bool:
    """Whether the teacher's distributions are there in place of hidden states, which on-policy samples have anyway."""
    return estimate.top_k is not None and not estimate.on_policy_prompts


class TeacherMemory:
    """What one of the teachers takes, in bytes of one device."""

    def __init__(self, estimate: "MemoryEstimate", teacher: TeacherModel) -> None:
        self.is_live, width, shape = teacher.role != "cached", estimate.teacher_dtype.itemsize, estimate.shape
        size = measure_size(teacher.config, teacher.tied)
        if not self.is_live:
            head = size.head if estimate.top_k is None else 0
            size = size._replace(whole=head, root=head, block=0)
        gathered = width * (estimate.shards > 1)
        self.root, self.block = size.root * gathered, size.block * gathered
        states = math.prod(shape) * teacher.config.n_embd * width
        self.hidden = math.prod(shape) * estimate.top_k.bytes_of_token if is_packed(estimate) else states
        running = max(b.no_grad for b in measure_blocks(teacher.config, *shape, estimate.teacher_dtype, False))
        self.inference = running + 2 * states
        blocks = (size.whole - size.root) * QUANTIZED.get(estimate.quantize, width)
        is_elsewhere = estimate.shares_base or (estimate.cpu_offload and self.is_live)
        self.weights = (not is_elsewhere) * (size.root * width + blocks) / estimate.shards
        self.tables = self.is_live * position_tables(teacher.config)


def position_tables(config: Config) -> int:
    """Sines and cosines for the whole context, which no sharding divides."""
    return (2 if config.rope_local_base_freq is None else 4) * config.block_size * config.rope_n_elem * FLOAT32
