"""The divergences: one table by name, and public functions of logits.

``p`` and ``q`` are the teacher's and the student's distributions over the vocabulary, both at the temperature ``T``;
the teacher never gets a gradient.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss import closed_forms
from litgpt_akl.loss.comparison import compare, find_head, relative_to_mean, tail_mass
from litgpt_akl.loss.objective import OPTIONS, HeadRule, Objective, UserFunction
from litgpt_akl.loss.tile import Tile, ValueAndGradient


class Divergence(NamedTuple):
    """A divergence on tiles."""

    function: Callable[..., ValueAndGradient]
    """Takes a :class:`Tile` and :attr:`Objective.options`."""
    compiled: Literal["with the loss", "alone", "never"]
    """How torch.compile takes it: its gradient in one kernel with that of the loss, since it sums nothing over the
    vocabulary that the comparison does not hold; by itself, since of both in one torch 2.13 cannot make CPU code for
    some divergences; or not at all."""
    takes_labels: bool = False
    """Whether a tile must have :attr:`Tile.labels`."""


DIVERGENCES: dict[str, Divergence] = {}
"""The divergences in closed form, by their names."""


def find_divergence(objective: Objective) -> Divergence:
    """What computes an objective's divergence."""
    return DIVERGENCES.get(objective.computed) or Divergence(_user_divergence, "never")


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, labels, objective: Objective):
        teacher, student = _rows(teacher_logits, student_logits, objective.temperature)
        comparison, h = compare(teacher, student), None
        if objective.divergence == "akl":
            h = find_head(teacher, student, comparison, mu=objective.mu, head_rule=objective.head_rule).weight
        tile = Tile(teacher, student, comparison, h, scale=1.0 if ctx.needs_input_grad[0] else None, labels=labels)
        if objective.weighs_tails:
            masses = tail_mass(teacher.clone(), objective.top_k)
            length = student_logits.size(-2) if student_logits.dim() > 1 else 1
            sequences = torch.arange(len(masses), device=masses.device) // max(1, length)
            tile = tile._replace(tails=relative_to_mean(masses, sequences))
        value, gradient = find_divergence(objective).function(tile, **objective.options)
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(objective.temperature))
        ctx.shape, ctx.dtype = student_logits.shape, student_logits.dtype
        return (value * objective.temperature**2).view(student_logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (student_gradient,) = ctx.saved_tensors
        scaled = student_gradient * grad_output.reshape(-1, 1)
        return scaled.view(ctx.shape).to(ctx.dtype), None, None, None


def _rows(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits {tuple(teacher_logits.shape)} and student_logits {tuple(student_logits.shape)} must have"
            " the same shape"
        )
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    blocks = (logits.detach().reshape(-1, logits.size(-1)) for logits in (teacher_logits, student_logits))
    return tuple(block.to(dtype) / temperature for block in blocks)


def _column(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels ``[...]`` of logits ``[..., vocab]`` as ``[n, 1]``; raises ValueError if they do not fit."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} must have the shape {tuple(logits.shape[:-1])} of the tokens")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.size(-1):
        raise ValueError(f"labels must be from 0 to {logits.size(-1) - 1}, the last id of the logits")
    return labels.reshape(-1, 1)


_OF_LOGITS = """
    Logits ``[..., vocab]`` give the value of each token ``[...]``, in nats where it has a unit. Value and gradient are
    multiplied by ``T**2``, so that the temperature does not rescale the step (Hinton et al. 2015).
"""
_OF_LABELS = """
    ``labels`` ``[...]`` are the ids that follow.
"""


def _public(
    name: str,
    function: Callable[..., ValueAndGradient],
    compiled: Literal["with the loss", "alone"] = "alone",
    takes_labels: bool = False,
    **head_options: float | str,
) -> Callable[..., Tensor]:
    """Put a function of tiles into the table; give a public one of logits. A tile's ``h`` has ``head_options``."""
    DIVERGENCES[name] = Divergence(function, compiled, takes_labels)
    names = ["teacher_logits", "student_logits", *(["labels"] if takes_labels else [])]
    tensors = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD) for each in names]
    defaults = {**OPTIONS.get(name, {}), **head_options, "temperature": 1.0}
    options = [Parameter(option, Parameter.KEYWORD_ONLY, default=value) for option, value in defaults.items()]
    signature = Signature([*tensors, *options])

    def divergence(*tensors: Tensor, **options) -> Tensor:
        given = signature.bind(*tensors, **options).arguments
        teacher_logits, student_logits, *labels = (given.pop(each) for each in names)
        labels = _column(*labels, student_logits) if labels else None
        return _Divergence.apply(student_logits, teacher_logits, labels, Objective(divergence=name, **given))

    divergence.__name__ = divergence.__qualname__ = function.__name__
    divergence.__signature__ = signature
    divergence.__doc__ = f"{function.__doc__.rstrip()}\n{_OF_LOGITS}{_OF_LABELS if takes_labels else ''}"
    return divergence


forward_kl = _public("fkl", closed_forms.forward_kl, "with the loss")
reverse_kl = _public("rkl", closed_forms.reverse_kl, "with the loss")
mixed_kl = _public("mix", closed_forms.mixed_kl, "with the loss")
adaptive_kl = _public("akl", closed_forms.adaptive_kl, "with the loss", mu=0.5, head_rule="paper")
generalised_jsd = _public("jsd", closed_forms.generalised_jsd)
skewed_forward_kl = _public("skewed_fkl", closed_forms.skewed_forward_kl)
skewed_reverse_kl = _public("skewed_rkl", closed_forms.skewed_reverse_kl)
total_variation = _public("tv", closed_forms.total_variation)
token_wise_kl = _public("todi", closed_forms.token_wise_kl)
alpha_beta_divergence = _public("alpha_beta", closed_forms.alpha_beta_divergence)
tail_aware_kl = _public("tad", closed_forms.tail_aware_kl)
concrete_score_divergence = _public("csd", closed_forms.concrete_score_divergence)
diversity_aware_reverse_kl = _public("drkl", closed_forms.diversity_aware_reverse_kl, takes_labels=True)


def _user_divergence(tile: Tile, *, function: UserFunction) -> ValueAndGradient:
    """A user's function of the logits; its gradient is autograd's."""
    if not function.is_checked:
        function.check_equality(tile.teacher[tile.comparison.teacher_log_sum.isfinite()])
    value, change = function.differentiate(tile.teacher, tile.student)
    q = torch.sub(tile.student, tile.comparison.student_log_sum[:, None], out=tile.scratch[0]).exp_()
    return value, tile.gradient(change, torch.zeros_like(value), q)


@torch.no_grad()
def adaptive_kl_weight(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    mu: float = 0.5,
    head_rule: HeadRule = "paper",
    temperature: float = 1.0,
) -> Tensor:
    """The weight ``h`` of forward KL in adaptive KL: logits ``[..., vocab]`` -> ``[...]`` in [0, 1], no gradient."""
    Objective(mu=mu, head_rule=head_rule, temperature=temperature)
    teacher, student = _rows(teacher_logits, student_logits, temperature)
    head = find_head(teacher, student, compare(teacher, student), mu=mu, head_rule=head_rule)
    return head.weight.view(student_logits.shape[:-1])
