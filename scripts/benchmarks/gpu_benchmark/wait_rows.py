"""Rows of host synchronisations: how often a step lets the host wait for the device, and where in our code."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import litgpt_akl
from gpu_benchmark.rows import Place, Row
from gpu_benchmark.runs import FLAT, PEAKED, make_state, steps_of
from litgpt_akl.training.loop import take_step

PACKAGE = Path(litgpt_akl.__file__).parent
STEPS = 3
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
"""How the profiler's names of calls and copies begin that the host waits for."""
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""Where a device would be waited for, of operations that a CPU does as well."""


def our_place() -> str:
    """The line of this package that is being run, the innermost; the deepest of all if there is none."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
    if not frames:
        return "outside of the package"
    found = frames[-1]
    return f"{Path(found.filename).relative_to(PACKAGE)}: {found.name}: {found.lineno}"


class HostReads(TorchDispatchMode):
    """Counts, on a CPU, what would let the host wait for a GPU."""

    def __init__(self, places: Counter) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS:
            self.places[our_place()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def synchronisations(place: Place, places: Counter) -> Iterator[None]:
    """Counts the places at which the host waits, as PyTorch warns of them."""
    if not place.is_cuda:
        with HostReads(places):
            yield
        return

    def note(message: Warning | str, *_, **__) -> None:
        if "synchronizing" in str(message):
            places[our_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def profiled_waits(place: Place, step: Callable[[], Any]) -> dict[str, int]:
    """Calls and copies of a step that the host waits for, by their names, as the profiler sees them.

    On a GPU the profiler itself waits for the device when it ends.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * place.is_cuda
    with profile(activities=activities) as found:
        step()
    names = WAITS if place.is_cuda else tuple(f"aten::{read.overloadpacket.__name__}" for read in READS)
    counts: Counter = Counter()
    for event in found.key_averages():
        for name in names:
            if event.key.startswith(name):
                counts[name] += event.count
    return {name: counts[name] for name in names}


def count_waits(place: Place, confidence: float, **changes) -> dict[str, Any]:
    """Waits of a step, those in its micro-batches apart from those at its end.

    There loss, statistics and the gradient's norm are read once, when all of the step is in the queue.
    """
    estimate = place.estimate("qwen3", **changes)
    fabric = place.fabric(estimate.precision)
    state, batches = make_state(fabric, estimate, confidence=confidence), cycle(list(steps_of(estimate, 2)))

    places, inside = Counter(), 0

    def step() -> None:
        nonlocal inside
        before, seen = places.total(), []
        take_step(fabric, state, next(batches), 1.0, lambda *_: seen.append(places.total()))
        inside += seen[-1] - before

    for _ in range(2):
        step()
    with synchronisations(place, places):
        for _ in range(STEPS):
            step()
    return {
        "in micro-batches": inside / STEPS,
        "at the step's end": (places.total() - inside) / STEPS,
        "micro-batches": estimate.global_batch_size // estimate.samples,
        "places": {name: count / STEPS for name, count in sorted(places.items())},
        "profiler": profiled_waits(place, step),
    }


def _row(name: str, confidence: float, **changes) -> Row:
    return Row("host waits a step", name, partial(count_waits, confidence=confidence, **changes))


FIRST = [_row("live", PEAKED), _row("live, a flat teacher", FLAT)]
OTHERS = [_row("cached", PEAKED, teacher_role="cached")]
