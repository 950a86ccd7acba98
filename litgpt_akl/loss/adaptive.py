"""The head of the teacher's distribution, and the weight of forward KL that adaptive KL takes from it.

Source: Wu et al., arXiv 2404.02657, section 4. There is no full sort, and the result is exact all the same: a top-k
holds the whole head of nearly every row, and is enlarged for the rows whose head is longer.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.comparison import Comparison

HeadRule = Literal["paper", "official"]

_FIRST_SIZE = 64


class Head(NamedTuple):
    """The head of the teacher's distribution, as the student meets it; both of shape ``[n]``."""

    gap: Tensor
    """sum of |p - q| over the head."""
    top_id: Tensor
    """The teacher's most probable id."""


def find_head(
    teacher_logits: Tensor, student_logits: Tensor, comparison: Comparison, *, mu: float, head_rule: HeadRule
) -> Head:
    """Find the head of each row of ``p`` and sum |p - q| over it.

    The head is the smallest set of the most probable ids whose mass reaches ``mu`` (``paper``), or the ids whose
    cumulative mass is at most ``mu``, and the first id always (``official``, the authors' published code).
    """
    if mu == 1.0:
        return _head_of_everything(teacher_logits, student_logits, comparison, head_rule)
    logs = comparison.teacher_log_sum, comparison.student_log_sum
    head, whole = _head_among_top(teacher_logits, student_logits, *logs, _FIRST_SIZE, mu, head_rule)
    for size in (1024, teacher_logits.size(-1)):
        rows = (~whole).nonzero()[:, 0]
        if len(rows) == 0:
            break
        found, now_whole = _head_among_top(
            teacher_logits[rows], student_logits[rows], logs[0][rows], logs[1][rows], size, mu, head_rule
        )
        head.gap[rows], whole[rows] = found.gap, now_whole
    return head


def _head_among_top(
    teacher_logits: Tensor,
    student_logits: Tensor,
    teacher_log_sum: Tensor,
    student_log_sum: Tensor,
    size: int,
    mu: float,
    head_rule: HeadRule,
) -> tuple[Head, Tensor]:
    """The part of each head that lies among the ``size`` most probable ids, and whether that is the whole head."""
    size = min(size, teacher_logits.size(-1))
    top, ids = teacher_logits.topk(size, dim=-1)
    p = torch.exp(top - teacher_log_sum[:, None])
    q = torch.exp(student_logits.gather(-1, ids) - student_log_sum[:, None])
    mass = p.cumsum(dim=-1)
    whole = mass[:, -1] >= mu if head_rule == "paper" else mass[:, -1] > mu
    if size == teacher_logits.size(-1):
        whole = torch.ones_like(whole)
    return Head(((p - q).abs() * in_head(mass, mu, head_rule)).sum(dim=-1), ids[:, 0]), whole


def in_head(mass: Tensor, mu: float, head_rule: HeadRule) -> Tensor:
    """Which ids belong to the head, given the cumulative mass ``[..., ids]`` of the most probable ones, falling."""
    if head_rule == "paper":
        return torch.nn.functional.pad(mass[..., :-1], (1, 0)) < mu
    inside = mass <= mu
    inside[..., 0] = True
    return inside


def _head_of_everything(
    teacher_logits: Tensor, student_logits: Tensor, comparison: Comparison, head_rule: HeadRule
) -> Head:
    """The head for ``mu = 1``: every id with mass (``paper``), or every id at all (``official``)."""
    gap = comparison.gap
    if head_rule == "paper":
        p = torch.exp(teacher_logits - comparison.teacher_log_sum[:, None])
        q = torch.exp(student_logits - comparison.student_log_sum[:, None])
        gap = ((p - q).abs() * (p > 0)).sum(dim=-1)
    return Head(gap, teacher_logits.argmax(dim=-1))


def adaptive_weight(comparison: Comparison, head_gap: Tensor) -> Tensor:
    """``h = head_gap / (head_gap + tail_gap)``, shape ``[n]``; 1/2 where teacher and student agree (0 / 0)."""
    agree = comparison.gap == 0
    return torch.where(agree, 0.5, head_gap / torch.where(agree, 1.0, comparison.gap)).clamp(max=1.0)
