"""What a row of the benchmark is, and where it is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.config import Config

from gpu_benchmark.runs import make_estimate
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.memory.estimate import MemoryEstimate

PAIRS = {"qwen3": ("Qwen3-0.6B", "Qwen3-8B"), "llama3": ("Llama-3.2-1B", "Llama-3.1-8B")}
"""Student and teacher, by their names in LitGPT; both students have one matrix for embeddings and LM head."""
SHAPE = {"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 1024}
TINY_SHAPE = {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32}


@dataclass(frozen=True)
class Place:
    """Where and how large is measured."""

    device: torch.device
    tiny: bool
    """Models of a thousandth of the size, to see that everything runs."""
    devices: int
    """In this machine; more than one for what is sharded."""
    scratch: Path
    """A directory for what one row leaves for another."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def fabric(self, precision: str) -> L.Fabric:
        """For one device."""
        fabric = L.Fabric(accelerator=self.device.type, devices=1, precision=precision)
        fabric.launch()
        return fabric

    def estimate(self, pair: str, **changes) -> MemoryEstimate:
        """A run of a pair, as these options change it; in bf16-mixed, with a live teacher in bfloat16."""
        student, teacher = (self._config(name, position) for position, name in enumerate(PAIRS[pair]))
        defaults = {
            "student_tied": True,
            "device": self.device.type,
            "loss": DistillationLoss(),
            "precision": "bf16-mixed",
            "teacher_dtype": torch.bfloat16,
            **(TINY_SHAPE if self.tiny else SHAPE),
        }
        return make_estimate(student, teacher, **{**defaults, **changes})

    def _config(self, name: str, position: int) -> Config:
        if not self.tiny:
            return Config.from_name(name)
        small = {"n_layer": 2, "n_embd": 64 * (1 + position), "n_head": 2, "n_query_groups": 1, "head_size": 32}
        small |= {"intermediate_size": 128, "block_size": 256, "vocab_size": 1000, "padded_vocab_size": 1024}
        return Config.from_name(name, **small)


@dataclass(frozen=True)
class Row:
    """One measurement, which knows nothing of the others."""

    group: str
    """Of rows with like figures."""
    name: str
    measure: Callable[[Place], dict[str, Any]]
    """Figures by their names, units in them; raises whatever goes wrong."""
    alone: bool = False
    """Whether it needs a process of its own."""

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}"


class NotHere(Exception):
    """What a row measures is not there: a package, or a second device."""
