"""Divergences between two distributions over a vocabulary: per-token values and closed-form gradients.

``p = softmax(teacher_logits / T)``, ``q = softmax(student_logits / T)``; the teacher never gets a gradient. Values are
multiplied by ``T**2`` and gradients by ``T`` (``T**2 / T``), so that the temperature does not rescale the step (Hinton
et al. 2015). Adaptive KL is from Wu et al., arXiv 2404.02657. Everything is computed in float32, or in float64 when
given float64.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from litgpt_akl.adaptive import HeadRule, adaptive_weight, find_head
from litgpt_akl.comparison import NO_SCRATCH, Comparison, Scratch, compare, without_nan

DivergenceName = Literal["akl", "fkl", "rkl", "mix"]


def forward_share(name: DivergenceName, adaptive_weight: Tensor, mix_ratio: float) -> Tensor | float:
    """Share of forward KL in the divergence ``name``, the rest being reverse KL."""
    return {"akl": adaptive_weight, "fkl": 1.0, "rkl": 0.0, "mix": mix_ratio}[name]


def blend(share: Tensor | float, forward: Tensor, reverse: Tensor) -> Tensor:
    """``share * forward + (1 - share) * reverse``, where a side without a share counts nothing even if infinite."""
    if not isinstance(share, Tensor):
        if share in (0.0, 1.0):
            return forward if share == 1.0 else reverse
        return share * forward + (1 - share) * reverse
    return torch.where(share == 0, 0, share * forward) + torch.where(share == 1, 0, (1 - share) * reverse)


def gradient(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    share: Tensor | float,
    *,
    scale: float = 1.0,
    student_scale: float = 0.0,
    finite: bool = False,
    scratch: Scratch = NO_SCRATCH,
) -> Tensor:
    """``scale`` times the gradient of ``share * forward_kl + (1 - share) * reverse_kl`` in the student's logits.

    Forward KL gives ``q - p``, reverse KL ``q (log q - log p - RKL)``. ``student_scale * q`` is added on the way: the
    part of a cross-entropy's gradient that does not depend on the label.

    Args:
        teacher_logits: ``[n, vocab]``.
        student_logits: ``[n, vocab]``.
        comparison: of the two.
        share: of forward KL, a number or a detached ``[n]`` tensor.
        scale: see above.
        student_scale: see above.
        finite: promises that no logit is -inf.
        scratch: five ``[n, vocab]`` tensors to write into, one of which is returned.
    """
    log_p = torch.sub(teacher_logits, comparison.teacher_log_sum[:, None], out=scratch[0])
    log_q = torch.sub(student_logits, comparison.student_log_sum[:, None], out=scratch[1])
    p, q = torch.exp(log_p, out=scratch[2]), torch.exp(log_q, out=scratch[3])
    if isinstance(share, float) and share == 1.0:
        return q.mul_(scale + student_scale).sub_(p, alpha=scale)
    share = torch.as_tensor(share, dtype=q.dtype, device=q.device)[..., None]
    forward_scale, reverse_scale = scale * share, scale * (1 - share)
    constant = forward_scale + student_scale - reverse_scale * comparison.reverse_kl[:, None]
    result = log_q.sub_(log_p).mul_(reverse_scale).add_(constant).mul_(q)
    return without_nan(result, finite).sub_(p.mul_(forward_scale))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, name, mu, head_rule, mix_ratio, temperature):
        teacher, student = _rows(teacher_logits, student_logits, temperature)
        comparison = compare(teacher, student)
        weight = None
        if name == "akl":
            head = find_head(teacher, student, comparison, mu=mu, head_rule=head_rule)
            weight = adaptive_weight(comparison, head.gap)
        share = forward_share(name, weight, mix_ratio)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient(teacher, student, comparison, share).mul_(temperature))
        ctx.shape, ctx.dtype = student_logits.shape, student_logits.dtype
        value = blend(share, comparison.forward_kl, comparison.reverse_kl) * temperature**2
        return value.view(student_logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (student_gradient,) = ctx.saved_tensors
        scaled = student_gradient * grad_output.reshape(-1, 1)
        return scaled.view(ctx.shape).to(ctx.dtype), None, None, None, None, None, None


def _rows(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits {tuple(teacher_logits.shape)} and student_logits {tuple(student_logits.shape)} must have"
            " the same shape"
        )
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    vocab = student_logits.size(-1)
    teacher = teacher_logits.detach().reshape(-1, vocab).to(dtype)
    return teacher / temperature, student_logits.detach().reshape(-1, vocab).to(dtype) / temperature


def check_divergence_options(
    *,
    divergence: str = "akl",
    mu: float = 0.5,
    head_rule: str = "paper",
    mix_ratio: float = 0.5,
    temperature: float = 1.0,
) -> None:
    """Raise ValueError, naming the option, its value and its range, if an option is out of range."""
    if divergence not in get_args(DivergenceName):
        raise ValueError(f"divergence must be one of {', '.join(get_args(DivergenceName))}, got {divergence!r}")
    if head_rule not in get_args(HeadRule):
        raise ValueError(f"head_rule must be one of {', '.join(get_args(HeadRule))}, got {head_rule!r}")
    if not 0.0 < mu <= 1.0:
        raise ValueError(f"mu must be above 0 and at most 1, got {mu}")
    if not 0.0 <= mix_ratio <= 1.0:
        raise ValueError(f"mix_ratio must be between 0 and 1, got {mix_ratio}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, got {temperature}")


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward KL ``sum p (log p - log q)``: logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``."""
    check_divergence_options(temperature=temperature)
    return _Divergence.apply(student_logits, teacher_logits, "fkl", 0.5, "paper", 0.5, temperature)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Reverse KL ``sum q (log q - log p)``: logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``."""
    check_divergence_options(temperature=temperature)
    return _Divergence.apply(student_logits, teacher_logits, "rkl", 0.5, "paper", 0.5, temperature)


def mixed_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, mix_ratio: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """``mix_ratio * forward KL + (1 - mix_ratio) * reverse KL``: ``[..., vocab]`` -> nats per token ``[...]``."""
    check_divergence_options(mix_ratio=mix_ratio, temperature=temperature)
    return _Divergence.apply(student_logits, teacher_logits, "mix", 0.5, "paper", mix_ratio, temperature)


def adaptive_kl(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    mu: float = 0.5,
    head_rule: HeadRule = "paper",
    temperature: float = 1.0,
) -> Tensor:
    """``h * forward KL + (1 - h) * reverse KL`` with the detached ``h`` of :func:`adaptive_kl_weight`.

    Logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``. Source: arXiv 2404.02657, equations 8 to 11.
    """
    check_divergence_options(mu=mu, head_rule=head_rule, temperature=temperature)
    return _Divergence.apply(student_logits, teacher_logits, "akl", mu, head_rule, 0.5, temperature)


@torch.no_grad()
def adaptive_kl_weight(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    mu: float = 0.5,
    head_rule: HeadRule = "paper",
    temperature: float = 1.0,
) -> Tensor:
    """The share ``h`` of forward KL in adaptive KL: logits ``[..., vocab]`` -> ``[...]`` in [0, 1], no gradient."""
    check_divergence_options(mu=mu, head_rule=head_rule, temperature=temperature)
    teacher, student = _rows(teacher_logits, student_logits, temperature)
    comparison = compare(teacher, student)
    head = find_head(teacher, student, comparison, mu=mu, head_rule=head_rule)
    return adaptive_weight(comparison, head.gap).view(student_logits.shape[:-1])
