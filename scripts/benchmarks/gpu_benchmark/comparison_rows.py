"""Rows that compare runs with each other: the same steps of a small pair in float32, and with one thing changed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from litgpt.config import Config
from torch import Tensor

from gpu_benchmark.rows import NotHere, Place, Row
from gpu_benchmark.runs import make_estimate, make_state
from litgpt_akl.data.dataset import sample_keys
from litgpt_akl.data.steps import StepBatch, collate
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.models.parallel import gather_full, make_strategy, unwrap
from litgpt_akl.teacher.cache import Caches, TeacherCache
from litgpt_akl.training.loop import take_step

STEPS, MICRO_BATCHES, SAMPLES, LENGTH = 4, 4, 2, 48
"""The first half of the steps is an epoch, and the second half is the same samples again."""
VOCABULARY = 1000
REFERENCE = "reference.pth"


class Result(NamedTuple):
    """What a run has come to."""

    losses: list[float]
    weights: dict[str, Tensor]
    """On the CPU, in float32."""


def _config(layers: int, width: int) -> Config:
    return Config(
        name=f"{layers} layers",
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        intermediate_size=width * 2,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        block_size=256,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
    )


STUDENT, TEACHER = _config(2, 128), _config(1, 192)


def step_batches(with_keys: bool, rank: int = 0, processes: int = 1) -> Iterator[StepBatch]:
    """The same steps each time: samples of uneven lengths, whose second halves count; this rank's micro-batches."""
    for step in range(STEPS):
        first = step % (STEPS // 2) * MICRO_BATCHES * SAMPLES
        numbers, batches = np.arange(first, first + MICRO_BATCHES * SAMPLES), []
        samples = [_sample(int(number)) for number in numbers]
        for start in range(rank * SAMPLES, len(samples), processes * SAMPLES):
            own = slice(start, start + SAMPLES)
            batches.append(collate(samples[own]))
            if with_keys:
                batches[-1].keys = sample_keys(numbers[own], samples[own])
        responses = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
        tokens = sum(len(sample["input_ids"]) for sample in samples)
        yield StepBatch(step * 2 // STEPS, step % (STEPS // 2), numbers, responses, tokens, tokens, batches)


def _sample(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(LENGTH // 2, LENGTH, (1,), generator=generator))
    input_ids = torch.randint(VOCABULARY, (length,), generator=generator)
    labels = input_ids.clone()
    labels[: length // 2] = -100
    return {"input_ids": input_ids, "labels": labels}


def run(place: Place, fabric: L.Fabric, caches: Caches | None = None, compile: bool = False, **changes) -> Result:
    """Take the steps with a run's options changed so."""
    pair = STUDENT, TEACHER
    shape = {"device": place.device.type, "global_batch_size": MICRO_BATCHES * SAMPLES, "micro_batch_size": SAMPLES}
    estimate = make_estimate(*pair, **{**shape, "sequence_length": LENGTH, **changes})
    state = make_state(fabric, estimate, compile=compile)
    if caches is not None:
        state["caches"] = caches
    losses = []
    for step_batch in step_batches(caches is not None, fabric.global_rank, fabric.world_size):
        losses.append(take_step(fabric, state, step_batch, 1.0).loss)
    if caches is not None:
        caches.flush()
    parameters = unwrap(state["student"]).named_parameters()
    return Result(losses, {name: gather_full(parameter).float() for name, parameter in parameters})


def reference(place: Place) -> Result:
    """The run with which all are compared; it is taken once."""
    path = place.scratch / REFERENCE
    if not path.exists():
        torch.save(run(place, place.fabric("32-true"))._asdict(), path)
    return Result(**torch.load(path, weights_only=True))


def differences(found: Result, expected: Result) -> dict[str, Any]:
    """The largest of weights and, relative, of losses."""
    weights = [(weight - expected.weights[name]).abs().max().item() for name, weight in found.weights.items()]
    losses = [abs(one - other) / abs(other) for one, other in zip(found.losses, expected.losses, strict=True)]
    return {"weights, at most": max(weights), "losses, at most": max(losses), "last loss": found.losses[-1]}


def compare(place: Place, needs: str | None = None, **changes) -> dict[str, Any]:
    """A run on one device."""
    if needs is not None and find_spec(needs) is None:
        raise NotHere(f"{needs} is not installed")
    expected = reference(place)
    return differences(run(place, place.fabric(changes.get("precision", "32-true")), **changes), expected)


def compare_cached(place: Place, reads: bool) -> dict[str, Any]:
    """A run that fills a teacher cache, or one that has only the cache and the teacher's LM head."""
    expected, fabric = reference(place), place.fabric("32-true")
    samples, width = STEPS // 2 * MICRO_BATCHES * SAMPLES, TEACHER.n_embd
    with TemporaryDirectory() as directory:
        (Path(directory) / "training").mkdir()
        cache = TeacherCache(f"{directory}/training", samples, torch.float32, width, writable=True)
        result = run(place, fabric, Caches(cache))
        if reads:
            result = run(place, fabric, Caches(cache), teacher_role="cached")
    return differences(result, expected)


def compare_sharded(place: Place, offload: bool = False, **changes) -> dict[str, Any]:
    """A run on all devices; in all processes but the first, what is returned is of no interest."""
    if not (place.scratch / REFERENCE).exists():
        raise NotHere("the run on one device is missing")
    options = {"devices": place.devices, "precision": changes.get("precision", "32-true")}
    strategy = make_strategy(place.devices, 1, False, offload)
    fabric = L.Fabric(accelerator=place.device.type, strategy=strategy, **options)
    fabric.launch()
    return differences(run(place, fabric, devices=place.devices, **changes), reference(place))


def _row(name: str, measure: Callable[..., dict[str, Any]], alone: bool = False, **changes) -> Row:
    return Row("runs, to the first in float32", name, partial(measure, **changes), alone)


HALF = {"teacher_dtype": torch.bfloat16}
ONE_DEVICE: Sequence[Row] = [
    _row("float32, once more", compare),
    _row("filling a teacher cache", compare_cached, reads=False),
    _row("reading it", compare_cached, reads=True),
    _row("loss compiled", compare, loss=DistillationLoss(compile=True)),
    _row("activations checkpointed", compare, activation_checkpointing=True),
    _row("bf16-mixed", compare, precision="bf16-mixed", **HALF),
    _row("bf16-true", compare, precision="bf16-true", **HALF),
    _row("teacher in int8", compare, needs="bitsandbytes", quantize="int8"),
    _row("teacher in nf4", compare, needs="bitsandbytes", quantize="nf4"),
]
SLOW: Sequence[Row] = [_row("blocks compiled", compare, compile=True)]
ALL_DEVICES: Sequence[Row] = [
    _row("float32, all devices", compare_sharded, alone=True),
    _row("bf16-mixed, all devices", compare_sharded, alone=True, precision="bf16-mixed", **HALF),
    _row("bf16-true, all devices", compare_sharded, alone=True, precision="bf16-true", **HALF),
    _row("float32, teacher in CPU memory, all devices", compare_sharded, alone=True, offload=True),
]
