"""Validation: how a student's distribution stands to its teacher's on held-out records, and an example answer."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import lightning as L
import torch
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import select_sft_generate_example
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error

from litgpt_akl.data.dataset import ArrowDataset, TokenizedDataset
from litgpt_akl.data.steps import in_order
from litgpt_akl.loss.head_loss import DistillationLoss
from litgpt_akl.loss.scoring import STATISTICS
from litgpt_akl.messages import progress_bar
from litgpt_akl.models.generation import generate, longest_prompt, stop_sequences, without_end
from litgpt_akl.models.gpt import distillation_loss
from litgpt_akl.models.pair import Pair
from litgpt_akl.models.parallel import all_gather_object, reshard
from litgpt_akl.teacher.teacher import Teacher
from litgpt_akl.training.launch import StopSignals
from litgpt_akl.training.run import Run, validation_batches

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
    dataset: TokenizedDataset,
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
        teacher: likewise, from :func:`~litgpt_akl.models.gpt.load_frozen`.
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
    for batch in in_order(dataset, numbers, *micro_batch, *share):
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
    calibration = dict(
        zip(CALIBRATION, torch.cat(all_gather_object(torch.cat(calibration, dim=1)), dim=1), strict=True)
    )
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


@torch.no_grad()
def validate(
    fabric: L.Fabric, run: Run, state: dict, dataset: TokenizedDataset, stop: StopSignals
) -> dict[str, float] | None:
    """Means over the response tokens of the first ``max_iters`` micro-batches' worth of records.

    Returns:
        None if a stop signal came, else:
        Nats per token: ``val_loss`` (the objective), ``val_cross_entropy``, ``val_teacher_cross_entropy``,
        ``val_divergence``, ``val_forward_kl``, ``val_reverse_kl``; ``val_ppl``; ``val_agreement`` of top-1 ids;
        ``val_gap_closed``, the share of the step-0 cross-entropy gap to the teacher that is closed by now
        (NaN if there was no gap, or no validation at the start).
    """
    student, teacher, cache = state["student"], state["teacher"], state["caches"].validation
    # loss, response tokens, statistics
    sums = torch.zeros(2 + len(STATISTICS), device=fabric.device, dtype=torch.float64)
    student.eval()
    for batch in validation_batches(fabric, run, dataset, cache):
        if stopped := stop.agreed(fabric) is not None:
            break
        for moved, teacher_hidden in teacher.answers([batch], cache):
            targets = moved.input_ids, moved.positions, moved.labels, teacher_hidden
            result = distillation_loss(student, teacher.model, state["loss"], *targets, state["vocab_size"])
            sums += torch.stack([result.loss, result.loss.new_tensor(result.tokens), *result.stats.values()])
    student.train()
    reshard(student.module)
    if stopped:
        return None
    loss, tokens, *sums = fabric.all_reduce(sums, reduce_op="sum").tolist()
    means = {name: value / tokens for name, value in zip(STATISTICS, sums, strict=True)}
    cross_entropy, teacher_cross_entropy = means["cross_entropy"], means["teacher_cross_entropy"]
    state.update(last_validation=state["step_count"], validation_loss=loss / tokens)
    if state["step_count"] == 0:
        state["start_cross_entropy"] = cross_entropy
    start = state.get("start_cross_entropy", math.nan)
    gap = start - teacher_cross_entropy
    return {
        "val_loss": state["validation_loss"],
        "val_cross_entropy": cross_entropy,
        "val_teacher_cross_entropy": teacher_cross_entropy,
        "val_ppl": math.exp(min(cross_entropy, 700.0)),
        "val_divergence": means["divergence"],
        "val_forward_kl": means["forward_kl"],
        "val_reverse_kl": means["reverse_kl"],
        "val_agreement": means["agreement"],
        "val_gap_closed": (start - cross_entropy) / gap if gap > 0 else math.nan,
    }


def describe(metrics: dict[str, float]) -> str:
    """One line for people."""
    closed = metrics["val_gap_closed"]
    return (
        f"cross-entropy {metrics['val_cross_entropy']:.3f} (teacher {metrics['val_teacher_cross_entropy']:.3f},"
        f" gap closed {'n/a' if math.isnan(closed) else f'{closed:.0%}'}), perplexity {metrics['val_ppl']:.2f},"
        f" divergence {metrics['val_divergence']:.3f}, forward KL {metrics['val_forward_kl']:.3f},"
        f" reverse KL {metrics['val_reverse_kl']:.3f}, agreement {metrics['val_agreement']:.1%}"
    )


def example_prompt(data: DataModule, dataset: TokenizedDataset, tokenizer: Tokenizer, eval: EvalArgs) -> Tensor | None:
    """The ids of the prompt that ``eval.evaluate_example`` means; None if the data module shows none of its prompts."""
    wish = str(eval.evaluate_example)
    if isinstance(dataset, ArrowDataset):
        number = random.randrange(len(dataset)) if wish == "random" else int(wish) if wish.isdigit() else 0
        return dataset.prompt(min(number, len(dataset) - 1))
    if not hasattr(data, "test_dataset"):
        return None
    # the command line hands a number over as text
    eval = replace(eval, evaluate_example=int(wish) if wish.isdigit() else wish)
    return tokenizer.encode(data.prompt_style.apply(select_sft_generate_example(eval, data)))


def example_answer(
    fabric: L.Fabric, model: torch.nn.Module, pair: Pair, input_ids: Tensor, max_new_tokens: int, step: int
) -> str | None:
    """A prompt ``[time]`` and the model's answer to it, or None if the model cannot read so long a prompt.

    All processes must ask together; ``step`` seeds what is drawn.
    """
    if len(input_ids) > longest_prompt(model.config):
        return None
    stop = stop_sequences(pair.tokenizer, None)
    # every process draws the same: a sharded model only runs in all of them together
    (answer,) = generate(
        fabric,
        model,
        [input_ids],
        max_new_tokens=max_new_tokens,
        stop=stop,
        vocab_size=pair.vocab_size,
        seeds=[(step,)],
        temperature=0.8,
    )
    return pair.tokenizer.decode(torch.tensor([*input_ids.tolist(), *without_end(answer, stop)]))
