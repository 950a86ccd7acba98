"""The divergences: value and gradient of each row in closed form, and as public functions of logits.

``p`` and ``q`` are the teacher's and the student's distributions over the vocabulary, both at the temperature ``T``;
the teacher never gets a gradient. A divergence ``D`` has the gradient ``u - q * sum(u)`` in the student's logits, where
``u = q * dD/dq``. A multiple of ``q`` may be added to ``u`` without changing it, and is, so that ``u`` is exactly 0 at
every id where ``p`` and ``q`` are equal. All is computed from logarithms, since ``p / q`` may be too large for float32.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.objective import OPTIONS, HeadRule, Objective, UserFunction

Scratch = Sequence[Tensor | None]
Number = Tensor | float
"""A number that an option gives: torch.compile must get it as a tensor of shape ``[]``, whose value it cannot keep. No
code may depend on it; what does is a bool of its own."""
NO_SCRATCH: Scratch = (None, None, None, None, None)

# where p and q differ by more than e**80, the smaller one of them has no part in any sum
_LARGEST_LOG_RATIO = 80.0
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
    forward = _without_nan(torch.mul(p, log_ratio, out=scratch[4]), finite).sum(dim=-1)
    reverse = _without_nan(log_ratio.mul_(q), finite).sum(dim=-1)
    gap = p.sub_(q.mul_((teacher_sum / student_sum)[:, None])).abs_().sum(dim=-1)
    offset = teacher_sum.log() - student_sum.log()
    teacher_log_sum, student_log_sum = teacher_sum.log() + teacher_max, student_sum.log() + student_max
    # a NaN or +inf among the logits shows in its log-sum, and must show in the result
    broken = (teacher_log_sum + student_log_sum) * 0
    forward_kl, reverse_kl = forward / teacher_sum - offset + broken, offset - reverse / student_sum + broken
    return Comparison(teacher_log_sum, student_log_sum, forward_kl, reverse_kl, gap / teacher_sum, student_max)


def _without_nan(products: Tensor, finite: bool = False) -> Tensor:
    """Set to 0, in place, the NaN of an id without mass (0 times infinity); keep the infinity of one with mass."""
    return products if finite else torch.nan_to_num_(products, nan=0.0, posinf=torch.inf, neginf=-torch.inf)


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
    agree = comparison.gap == 0
    weight = torch.where(agree, 0.5, gap / torch.where(agree, 1.0, comparison.gap)).clamp(max=1.0)
    return Head(gap, top_id, weight)


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


class Tile(NamedTuple):
    """Rows of both models' logits, what is known of them, and what gradient is wanted."""

    teacher: Tensor
    """Logits divided by ``T``, ``[n, vocab]``."""
    student: Tensor
    """Logits divided by ``T``, ``[n, vocab]``."""
    comparison: Comparison
    """Of the two."""
    h: Tensor | None = None
    """Weight of forward KL in adaptive KL, ``[n]``; None for other divergences."""
    finite: bool = False
    """Promises that no logit is -inf."""
    scratch: Scratch = NO_SCRATCH
    """Five ``[n, vocab]`` tensors to write into, one of which may be the gradient."""
    scale: Number | None = 1.0
    """Factor of the gradient; None if none is wanted."""
    student_scale: Number = 0.0
    """``student_scale * q`` is added to it: the part of a cross-entropy's gradient that does not depend on a label."""

    @property
    def broken(self) -> Tensor:
        """0, or NaN for a row with a NaN or +inf among its logits, which must show in every value; ``[n]``."""
        return (self.comparison.teacher_log_sum + self.comparison.student_log_sum) * 0

    def logarithms(self) -> tuple[Tensor, Tensor]:
        """``log p`` and ``log q``, in the first two of ``scratch``."""
        log_p = torch.sub(self.teacher, self.comparison.teacher_log_sum[:, None], out=self.scratch[0])
        return log_p, torch.sub(self.student, self.comparison.student_log_sum[:, None], out=self.scratch[1])

    def distributions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``log p``, ``log q``, ``p`` and ``q``, in the first four of ``scratch``."""
        log_p, log_q = self.logarithms()
        return log_p, log_q, torch.exp(log_p, out=self.scratch[2]), torch.exp(log_q, out=self.scratch[3])

    def log_ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """``log(p / q)`` in the place of ``log_p``; 0 for an id that is forbidden to both."""
        return _without_nan(log_p.sub_(log_q), self.finite)

    def bounded_log_ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The same, so that its exponential is finite."""
        return self.log_ratio(log_p, log_q).clamp_(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)

    def gradient(self, u: Tensor, total: Tensor, q: Tensor) -> Tensor | None:
        """``scale * (u - q * total) + student_scale * q`` in the place of ``u``, where ``total`` is ``sum(u)``."""
        if self.scale is None:
            return None
        constant = self.student_scale - self.scale * total
        return u.mul_(self.scale).add_(q.mul_(constant[:, None]))


ValueAndGradient = tuple[Tensor, Tensor | None]
"""Of each row ``[n]``, in nats where the divergence has a unit, and ``[n, vocab]``; None where none is wanted."""


class Divergence(NamedTuple):
    """A divergence on tiles."""

    function: Callable[..., ValueAndGradient]
    """Takes a :class:`Tile` and :attr:`Objective.options`."""
    compiled: Literal["with the loss", "alone", "never"]
    """How torch.compile takes it: its gradient in one kernel with that of the loss, since it sums nothing over the
    vocabulary that the comparison does not hold; by itself, since of both in one torch 2.13 cannot make CPU code for
    some divergences; or not at all."""


DIVERGENCES: dict[str, Divergence] = {}
"""The divergences in closed form, by their names."""


def find_divergence(objective: Objective) -> Divergence:
    """What computes an objective's divergence."""
    return DIVERGENCES.get(objective.computed) or Divergence(_user_divergence, "never")


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, objective: Objective):
        teacher, student = _rows(teacher_logits, student_logits, objective.temperature)
        comparison, h = compare(teacher, student), None
        if objective.divergence == "akl":
            h = find_head(teacher, student, comparison, mu=objective.mu, head_rule=objective.head_rule).weight
        tile = Tile(teacher, student, comparison, h, scale=1.0 if ctx.needs_input_grad[0] else None)
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
        return scaled.view(ctx.shape).to(ctx.dtype), None, None


def _rows(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits {tuple(teacher_logits.shape)} and student_logits {tuple(student_logits.shape)} must have"
            " the same shape"
        )
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    blocks = (logits.detach().reshape(-1, logits.size(-1)) for logits in (teacher_logits, student_logits))
    return tuple(block.to(dtype) / temperature for block in blocks)


_OF_LOGITS = """
    Logits ``[..., vocab]`` give the value of each token ``[...]``, in nats where it has a unit. Value and gradient are
    multiplied by ``T**2``, so that the temperature does not rescale the step (Hinton et al. 2015).
"""


def _closed_form(
    name: str, compiled: Literal["with the loss", "alone"] = "alone", **head_options: float | str
) -> Callable[[Callable[..., ValueAndGradient]], Callable[..., Tensor]]:
    """Put a function of tiles into the table; give a public one of logits. A tile's ``h`` has ``head_options``."""
    logits = [Parameter(f"{model}_logits", Parameter.POSITIONAL_OR_KEYWORD) for model in ("teacher", "student")]
    defaults = {**OPTIONS.get(name, {}), **head_options, "temperature": 1.0}
    options = [Parameter(option, Parameter.KEYWORD_ONLY, default=value) for option, value in defaults.items()]
    signature = Signature([*logits, *options])

    def register(function: Callable[..., ValueAndGradient]) -> Callable[..., Tensor]:
        DIVERGENCES[name] = Divergence(function, compiled)

        def divergence(teacher_logits: Tensor, student_logits: Tensor, **options) -> Tensor:
            signature.bind(teacher_logits, student_logits, **options)
            return _Divergence.apply(student_logits, teacher_logits, Objective(divergence=name, **options))

        divergence.__name__ = divergence.__qualname__ = function.__name__
        divergence.__signature__ = signature
        divergence.__doc__ = f"{function.__doc__.rstrip()}\n{_OF_LOGITS}"
        return divergence

    return register


@_closed_form("fkl", "with the loss")
def forward_kl(tile: Tile) -> ValueAndGradient:
    """Forward KL, ``sum p log(p / q)``."""
    # gradient = q - p
    value = tile.comparison.forward_kl
    if tile.scale is None:
        return value, None
    _, _, p, q = tile.distributions()
    return value, q.mul_(tile.scale + tile.student_scale).sub_(p.mul_(tile.scale))


@_closed_form("rkl", "with the loss")
def reverse_kl(tile: Tile) -> ValueAndGradient:
    """Reverse KL, ``sum q log(q / p)``."""
    return tile.comparison.reverse_kl, _mixed_gradient(tile, 0.0)


@_closed_form("mix", "with the loss")
def mixed_kl(tile: Tile, *, mix_ratio: Number) -> ValueAndGradient:
    """Forward KL times ``mix_ratio`` plus reverse KL times ``1 - mix_ratio``."""
    value = mix_ratio * tile.comparison.forward_kl + (1 - mix_ratio) * tile.comparison.reverse_kl
    return value, _mixed_gradient(tile, mix_ratio)


@_closed_form("akl", "with the loss", mu=0.5, head_rule="paper")
def adaptive_kl(tile: Tile) -> ValueAndGradient:
    """Adaptive KL: forward KL times ``h`` plus reverse KL times ``1 - h``, with the ``h`` of ``adaptive_kl_weight``.

    Source: arXiv 2404.02657, equations 8 to 11.
    """
    h, forward, reverse = tile.h, tile.comparison.forward_kl, tile.comparison.reverse_kl
    # a side without a share counts nothing even if infinite
    value = torch.where(h == 0, 0, h * forward) + torch.where(h == 1, 0, (1 - h) * reverse)
    return value, _mixed_gradient(tile, h)


def _mixed_gradient(tile: Tile, share: Number) -> Tensor | None:
    """Of ``share`` times forward KL plus ``1 - share`` times reverse KL; ``share`` is detached, a number or ``[n]``."""
    # gradient = q ((1 - share) (log(q / p) - RKL) + share) - share p
    if tile.scale is None:
        return None
    log_p, log_q, p, q = tile.distributions()
    share = share[..., None] if isinstance(share, Tensor) else q.new_full((1,), share)
    forward_scale, reverse_scale = tile.scale * share, tile.scale * (1 - share)
    constant = forward_scale + tile.student_scale - reverse_scale * tile.comparison.reverse_kl[:, None]
    gradient = log_q.sub_(log_p).mul_(reverse_scale).add_(constant).mul_(q)
    return _without_nan(gradient, tile.finite).sub_(p.mul_(forward_scale))


@_closed_form("jsd")
def generalised_jsd(tile: Tile, *, beta: Number, teacher_outweighs: bool) -> ValueAndGradient:
    """``KL(p || m) / (1 - beta) + KL(q || m) / beta`` with ``m = beta p + (1 - beta) q``.

    This is the generalised Jensen-Shannon divergence of GKD, arXiv 2306.13649, divided by ``beta (1 - beta)``: four
    times the usual one at 1/2. As it is, that vanishes towards both ends, and would train a hundred times slower there.
    Divided, it curves as KL does where the models agree, for every ``beta``. It is forward KL at 0, reverse KL at 1.
    """
    # log(q / m) = -log(1 + beta (p / q - 1)), and log(p / m) = -log(1 + (1 - beta) (q / p - 1))
    # value = sum p log(p / m) / (1 - beta) + sum(u), where u = q log(q / m) / beta
    log_p, log_q, p, q = tile.distributions()
    log_ratio = tile.bounded_log_ratio(log_p, log_q)
    # the one that is divided by the smaller share is computed, and not a difference
    if teacher_outweighs:
        log_p_to_m = torch.neg(log_ratio, out=tile.scratch[1]).expm1_().mul_(1 - beta).log1p_().neg_()
        log_q_to_m = torch.sub(log_p_to_m, log_ratio, out=tile.scratch[0])
    else:
        log_q_to_m = torch.expm1(log_ratio, out=tile.scratch[1]).mul_(beta).log1p_().neg_()
        log_p_to_m = log_ratio.add_(log_q_to_m)
    u = log_q_to_m.mul_(q).div_(beta)
    total = u.sum(dim=-1)
    value = log_p_to_m.mul_(p).sum(dim=-1) / (1 - beta) + total
    return value + tile.broken, tile.gradient(u, total, q)


@_closed_form("skewed_fkl")
def skewed_forward_kl(tile: Tile, *, skew: Number) -> ValueAndGradient:
    """``KL(p || m)`` with ``m = skew p + (1 - skew) q``, not rescaled. Source: DistiLLM, arXiv 2402.03898."""
    # log(p / m) = log(p / q) - log(1 + skew (p / q - 1))
    # value = sum p log(p / m), and u = -(1 - skew) q (p / m - 1)
    log_p, log_q, p, q = tile.distributions()
    log_ratio = tile.bounded_log_ratio(log_p, log_q)
    log_p_to_m = log_ratio.sub_(torch.expm1(log_ratio, out=tile.scratch[1]).mul_(skew).log1p_())
    value = p.mul_(log_p_to_m).sum(dim=-1)
    u = log_p_to_m.expm1_().mul_(q).mul_(skew - 1)
    return value + tile.broken, tile.gradient(u, u.sum(dim=-1), q)


@_closed_form("skewed_rkl")
def skewed_reverse_kl(tile: Tile, *, skew: Number) -> ValueAndGradient:
    """``KL(q || m)`` with ``m = (1 - skew) p + skew q``, not rescaled. Source: DistiLLM, arXiv 2402.03898."""
    # log(q / m) = -log(1 + (1 - skew) (p / q - 1))
    # value = sum q log(q / m), and u = q (log(q / m) - skew (q / m - 1))
    log_p, log_q, _, q = tile.distributions()
    log_ratio = tile.bounded_log_ratio(log_p, log_q)
    log_q_to_m = log_ratio.expm1_().mul_(1 - skew).log1p_().neg_()
    u = torch.expm1(log_q_to_m, out=tile.scratch[1]).mul_(-skew).add_(log_q_to_m).mul_(q)
    value = log_q_to_m.mul_(q).sum(dim=-1)
    return value + tile.broken, tile.gradient(u, u.sum(dim=-1), q)


@_closed_form("tv")
def total_variation(tile: Tile) -> ValueAndGradient:
    """``sum |p - q| / 2``, between 0 and 1. Source: arXiv 2307.15190.

    Where ``p`` and ``q`` are equal there is no derivative, and 0 is taken for it.
    """
    # u = q sign(q - p) / 2
    _, _, p, q = tile.distributions()
    u = torch.sub(q, p, out=tile.scratch[0]).sign_().mul_(q).mul_(0.5)
    return tile.comparison.gap / 2 + tile.broken, tile.gradient(u, u.sum(dim=-1), q)


@_closed_form("todi")
def token_wise_kl(tile: Tile) -> ValueAndGradient:
    """``sum w p log(p / q) + (1 - w) q log(q / p)`` with the detached ``w = sigmoid(log(p / q))`` of each id.

    Since ``w = p / (p + q)``, the value is forward plus reverse KL; only the gradient is another. Source: ToDi,
    arXiv 2505.16297.
    """
    # u = q (1 - w) (1 - log(p / q)) - w p = q - p - q (1 - w) log(p / q)
    log_p, log_q, p, q = tile.distributions()
    log_ratio = tile.log_ratio(log_p, log_q)
    turn = torch.neg(log_ratio, out=tile.scratch[1]).sigmoid_().mul_(log_ratio).mul_(q)
    u = torch.sub(q, p, out=tile.scratch[4]).sub_(_without_nan(turn, tile.finite))
    return tile.comparison.forward_kl + tile.comparison.reverse_kl, tile.gradient(u, u.sum(dim=-1), q)


@_closed_form("alpha_beta")
def alpha_beta_divergence(tile: Tile, *, alpha: Number, beta: Number) -> ValueAndGradient:
    """``-sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] / (a b)`` with ``a = alpha`` and ``b = beta``.

    Forward KL at ``alpha`` 1 and ``beta`` 0, reverse KL at 0 and 1, to which it tends there. Source: ABKD,
    arXiv 2505.04560.
    """
    # value = (sum p^a (p^b - q^b) / b + sum(u)) / (a + b), where u = (q^a - p^a) q^b / a
    log_p, log_q = tile.logarithms()
    q = torch.exp(log_q, out=tile.scratch[3])
    p_alpha = torch.mul(log_p, alpha, out=tile.scratch[2]).exp_()
    q_alpha = torch.mul(log_q, alpha, out=tile.scratch[4]).exp_()
    p_beta, q_beta = log_p.mul_(beta).exp_(), log_q.mul_(beta).exp_()
    u = q_alpha.sub_(p_alpha).mul_(q_beta).div_(alpha)
    total = u.sum(dim=-1)
    value = (p_beta.sub_(q_beta).mul_(p_alpha).sum(dim=-1) / beta + total) / (alpha + beta)
    return value + tile.broken, tile.gradient(u, total, q)


@_closed_form("tad")
def tail_aware_kl(tile: Tile, *, top_k: int, tail_weight: Number) -> ValueAndGradient:
    """KL over the teacher's ``top_k`` ids and all others as one, plus ``tail_weight`` times KL among those others.

    The second KL is of the two distributions renormalised over the others, and 0 if the teacher has no mass there. With
    the teacher's mass there for a weight it is forward KL. Source: TAD, arXiv 2602.20816; the default weight is ours.
    """
    # value = sum over the top of p log(p / q) + P log(P / Q) + tail_weight * sum over the others of p' log(p' / q')
    # gradient = q - p at a top id, q' (Q - P) + tail_weight (q' - p') at another
    # P and Q are the masses of the others, p' = p / P and q' = q / Q
    ids = tile.teacher.topk(min(top_k, tile.teacher.size(-1)), dim=-1, sorted=False).indices
    log_p, log_q = tile.logarithms()
    top_log_p, top_log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    log_p.scatter_(-1, ids, -torch.inf)
    log_q.scatter_(-1, ids, -torch.inf)
    # of the ids that are left; a sum over what is left of 1 could not be told from rounding
    p, log_mass_p = _renormalised(log_p, tile.scratch[2])
    q, log_mass_q = _renormalised(log_q, tile.scratch[3])
    top_p, top_q, mass_p, mass_q = top_log_p.exp(), top_log_q.exp(), log_mass_p.exp(), log_mass_q.exp()
    # the differences sum to 0; with them the rounding of a log-sum, which shifts all logarithms, cancels
    top = _without_nan(top_p * (top_log_p - top_log_q)).add_(top_q - top_p).sum(dim=-1)
    value = top + _without_nan(mass_p * (log_mass_p - log_mass_q)) + (mass_q - mass_p)
    no_tail = log_mass_p.isneginf()
    among_others = _without_nan(log_p.sub_(log_q).mul_(p)).sum(dim=-1) - (log_mass_p - log_mass_q)
    among_others = torch.where(no_tail | log_mass_q.isneginf(), 0, among_others)
    # a weight of 0 makes nothing of an infinite one
    value = value + _without_nan(tail_weight * among_others)
    weight = torch.where(no_tail, 0, tail_weight * torch.ones_like(mass_p))
    change = torch.sub(q, p, out=tile.scratch[2]).mul_(weight[:, None]).add_(q.mul_((mass_q - mass_p)[:, None]))
    change.scatter_(-1, ids, top_q - top_p)
    q = torch.sub(tile.student, tile.comparison.student_log_sum[:, None], out=tile.scratch[4]).exp_()
    return value + tile.broken, tile.gradient(change, torch.zeros_like(value), q)


def _renormalised(logs: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of ``[n, vocab]``, and its logsumexp ``[n]``; 0 and -inf for a row that is -inf throughout."""
    largest = logs.amax(dim=-1).clamp(min=torch.finfo(logs.dtype).min)
    exponentials = torch.sub(logs, largest[:, None], out=out).exp_()
    total = exponentials.sum(dim=-1)
    return exponentials.div_(total.clamp(min=1.0)[:, None]), largest + total.log()


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
