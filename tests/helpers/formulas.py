"""The divergences as they are written down, on whole blocks of finite float64 logits, for autograd to differentiate."""

import torch
from torch import Tensor

from litgpt_akl.loss.objective import Objective


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def formula(
    objective: Objective, teacher: Tensor, student: Tensor, h: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """Value of each row, times T squared; ``h`` is the weight of forward KL in adaptive KL, ``labels`` are ids."""
    log_p = (teacher / objective.temperature).log_softmax(-1)
    log_q = (student / objective.temperature).log_softmax(-1)
    more = labels if objective.divergence == "drkl" else h
    return objective.temperature**2 * _FORMULAS[objective.divergence](log_p, log_q, objective, more)


def _jsd(log_p, log_q, objective, _):
    beta = 0.5 if objective.beta is None else objective.beta
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)) / (beta * (1 - beta))


def _token_wise(log_p, log_q, *_):
    w = torch.sigmoid(log_p - log_q).detach()
    return (w * log_p.exp() * (log_p - log_q) + (1 - w) * log_q.exp() * (log_q - log_p)).sum(-1)


def _alpha_beta(log_p, log_q, objective, _):
    a, b = objective.alpha, 0.7 if objective.beta is None else objective.beta
    p, q = log_p.exp(), log_q.exp()
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def _tail_aware(log_p, log_q, objective, _):
    if objective.top_k >= log_p.size(-1):
        return kl(log_p, log_q)
    ids = log_p.topk(objective.top_k, dim=-1).indices
    top = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, ids, True)
    lumped, others = [], []
    for logs in (log_p, log_q):
        mass = logs.masked_fill(top, -torch.inf).logsumexp(-1, keepdim=True)
        lumped.append(torch.cat([logs.gather(-1, ids), mass], dim=-1))
        others.append(logs - mass)
    among = (others[0].exp() * (others[0] - others[1])).masked_fill(top, 0).sum(-1)
    if objective.tail_weighting == "constant":
        return kl(*lumped) + objective.tail_weight * among
    # all rows are tokens of one sequence
    masses = (log_p.exp() * ~top).sum(-1)
    return kl(*lumped) + objective.tail_weight * masses / masses.mean() * among


def _concrete_score(log_p, log_q, objective, _):
    p, q = log_p.exp().detach(), log_q.exp().detach()
    mean, d = (p + q) / 2, log_q - log_p
    a, b = {"mean": (mean, mean), "teacher_student": (p, q), "student": (q, q), "teacher": (p, p)}[objective.weight]
    return (((a + b) * d * d).sum(-1) - 2 * (a * d).sum(-1) * (b * d).sum(-1)) / 4


def _diversity_aware(log_p, log_q, objective, labels):
    is_label = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, labels[:, None], True)
    lumped, others = [], []
    for logs in (log_q, log_p):
        mass = logs.masked_fill(is_label, -torch.inf).logsumexp(-1, keepdim=True)
        lumped.append(torch.cat([logs.gather(-1, labels[:, None]), mass], dim=-1))
        others.append(logs - mass)
    among = (others[0].exp() * (others[0] - others[1])).masked_fill(is_label, 0).sum(-1)
    return kl(*lumped) + objective.gamma * among


_FORMULAS = {
    "akl": lambda p, q, _, h: h * kl(p, q) + (1 - h) * kl(q, p),
    "fkl": lambda p, q, *_: kl(p, q),
    "rkl": lambda p, q, *_: kl(q, p),
    "mix": lambda p, q, o, _: o.mix_ratio * kl(p, q) + (1 - o.mix_ratio) * kl(q, p),
    "jsd": _jsd,
    "skewed_fkl": lambda p, q, o, _: kl(p, (o.skew * p.exp() + (1 - o.skew) * q.exp()).log()),
    "skewed_rkl": lambda p, q, o, _: kl(q, (o.skew * q.exp() + (1 - o.skew) * p.exp()).log()),
    "tv": lambda p, q, *_: (p.exp() - q.exp()).abs().sum(-1) / 2,
    "todi": _token_wise,
    "alpha_beta": _alpha_beta,
    "tad": _tail_aware,
    "csd": _concrete_score,
    "drkl": _diversity_aware,
}
