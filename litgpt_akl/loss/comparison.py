"""What one sweep over both models' logits tells of each row, and the head of the teacher's distribution.

``p`` and ``q`` are the teacher's and the student's distributions over the vocabulary, both at the temperature ``T``.
All is computed from logarithms, since ``p / q`` may be too large for float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.objective import HeadRule

Scratch = Sequence[Tensor | None]
NO_SCRATCH: Scratch = (None, None, None, None, None)

_FIRST_HEAD = 64
# logits that are sorted together, which takes a dozen tensors as large; by whether a GPU is to have enough to do
_SORTED_ELEMENTS = {False: 2**20, True: 2**23}


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

    def of_rows(self, rows: slice | Tensor) -> "Comparison":
        """The same of some rows."""
        return Comparison(*(value[rows] for value in self))


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
    forward_kl, reverse_kl = forward / teacher_sum - offset + broken, offset - reverse / student_sum + broken
    return Comparison(teacher_log_sum, student_log_sum, forward_kl, reverse_kl, gap / teacher_sum, student_max)


def without_nan(products: Tensor, finite: bool = False) -> Tensor:
    """Set to 0, in place, the NaN of an id without mass (0 times infinity); keep the infinity of one with mass."""
    return products if finite else torch.nan_to_num_(products, nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def tail_mass(teacher_logits: Tensor, top_k: int) -> Tensor:
    """The mass of all ids but the ``top_k`` most probable ones, ``[n]`` of ``[n, vocab]`` logits, which are lost."""
    top, ids = teacher_logits.topk(min(top_k, teacher_logits.size(-1)), dim=-1, sorted=False)
    p = teacher_logits.sub_(top.amax(dim=-1, keepdim=True)).exp_()
    total = p.sum(dim=-1)
    # what is left of 1 could not be told from rounding
    return p.scatter_(-1, ids, 0).sum(dim=-1) / total


def relative_to_mean(masses: Tensor, sequences: Tensor | None) -> Tensor:
    """Masses of tokens ``[n]`` divided by the mean of their sequence, whose number is in ``sequences`` ``[n]``.

    Where a mean is 0 they stay 0. Without ``sequences`` all are of one.
    """
    if sequences is None or len(masses) == 0:
        means = masses.mean().expand(len(masses))
    else:
        # products have the same rounding each time, which sums by index have not on a GPU
        numbers, inverse = sequences.unique(return_inverse=True)
        members = torch.nn.functional.one_hot(inverse, len(numbers)).to(masses.dtype)
        means = members @ ((masses @ members) / members.sum(dim=0))
    return torch.where(means > 0, masses / means, 0)


class Head(NamedTuple):
    """The head of the teacher's distribution, as the student meets it; all of shape ``[n]``."""

    gap: Tensor
    """sum of |p - q| over the head."""
    top_id: Tensor
    """The teacher's most probable id."""
    weight: Tensor
    """Of forward KL in adaptive KL: ``h = head gap / (head gap + tail gap)``, and 1/2 where teacher and student agree
    (0 / 0)."""


def find_head(
    teacher_logits: Tensor, student_logits: Tensor, comparison: Comparison, *, mu: float, head_rule: HeadRule
) -> Head:
    """Find the head of each row of ``p`` and sum |p - q| over it. Source: arXiv 2404.02657, section 4.

    The head is the smallest set of the most probable ids whose mass reaches ``mu`` (``paper``), or the ids whose
    cumulative mass is at most ``mu``, and the first id always (``official``, the authors' published code). There is no
    full sort, and the result is exact all the same: a top-k holds the whole head of nearly every row.
    """
    blocks = teacher_logits, student_logits
    if mu == 1.0:
        gap, top_id = comparison.gap, teacher_logits.argmax(dim=-1)
        if head_rule == "paper":  # every id with mass; every id at all for the other rule
            p = torch.sub(teacher_logits, comparison.teacher_log_sum[:, None]).exp_()
            q = torch.sub(student_logits, comparison.student_log_sum[:, None]).exp_()
            gap = (q.sub_(p).abs_() * (p > 0)).sum(dim=-1)
    else:
        gap, top_id, whole = _head_among_top(*blocks, comparison, _FIRST_HEAD, mu, head_rule)
        at_once = max(1, _SORTED_ELEMENTS[teacher_logits.is_cuda] // teacher_logits.size(-1))
        for size in (1024, teacher_logits.size(-1)):
            rows = (~whole).nonzero()[:, 0]
            for part in rows.split(at_once) if len(rows) else ():
                of_rows = *(logits[part] for logits in blocks), comparison.of_rows(part)
                gap[part], _, whole[part] = _head_among_top(*of_rows, size, mu, head_rule)
    return Head(gap, top_id, head_weight(gap, comparison))


def head_weight(gap: Tensor, comparison: Comparison) -> Tensor:
    """The weight of forward KL in adaptive KL, ``[n]``, of heads with this gap ``[n]``."""
    agree = comparison.gap == 0
    return torch.where(agree, 0.5, gap / torch.where(agree, 1.0, comparison.gap)).clamp(max=1.0)


def _head_among_top(
    teacher_logits: Tensor, student_logits: Tensor, comparison: Comparison, size: int, mu: float, head_rule: HeadRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Look for each head among the ``size`` most probable ids: the gap of what is there, the first id, is it whole."""
    size = min(size, teacher_logits.size(-1))
    top, ids = teacher_logits.topk(size, dim=-1)
    p = torch.exp(top - comparison.teacher_log_sum[:, None])
    q = torch.exp(student_logits.gather(-1, ids) - comparison.student_log_sum[:, None])
    mass = p.cumsum(dim=-1)
    whole = mass[:, -1] >= mu if head_rule == "paper" else mass[:, -1] > mu
    if size == teacher_logits.size(-1):
        whole = torch.ones_like(whole)
    return ((p - q).abs() * in_head(mass, mu, head_rule)).sum(dim=-1), ids[:, 0], whole


def in_head(mass: Tensor, mu: float, head_rule: HeadRule) -> Tensor:
    """Which ids belong to the head, given the cumulative mass ``[..., ids]`` of the most probable ones, falling."""
    if head_rule == "paper":
        return torch.nn.functional.pad(mass[..., :-1], (1, 0)) < mu
    inside = mass <= mu
    inside[..., 0] = True
    return inside
