"""Trains free logits on a teacher's distribution by each divergence, all seeds at once, and measures every step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl import adaptive_kl, adaptive_kl_weight, forward_kl, mixed_kl, reverse_kl
from toy.setups import Setup, random_numbers

CONVERGED = 0.01
"""Where sum |p - q|, which is at most 2, is below this, the student counts as its teacher."""
DIVERGENCES = {"fkl": forward_kl, "rkl": reverse_kl, "mix": mixed_kl, "akl": adaptive_kl}
LABELS = {
    "fkl": "forward KL",
    "rkl": "reverse KL",
    "mix": "even mix",
    "akl": "adaptive KL",
    "static": "static mix at adaptive KL's mean h",
}
_MU = 0.5


class Run(NamedTuple):
    """The students of all seeds on one set-up by one divergence."""

    teacher: Tensor
    """``[seeds, vocab]``."""
    students: dict[int, Tensor]
    """``[seeds, vocab]`` after each step that is looked at."""
    measures: dict[str, Tensor]
    """``[1 + steps, seeds]``, before the first step and after each: ``error`` is sum |p - q| over all ids; ``head``,
    ``tail`` and ``far_tail`` are over some; ``forward_kl`` and ``reverse_kl`` are in nats, ``h`` is adaptive KL's."""


def head_of(teacher: Tensor) -> Tensor:
    """Which ids are in the smallest set of the most probable ones whose mass reaches 0.5; ``[seeds, vocab]``."""
    sorted_p, order = teacher.sort(dim=-1, descending=True)
    return torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, order, sorted_p.cumsum(dim=-1) - sorted_p < _MU)


def train(setup: Setup, divergence: Callable[[Tensor, Tensor], Tensor], seeds: int) -> Run:
    """Adam on free logits that start uniform in [0, 1); each seed's row is trained as if it were alone."""
    teacher = setup.teacher(seeds)
    teacher_logits = teacher.log()
    logits = random_numbers(torch.rand, seeds, teacher.size(1)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=setup.learning_rate)
    path = [logits.detach().clone()]
    for _ in range(setup.steps):
        optimizer.zero_grad()
        divergence(teacher_logits, logits).sum().backward()
        optimizer.step()
        path.append(logits.detach().clone())
    students = {step: path[step].softmax(dim=-1) for step in setup.looked_at}
    return Run(teacher, students, measure(teacher, torch.stack(path), setup.far_from))


def measure(teacher: Tensor, student_logits: Tensor, far_from: int | None) -> dict[str, Tensor]:
    """The measures of a run, from a teacher ``[seeds, vocab]`` and its students ``[1 + steps, seeds, vocab]``."""
    gap, head = (teacher - student_logits.softmax(dim=-1)).abs(), head_of(teacher)
    measures = {"error": gap.sum(dim=-1), "head": (gap * head).sum(dim=-1), "tail": (gap * ~head).sum(dim=-1)}
    if far_from is not None:
        measures["far_tail"] = gap[..., far_from:].sum(dim=-1)
    logits = teacher.log().expand_as(student_logits), student_logits
    measures |= {"forward_kl": forward_kl(*logits), "reverse_kl": reverse_kl(*logits)}
    return measures | {"h": adaptive_kl_weight(*logits, mu=_MU)}


def mean_weight(run: Run) -> float:
    """The mean of ``h`` over seeds and steps, as long as there is something to weigh."""
    return run.measures["h"][run.measures["error"] >= CONVERGED].mean().item()


def train_all(setup: Setup, seeds: int) -> dict[str, Run]:
    """A run for each of :data:`LABELS`; the last is the control that adaptive KL has to beat to owe it to adapting."""
    runs = {name: train(setup, divergence, seeds) for name, divergence in DIVERGENCES.items()}
    runs["static"] = train(setup, partial(mixed_kl, mix_ratio=mean_weight(runs["akl"])), seeds)
    return runs
