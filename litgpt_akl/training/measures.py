"""How a student's distribution stands to its teacher's on held-out records."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import lightning as L
import torch
from litgpt.model import GPT
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error

from litgpt_akl.data.dataset import Store
from litgpt_akl.data.steps import in_order
from litgpt_akl.loss.head_loss import DistillationLoss
from litgpt_akl.loss.scoring import STATISTICS
from litgpt_akl.messages import progress_bar
from litgpt_akl.models.gpt import distillation_loss
from litgpt_akl.models.parallel import from_each, reshard
from litgpt_akl.teacher.teacher import Teacher

BINS = 15
"""Of the calibration error, of equal width (Guo et al., arXiv 1706.04599)."""

CALIBRATION = ("confidence", "accuracy", "teacher_confidence", "teacher_accuracy")
"""What calibration errors are made of: values of each token, of all processes."""


class Measures(NamedTuple):
    """Means over response tokens; see :func:`measure`."""

    student: dict[str, float]
    teacher: dict[str, float]
    response_tokens: int


@torch.no_grad()
def measure(
    fabric: L.Fabric,
    student: nn.Module,
    teacher: GPT,
    loss: DistillationLoss,
    store: Store,
    numbers: Sequence[int],
    *,
    micro_batch: tuple[int, int | None],
    vocab_size: int,
    name: str,
) -> Measures:
    """Read samples with both models. All processes must ask together; each reads its share.

    Args:
        fabric: of the run.
        student: a GPT with a distillation head.
        teacher: likewise, from :func:`~litgpt_akl.models.frozen.load_frozen`.
        loss: adaptive KL with the head that is meant.
        store: of the samples.
        numbers: of the samples in it.
        micro_batch: samples that are read together, and if not None, the tokens that count in their place.
        vocab_size: ids that tokenizer and both heads have.
        name: of the student, for the progress line.

    Returns:
        Of both models ``cross_entropy`` in nats per response token, ``perplexity``, ``accuracy`` of the top-1 id and
        its ``calibration_error``; of the student also its ``forward_kl``, ``reverse_kl`` and ``adaptive_kl`` in nats
        per response token, the mean weight of forward KL ``h``, and ``agreement`` of the two top-1 ids.
    """
    sums = torch.zeros(1 + len(STATISTICS), device=fabric.device, dtype=torch.float64)
    calibration = []
    share = fabric.global_rank, fabric.world_size
    quiet = not fabric.is_global_zero
    bar = progress_bar(total=len(numbers), desc=f"{name}: reading", unit="record", disable=quiet)
    for batch in in_order(store, numbers, *micro_batch, *share):
        began = time.perf_counter()
        for moved, teacher_hidden in Teacher(fabric, teacher).answers([batch]):
            targets = moved.input_ids, moved.positions, moved.labels, teacher_hidden
            result = distillation_loss(student, teacher, loss, *targets, vocab_size)
        sums += torch.cat([sums.new_tensor([result.tokens]), result.values.sum(dim=1)])
        calibration.append(torch.stack([result.values[STATISTICS.index(name)] for name in CALIBRATION]).cpu())
        rate = batch.input_ids.numel() * fabric.world_size / (time.perf_counter() - began)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update(min(fabric.world_size * len(batch.input_ids), len(numbers) - bar.n))
    bar.close()
    reshard(student)
    tokens, *totals = fabric.all_reduce(sums, reduce_op="sum").tolist()
    means = {name: total / tokens for name, total in zip(STATISTICS, totals, strict=True)}
    calibration = dict(zip(CALIBRATION, torch.cat(from_each(torch.cat(calibration, dim=1)), dim=1), strict=True))
    of_models = {
        role: {
            "cross_entropy": means[f"{prefix}cross_entropy"],
            "perplexity": math.exp(min(means[f"{prefix}cross_entropy"], 700.0)),
            "accuracy": means[f"{prefix}accuracy"],
            "calibration_error": binary_calibration_error(
                # beyond 1 torchmetrics takes them for logits
                calibration[f"{prefix}confidence"].clamp(max=1),
                calibration[f"{prefix}accuracy"].int(),
                n_bins=BINS,
            ).item(),
        }
        for role, prefix in (("student", ""), ("teacher", "teacher_"))
    }
    of_models["student"] |= {
        "forward_kl": means["forward_kl"],
        "reverse_kl": means["reverse_kl"],
        "adaptive_kl": means["divergence"],
        "h": means["h"],
        "agreement": means["agreement"],
    }
    return Measures(of_models["student"], of_models["teacher"], round(tokens))


def gap_closed(before: float, after: float, teacher: float) -> float:
    """The share of a gap to the teacher that distillation has closed; NaN if there was none."""
    return (before - after) / (before - teacher) if before > teacher else math.nan
