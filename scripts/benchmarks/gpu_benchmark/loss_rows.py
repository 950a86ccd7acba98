"""Rows of the loss over both LM heads: time against its four products, peak memory, and compiled against eager."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, get_args

import torch
from loss_benchmark import cases
from loss_benchmark.option_pairs import SETS, draw_inputs, relative_differences

from gpu_benchmark.rows import NotHere, Place, Row
from gpu_benchmark.timing import Memory, measure
from litgpt_akl.loss.objective import DivergenceName

SHAPE = {"tokens": 4096, "vocab": 151_936, "student_width": 1024, "teacher_width": 4096}
"""Of Qwen3-8B into Qwen3-0.6B."""
TINY_SHAPE = {"tokens": 64, "vocab": 1000, "student_width": 32, "teacher_width": 64}
OWN_FUNCTION = "loss_benchmark.cases.own_forward_kl"
TOLERANCE = 1e-5
"""Of the compiled loss in float32, relative to the largest number."""


def measure_loss(place: Place, make: Callable[..., Callable[[], None]], needs: str | None = None) -> dict[str, Any]:
    """One loss, forward and backward, in bfloat16 on a GPU; its four products are timed in the same row.

    Memory is the peak beyond inputs and their gradients.
    """
    if needs is not None and find_spec(needs) is None:
        raise NotHere(f"{needs} is not installed")
    dtype = torch.bfloat16 if place.is_cuda else torch.float32
    inputs = cases.make_inputs(**(TINY_SHAPE if place.tiny else SHAPE), device=place.device, dtype=dtype)
    run, leaves = make(inputs), [x for x in inputs.values() if x.requires_grad]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        run()

    products = measure(cases.products(inputs), place.device)
    # a compiler's own memory is not the loss's, and from here on there are gradients
    call()
    memory = Memory(place.device)
    seconds = measure(call, place.device)
    return {
        "ms": 1e3 * seconds.median,
        "least ms": 1e3 * seconds.least,
        "products ms": 1e3 * products.median,
        "/ products": seconds.median / products.median,
        "GB": memory.peaks_gb()[0],
    }


def compare_compiled(place: Place, number: int) -> dict[str, Any]:
    """The largest relative differences of the compiled loss to the eager one at two values of every option."""
    name, pair = SETS[number]
    inputs = draw_inputs(str(place.device))
    differences = [relative_differences(inputs, name, options) for options in pair]
    most = [max(values) for values in zip(*differences, strict=True)]
    figures = dict(zip(("loss", "divergence", "student's hidden states", "student's head"), most, strict=True))
    return {**figures, f"all below {TOLERANCE:g}": max(most) < TOLERANCE, "options": " and ".join(map(str, pair))}


def _row(name: str, make: Callable[..., Callable[[], None]], needs: str | None = None) -> Row:
    return Row("loss", name, partial(measure_loss, make=make, needs=needs))


NAMES = [*get_args(DivergenceName), OWN_FUNCTION]
FIRST = [_row("akl, compiled", cases.ours), _row("akl, eager", cases.eager)]
OTHERS = [_row(f"{name}, compiled", partial(cases.ours, divergence=name)) for name in NAMES if name != "akl"]
PEERS = [
    _row("liger-kernel's chunked JSD", cases.liger, needs="liger_kernel"),
    _row("TRL's chunked JSD", cases.trl, needs="trl"),
]
NUMERICS = [
    Row("compiled - eager", f"{number + 1}. {name}", partial(compare_compiled, number=number))
    for number, (name, _) in enumerate(SETS)
]
