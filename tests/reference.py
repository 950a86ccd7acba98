"""The slow, obvious reference: float64, one id at a time, a full sort; no code shared with the package."""

import math


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - log_sum for x in scaled]


def kl(log_a: list[float], log_b: list[float]) -> float:
    """KL(a || b); ids without mass in a cost nothing, an id without mass in b alone costs infinity."""
    terms = []
    for la, lb in zip(log_a, log_b, strict=True):
        if la == -math.inf:
            continue
        if lb == -math.inf:
            return math.inf
        terms.append(math.exp(la) * (la - lb))
    return math.fsum(terms)


def head_of(p: list[float], mu: float, head_rule: str) -> set[int]:
    """Ids of the head, from a full descending sort."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if mu == 1.0:
        # whether a sum of floats reaches 1 is luck of rounding: in exact arithmetic all the support is needed
        return {i for i in order if p[i] > 0 or head_rule == "official"}
    head, mass = set(), 0.0
    for rank, i in enumerate(order):
        if head_rule == "paper" and mass >= mu:
            break
        mass += p[i]
        if head_rule == "official" and mass > mu and rank > 0:
            break
        head.add(i)
    return head


def divergence(name: str, teacher, student, *, mu=0.5, head_rule="paper", mix_ratio=0.5, temperature=1.0):
    """Value (times T squared), adaptive weight h, head gap and tail gap of one token."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    head = head_of(p, mu, head_rule)
    head_gap = math.fsum(abs(p[i] - q[i]) for i in range(len(p)) if i in head)
    tail_gap = math.fsum(abs(p[i] - q[i]) for i in range(len(p)) if i not in head)
    h = head_gap / (head_gap + tail_gap) if head_gap + tail_gap > 0 else 0.5
    share = {"akl": h, "fkl": 1.0, "rkl": 0.0, "mix": mix_ratio}[name]
    value = 0.0
    if share > 0:
        value += share * kl(log_p, log_q)
    if share < 1:
        value += (1 - share) * kl(log_q, log_p)
    return temperature**2 * value, h, head_gap, tail_gap
