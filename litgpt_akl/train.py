"""The loop: window, teacher, student's loss, backward, step; and when to log, validate, save and stop."""

import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from torch.optim.lr_scheduler import LambdaLR

from litgpt_akl.data import MicroBatch, Store, windows_from
from litgpt_akl.errors import UserError
from litgpt_akl.models import distillation_loss
from litgpt_akl.monitor import Progress
from litgpt_akl.scoring import STATISTICS


def total_steps(train: TrainArgs, samples: int) -> int:
    """Optimizer steps of the whole run."""
    limits = [train.max_steps]
    if train.epochs is not None:
        limits.append(train.epochs * math.ceil(samples / train.global_batch_size))
    return min(limit for limit in limits if limit is not None)


def warmup_steps(train: TrainArgs, samples: int) -> int:
    """Optimizer steps with a rising learning rate; if nothing is set, a tenth of the run and at most 100."""
    steps = total_steps(train, samples)
    if train.lr_warmup_fraction is not None:
        return min(steps, math.ceil(train.lr_warmup_fraction * samples / train.global_batch_size))
    if train.lr_warmup_steps is not None:
        return min(steps, train.lr_warmup_steps)
    return min(100, steps // 10)


def make_scheduler(optimizer: torch.optim.Optimizer, warmup: int, steps: int, min_lr: float) -> LambdaLR:
    """Linear warm-up to each group's learning rate, then a cosine down to ``min_lr`` at the last step.

    Raises:
        UserError: ``min_lr`` lies above a learning rate.
    """

    def schedule(highest: float) -> Callable[[int], float]:
        floor = min_lr / highest if highest > 0 else 0.0

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

        return factor

    rates = [group["lr"] for group in optimizer.param_groups]
    if min_lr > min(rates):
        raise UserError(
            f"--train.min_lr {min_lr} is above the optimizer's learning rate {min(rates)}.\n"
            "Lower min_lr, or raise the optimizer's lr."
        )
    return LambdaLR(optimizer, [schedule(rate) for rate in rates])


def take_step(
    fabric: L.Fabric, state: dict, micro_batches: list[MicroBatch], response_tokens: int, max_norm: float | None
) -> tuple[float, torch.Tensor, float]:
    """One optimizer step, its sums divided once by the response tokens of the whole step.

    Returns:
        The loss in nats per token, the sums of ``STATISTICS``, and the gradient norm before clipping.

    Raises:
        UserError: the loss or the gradient is not finite; weights and optimizer are as they were before the step.
    """
    student, teacher, optimizer = state["student"], state["teacher"], state["optimizer"]
    sums = torch.zeros(len(STATISTICS), device=fabric.device)
    loss = torch.zeros((), device=fabric.device)
    for batch in micro_batches:
        batch = batch.to(fabric.device)
        result = distillation_loss(
            student, teacher, state["loss"], batch.input_ids, batch.positions, batch.labels, state["vocab_size"]
        )
        fabric.backward(result.loss / response_tokens)
        sums += torch.stack(list(result.stats.values()))
        loss += result.loss.detach() / response_tokens
    norm = fabric.clip_gradients(student, optimizer, max_norm=max_norm or math.inf, error_if_nonfinite=False)
    loss, norm = loss.item(), float(norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"Step {state['step_count'] + 1}: the loss is {loss}, the gradient norm {norm}; the step was not taken.\n"
            "Lower the optimizer's lr, or set --train.max_norm. The last checkpoint that was saved is as it was."
        )
    optimizer.step()
    optimizer.zero_grad()
    state["learning_rate"] = state["scheduler"].get_last_lr()[0]
    state["scheduler"].step()
    return loss, sums, norm


def fit(
    fabric: L.Fabric,
    state: dict,
    store: Store,
    train: TrainArgs,
    eval: EvalArgs,
    *,
    seed: int,
    validate: Callable[[Progress], None],
    save: Callable[[], Path],
) -> None:
    """Train from ``state``'s position to the end of the run, or until ``train.max_time`` seconds have passed."""
    steps, start = total_steps(train, len(store)), time.perf_counter()
    progress = Progress(fabric, steps, state["step_count"])
    windows = windows_from(
        store,
        seed=seed,
        epoch=state["epoch"],
        step=state["epoch_step"],
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )
    try:
        for epoch, number, micro_batches, response_tokens in islice(windows, steps - state["step_count"]):
            loss, sums, norm = take_step(fabric, state, micro_batches, response_tokens, train.max_norm)
            tokens = sum(batch.tokens for batch in micro_batches)
            state.update(epoch=epoch, epoch_step=number + 1, step_count=state["step_count"] + 1)
            state["tokens"] += tokens
            progress.step(tokens, response_tokens)
            step = state["step_count"]
            if step % train.log_interval == 0 or step == steps:
                progress.log(state, sums, loss, norm, response_tokens)
            if step % eval.interval == 0 and step < steps:
                validate(progress)
            if train.save_interval is not None and step % train.save_interval == 0:
                progress.write(f"Step {step}: saved {save()}")
            if train.max_time is not None and time.perf_counter() - start >= train.max_time:
                progress.write(f"Step {step}: --train.max_time {train.max_time} s is over")
                break
    finally:
        progress.close()
