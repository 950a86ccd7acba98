"""Steps of models of any size on made-up tokens, with the memory of a process watched."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.data.steps import MicroBatch, StepBatch
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.memory.estimate import MemoryEstimate
from litgpt_akl.memory.process import MemoryWatch, anonymous_memory
from litgpt_akl.models.generation import generate
from litgpt_akl.models.gpt import build_model, checkpoint_activations, empty_weights, set_up_teacher
from litgpt_akl.models.parallel import load_weights, make_strategy, return_freed_memory
from litgpt_akl.teacher.cache import Caches
from litgpt_akl.teacher.teacher import Teacher
from litgpt_akl.training.loop import take_step


def held() -> int:
    """Bytes of this process that no file backs, after what was freed is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_memory()


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Yields the bytes of this process at the ``start``; afterwards ``growth`` is by how many it had grown at most."""
    # what was freed before would be used again, and not be seen
    result = {"start": held()}
    watch = MemoryWatch(period=0.001)
    try:
        yield result
    finally:
        watch.close()
        result["growth"] = watch.look() - result["start"]


def write_weights(path: Path, config: Config, tied: bool, trained: bool = True) -> None:
    """Random weights; of a ``trained`` model logits are so far apart that a few ids have nearly all of the mass."""
    weights = GPT(config).state_dict()
    if trained:
        torch.nn.init.normal_(weights["lm_head.weight"])
    if tied:
        del weights["transformer.wte.weight"]
    torch.save(weights, path)


def micro_batch(estimate: MemoryEstimate) -> MicroBatch:
    input_ids = torch.randint(estimate.vocab_size, (estimate.samples, estimate.sequence_length))
    return MicroBatch(input_ids, torch.arange(input_ids.numel()), input_ids.flatten())


def take_steps(estimate: MemoryEstimate, small: MemoryEstimate, directory: Path) -> None:
    """Two steps of such a run in this process; writes its growth in bytes to ``growth-RANK.pth``.

    Args:
        estimate: on a CPU.
        small: like it, with models so small that a step only loads what the libraries load when they are first used.
        directory: with ``student.pth`` and ``teacher.pth``.
    """
    torch.set_num_threads(1)
    return_freed_memory()
    strategy = make_strategy(estimate.devices, estimate.num_nodes, estimate.hybrid_sharding)
    fabric = L.Fabric(
        accelerator="cpu",
        devices=estimate.devices,
        num_nodes=estimate.num_nodes,
        strategy=strategy,
        precision=estimate.precision,
    )
    fabric.launch()
    _distil(fabric, small, None)
    with watched() as result:
        _distil(fabric, estimate, directory)
    torch.save(result["growth"], directory / f"growth-{fabric.global_rank}.pth")


def _distil(fabric: L.Fabric, estimate: MemoryEstimate, directory: Path | None) -> None:
    state = make_state(fabric, estimate, directory)
    for step_batch in steps_of(estimate, 2):
        if estimate.on_policy_prompts:
            prompts = [torch.zeros(estimate.sequence_length - 4, dtype=torch.int64)] * estimate.on_policy_prompts
            seeds = [(number,) for number in range(estimate.on_policy_prompts)]
            options = {"max_new_tokens": 4, "vocab_size": estimate.vocab_size, "stop": []}
            generate(fabric, state["student"], prompts, seeds=seeds, **options)
        take_step(fabric, state, step_batch, max_norm=1.0)


def make_state(fabric: L.Fabric, estimate: MemoryEstimate, directory: Path | None) -> dict[str, Any]:
    """The models of a run with the weights in ``directory``, if any, ready for ``take_step``."""
    with empty_weights(fabric):
        student = build_model(estimate.student, estimate.student_tied)
    if estimate.activation_checkpointing:
        checkpoint_activations(student)
    with empty_weights(fabric, estimate.teacher_dtype):
        teacher = build_model(estimate.teacher, estimate.teacher_tied)
    teacher = set_up_teacher(fabric, teacher)
    student = fabric.setup_module(student)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(student.parameters(), lr=1e-4, fused=estimate.optimizer_is_fused)
    )
    if directory is not None:
        for model, name in ((teacher, "teacher"), (student, "student")):
            path = directory / f"{name}.pth"
            load_weights(model, torch.load(path, mmap=True, weights_only=True) if fabric.is_global_zero else None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    state = {"student": student, "teacher": Teacher(fabric, teacher), "caches": Caches()}
    state |= {"optimizer": optimizer, "scheduler": scheduler}
    return state | {"loss": estimate.loss, "vocab_size": estimate.vocab_size}


def steps_of(estimate: MemoryEstimate, number: int) -> Iterator[StepBatch]:
    """That many step batches of a process, of made-up tokens."""
    micro_batches = estimate.global_batch_size // estimate.samples // estimate.processes
    tokens = estimate.samples * estimate.sequence_length * micro_batches * estimate.processes
    for step in range(number):
        batches = [micro_batch(estimate) for _ in range(micro_batches)]
        yield StepBatch(0, step, np.arange(estimate.global_batch_size), tokens, tokens, tokens, batches)


OPTIONS = ("train", "teacher", "precision", "devices", "num_nodes", "hybrid_sharding")


def model(layers: int, width: int, vocab_size: int) -> Config:
    return Config(
        name=f"{layers} layers",
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        intermediate_size=width * 11 // 4,
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
        block_size=2048,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
    )


def make_estimate(student: Config, teacher: Config, **changes) -> MemoryEstimate:
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


LLAMA_8B, LLAMA_70B = Config.from_name("Llama-3.1-8B"), Config.from_name("Llama-3.1-70B")


ON_GPUS = make_estimate(
    LLAMA_8B,
    LLAMA_70B,
    device="cuda",
    devices=8,
    precision="bf16-mixed",
    teacher_dtype=torch.bfloat16,
    loss=DistillationLoss(),
    global_batch_size=64,
    micro_batch_size=2,
    sequence_length=512,
)
