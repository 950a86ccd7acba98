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


def mixture(log_a: list[float], log_b: list[float], share: float) -> list[float]:
    """Logarithm of ``share * a + (1 - share) * b``."""
    terms = [[math.log(share) + la, math.log(1 - share) + lb] for la, lb in zip(log_a, log_b, strict=True)]
    return [
        max(t) + math.log(math.fsum(math.exp(x - max(t)) for x in t)) if max(t) > -math.inf else -math.inf
        for t in terms
    ]


def token_wise_kl(log_p: list[float], log_q: list[float]) -> float:
    """sum w p log(p/q) + (1 - w) q log(q/p), w = p / (p + q)."""
    total = 0.0
    for lp, lq in zip(log_p, log_q, strict=True):
        p, q = math.exp(lp), math.exp(lq)
        if max(p, q) == 0:
            continue
        if min(lp, lq) == -math.inf:
            return math.inf
        w = p / (p + q)
        total += w * p * (lp - lq) + (1 - w) * q * (lq - lp)
    return total


def alpha_beta(log_p: list[float], log_q: list[float], alpha: float, beta: float) -> float:
    terms, both = [], alpha + beta
    for lp, lq in zip(log_p, log_q, strict=True):
        p, q = math.exp(lp), math.exp(lq)
        terms += [p**alpha * q**beta, -alpha / both * p**both, -beta / both * q**both]
    return -math.fsum(terms) / (alpha * beta)


def tail_aware_kl(log_p: list[float], log_q: list[float], top_k: int, tail_weight: float) -> float:
    """KL over the teacher's top k and all others as one, plus a weight times KL of the others, renormalised."""
    order = sorted(range(len(log_p)), key=lambda i: -log_p[i])
    top, others = order[:top_k], order[top_k:]
    if all(log_p[i] == -math.inf for i in others):
        return kl(log_p, log_q)
    log_masses, renormalised = [], []
    for logs in (log_p, log_q):
        largest = max(logs[i] for i in others)
        if largest == -math.inf:
            return math.inf
        log_masses.append(largest + math.log(math.fsum(math.exp(logs[i] - largest) for i in others)))
        renormalised.append([logs[i] - log_masses[-1] for i in others])
    lumped = [[logs[i] for i in top] + [mass] for logs, mass in zip((log_p, log_q), log_masses, strict=True)]
    return kl(*lumped) + (tail_weight * kl(*renormalised) if tail_weight else 0)


def tail_masses(rows: list[list[float]], top_k: int) -> list[float]:
    """The teacher's mass beyond its top k of each row of logarithms, divided by their mean; 0 if there is none."""
    masses = [math.fsum(sorted((math.exp(x) for x in row), reverse=True)[top_k:]) for row in rows]
    mean = math.fsum(masses) / len(masses)
    return [mass / mean if mean else 0.0 for mass in masses]


def concrete_score(log_p: list[float], log_q: list[float], weight: str) -> float:
    """A quarter of sum a_i b_j (d_i - d_j)^2 over all pairs of ids, d = log(q/p); ids without weight count nothing."""
    p, q = ([math.exp(x) for x in logs] for logs in (log_p, log_q))
    mean = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    a, b = {"mean": (mean, mean), "teacher_student": (p, q), "student": (q, q), "teacher": (p, p)}[weight]
    counted = [i for i in range(len(p)) if a[i] + b[i] > 0]
    d = {i: log_q[i] - log_p[i] for i in counted}
    if not all(math.isfinite(x) for x in d.values()):
        return math.inf
    # the sum over pairs, multiplied out
    mean_a, mean_b = (math.fsum(w[i] * d[i] for i in counted) for w in (a, b))
    return (math.fsum((a[i] + b[i]) * d[i] ** 2 for i in counted) - 2 * mean_a * mean_b) / 4


def diversity_aware(log_p: list[float], log_q: list[float], gamma: float, label: int) -> float:
    """Reverse KL between the label and all others as one, plus gamma times reverse KL among those, renormalised."""
    parts = []
    for logs in (log_p, log_q):
        others = [x for i, x in enumerate(logs) if i != label]
        largest = max(others)
        if largest == -math.inf:
            parts.append(([logs[label], -math.inf], None))
            continue
        mass = largest + math.log(math.fsum(math.exp(x - largest) for x in others))
        parts.append(([logs[label], mass], [x - mass for x in others]))
    (two_p, others_p), (two_q, others_q) = parts
    among = 0.0 if others_p is None or others_q is None or gamma == 0 else gamma * kl(others_q, others_p)
    return kl(two_q, two_p) + among


def other_divergence(name: str, teacher, student, *, temperature=1.0, **options) -> float:
    """Value, times T squared, of one token's divergence beyond the two KLs, away from its limits."""
    log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    if name == "jsd":
        beta, m = options["beta"], mixture(log_p, log_q, options["beta"])
        value = (beta * kl(log_p, m) + (1 - beta) * kl(log_q, m)) / (beta * (1 - beta))
    elif name == "skewed_fkl":
        value = kl(log_p, mixture(log_p, log_q, options["skew"]))
    elif name == "skewed_rkl":
        value = kl(log_q, mixture(log_q, log_p, options["skew"]))
    elif name == "tv":
        value = math.fsum(abs(math.exp(lp) - math.exp(lq)) for lp, lq in zip(log_p, log_q, strict=True)) / 2
    else:
        others = {"todi": token_wise_kl, "alpha_beta": alpha_beta, "tad": tail_aware_kl}
        others |= {"csd": concrete_score, "drkl": diversity_aware}
        value = others[name](log_p, log_q, **options)
    return temperature**2 * value


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


def lumped(logs: list[float], ids: list[int]) -> list[float]:
    """Logarithms of the probabilities of some ids, and at last of all others together."""
    others = [x for i, x in enumerate(logs) if i not in ids]
    largest = max(others)
    if largest == -math.inf:
        return [*(logs[i] for i in ids), -math.inf]
    return [*(logs[i] for i in ids), largest + math.log(math.fsum(math.exp(x - largest) for x in others))]


def ranked_divergence(name: str, log_p: list[float], log_q: list[float], *, mu=0.5, head_rule="paper", **options):
    """Value and adaptive weight h on outcomes in the teacher's order, of which the last is many ids together."""
    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    head, mass = set(), 0.0
    for i in range(len(p)):
        if mu == 1.0:
            if p[i] > 0 or head_rule == "official":
                head.add(i)
            continue
        if head_rule == "paper" and mass >= mu:
            break
        mass += p[i]
        if head_rule == "official" and mass > mu and i > 0:
            break
        head.add(i)
    head_gap = math.fsum(gaps[i] for i in head)
    h = head_gap / math.fsum(gaps) if math.fsum(gaps) > 0 else 0.5
    if name == "tad":
        top, weight = options["top_k"], options["tail_weight"]
        masses = [lumped(logs, list(range(top))) for logs in (log_p, log_q)]
        others = [[x - of[-1] for x in logs[top:]] for of, logs in zip(masses, (log_p, log_q), strict=True)]
        among = kl(*others) if weight and masses[0][-1] > -math.inf else 0.0
        return kl(*masses) + weight * among, h
    share = {"akl": h, "fkl": 1.0, "rkl": 0.0, "mix": options.get("mix_ratio")}[name]
    value = share * kl(log_p, log_q) if share > 0 else 0.0
    return value + ((1 - share) * kl(log_q, log_p) if share < 1 else 0.0), h
