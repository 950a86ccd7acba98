"""The compiled loss at two values of every option, one after the other, against the eager loss.

Both follow each other in one process, and, the other way round, in a second process on the first one's cache. This file
needs little, so that it runs on a machine with a GPU and not much else:

    python -m pytest -s --noconftest tests/loss/test_compiled_loss.py -k cuda
"""

import json
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch

from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.objective import DivergenceName

OWN = {
    "akl": ({"mu": 0.5}, {"mu": 0.9}),
    "mix": ({"mix_ratio": 0.2}, {"mix_ratio": 0.7}),
    "jsd": ({"beta": 0.2}, {"beta": 0.4}),
    "skewed_fkl": ({"skew": 0.1}, {"skew": 0.6}),
    "skewed_rkl": ({"skew": 0.1}, {"skew": 0.6}),
    "alpha_beta": ({"alpha": 0.2, "beta": 0.7}, {"alpha": 1.3, "beta": 0.4}),
    "tad": ({"top_k": 10, "tail_weight": 1.0}, {"top_k": 3, "tail_weight": 0.25}),
    "csd": ({"weight": "mean"}, {"weight": "teacher_student"}),
    "drkl": ({"gamma": 0.5}, {"gamma": 2.0}),
}
SHARED = (
    {"kd_ratio": 0.5, "temperature": 2.0, "student_softcap": 3.0},
    {"kd_ratio": 0.9, "temperature": 3.0, "student_softcap": 5.0},
)
SETS = [
    (name, [{**shared, **own} for shared, own in zip(SHARED, OWN.get(name, ({}, {})), strict=True)])
    for name in get_args(DivergenceName)
] + [
    # other code for other values: one pass fewer at temperature 1, and the larger share of JSD's teacher
    ("akl", [{"kd_ratio": 0.5}, {"kd_ratio": 0.9}]),
    ("jsd", [{**SHARED[0], "beta": 0.6}, {**SHARED[1], "beta": 0.8}]),
    ("tad", [{**shared, "tail_weighting": "constant", "tail_weight": shared["temperature"]} for shared in SHARED]),
]
"""Options in the order in which they follow each other in one process; the second ones of a pair need no new code."""
LEAVES = ("student_hidden", "student_head_weight")


def draw_inputs(device: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "student_hidden": (11, 16),
        "student_head_weight": (90, 16),
        "teacher_hidden": (11, 24),
        "teacher_head_weight": (90, 24),
    }
    inputs = {name: 0.7 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    inputs["labels"] = torch.randint(0, 90, (11,), generator=generator)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    for name in LEAVES:
        inputs[name].requires_grad_()
    return inputs


def results(inputs: dict, compile: bool, student_softcap: float | None = None, **options) -> list[torch.Tensor]:
    """The loss, the divergence of each token, and the gradients."""
    output = DistillationLoss(compile=compile, **options)(**inputs, student_softcap=student_softcap)
    gradients = torch.autograd.grad(output.loss, [inputs[name] for name in LEAVES])
    return [output.loss.detach(), output.values["divergence"], *gradients]


def measure(device: str, backwards: bool) -> None:
    """Print, as JSON, the new graphs and the largest relative difference to eager results for each of SETS."""
    inputs, rows, counters = draw_inputs(device), [], torch._dynamo.utils.counters
    for name, sets in SETS:
        for options in reversed(sets) if backwards else sets:
            before = counters["stats"]["unique_graphs"]
            pairs = zip(
                *(results(inputs, compile, divergence=name, **options) for compile in (True, False)), strict=True
            )
            differences = [((one - other).abs().max() / other.abs().max()).item() for one, other in pairs]
            rows.append((name, options, counters["stats"]["unique_graphs"] - before, differences))
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print(json.dumps({"rows": rows, "hits": hits}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_every_option_at_two_values_in_two_processes_on_one_cache(device, tmp_path):
    assert DistillationLoss(compile=True).compiles_on(device), "the tests need a compiler (apt-get install g++)"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "error:torch.compile"}
    found = {}
    for process in ("first", "second"):
        code = f"import test_compiled_loss; test_compiled_loss.measure({device!r}, {process == 'second'})"
        folders = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
        finished = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"PYTHONPATH": folders}, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        found[process] = json.loads(finished.stdout.splitlines()[-1])
        print(f"\n{device}, {process} process, {found[process]['hits']} cache hits")
        print("objective    graphs  loss     divergence  gradients")
        for name, options, graphs, differences in found[process]["rows"]:
            print(f"{name:<12} {graphs:<7}", *(f"{difference:.1e} " for difference in differences), options)
    assert found["second"]["hits"] > found["first"]["hits"], "the second process did not use the first one's cache"
    rows = [row for process in found.values() for row in process["rows"]]
    assert [row for row in rows if not all(difference < 1e-5 for difference in row[3])] == []
    assert [row[2] for row in rows[1::2]] == [0] * (len(rows) // 2), "code was made anew for another value"
