"""Steps of runs on made-up weights and tokens: the trainer's own models, teacher, optimizer and step, without files."""

import zlib
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from litgpt.config import Config
from torch import Tensor, nn

from litgpt_akl.data.steps import MicroBatch, StepBatch
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.memory.estimate import MemoryEstimate
from litgpt_akl.models.gpt import (
    build_model,
    checkpoint_activations,
    compile_blocks,
    empty_weights,
    load_quantized,
    set_up_teacher,
)
from litgpt_akl.models.parallel import load_weights, unwrap
from litgpt_akl.teacher.cache import Caches, TeacherCache
from litgpt_akl.teacher.teacher import HeadOnly, Teacher
from litgpt_akl.training.optimizer import make_optimizer, make_scheduler

OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}
STEPS = 1000
"""Of which the learning rate's schedule knows."""
PEAKED, FLAT = 6.0, 0.3
"""Standard deviations of made logits: with the first a handful of ids hold half of the mass, as a real model's do."""


def make_estimate(student: Config, teacher: Config, **changes) -> MemoryEstimate:
    """What a run is, and what memory it will take: by default on a CPU, in float32 with one micro-batch."""
    defaults = dict(
        student_tied=False,
        teacher_tied=False,
        vocab_size=student.padded_vocab_size,
        loss=DistillationLoss(compile=False),
        device="cpu",
        devices=1,
        num_nodes=1,
        hybrid_sharding=False,
        precision="32-true",
        teacher_dtype=torch.float32,
        optimizer_states=2.0,
        optimizer_is_fused=True,
        global_batch_size=4,
        micro_batch_size=4,
        micro_batch_tokens=None,
        sequence_length=1024,
    )
    return MemoryEstimate(student, teacher, **{**defaults, **changes})


class DrawnWeights:
    """Random weights of a model by their names, drawn when they are asked for; the same each time.

    Args:
        config: of the model.
        role: other numbers for another role, such as teacher.
        confidence: standard deviation of the logits.
        device: on which they are drawn.
        place: where they are to lie.
        dtype: of what is drawn.
    """

    def __init__(
        self,
        config: Config,
        role: str,
        *,
        confidence: float = PEAKED,
        device: torch.device | str = "cpu",
        place: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        with torch.device("meta"):
            self._shapes = {name: value.shape for name, value in build_model(config, False).state_dict().items()}
        self.role, self.confidence, self.device, self.dtype = role, confidence, torch.device(device), dtype
        self.place = self.device if place is None else torch.device(place)

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name], device=self.device, dtype=self.dtype)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.role} {name}".encode()))
        if tensor.ndim < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = self.confidence / tensor.size(1) ** 0.5 if name == "lm_head.weight" else 0.02
            tensor.normal_(std=std, generator=generator)
        return tensor.to(self.place)


def make_state(
    fabric: L.Fabric, estimate: MemoryEstimate, confidence: float | None = PEAKED, compile: bool = False
) -> dict[str, Any]:
    """The models of a run, ready for ``take_step``.

    Without a ``confidence`` their weights are whatever the memory held. With ``compile`` the blocks are compiled.
    """
    with empty_weights(fabric):
        student = build_model(estimate.student, estimate.student_tied)
    if compile:
        compile_blocks(student)
    if estimate.activation_checkpointing:
        checkpoint_activations(student)
    teacher = _make_teacher(fabric, estimate, confidence, compile)
    student = fabric.setup_module(student)
    unwrap(student).reset_parameters()
    optimizer = fabric.setup_optimizers(make_optimizer(OPTIMIZER, student, estimate.optimizer_is_fused))
    if confidence is not None:
        options = {"confidence": confidence, "device": fabric.device}
        load_weights(student, DrawnWeights(estimate.student, "student", **options))
    return {
        "student": student,
        "teacher": Teacher(fabric, teacher),
        "caches": _empty_cache(estimate) if estimate.teacher_role == "cached" else Caches(),
        "optimizer": optimizer,
        "scheduler": make_scheduler(optimizer, 0, STEPS, 0.0),
        "loss": estimate.loss,
        "aligned": None,
        "vocab_size": estimate.vocab_size,
    }


def _make_teacher(fabric: L.Fabric, estimate: MemoryEstimate, confidence: float | None, compile: bool) -> nn.Module:
    config, dtype = estimate.teacher, estimate.teacher_dtype
    options = {"confidence": confidence, "device": fabric.device, "dtype": dtype}
    if estimate.quantize is not None:
        with torch.device("meta"):
            teacher = build_model(config, estimate.teacher_tied)
        # bitsandbytes quantizes what comes from the CPU
        weights = DrawnWeights(config, "teacher", **{**options, "confidence": confidence or PEAKED}, place="cpu")
        return load_quantized(teacher, weights, estimate.quantize, dtype, fabric.device)
    is_cached = estimate.teacher_role == "cached"
    if is_cached and estimate.top_k is not None:
        return HeadOnly(config, has_head=False)
    with empty_weights(fabric, dtype):
        teacher = HeadOnly(config) if is_cached else build_model(config, estimate.teacher_tied)
    if compile and not is_cached:
        compile_blocks(teacher)
    teacher = set_up_teacher(fabric, teacher)
    if confidence is not None:
        load_weights(teacher, DrawnWeights(config, "teacher", **options))
    return teacher


def _empty_cache(estimate: MemoryEstimate) -> Caches:
    """A cache from which nothing is read: each micro-batch has its hidden states, as a loader's processes read them."""
    of, row = estimate.top_k, (estimate.teacher_dtype, estimate.teacher.n_embd)
    with TemporaryDirectory() as directory:
        row = row if of is None else (torch.uint8, of.bytes_of_token)
        return Caches(TeacherCache(directory, 0, *row, writable=False, top_k=of))


def steps_of(estimate: MemoryEstimate, number: int) -> Iterator[StepBatch]:
    """That many step batches of a process, of made-up tokens, each of which counts."""
    micro_batches = estimate.global_batch_size // estimate.samples // estimate.processes
    tokens = estimate.samples * estimate.sequence_length * micro_batches * estimate.processes
    for step in range(number):
        batches = [_micro_batch(estimate) for _ in range(micro_batches)]
        yield StepBatch(0, step, np.arange(estimate.global_batch_size), tokens, tokens, tokens, batches)


def _micro_batch(estimate: MemoryEstimate) -> MicroBatch:
    input_ids = torch.randint(estimate.vocab_size, (estimate.samples, estimate.sequence_length))
    batch = MicroBatch(input_ids, torch.arange(input_ids.numel()), input_ids.flatten())
    if estimate.teacher_role == "cached" and estimate.top_k is not None:
        # a few at a time, since the logits are no part of what such a run holds
        parts = (estimate.top_k.pack(torch.randn(len(of), estimate.vocab_size), of) for of in batch.labels.split(16))
        batch.teacher_hidden = torch.cat([*parts])
    elif estimate.teacher_role == "cached":
        batch.teacher_hidden = torch.randn(input_ids.numel(), estimate.teacher.n_embd).to(estimate.teacher_dtype)
    return batch
