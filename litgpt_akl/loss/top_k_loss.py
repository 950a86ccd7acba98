"""The distillation loss to a teacher of which k ids and the mass of all others are known, block by block.

The divergence is that of k + 1 outcomes: the teacher's k most probable ids, and all others as one. The cross-entropy
with the labels is exact. Only the student's logits are formed, and their gradient in the same place.
"""

from functools import partial

import torch
from torch import Tensor

from litgpt_akl.loss.blockwise import Blocks, HeadLoss, LMHead, Score, blockwise_loss
from litgpt_akl.loss.comparison import Comparison, compare, head_weight, in_head, relative_to_mean
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.divergences import find_divergence
from litgpt_akl.loss.objective import Objective
from litgpt_akl.loss.tile import Tile
from litgpt_akl.loss.top_k import Lumped, Ranked, TopK, lump

DEFINED = ("akl", "fkl", "rkl", "mix", "tad")
"""Divergences that are sums over ids of what these k + 1 outcomes have, or look at the most probable ones alone."""


def why_undefined(objective: Objective, k: int) -> tuple[str, str] | None:
    """The keyword of an objective, and a reason, if it has no meaning for k ids and the mass of the others."""
    if objective.divergence not in DEFINED:
        return "divergence", f"it is not defined on {k} ids and the mass of all others"
    if objective.temperature != 1.0:
        return (
            "temperature",
            f"it needs each of the probabilities, and beside {k} ids only the sum of all others is known",
        )
    if objective.divergence == "tad" and objective.top_k >= k:
        return "top_k", f"none of {k} ids is left to the rest that it weighs by itself"
    return None


def top_k_loss(
    loss: DistillationLoss,
    student: LMHead,
    teacher_rows: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    sequences: Tensor | None = None,
) -> HeadLoss:
    """Sum a loss over tokens, all of which count.

    Args:
        loss: what is minimised.
        student: its final hidden states ``[n, d]`` and its LM head.
        teacher_rows: ``[n, bytes]`` from :meth:`TopK.pack`, made for the same ``labels`` and ``vocab_size``.
        labels: ``[n]``, the id that follows each position.
        vocab_size: ids from here on are padding and get no mass.
        sequences: ``[n]``, the number of the sequence that each position is of, for tad; default: all are of one.

    Raises:
        ValueError: the loss is not defined on k ids and the mass of the others.
    """
    layout = TopK.of(teacher_rows, vocab_size)
    if undefined := why_undefined(loss, layout.k):
        name, why = undefined
        raise ValueError(f"{name} {getattr(loss, name)}: {why}")
    block_tokens = loss.tokens_per_block(vocab_size, student.hidden.device.type)
    score = partial(_make_score, loss, layout, teacher_rows, labels, sequences)
    blocks = Blocks(block_tokens, vocab_size, loss.kd_ratio, score)
    return blockwise_loss(*student, labels, blocks)


def _make_score(
    loss: DistillationLoss,
    layout: TopK,
    teacher_rows: Tensor,
    labels: Tensor,
    sequences: Tensor | None,
    student: LMHead,
    block: Tensor,
    parts: list[slice],
    want_gradient: bool,
) -> Score:
    """What scores blocks of the student's logits against the teacher's rows."""
    tails = None
    if loss.weighs_tails:
        masses = [layout.unpack(teacher_rows[rows], block.dtype).log_p[:, loss.top_k :].exp().sum(-1) for rows in parts]
        tails = relative_to_mean(torch.cat([block.new_empty(0), *masses]), sequences)
    cross_entropy = 1 - loss.kd_ratio

    def score(rows: slice, logits: Tensor, out: dict[str, Tensor]) -> None:
        teacher, label = layout.unpack(teacher_rows[rows], logits.dtype), labels[rows, None]
        label_logit = logits.gather(-1, label)[:, 0]
        capped = logits.clone() if want_gradient and student.softcap is not None else None
        lumped = lump(logits, teacher.ids)
        comparison = compare(teacher.log_p, lumped.logits)
        gap = _head_gap(teacher.log_p, lumped.logits, comparison, loss)
        statistics = _statistics(teacher, lumped, comparison, gap, labels[rows], label_logit)
        for name, value in statistics.items():
            out[name].copy_(value)
        # an infinite divergence without a share has no part in the gradient
        scale = loss.kd_ratio if want_gradient and loss.kd_ratio > 0 else None
        tile = Tile(teacher.log_p, lumped.logits, comparison, statistics["h"], scale=scale, student_scale=cross_entropy)
        tile = tile._replace(is_ranked=True, tails=None if tails is None else tails[rows])
        value, gradient = find_divergence(loss).function(tile, **loss.options)
        out["divergence"].copy_(value)
        if not want_gradient:
            return
        if gradient is None:
            gradient = (lumped.logits - comparison.student_log_sum[:, None]).exp_().mul_(cross_entropy)
        # the gradient of the others as one is shared out by what each of them has of their mass
        logits.mul_((gradient[:, -1] / lumped.total)[:, None]).scatter_(-1, teacher.ids, gradient[:, :-1])
        if cross_entropy > 0:
            logits.scatter_add_(-1, label, torch.full_like(label_logit, -cross_entropy)[:, None])
        if capped is not None:
            logits.mul_(capped.div_(student.softcap).square_().neg_().add_(1))

    return score


def _head_gap(log_p: Tensor, logits: Tensor, comparison: Comparison, objective: Objective) -> Tensor:
    """The sum of |p - q| over the head, ``[n]``; the ids that are one come last, and are in it together or not.

    Where the k ids have the mass ``mu``, it is that of the whole distributions.
    """
    p, q = log_p.exp(), (logits - comparison.student_log_sum[:, None]).exp()
    if objective.mu == 1.0:
        inside = p > 0 if objective.head_rule == "paper" else torch.ones_like(p, dtype=torch.bool)
    else:
        inside = in_head(p.cumsum(dim=-1), objective.mu, objective.head_rule)
    return ((p - q).abs_() * inside).sum(dim=-1)


def _statistics(
    teacher: Ranked, lumped: Lumped, comparison: Comparison, gap: Tensor, labels: Tensor, label_logit: Tensor
) -> dict[str, Tensor]:
    """All statistics of a block but the divergence, ``[block]`` each.

    Those of one model, and of labels and top-1 ids, are of the whole vocabulary; of ids that the teacher holds equally
    probable at the top the first counts. KL and gaps are those of k + 1 outcomes.
    """
    top, log_sum = lumped.logits[:, 0], comparison.student_log_sum
    h = head_weight(gap, comparison)
    student_max = torch.maximum(lumped.logits[:, :-1].amax(dim=-1), lumped.largest)
    return {
        "forward_kl": comparison.forward_kl,
        "reverse_kl": comparison.reverse_kl,
        "cross_entropy": log_sum - label_logit,
        "teacher_cross_entropy": -teacher.label_log_p,
        "h": h,
        "h_squared": h.square(),
        "head_gap": gap,
        "tail_gap": comparison.gap - gap,
        "agreement": top >= student_max,
        "accuracy": label_logit >= student_max,
        "confidence": torch.exp(student_max - log_sum),
        "teacher_accuracy": teacher.ids[:, 0] == labels,
        "teacher_confidence": teacher.log_p[:, 0].exp(),
    }
