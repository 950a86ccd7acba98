"""Where a step's time goes, by torch.profiler: ``python -m step_benchmark.profiling NAME JOB [--cache DIR]``."""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from litgpt_akl.data import workers
from litgpt_akl.loss import blockwise, distillation_loss
from litgpt_akl.teacher import teacher
from litgpt_akl.training import loop
from step_benchmark import variants
from step_benchmark.job import THREADS, Job

HEADS, LOSS, NORM, OPTIMIZER, LOADING = (
    "products with the LM heads",
    "loss, element by element",
    "gradient norm and clipping",
    "optimizer",
    "data loading",
)
PRODUCTS, REST = "{}'s matrix products", "{}'s other operations"
OUTSIDE = "outside of operations: Python, logging"
CATEGORIES = (
    *(text.format(role) for role in ("teacher", "student") for text in (PRODUCTS, REST)),
    *(HEADS, LOSS, NORM, OPTIMIZER, LOADING, OUTSIDE),
)
PRODUCT_OPERATIONS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")
LOSS_OPERATIONS = ("aten::_log_softmax", "aten::nll_loss")
RANGES = (
    (teacher, "hidden_states", "teacher"),
    (workers.Fetched, "__next__", LOADING),
    (blockwise, "_product", HEADS),
    (distillation_loss.Scorer, "__call__", LOSS),
    (loop, "clip_gradients", NORM),
    (variants, "linear", HEADS),
    (variants, "cross_entropy", LOSS),
    (variants, "collate", LOADING),
)


def replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    function = getattr(owner, name)
    setattr(owner, name, wraps(function)(make(function)))


def ranged(range_name: str) -> Callable[[Callable], Callable]:
    def make(function: Callable) -> Callable:
        def call(*args, **kwargs):
            with record_function(range_name):
                return function(*args, **kwargs)

        return call

    return make


def teacher_ranged(logits: Callable) -> Callable:
    def call(*args):
        with record_function("student" if torch.is_grad_enabled() else "teacher"):
            return logits(*args)

    return call


class Recorder:
    """Profiles all steps after the warm-up, from the end of the step before them."""

    def __init__(self, job: Job) -> None:
        self.job, self.profile, self.calls = job, profile(activities=[ProfilerActivity.CPU]), 0

    def watching(self, take_step: Callable) -> Callable:
        def call(*args):
            result = take_step(*args)
            self.calls += 1
            if self.calls == self.job.warmup:
                self.profile.start()
                self.started = time.perf_counter()
            if self.calls == len(self.job.steps):
                self.seconds = time.perf_counter() - self.started
                self.profile.stop()
            return result

        return call


def category(event: FunctionEvent) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for name in names:
        if name in (HEADS, LOSS, NORM, LOADING):
            return name
        if name.startswith("Optimizer."):
            return OPTIMIZER
        if name.startswith(LOSS_OPERATIONS):
            return LOSS
    is_product = any(name.startswith(PRODUCT_OPERATIONS) for name in names)
    return (PRODUCTS if is_product else REST).format("teacher" if "teacher" in names else "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=variants.RUNNERS)
    parser.add_argument("job", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    job = Job.read(arguments.job)
    recorder = Recorder(job)
    for owner, name, range_name in RANGES:
        replace(owner, name, ranged(range_name))
    replace(variants, "logits", teacher_ranged)
    replace(loop, "take_step", recorder.watching)
    replace(variants, "take_floor_step", recorder.watching)
    with tempfile.TemporaryDirectory() as directory:
        variants.RUNNERS[arguments.name](job, Path(directory), arguments.cache)
    microseconds = defaultdict(float)
    operations = defaultdict(float)
    for event in recorder.profile.events():
        microseconds[category(event)] += event.self_cpu_time_total
        operations[category(event), event.name] += event.self_cpu_time_total
    steps = len(job.steps) - job.warmup
    milliseconds = {name: total / 1e3 / steps for name, total in microseconds.items()}
    milliseconds[OUTSIDE] = recorder.seconds * 1e3 / steps - sum(milliseconds.values())
    top = sorted(operations.items(), key=lambda item: -item[1])[:25]
    print("\n".join(f"{total / 1e3 / steps:9.1f} ms  {kind}: {name}" for (kind, name), total in top))
    print("\n" + json.dumps({name: milliseconds.get(name, 0.0) for name in CATEGORIES}))


if __name__ == "__main__":
    main()
