"""Steps of models of any size on made-up tokens, with the memory of a process watched."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gpu_benchmark import runs
from gpu_benchmark.runs import make_estimate, steps_of
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.memory.estimate import MemoryEstimate
from litgpt_akl.memory.process import MemoryWatch, anonymous_memory
from litgpt_akl.models.generation import generate
from litgpt_akl.models.parallel import load_weights, make_strategy, return_freed_memory
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


LENGTHS = (0.4, 0.9, 0.6, 1, 0.5, 1)
"""Of the samples of steps, as shares of the longest: what is freed has other sizes than what is asked for next."""


def take_steps(estimate: MemoryEstimate, small: MemoryEstimate, directory: Path) -> None:
    """Some steps of such a run in this process; writes its growth in bytes to ``growth-RANK.pth``.

    Args:
        estimate: on a CPU.
        small: like it, with models so small that a step only loads what the libraries load when they are first used.
        directory: with ``student.pth`` and ``teacher.pth``.
    """
    torch.set_num_threads(1)
    if estimate.processes > 1:
        # as a run does
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
    for share in LENGTHS if estimate.processes == 1 else (1, 1):
        length = max(8, int(share * estimate.sequence_length))
        (step_batch,) = steps_of(replace(estimate, sequence_length=length), 1)
        if estimate.on_policy_prompts:
            prompts = [torch.zeros(estimate.sequence_length - 4, dtype=torch.int64)] * estimate.on_policy_prompts
            seeds = [(number,) for number in range(estimate.on_policy_prompts)]
            options = {"max_new_tokens": 4, "vocab_size": estimate.vocab_size, "stop": []}
            generate(fabric, state["student"], prompts, seeds=seeds, **options)
        take_step(fabric, state, step_batch, max_norm=1.0)


def make_state(fabric: L.Fabric, estimate: MemoryEstimate, directory: Path | None) -> dict[str, Any]:
    """The models of a run with the weights in ``directory``, if any, ready for ``take_step``."""
    state = runs.make_state(fabric, estimate, confidence=None)
    if directory is not None:
        for model, name in ((state["teacher"].model, "teacher"), (state["student"], "student")):
            path = directory / f"{name}.pth"
            load_weights(model, torch.load(path, mmap=True, weights_only=True) if fabric.is_global_zero else None)
    return state


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
