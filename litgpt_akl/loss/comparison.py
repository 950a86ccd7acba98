"""One sweep over two blocks of logits, from which every divergence of their rows follows.

``p`` and ``q`` are the teacher's and the student's distributions, the softmax of their logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scratch = Sequence[Tensor | None]
Number = Tensor | float
"""A number that an option gives: torch.compile must get it as a tensor of shape ``[]``, whose value it cannot keep."""
NO_SCRATCH: Scratch = (None, None, None, None, None)


class Comparison(NamedTuple):
    """What one sweep over teacher and student logits tells about each row; all of shape ``[n]``."""

    teacher_log_sum: Tensor
    """logsumexp of the teacher's logits over the vocabulary."""
    student_log_sum: Tensor
    """logsumexp of the student's logits over the vocabulary."""
    forward_kl: Tensor
    """KL(p || q) in nats."""
    reverse_kl: Tensor
    """KL(q || p) in nats."""
    gap: Tensor
    """sum of |p - q|, which is the head gap plus the tail gap."""
    student_max: Tensor
    """The student's largest logit."""


def compare(
    teacher_logits: Tensor, student_logits: Tensor, *, finite: bool = False, scratch: Scratch = NO_SCRATCH
) -> Comparison:
    """Reduce two ``[n, vocab]`` blocks of logits to what the divergences of each row need.

    Args:
        teacher_logits: ``[n, vocab]``.
        student_logits: ``[n, vocab]``.
        finite: promises that no logit is -inf, which saves two passes; NaN and +inf show in the result either way.
        scratch: five ``[n, vocab]`` tensors to write into: on a CPU, fresh memory costs more than what is done with it.
    """
    teacher_max, student_max = teacher_logits.amax(dim=-1), student_logits.amax(dim=-1)
    log_p = torch.sub(teacher_logits, teacher_max[:, None], out=scratch[0])
    log_q = torch.sub(student_logits, student_max[:, None], out=scratch[1])
    p, q = torch.exp(log_p, out=scratch[2]), torch.exp(log_q, out=scratch[3])
    # not yet divided by their sums, which is done on rows, after the reductions
    teacher_sum, student_sum = p.sum(dim=-1), q.sum(dim=-1)
    log_ratio = log_p.sub_(log_q)
    forward = without_nan(torch.mul(p, log_ratio, out=scratch[4]), finite).sum(dim=-1)
    reverse = without_nan(log_ratio.mul_(q), finite).sum(dim=-1)
    gap = p.sub_(q.mul_((teacher_sum / student_sum)[:, None])).abs_().sum(dim=-1)
    offset = teacher_sum.log() - student_sum.log()
    teacher_log_sum, student_log_sum = teacher_sum.log() + teacher_max, student_sum.log() + student_max
    # a NaN or +inf among the logits shows in its log-sum, and must show in the result
    broken = (teacher_log_sum + student_log_sum) * 0
    return Comparison(
        teacher_log_sum,
        student_log_sum,
        forward / teacher_sum - offset + broken,
        offset - reverse / student_sum + broken,
        gap / teacher_sum,
        student_max,
    )


def log_distributions(
    teacher_logits: Tensor, student_logits: Tensor, comparison: Comparison, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log q`` of two ``[n, vocab]`` blocks, in the first two of ``scratch``."""
    log_p = torch.sub(teacher_logits, comparison.teacher_log_sum[:, None], out=scratch[0])
    return log_p, torch.sub(student_logits, comparison.student_log_sum[:, None], out=scratch[1])


def distributions(
    teacher_logits: Tensor, student_logits: Tensor, comparison: Comparison, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``log p``, ``log q``, ``p`` and ``q`` of two ``[n, vocab]`` blocks, in the first four of ``scratch``."""
    log_p, log_q = log_distributions(teacher_logits, student_logits, comparison, scratch)
    return log_p, log_q, torch.exp(log_p, out=scratch[2]), torch.exp(log_q, out=scratch[3])


def without_nan(products: Tensor, finite: bool) -> Tensor:
    """Set to 0, in place, the NaN of an id without mass (0 times infinity); keep the infinity of one with mass."""
    return products if finite else torch.nan_to_num_(products, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
