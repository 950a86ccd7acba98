"""Scores blocks of logits: statistics of each row, and the gradient of the loss in place of the student's logits.

On a CPU, rows are worked on in tiles that stay in the cache from the first pass to the last, in memory that is
allocated once; torch.compile, where it works, fuses the passes.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.adaptive import adaptive_weight, find_head
from litgpt_akl.loss.closed_forms import Slope
from litgpt_akl.loss.comparison import NO_SCRATCH, Comparison, Number, Scratch, compare
from litgpt_akl.loss.divergences import blend, gradient
from litgpt_akl.loss.objective import Objective
from litgpt_akl.loss.own_divergence import OwnDivergence

STATISTICS = (
    "divergence",
    "forward_kl",
    "reverse_kl",
    "cross_entropy",
    "teacher_cross_entropy",
    "h",
    "h_squared",
    "head_gap",
    "tail_gap",
    "agreement",
    "confidence",
    "accuracy",
    "teacher_confidence",
    "teacher_accuracy",
)
"""What is known of each token beside the loss. Those up to ``teacher_cross_entropy`` are in nats; ``agreement`` is of
the two top-1 ids; ``confidence`` is the probability of a model's top-1 id at temperature 1, ``accuracy`` whether it is
the label."""

# less than 1 MB in float32, so that what a tile needs fits into a core's cache
_TILE_ELEMENTS = 200_000


class _Weights(NamedTuple):
    """The numbers that the gradient of the loss depends on; None for what is left out, since that is other code."""

    divergence: Number
    """``kd_ratio * temperature``."""
    cross_entropy: Number | None
    """``1 - kd_ratio``; None for 0."""
    temperature: Number | None
    """None for 1."""
    softcap: Number | None
    """Of the student's logits."""


class Scorer:
    """Scores blocks of logits and turns the student's logits into the gradient of the objective, in place.

    Args:
        objective: what is minimised.
        block: a block such as will be scored, ``[block, vocab]``.
        softcap: of the student's logits.
        finite: promises that no logit is -inf.
        compiled: whether torch.compile fuses the element-wise part.
        want_gradient: whether the student's logits are to become the gradient.
    """

    def __init__(
        self,
        objective: Objective,
        block: Tensor,
        *,
        softcap: float | None,
        finite: bool,
        compiled: bool,
        want_gradient: bool,
    ) -> None:
        self.objective, self.want_gradient, self.scratch = objective, want_gradient, NO_SCRATCH
        self.tile = len(block)
        if block.device.type == "cpu":
            self.tile = max(1, _TILE_ELEMENTS // block.size(1))
            if not compiled:
                self.scratch = tuple(block.new_empty(len(NO_SCRATCH), self.tile, block.size(1)))
        make = _compiled if compiled else _eager
        self.number = partial(_as_tensor, like=block) if compiled else float
        self.compare = make(compare, finite=finite)
        self.form = form = objective.form
        if form is not None:
            # apart from self.replace: of both in one, torch 2.13 cannot make CPU code for some divergences
            make_form = _eager if isinstance(form, OwnDivergence) else make
            numbers = {n: self.number(x) if isinstance(x, float) else x for n, x in objective.options.items()}
            self.form = partial(make_form(form, **objective.switches, finite=finite), **numbers)
        kd_ratio, temperature = objective.kd_ratio, objective.temperature
        weights = _Weights(
            self.number(kd_ratio * temperature),
            None if kd_ratio == 1 else self.number(1 - kd_ratio),
            None if temperature == 1 else self.number(temperature),
            None if softcap is None else self.number(softcap),
        )
        variant = objective.divergence if form is None else "slope", *(weight is None for weight in weights)
        self.replace = partial(make(_replace_by_gradient, *variant, finite=finite), weights=weights)

    def __call__(self, teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, stats: Tensor) -> None:
        """Fill the rows of ``stats`` ``[len(STATISTICS), block]`` for blocks of logits ``[block, vocab]``."""
        objective, temperature = self.objective, self.objective.temperature
        teacher, student = teacher_logits, student_logits
        if temperature != 1.0:
            teacher, student = teacher / temperature, student / temperature
        tiles = self._tiles(len(labels))
        parts = [self.compare(teacher[rows], student[rows], scratch=scratch) for rows, scratch in tiles]
        comparison = parts[0] if len(parts) == 1 else Comparison(*map(torch.cat, zip(*parts, strict=True)))
        head = find_head(teacher, student, comparison, mu=objective.mu, head_rule=objective.head_rule)
        h = adaptive_weight(comparison, head.gap)
        share = objective.forward_share(h) if self.form is None else None
        teacher_log_sum, log_sum = comparison.teacher_log_sum, comparison.student_log_sum
        if temperature != 1.0:
            teacher_log_sum, log_sum = teacher_logits.logsumexp(dim=-1), student_logits.logsumexp(dim=-1)
        values = (
            comparison.forward_kl,
            comparison.reverse_kl,
            log_sum - _of_each(student_logits, labels),
            teacher_log_sum - _of_each(teacher_logits, labels),
            h,
            h.square(),
            head.gap,
            comparison.gap - head.gap,
            _of_each(student, head.top_id) >= comparison.student_max,
            torch.exp(temperature * comparison.student_max - log_sum),
            _of_each(student, labels) >= comparison.student_max,
            torch.exp(_of_each(teacher_logits, head.top_id) - teacher_log_sum),
            _of_each(teacher, labels) >= _of_each(teacher, head.top_id),
        )
        divergence, *others = stats
        for row, value in zip(others, values, strict=True):
            row.copy_(value)
        if self.form is None:
            divergence.copy_(blend(share, comparison.forward_kl, comparison.reverse_kl) * temperature**2)
            if not self.want_gradient:
                return
        if objective.kd_ratio == 0:
            share = None
        elif isinstance(share, float):
            share = self.number(share)
        for rows, scratch in tiles:
            tile_share = share[rows] if isinstance(share, Tensor) and share.ndim > 0 else share
            of_rows, slope = Comparison(*(value[rows] for value in comparison)), None
            if self.form is not None:
                slope = self.form(teacher[rows], student[rows], of_rows, scratch=scratch)
                divergence[rows] = slope.value * temperature**2
            if self.want_gradient:
                self.replace(
                    teacher_logits[rows],
                    student_logits[rows],
                    of_rows,
                    tile_share,
                    log_sum[rows],
                    labels[rows, None],
                    None if objective.kd_ratio == 0 else slope,  # an infinite divergence has no part in it
                    scratch=scratch,
                )

    def _tiles(self, rows: int) -> list[tuple[slice, Scratch]]:
        """Slices of a block's rows, and memory to work on each in."""
        slices = [slice(start, min(start + self.tile, rows)) for start in range(0, rows, self.tile)]
        return [(s, [x if x is None else x[: s.stop - s.start] for x in self.scratch]) for s in slices]


def _of_each(logits: Tensor, ids: Tensor) -> Tensor:
    """The logit ``[n]`` of one id of each row."""
    return logits.gather(-1, ids[:, None])[:, 0]


def _replace_by_gradient(
    teacher_logits: Tensor,
    student_logits: Tensor,
    comparison: Comparison,
    share: Number | None,
    log_sum: Tensor,
    labels: Tensor,
    slope: Slope | None,
    *,
    weights: _Weights,
    finite: bool,
    scratch: Scratch,
) -> None:
    """Overwrite ``student_logits`` with the gradient of the loss in the logits as they were before the softcap.

    ``comparison`` is of the logits divided by the temperature, ``log_sum`` is that of ``student_logits``. The
    divergence is given by its ``slope`` at that temperature, or else by its ``share`` of forward KL.
    """
    teacher, student = teacher_logits, student_logits
    if weights.temperature is not None:
        # divided here again: handed in beside student_logits, they could be the same memory under another name
        teacher, student = teacher / weights.temperature, student / weights.temperature
    # at temperature 1 the student's distribution is the same in the divergence and in the cross-entropy
    is_shared = weights.temperature is None and weights.cross_entropy is not None
    shared = weights.cross_entropy if is_shared else 0.0
    if slope is not None:
        result = slope.gradient(weights.divergence, shared)
    else:
        result = gradient(
            teacher,
            student,
            comparison,
            share,
            scale=weights.divergence,
            student_scale=shared,
            finite=finite,
            scratch=scratch,
        )
    if weights.cross_entropy is not None:
        if not is_shared:
            result.add_((student_logits - log_sum[:, None]).exp_().mul_(weights.cross_entropy))
        result.scatter_add_(-1, labels, (torch.zeros_like(log_sum) - weights.cross_entropy)[:, None])
    if weights.softcap is not None:
        result.mul_(1 - (student_logits / weights.softcap).square_())
    student_logits.copy_(result)


@cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works there; only a trial tells, since it needs a compiler and its headers."""
    try:
        torch.compile(lambda x: x.exp().sum(dim=-1), dynamic=True)(torch.ones(2, 8, device=device_type))
    except Exception:
        return False
    return True


def _as_tensor(number: float, like: Tensor) -> Tensor:
    """A tensor of shape ``[]``; filled by the device itself, the host does not wait as it would for a copy."""
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _eager(function: Callable, *_, **switches: bool) -> Callable:
    return partial(function, **switches)


@cache
def _compiled(function: FunctionType, *variant: str | bool, **switches: bool) -> Callable:
    """``function`` as torch.compile fuses it; what it is called with must have no Python float in it.

    torch.compile would make a symbol of the float, specialise the code to its value, and take that code from its cache
    for another value (pytorch issues 194976 and 197889).
    """
    # how much is compiled of a code object is limited, and all partials share one: each variant has its own
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    own.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **switches}
    fused = torch.compile(own, dynamic=True, fullgraph=True)

    def call(*args, **kwargs):
        try:
            return fused(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            warnings.warn(
                f"torch.compile has compiled as many variants of {function.__name__} as it may"
                f" ({torch._dynamo.config.recompile_limit}, torch._dynamo.config.recompile_limit). Others are computed"
                " without it, which is slower.",
                stacklevel=2,
            )
            return function(*args, **kwargs, **switches)

    return call
