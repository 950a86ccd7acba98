"""Divergences such as a user may write, good ones and others, to be found by their import paths."""

import torch
from torch import Tensor

ROWS: list[int] = []
"""Rows of each block that ``forward_kl`` was called on."""


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    assert not teacher_logits.requires_grad and teacher_logits.dtype in (torch.float32, torch.float64)
    ROWS.append(len(teacher_logits))
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def squared_logits(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Unlike a function of distributions, its gradient does not sum to 0."""
    return (teacher_logits - student_logits).square().mean(-1)


def mean(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    return forward_kl(teacher_logits, student_logits).mean()


def distance(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    return (teacher_logits.softmax(-1) - student_logits.softmax(-1)).norm(dim=-1).sqrt()


def logarithm(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    return squared_logits(teacher_logits, student_logits).log()


def detached(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    return forward_kl(teacher_logits, student_logits.detach())


def number(teacher_logits: Tensor, student_logits: Tensor) -> float:
    return 0.0


constant = 3
