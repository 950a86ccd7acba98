"""Value and gradient of a tile's rows, in closed form.

A divergence ``D`` has the gradient ``u - q * sum(u)`` in the student's logits, where ``u = q * dD/dq``. A multiple of
``q`` may be added to ``u`` without changing it, and is, so that ``u`` is exactly 0 at every id where ``p`` and ``q``
are equal.
"""

import torch
from torch import Tensor

from litgpt_akl.loss.comparison import without_nan
from litgpt_akl.loss.tile import Number, Tile, ValueAndGradient


def forward_kl(tile: Tile) -> ValueAndGradient:
    """Forward KL, ``sum p log(p / q)``."""
    # gradient = q - p
    value = tile.comparison.forward_kl
    if tile.scale is None:
        return value, None
    _, _, p, q = tile.distributions()
    return value, q.mul_(tile.scale + tile.student_scale).sub_(p.mul_(tile.scale))


def reverse_kl(tile: Tile) -> ValueAndGradient:
    """Reverse KL, ``sum q log(q / p)``."""
    return tile.comparison.reverse_kl, _mixed_gradient(tile, 0.0)


def mixed_kl(tile: Tile, *, mix_ratio: Number) -> ValueAndGradient:
    """Forward KL times ``mix_ratio`` plus reverse KL times ``1 - mix_ratio``."""
    value = mix_ratio * tile.comparison.forward_kl + (1 - mix_ratio) * tile.comparison.reverse_kl
    return value, _mixed_gradient(tile, mix_ratio)


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
    return without_nan(gradient, tile.finite).sub_(p.mul_(forward_scale))


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


def total_variation(tile: Tile) -> ValueAndGradient:
    """``sum |p - q| / 2``, between 0 and 1. Source: arXiv 2307.15190.

    Where ``p`` and ``q`` are equal there is no derivative, and 0 is taken for it.
    """
    # u = q sign(q - p) / 2
    _, _, p, q = tile.distributions()
    u = torch.sub(q, p, out=tile.scratch[0]).sign_().mul_(q).mul_(0.5)
    return tile.comparison.gap / 2 + tile.broken, tile.gradient(u, u.sum(dim=-1), q)


def token_wise_kl(tile: Tile) -> ValueAndGradient:
    """``sum w p log(p / q) + (1 - w) q log(q / p)`` with the detached ``w = sigmoid(log(p / q))`` of each id.

    Since ``w = p / (p + q)``, the value is forward plus reverse KL; only the gradient is another. Source: ToDi,
    arXiv 2505.16297.
    """
    # u = q (1 - w) (1 - log(p / q)) - w p = q - p - q (1 - w) log(p / q)
    log_p, log_q, p, q = tile.distributions()
    log_ratio = tile.log_ratio(log_p, log_q)
    turn = torch.neg(log_ratio, out=tile.scratch[1]).sigmoid_().mul_(log_ratio).mul_(q)
    u = torch.sub(q, p, out=tile.scratch[4]).sub_(without_nan(turn, tile.finite))
    return tile.comparison.forward_kl + tile.comparison.reverse_kl, tile.gradient(u, u.sum(dim=-1), q)


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


def tail_aware_kl(tile: Tile, *, top_k: int, tail_weight: Number) -> ValueAndGradient:
    """KL over the teacher's ``top_k`` ids and all others as one, plus ``tail_weight`` times KL among those others.

    The second KL is of the two distributions renormalised over the others, and 0 if the teacher has no mass there. With
    the teacher's mass there for a weight it is forward KL. ``tail_weighting`` ``sequence`` multiplies a token's weight
    by that mass, divided by its mean over the tokens of the sequence, the last dimension but the vocabulary's; with
    ``constant`` it is the same for all. Source: TAD, arXiv 2602.20816, equation 3; a constant weight is ours.
    """
    # value = sum over the top of p log(p / q) + P log(P / Q) + tail_weight * sum over the others of p' log(p' / q')
    # gradient = q - p at a top id, q' (Q - P) + tail_weight (q' - p') at another
    # P and Q are the masses of the others, p' = p / P and q' = q / Q
    ids = tile.top_ids(top_k)
    log_p, log_q = tile.logarithms()
    top_log_p, top_log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    log_p.scatter_(-1, ids, -torch.inf)
    log_q.scatter_(-1, ids, -torch.inf)
    # of the ids that are left; a sum over what is left of 1 could not be told from rounding
    p, log_mass_p = _renormalised(log_p, tile.scratch[2])
    q, log_mass_q = _renormalised(log_q, tile.scratch[3])
    top_p, top_q, mass_p, mass_q = top_log_p.exp(), top_log_q.exp(), log_mass_p.exp(), log_mass_q.exp()
    # the differences sum to 0; with them the rounding of a log-sum, which shifts all logarithms, cancels
    top = without_nan(top_p * (top_log_p - top_log_q)).add_(top_q - top_p).sum(dim=-1)
    value = top + without_nan(mass_p * (log_mass_p - log_mass_q)) + (mass_q - mass_p)
    no_tail = log_mass_p.isneginf()
    among_others = without_nan(log_p.sub_(log_q).mul_(p)).sum(dim=-1) - (log_mass_p - log_mass_q)
    among_others = torch.where(no_tail | log_mass_q.isneginf(), 0, among_others)
    weight = tail_weight * (torch.ones_like(mass_p) if tile.tails is None else tile.tails)
    # a weight of 0 makes nothing of an infinite one
    value = value + without_nan(weight * among_others)
    weight = torch.where(no_tail, 0, weight)
    change = torch.sub(q, p, out=tile.scratch[2]).mul_(weight[:, None]).add_(q.mul_((mass_q - mass_p)[:, None]))
    change.scatter_(-1, ids, top_q - top_p)
    q = torch.sub(tile.student, tile.comparison.student_log_sum[:, None], out=tile.scratch[4]).exp_()
    return value + tile.broken, tile.gradient(change, torch.zeros_like(value), q)


def concrete_score_divergence(tile: Tile, *, share: Number, difference: Number) -> ValueAndGradient:
    """``sum a_i b_j (d_i - d_j)**2 / 4`` over all pairs of ids, with ``d = log(q / p)`` and detached weights a and b.

    ``weight`` says what the two are: both ``(p + q) / 2`` (``mean``), p and q (``teacher_student``), both q
    (``student``) or both p (``teacher``). Where they are one, the value is half the variance of d by it. Source:
    Concrete Score Distillation, arXiv 2509.25837, whose loss is twice this, and whose code has this gradient; it curves
    as KL does where the models agree. Its gradient is that of reverse KL if both weights are q.
    """
    # c is the mean of d over both weights, and delta half the difference of its means over a and over b
    # value = sum (a + b) (d - c)^2 / 4 + delta^2 / 2
    # gradient = ((a + b) (d - c) + delta (a - b)) / 2, where a - b = difference (p - q)
    # the mean of d over p is minus forward KL, that over q reverse KL
    log_p, log_q, p, q = tile.distributions()
    forward, reverse = tile.comparison.forward_kl, tile.comparison.reverse_kl
    center = without_nan((1 - share) * reverse) - without_nan(share * forward)
    # the value is infinite by what is summed, whatever is near the center
    center = torch.nan_to_num(center, nan=0.0, posinf=0.0, neginf=0.0)
    delta = without_nan(difference * (forward + reverse)) / -2
    off_center = tile.log_ratio(log_p, log_q).add_(center[:, None]).neg_()
    weights = torch.mul(p, 2 * share, out=tile.scratch[1]).add_(torch.mul(q, 2 - 2 * share, out=tile.scratch[4]))
    change = without_nan(weights.mul_(off_center), tile.finite)
    squares = without_nan(off_center.mul_(change), tile.finite).sum(dim=-1)
    value = squares / 4 + delta.square() / 2
    change.add_(p.sub_(q).mul_((delta * difference)[:, None])).mul_(0.5)
    return value + tile.broken, tile.gradient(change, torch.zeros_like(value), q)


def diversity_aware_reverse_kl(tile: Tile, *, gamma: Number) -> ValueAndGradient:
    """Reverse KL between the label and all other ids as one, plus ``gamma`` times reverse KL among those others.

    The second KL is of the two distributions renormalised over the others. With the student's mass there for a weight
    the value is reverse KL. A fixed weight takes the pull on the label's logit from it. Source: DRKL, arXiv 2604.00223;
    of its equations only descriptions were at hand, by which gamma replaces that mass and the target is the label.
    """
    # value = q_y log(q_y / p_y) + Q log(Q / P) + gamma N, where N = sum over the others of q' log(q' / p')
    # gradient = G at the label y, q' (gamma (log(q' / p') - N) - G) at another id
    # P and Q are the masses of the others, p' = p / P, q' = q / Q and G = q_y Q (log(q_y / p_y) - log(Q / P))
    log_p, log_q = tile.logarithms()
    label_log_p, label_log_q = (logs.gather(-1, tile.labels)[:, 0] for logs in (log_p, log_q))
    log_p.scatter_(-1, tile.labels, -torch.inf)
    log_q.scatter_(-1, tile.labels, -torch.inf)
    _, log_mass_p = _renormalised(log_p, tile.scratch[2])
    q, log_mass_q = _renormalised(log_q, tile.scratch[3])
    label_p, label_q, mass_p, mass_q = label_log_p.exp(), label_log_q.exp(), log_mass_p.exp(), log_mass_q.exp()
    label_ratio, mass_ratio = label_log_q - label_log_p, log_mass_q - log_mass_p
    # the differences sum to 0; with them the rounding of a log-sum, which shifts all logarithms, cancels
    value = without_nan(label_q * label_ratio) + (label_p - label_q)
    value = value + without_nan(mass_q * mass_ratio) + (mass_p - mass_q)
    log_ratio = without_nan(log_q.sub_(log_p))
    among_others = without_nan(torch.mul(log_ratio, q, out=tile.scratch[2])).sum(dim=-1) - mass_ratio
    # where the teacher alone has no others, the first part is infinite already
    among_others = torch.where(log_mass_p.isneginf() | log_mass_q.isneginf(), 0, among_others)
    # a weight of 0 makes nothing of an infinite one
    value = value + without_nan(gamma * among_others)
    of_label = without_nan(label_q * mass_q * (label_ratio - mass_ratio))
    change = log_ratio.sub_((mass_ratio + among_others)[:, None]).mul_(gamma).sub_(of_label[:, None]).mul_(q)
    change = without_nan(change).scatter_(-1, tile.labels, of_label[:, None])
    q = torch.sub(tile.student, tile.comparison.student_log_sum[:, None], out=tile.scratch[4]).exp_()
    return value + tile.broken, tile.gradient(change, torch.zeros_like(value), q)


def _renormalised(logs: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of ``[n, vocab]``, and its logsumexp ``[n]``; 0 and -inf for a row that is -inf throughout."""
    largest = logs.amax(dim=-1).clamp(min=torch.finfo(logs.dtype).min)
    exponentials = torch.sub(logs, largest[:, None], out=out).exp_()
    total = exponentials.sum(dim=-1)
    return exponentials.div_(total.clamp(min=1.0)[:, None]), largest + total.log()
