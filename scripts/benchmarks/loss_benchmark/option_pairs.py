"""Every divergence at two values of each of its options, and how far the compiled loss is from the eager one there."""

from typing import get_args

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
    """A small loss's inputs in float32."""
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


def relative_differences(inputs: dict, name: str, options: dict) -> list[float]:
    """How far the compiled :func:`results` are from the eager ones, relative to the largest number of each."""
    pairs = zip(*(results(inputs, compile, divergence=name, **options) for compile in (True, False)), strict=True)
    return [((one - other).abs().max() / other.abs().max()).item() for one, other in pairs]
