"""Rows of whole steps: speed against the two models' bare passes, share of the peak, memory as predicted and taken."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import lightning as L
import torch

from gpu_benchmark.flops import published_peak, step_operations
from gpu_benchmark.rows import NotHere, Place, Row
from gpu_benchmark.runs import make_state, steps_of
from gpu_benchmark.timing import Memory, Seconds, measure
from litgpt_akl.data.steps import MicroBatch
from litgpt_akl.memory.estimate import MemoryEstimate
from litgpt_akl.models.gpt import hidden_states
from litgpt_akl.training.loop import take_step

EARLY, LATE = 3, 40
"""Steps after which memory is read."""
MAX_NORM = 1.0


def measure_step(place: Place, pair: str, late: int | None = None, **changes) -> dict[str, Any]:
    """Steps of a run, timed after the first three; with ``late`` so many are taken, and memory is read again."""
    estimate = place.estimate(pair, **changes)
    if estimate.quantize is not None and find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    fabric, memory = place.fabric(estimate.precision), Memory(place.device)
    state = make_state(fabric, estimate)
    # drawing the weights has taken some that a run does not
    memory.reset()
    batches = cycle(list(steps_of(estimate, 2)))
    losses: list[float] = []

    def step() -> None:
        losses.append(take_step(fabric, state, next(batches), MAX_NORM).loss)

    for _ in range(EARLY):
        step()
    early = memory.peaks_gb()
    seconds = measure(step, place.device, warmup=0, calls=5 if place.tiny else 12)
    while late is not None and len(losses) < late:
        step()
    # what bare passes take must not be counted
    peaks = memory.peaks_gb()
    bare = bare_passes(fabric, state, estimate, place)
    return {
        **_speed(place, estimate, seconds, bare),
        "predicted GB": estimate.peak.total / 1e9,
        "allocated GB": peaks[0],
        "reserved GB": peaks[1],
        f"reserved after {EARLY}": early[1],
        "steps": len(losses),
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def _speed(place: Place, estimate: MemoryEstimate, seconds: Seconds, bare: dict[str, float]) -> dict[str, Any]:
    rate = step_operations(estimate) / seconds.median
    peak = published_peak(torch.cuda.get_device_name(place.device)) if place.is_cuda else None
    tokens = estimate.global_batch_size * estimate.sequence_length
    return {
        "tokens/s": tokens / seconds.median,
        "ms": 1e3 * seconds.median,
        "least ms": 1e3 * seconds.least,
        "MFU": None if peak is None else rate / peak,
        "TFLOP/s": rate / 1e12,
        "/ bare": seconds.median / sum(bare.values()),
        **{f"{name} ms": 1e3 * value for name, value in bare.items()},
    }


def bare_passes(fabric: L.Fabric, state: dict[str, Any], estimate: MemoryEstimate, place: Place) -> dict[str, float]:
    """Seconds that a step's micro-batches take at least: the teacher's forward, the student's forward and backward.

    Both without LM head; the student's backward begins with a gradient of ones. Optimizer and loss come on top.
    """
    batch = next(steps_of(estimate, 1)).micro_batches[0]
    batch = MicroBatch(*(tensor.to(place.device) for tensor in (batch.input_ids, batch.positions, batch.labels)))
    student, count = state["student"], estimate.global_batch_size // estimate.samples

    def teach() -> None:
        hidden_states(state["teacher"].model, batch.input_ids, batch.positions)

    def learn() -> None:
        with student.lm_head.output_of_head(lambda head, hidden: hidden):
            fabric.backward(student(batch.input_ids).sum())
        student.zero_grad()

    calls: dict[str, Callable[[], None]] = {"bare student": learn}
    if estimate.teacher_role == "live":
        calls["bare teacher"] = teach
    return {name: count * measure(call, place.device, warmup=2, calls=5).median for name, call in calls.items()}


def _row(pair: str, name: str, late: int | None = None, **changes) -> Row:
    return Row("step", f"{pair}, {name}", partial(measure_step, pair=pair, late=late, **changes))


TRUE = {"precision": "bf16-true"}
CACHED = {"teacher_role": "cached"}
CHECKPOINTED = {"activation_checkpointing": True}
FIRST = [_row("qwen3", "bf16-mixed, live", late=LATE)]
SECOND = [
    _row("qwen3", "bf16-true, live", late=LATE, **TRUE),
    _row("qwen3", "bf16-mixed, cached", **CACHED),
    _row("qwen3", "bf16-mixed, live, checkpointed", **CHECKPOINTED),
]
QUANTIZED = [_row("qwen3", f"bf16-mixed, live, teacher in {kind}", quantize=kind) for kind in ("int8", "nf4")]
OTHERS = [
    _row("llama3", "bf16-mixed, live"),
    _row("llama3", "bf16-true, live", **TRUE),
    _row("llama3", "bf16-mixed, cached", **CACHED),
    _row("llama3", "bf16-mixed, live, checkpointed", **CHECKPOINTED),
    _row("qwen3", "bf16-true, cached", **TRUE, **CACHED),
    _row("qwen3", "bf16-true, live, checkpointed", **TRUE, **CHECKPOINTED),
]
