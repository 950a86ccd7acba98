"""Validation: how a student's distribution stands to its teacher's on held-out records."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import lightning as L
import torch
from litgpt.model import GPT
from torch import Tensor, distributed, nn

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import in_order
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.messages import progress_bar
from litgpt_akl.models.gpt import distillation_loss, distillation_losses
from litgpt_akl.models.parallel import all_gather_object, all_reduce, rank, reshard
from litgpt_akl.teacher.teacher import Teacher
from litgpt_akl.training.other_tokenizer import loss_of_batch, per_position
from litgpt_akl.training.run import Run

BINS = 15
"""Of the calibration error, of equal width."""

SHORT = 2.0
"""Seconds of a validation that needs no progress line."""

CALIBRATION = ("confidence", "accuracy", "teacher_confidence", "teacher_accuracy")
"""What calibration errors are made of: values of each token, of all processes."""


class Sums:
    """Sums of numbers that have names, over micro-batches and in the end over all processes."""

    def __init__(self, fabric: L.Fabric, dtype: torch.dtype = torch.float32) -> None:
        self._names = ()
        self._sums = torch.zeros(1, dtype=dtype, device=fabric.device)

    def add(self, **values: Tensor) -> None:
        """Add scalars, each time those of the same names."""
        self._names, self._sums = tuple(values), self._sums + torch.stack([*values.values()])

    def of_all(self) -> dict[str, Tensor]:
        """The scalars, summed over the processes, which must ask together."""
        return dict(zip(self._names, all_reduce(self._sums.clone(), distributed.ReduceOp.SUM).unbind(), strict=True))


class Measures(NamedTuple):
    """Means over response tokens.

    Of both models ``cross_entropy`` in nats per response token, ``perplexity``, ``accuracy`` of the top-1 id and its
    ``calibration_error``. Of the student also its ``forward_kl``, ``reverse_kl`` and ``adaptive_kl`` in nats per
    response token, the mean weight of forward KL ``h``, and ``agreement`` of the two top-1 ids.
    """

    student: dict[str, float]
    teacher: dict[str, float]
    response_tokens: int


@torch.no_grad()
def measure(
    fabric: L.Fabric,
    student: nn.Module,
    teacher: GPT,
    loss: DistillationLoss,
    dataset: TokenizedDataset,
    numbers: Sequence[int],
    *,
    micro_batch: tuple[int, int | None],
    vocab_size: int,
    name: str,
) -> Measures:
    """Read the samples of these ``numbers`` with both models; all processes ask together, each reads its share.

    Args:
        fabric: of the run.
        student: a GPT with a distillation head, from :func:`~litgpt_akl.models.gpt.load_frozen`.
        teacher: likewise.
        loss: adaptive KL with the head of the distribution that is meant.
        dataset: of the samples.
        numbers: of the samples in it.
        micro_batch: samples that are read together, and if not None, the tokens that count in their place.
        vocab_size: ids that tokenizer and both LM heads have.
        name: of the student, for the progress line.
    """
    sums, calibration, quiet = Sums(fabric, torch.float64), [], not fabric.is_global_zero
    bar = progress_bar(total=len(numbers), desc=f"{name}: reading", unit="record", disable=quiet)
    for batch in in_order(dataset, numbers, *micro_batch, fabric.global_rank, fabric.world_size):
        began = time.perf_counter()
        for moved, teacher_hidden in Teacher(fabric, teacher).hidden_states([batch]):
            targets = moved.input_ids, moved.positions, moved.labels, teacher_hidden
            result = distillation_loss(student, teacher, loss, *targets, vocab_size)
        sums.add(tokens=result.loss.new_tensor(result.tokens), **result.stats)
        calibration.append(torch.stack([result.values[name] for name in CALIBRATION]).cpu())
        rate = batch.input_ids.numel() * fabric.world_size / (time.perf_counter() - began)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update(min(fabric.world_size * len(batch.input_ids), len(numbers) - bar.n))
    bar.close()
    reshard(student)
    total = sums.of_all()
    tokens = total.pop("tokens").item()
    means = {name: value.item() / tokens for name, value in total.items()}
    return _measures(means, torch.cat(all_gather_object(torch.cat(calibration, dim=1)), dim=1), round(tokens))


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Mean over bins of ``|accuracy - mean confidence|``, weighted by how many of the tokens ``[n]`` are in each.

    Of 15 bins of equal width each has its upper end and not its lower one, so that a confidence of 1 is in the last
    bin. Source: Guo et al., arXiv 1706.04599. (torchmetrics takes the lower ends, and one more bin for 1 itself.)
    """
    ends = torch.arange(1, BINS, dtype=torch.float64) / BINS
    bins = torch.bucketize(confidence.double(), ends)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence.double())
    return gaps.abs().sum().item() / len(confidence)


def _measures(means: dict[str, float], calibration: Tensor, response_tokens: int) -> Measures:
    """What is told of both models, from the means of what the loss tells and the ``CALIBRATION``, ``[4, n]``."""
    calibration = dict(zip(CALIBRATION, calibration, strict=True))
    student, teacher = (
        {
            "cross_entropy": means[f"{prefix}cross_entropy"],
            "perplexity": math.exp(min(means[f"{prefix}cross_entropy"], 700.0)),
            "accuracy": means[f"{prefix}accuracy"],
            "calibration_error": expected_calibration_error(
                calibration[f"{prefix}confidence"], calibration[f"{prefix}accuracy"]
            ),
        }
        for prefix in ("", "teacher_")
    )
    student |= {
        "forward_kl": means["forward_kl"],
        "reverse_kl": means["reverse_kl"],
        "adaptive_kl": means["divergence"],
        "h": means["h"],
        "agreement": means["agreement"],
    }
    return Measures(student, teacher, response_tokens)


def gap_closed(before: float, after: float, teacher: float) -> float:
    """The share of a gap to the teacher that distillation has closed; NaN if there was none."""
    return (before - after) / (before - teacher) if before > teacher else math.nan


@torch.no_grad()
def validate(fabric: L.Fabric, run: Run, state: dict) -> dict[str, float] | None:
    """Means over the response tokens of the first ``max_iters`` micro-batches' worth of records.

    Returns:
        None if a stop signal came, else:
        Nats per token: ``val_loss`` (the objective), ``val_cross_entropy``, ``val_teacher_cross_entropy``,
        ``val_divergence``, ``val_forward_kl``, ``val_reverse_kl``; ``val_ppl``; ``val_agreement`` of top-1 ids;
        ``val_forward_kl_1`` and on, of several teachers to each by itself;
        ``val_gap_closed``, the share of the step-0 cross-entropy gap to the teacher that is closed by now
        (NaN if there was no gap, or no validation at the start).
    """
    student, teacher, cache = state["student"], state["teacher"], state["caches"].validation
    # at its end, where a schedule leads to: validations can be compared with each other
    loss = run.distill.loss()
    sums, records = Sums(fabric, torch.float64), len(run.validation_records(state["validation_dataset"]))
    bar = progress_bar(total=records, desc="validating", unit="record", leave=False, delay=SHORT, disable=rank() > 0)
    student.eval()
    for batch in run.validation_batches(fabric, state["validation_dataset"], cache):
        if stopped := state["stop"].agreed(fabric) is not None:
            break
        for moved, teacher_hidden in teacher.hidden_states([batch], cache):
            targets = moved.input_ids, moved.positions, moved.labels, teacher_hidden
            of_batch = loss_of_batch(state, loss, moved)
            result, *of_each = distillation_losses(student, teacher.model, of_batch, *targets, state["vocab_size"])
            own = {f"forward_kl_{n}": each.stats["forward_kl"] for n, each in enumerate(of_each, start=1)}
            sums.add(loss=result.loss, tokens=result.loss.new_tensor(result.tokens), **result.stats, **own)
        bar.update(min(fabric.world_size * len(batch.input_ids), records - bar.n))
    bar.close()
    student.train()
    reshard(student.module)
    if stopped:
        return None
    total = sums.of_all()
    tokens = total.pop("tokens").item()
    means = per_position({name: value.item() / tokens for name, value in total.items()})
    cross_entropy = means["cross_entropy"]
    state.update(last_validation=state["step_count"], validation_loss=means["loss"])
    if state["step_count"] == 0:
        state["start_cross_entropy"] = cross_entropy
    start = state.get("start_cross_entropy", math.nan)
    own = [name for name in means if name.startswith("forward_kl_")]
    names = (
        "loss",
        "cross_entropy",
        "teacher_cross_entropy",
        "divergence",
        "forward_kl",
        "reverse_kl",
        "agreement",
        *own,
    )
    return {
        **{f"val_{name}": means[name] for name in names},
        "val_ppl": math.exp(min(cross_entropy, 700.0)),
        "val_gap_closed": gap_closed(start, cross_entropy, means["teacher_cross_entropy"]),
    }
