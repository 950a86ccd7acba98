"""Divergences beyond the two KLs in closed form: value and gradient of each row from one look at a tile of logits.

``p`` and ``q`` are the teacher's and the student's distributions over the vocabulary. A divergence ``D`` has the
gradient ``u - q * sum(u)`` in the student's logits, where ``u = q * dD/dq``; a multiple of ``q`` may be added to ``u``
without changing it, and is, so that ``u`` is exactly 0 at every id where ``p`` and ``q`` are equal. All is computed
from logarithms, since ``p / q`` may be too large for float32. Ids without mass in ``p`` and ``q`` cost nothing.

Each function takes a tile of teacher's and student's logits, ``[n, vocab]``, their comparison, what the divergence
depends on, ``finite``, which promises that no logit is -inf, and ``scratch``, five ``[n, vocab]`` tensors to write
into. No code may depend on the value of a ``Number``, which may be a tensor; what does is a bool of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.comparison import (
    NO_SCRATCH,
    Comparison,
    Number,
    Scratch,
    distributions,
    log_distributions,
    without_nan,
)

# where p and q differ by more than e**80, the smaller one of them has no part in any sum
_LARGEST_LOG_RATIO = 80.0


class Slope(NamedTuple):
    """A divergence of each row; its gradient in the student's logits is ``pull - drift * student``."""

    value: Tensor
    """``[n]``, in nats where the divergence has a unit."""
    pull: Tensor
    """``[n, vocab]``."""
    drift: Tensor
    """``[n]``."""
    student: Tensor
    """``q``, ``[n, vocab]``."""

    def gradient(self, scale: Number = 1.0, student_scale: Number = 0.0) -> Tensor:
        """``scale`` times the gradient, plus ``student_scale * q``; ``[n, vocab]``, in the place of ``pull``."""
        constant = student_scale - scale * self.drift
        return self.pull.mul_(scale).add_(self.student.mul_(constant[:, None]))


def generalised_jsd(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    *,
    beta: Number,
    teacher_outweighs: bool,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Slope:
    """``KL(p || m) / (1 - beta) + KL(q || m) / beta`` with ``m = beta p + (1 - beta) q``, for 0 < ``beta`` < 1.

    This is the generalised Jensen-Shannon divergence of arXiv 2306.13649 divided by ``beta (1 - beta)``.
    ``teacher_outweighs`` tells whether ``beta`` is above 1/2.
    """
    log_p, log_q, p, q = distributions(teacher_logits, student_logits, comparison, scratch)
    log_ratio = _bounded_log_ratio(log_p, log_q, finite)
    # the one that is divided by the smaller share is computed, and not a difference
    if teacher_outweighs:
        log_p_to_m = torch.neg(log_ratio, out=scratch[1]).expm1_().mul_(1 - beta).log1p_().neg_()
        log_q_to_m = torch.sub(log_p_to_m, log_ratio, out=scratch[0])
    else:
        log_q_to_m = torch.expm1(log_ratio, out=scratch[1]).mul_(beta).log1p_().neg_()
        log_p_to_m = log_ratio.add_(log_q_to_m)
    pull = log_q_to_m.mul_(q).div_(beta)
    drift = pull.sum(dim=-1)
    value = log_p_to_m.mul_(p).sum(dim=-1) / (1 - beta) + drift
    return Slope(value + _broken(comparison), pull, drift, q)


def skewed_forward_kl(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    *,
    skew: Number,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Slope:
    """``KL(p || skew p + (1 - skew) q)`` for 0 < ``skew`` < 1. Source: arXiv 2402.03898."""
    log_p, log_q, p, q = distributions(teacher_logits, student_logits, comparison, scratch)
    log_ratio = _bounded_log_ratio(log_p, log_q, finite)
    log_p_to_m = log_ratio.sub_(torch.expm1(log_ratio, out=scratch[1]).mul_(skew).log1p_())
    value = p.mul_(log_p_to_m).sum(dim=-1)
    pull = log_p_to_m.expm1_().mul_(q).mul_(skew - 1)
    return Slope(value + _broken(comparison), pull, pull.sum(dim=-1), q)


def skewed_reverse_kl(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    *,
    skew: Number,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Slope:
    """``KL(q || (1 - skew) p + skew q)`` for 0 < ``skew`` < 1. Source: arXiv 2402.03898."""
    log_p, log_q, _, q = distributions(teacher_logits, student_logits, comparison, scratch)
    log_ratio = _bounded_log_ratio(log_p, log_q, finite)
    log_q_to_m = log_ratio.expm1_().mul_(1 - skew).log1p_().neg_()
    pull = torch.expm1(log_q_to_m, out=scratch[1]).mul_(-skew).add_(log_q_to_m).mul_(q)
    value = log_q_to_m.mul_(q).sum(dim=-1)
    return Slope(value + _broken(comparison), pull, pull.sum(dim=-1), q)


def total_variation(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    *,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Slope:
    """``sum |p - q| / 2``, between 0 and 1. Source: arXiv 2307.15190.

    Where ``p`` and ``q`` are equal there is no derivative, and 0 is taken for it.
    """
    _, _, p, q = distributions(teacher_logits, student_logits, comparison, scratch)
    pull = torch.sub(q, p, out=scratch[0]).sign_().mul_(q).mul_(0.5)
    return Slope(comparison.gap / 2 + _broken(comparison), pull, pull.sum(dim=-1), q)


def token_wise_kl(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    *,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Slope:
    """``sum w p log(p / q) + (1 - w) q log(q / p)`` with ``w = sigmoid(log(p / q))`` of each id, without a gradient.

    Since ``w = p / (p + q)``, the value is forward plus reverse KL; only the gradient is another. Source: ToDi,
    arXiv 2505.16297.
    """
    log_p, log_q, p, q = distributions(teacher_logits, student_logits, comparison, scratch)
    log_ratio = _log_ratio(log_p, log_q, finite)
    turn = torch.neg(log_ratio, out=scratch[1]).sigmoid_().mul_(log_ratio).mul_(q)
    # (1 - w) q log(q / p) gives q (1 - w) (1 - log_ratio), and w p log(p / q) gives -w p
    pull = torch.sub(q, p, out=scratch[4]).sub_(without_nan(turn, finite))
    return Slope(comparison.forward_kl + comparison.reverse_kl, pull, pull.sum(dim=-1), q)


def alpha_beta(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    *,
    alpha: Number,
    beta: Number,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Slope:
    """``-sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] / (a b)`` for ``a = alpha``, ``b = beta`` above 0.

    Source: ABKD, arXiv 2505.04560.
    """
    log_p, log_q = log_distributions(teacher_logits, student_logits, comparison, scratch)
    q = torch.exp(log_q, out=scratch[3])
    p_alpha = torch.mul(log_p, alpha, out=scratch[2]).exp_()
    q_alpha = torch.mul(log_q, alpha, out=scratch[4]).exp_()
    p_beta, q_beta = log_p.mul_(beta).exp_(), log_q.mul_(beta).exp_()
    pull = q_alpha.sub_(p_alpha).mul_(q_beta).div_(alpha)
    drift = pull.sum(dim=-1)
    of_teacher = p_beta.sub_(q_beta).mul_(p_alpha).sum(dim=-1) / beta
    value = (of_teacher + drift) / (alpha + beta)
    return Slope(value + _broken(comparison), pull, drift, q)


def tail_aware_kl(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    *,
    top_k: int,
    tail_weight: Number,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Slope:
    """KL over the teacher's ``top_k`` ids and all others as one, plus ``tail_weight`` times KL among those others.

    The second KL is of the two distributions renormalised over the ids outside the top k, and 0 if the teacher has no
    mass there. Source: TAD, arXiv 2602.20816.
    """
    ids = teacher_logits.topk(min(top_k, teacher_logits.size(-1)), dim=-1, sorted=False).indices
    log_p, log_q = log_distributions(teacher_logits, student_logits, comparison, scratch)
    top_log_p, top_log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    log_p.scatter_(-1, ids, -torch.inf)
    log_q.scatter_(-1, ids, -torch.inf)
    # of the ids that are left; a sum over what is left of 1 could not be told from rounding
    p, log_mass_p = _renormalised(log_p, scratch[2])
    q, log_mass_q = _renormalised(log_q, scratch[3])
    top_p, top_q, mass_p, mass_q = top_log_p.exp(), top_log_q.exp(), log_mass_p.exp(), log_mass_q.exp()
    # the differences sum to 0; with them the rounding of a log-sum, which shifts all logarithms, cancels
    top = without_nan(top_p * (top_log_p - top_log_q), finite=False).add_(top_q - top_p).sum(dim=-1)
    value = top + without_nan(mass_p * (log_mass_p - log_mass_q), finite=False) + (mass_q - mass_p)
    no_tail = log_mass_p.isneginf()
    among_others = without_nan(log_p.sub_(log_q).mul_(p), finite=False).sum(dim=-1) - (log_mass_p - log_mass_q)
    among_others = torch.where(no_tail | log_mass_q.isneginf(), 0, among_others)
    # a weight of 0 makes nothing of an infinite one
    value = value + without_nan(tail_weight * among_others, finite=False)
    weight = torch.where(no_tail, 0, tail_weight * torch.ones_like(mass_p))
    pull = torch.sub(q, p, out=scratch[2]).mul_(weight[:, None]).add_(q.mul_((mass_q - mass_p)[:, None]))
    pull.scatter_(-1, ids, top_q - top_p)
    student = torch.sub(student_logits, comparison.student_log_sum[:, None], out=scratch[4]).exp_()
    return Slope(value + _broken(comparison), pull, torch.zeros_like(value), student)


def _renormalised(logs: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of ``[n, vocab]``, and its logsumexp ``[n]``; 0 and -inf for a row that is -inf throughout."""
    largest = logs.amax(dim=-1).clamp(min=torch.finfo(logs.dtype).min)
    exponentials = torch.sub(logs, largest[:, None], out=out).exp_()
    total = exponentials.sum(dim=-1)
    return exponentials.div_(total.clamp(min=1.0)[:, None]), largest + total.log()


def _log_ratio(log_p: Tensor, log_q: Tensor, finite: bool) -> Tensor:
    """``log(p / q)`` in the place of ``log_p``; 0 for an id that is forbidden to both."""
    return without_nan(log_p.sub_(log_q), finite)


def _bounded_log_ratio(log_p: Tensor, log_q: Tensor, finite: bool) -> Tensor:
    """The same, so that its exponential is finite."""
    return _log_ratio(log_p, log_q, finite).clamp_(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _broken(comparison: Comparison) -> Tensor:
    """0, or NaN for a row with a NaN or +inf among its logits, which must show in every value."""
    return (comparison.teacher_log_sum + comparison.student_log_sum) * 0
