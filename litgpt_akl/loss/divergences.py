"""Divergences between two distributions over a vocabulary: per-token values and closed-form gradients.

``p = softmax(teacher_logits / T)``, ``q = softmax(student_logits / T)``; the teacher never gets a gradient. Values are
multiplied by ``T**2`` and gradients by ``T`` (``T**2 / T``), so that the temperature does not rescale the step (Hinton
et al. 2015). Adaptive KL is from Wu et al., arXiv 2404.02657. Everything is computed in float32, or in float64 when
given float64.
"""

import torch
from torch import Tensor

from litgpt_akl.loss.adaptive import HeadRule, adaptive_weight, find_head
from litgpt_akl.loss.comparison import NO_SCRATCH, Comparison, Number, Scratch, compare, distributions, without_nan
from litgpt_akl.loss.objective import Objective


def blend(share: Number | None, forward: Tensor, reverse: Tensor) -> Tensor:
    """``share * forward + (1 - share) * reverse``, where a side without a share counts nothing even if infinite."""
    if share is None:
        return forward
    if not isinstance(share, Tensor):
        return reverse if share == 0.0 else share * forward + (1 - share) * reverse
    return torch.where(share == 0, 0, share * forward) + torch.where(share == 1, 0, (1 - share) * reverse)


def gradient(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    share: Number | None,
    *,
    scale: Number = 1.0,
    student_scale: Number = 0.0,
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
        share: of forward KL, a number or a detached ``[n]`` tensor; None: there is no reverse KL.
        scale: see above.
        student_scale: see above.
        finite: promises that no logit is -inf.
        scratch: five ``[n, vocab]`` tensors to write into, one of which is returned.
    """
    log_p, log_q, p, q = distributions(teacher_logits, student_logits, comparison, scratch)
    if share is None:
        return q.mul_(scale + student_scale).sub_(p.mul_(scale))
    share = torch.as_tensor(share, dtype=q.dtype, device=q.device)[..., None]
    forward_scale, reverse_scale = scale * share, scale * (1 - share)
    constant = forward_scale + student_scale - reverse_scale * comparison.reverse_kl[:, None]
    result = log_q.sub_(log_p).mul_(reverse_scale).add_(constant).mul_(q)
    return without_nan(result, finite).sub_(p.mul_(forward_scale))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, objective: Objective):
        temperature = objective.temperature
        teacher, student = _rows(teacher_logits, student_logits, temperature)
        comparison, form, weight = compare(teacher, student), objective.form, None
        if objective.divergence == "akl":
            head = find_head(teacher, student, comparison, mu=objective.mu, head_rule=objective.head_rule)
            weight = adaptive_weight(comparison, head.gap)
        if form is None:
            share = objective.forward_share(weight)
            value = blend(share, comparison.forward_kl, comparison.reverse_kl)
        else:
            slope = form(teacher, student, comparison, **objective.options, **objective.switches)
            value = slope.value
        if ctx.needs_input_grad[0]:
            change = gradient(teacher, student, comparison, share) if form is None else slope.gradient()
            ctx.save_for_backward(change.mul_(temperature))
        ctx.shape, ctx.dtype = student_logits.shape, student_logits.dtype
        return (value * temperature**2).view(student_logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (student_gradient,) = ctx.saved_tensors
        scaled = student_gradient * grad_output.reshape(-1, 1)
        return scaled.view(ctx.shape).to(ctx.dtype), None, None


def _divergence(teacher_logits: Tensor, student_logits: Tensor, **options) -> Tensor:
    return _Divergence.apply(student_logits, teacher_logits, Objective(**options))


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


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward KL ``sum p (log p - log q)``: logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``."""
    return _divergence(teacher_logits, student_logits, divergence="fkl", temperature=temperature)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Reverse KL ``sum q (log q - log p)``: logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``."""
    return _divergence(teacher_logits, student_logits, divergence="rkl", temperature=temperature)


def mixed_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, mix_ratio: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """``mix_ratio * forward KL + (1 - mix_ratio) * reverse KL``: ``[..., vocab]`` -> nats per token ``[...]``."""
    options = {"divergence": "mix", "mix_ratio": mix_ratio, "temperature": temperature}
    return _divergence(teacher_logits, student_logits, **options)


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
    options = {"divergence": "akl", "mu": mu, "head_rule": head_rule, "temperature": temperature}
    return _divergence(teacher_logits, student_logits, **options)


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
    Objective(mu=mu, head_rule=head_rule, temperature=temperature)
    teacher, student = _rows(teacher_logits, student_logits, temperature)
    comparison = compare(teacher, student)
    head = find_head(teacher, student, comparison, mu=mu, head_rule=head_rule)
    return adaptive_weight(comparison, head.gap).view(student_logits.shape[:-1])


def generalised_jsd(
    teacher_logits: Tensor, student_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """``KL(p || m) / (1 - beta) + KL(q || m) / beta`` with ``m = beta p + (1 - beta) q``.

    Logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``. This is the generalised Jensen-Shannon
    divergence of GKD, arXiv 2306.13649, divided by ``beta (1 - beta)``: four times the usual one at 1/2. As it is, that
    vanishes towards both ends, and would train a hundred times slower there; divided, it curves as KL does where the
    models agree, for every ``beta``, and tends to forward KL at 0 and to reverse KL at 1, which it is there.
    """
    return _divergence(teacher_logits, student_logits, divergence="jsd", beta=beta, temperature=temperature)


def skewed_forward_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """``KL(p || skew p + (1 - skew) q)``: logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``.

    Source: DistiLLM, arXiv 2402.03898. Not rescaled; forward KL at ``skew`` 0.
    """
    return _divergence(teacher_logits, student_logits, divergence="skewed_fkl", skew=skew, temperature=temperature)


def skewed_reverse_kl(
    teacher_logits: Tensor, student_logits: Tensor, *, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """``KL(q || (1 - skew) p + skew q)``: logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``.

    Source: DistiLLM, arXiv 2402.03898. Not rescaled; reverse KL at ``skew`` 0.
    """
    return _divergence(teacher_logits, student_logits, divergence="skewed_rkl", skew=skew, temperature=temperature)


def total_variation(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``sum |p - q| / 2``: logits ``[..., vocab]`` -> ``[...]``, times ``T**2``. Source: arXiv 2307.15190.

    The gradient takes 0 for the derivative of ``|p - q|`` where ``p`` and ``q`` are equal.
    """
    return _divergence(teacher_logits, student_logits, divergence="tv", temperature=temperature)


def token_wise_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``sum w p log(p / q) + (1 - w) q log(q / p)`` with the detached ``w = sigmoid(log(p / q))`` of each id.

    Logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``. Since ``w = p / (p + q)``, the value is forward
    plus reverse KL; its gradient is another. Source: ToDi, arXiv 2505.16297.
    """
    return _divergence(teacher_logits, student_logits, divergence="todi", temperature=temperature)


def alpha_beta_divergence(
    teacher_logits: Tensor, student_logits: Tensor, *, alpha: float = 0.2, beta: float = 0.7, temperature: float = 1.0
) -> Tensor:
    """``-sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] / (a b)`` with ``a = alpha`` and ``b = beta``.

    Logits ``[..., vocab]`` -> ``[...]``, times ``T**2``. Forward KL at ``alpha`` 1 and ``beta`` 0, reverse KL at 0 and
    1, to which it tends there. Source: ABKD, arXiv 2505.04560.
    """
    options = {"divergence": "alpha_beta", "alpha": alpha, "beta": beta, "temperature": temperature}
    return _divergence(teacher_logits, student_logits, **options)


def tail_aware_kl(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    top_k: int = 10,
    tail_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """KL over the teacher's ``top_k`` ids and the rest as one, plus ``tail_weight`` times KL of the renormalised rest.

    Logits ``[..., vocab]`` -> nats per token ``[...]``, times ``T**2``. It is forward KL where ``tail_weight`` is the
    teacher's mass in the rest. Source: TAD, arXiv 2602.20816; the default weight is ours.
    """
    options = {"divergence": "tad", "top_k": top_k, "tail_weight": tail_weight, "temperature": temperature}
    return _divergence(teacher_logits, student_logits, **options)
