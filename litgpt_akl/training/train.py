"""The loop: window, teacher, student's loss, backward, step; and when to log, validate, save and stop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from torch.optim.lr_scheduler import LambdaLR

from litgpt_akl.data.steps import StepBatch
from litgpt_akl.loss.scoring import STATISTICS
from litgpt_akl.messages import UserError
from litgpt_akl.models.gpt import distillation_loss
from litgpt_akl.models.parallel import all_reduce_max_each, gather_full
from litgpt_akl.training.launch import StopSignals
from litgpt_akl.training.logging import Progress

NONFINITE_LIMIT = 3
"""Steps in a row that may be dropped for a loss or gradient that is not finite, before the run stops."""


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


@dataclass
class StepResult:
    """What an optimizer step came to."""

    loss: float
    """In nats per response token."""
    sums: torch.Tensor
    """Of the ``STATISTICS`` over the response tokens."""
    gradient_norm: float
    """Before clipping."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def take_step(fabric: L.Fabric, state: dict, step_batch: StepBatch, max_norm: float | None) -> StepResult:
    """One optimizer step, its sums divided once by the response tokens of the whole step.

    If the loss or the gradient is not finite, weights and optimizer are left as they were; the learning rate's schedule
    goes on.
    """
    student, teacher, optimizer = state["student"], state["teacher"], state["optimizer"]
    sums = torch.zeros(1 + len(STATISTICS), device=fabric.device)
    for batch, teacher_hidden in teacher.answers(step_batch.micro_batches, state["caches"].training):
        targets = batch.input_ids, batch.positions, batch.labels, teacher_hidden
        loss, weight = state["loss"], 1.0
        if batch.is_own:
            # what the student wrote is no label
            loss, weight = replace(loss, kd_ratio=1.0), loss.kd_ratio
        result = distillation_loss(student, teacher.model, loss, *targets, state["vocab_size"])
        # sharding averages gradients over the processes
        fabric.backward(result.loss * (weight * fabric.world_size / step_batch.response_tokens))
        sums += torch.stack([result.loss.detach() * weight, *result.stats.values()])
    norm = clip_gradients(student, max_norm or math.inf)
    loss, *sums = fabric.all_reduce(sums, reduce_op="sum").unbind()
    result = StepResult(loss.item() / step_batch.response_tokens, torch.stack(sums), norm)
    if result.finite:
        optimizer.step()
    optimizer.zero_grad()
    state["learning_rate"] = optimizer.param_groups[0]["lr"]
    state["scheduler"].step()
    return result


def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
    """Scale gradients down to ``max_norm`` together; returns the norm that they had, in float32 whatever they are."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float32) for parameter in parameters]
    norm = gather_full(torch.linalg.vector_norm(torch.stack(norms)))
    if norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


def fit(
    fabric: L.Fabric,
    state: dict,
    step_batches: Iterator[StepBatch],
    train: TrainArgs,
    eval: EvalArgs,
    *,
    steps: int,
    save_minutes: float | None,
    validate: Callable[[Progress], None],
    save: Callable[[bool], Path],
    save_student: Callable[[], None],
    on_nonfinite: Callable[[StepBatch, StepResult], str],
    stop: StopSignals,
) -> None:
    """Train from ``state``'s position to step ``steps``, a stop signal, or the end of ``train.max_time`` seconds.

    A stop signal and the end of ``max_time`` let the step at hand be finished, and save it; after the last step the
    student is saved before anything else is done. ``save`` is told whether only ``save_minutes``, by the clock of
    process 0, asks for it.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    start = saved = time.perf_counter()
    progress = Progress(fabric, steps, state["step_count"])
    try:
        if validation_due(state, eval, steps):
            # the run was stopped between a step and its validation
            with progress.paused():
                validate(progress)
        for step_batch in step_batches:
            if step_batch.epoch > state["epoch"]:
                state["caches"].share(fabric)
            result = take_step(fabric, state, step_batch, train.max_norm)
            advance(state, step_batch)
            progress.step(step_batch)
            step = state["step_count"]
            if result.finite:
                state["nonfinite_in_a_row"] = 0
            else:
                progress.write(on_nonfinite(step_batch, result))
            if step == steps:
                save_student()
            if step % train.log_interval == 0 or step == steps:
                progress.log(state, result.sums, result.loss, result.gradient_norm, step_batch.response_tokens)
            if validation_due(state, eval, steps):
                with progress.paused():
                    validate(progress)
            now = time.perf_counter()
            over = now - start >= (train.max_time or math.inf)
            due = fabric.is_global_zero and now - saved >= 60 * (save_minutes or math.inf)
            over, due, stopping = all_reduce_max_each(fabric, [over, due, over or stop.received is not None])
            by_interval = train.save_interval is not None and step % train.save_interval == 0
            # at the end there is the student
            if by_interval or ((stopping or due) and step < steps):
                with progress.paused():
                    progress.write(f"Step {step}: saved {save(not by_interval and not stopping)}")
                saved = time.perf_counter()
            if over:
                progress.write(f"Step {step}: --train.max_time {train.max_time} s is over")
            if stopping:
                break
    finally:
        progress.close()


def advance(state: dict, step_batch: StepBatch) -> None:
    """Count a step that was taken or dropped."""
    state.update(epoch=step_batch.epoch, step_count=state["step_count"] + 1)
    state["tokens"] += step_batch.tokens


def validation_due(state: dict, eval: EvalArgs, steps: int) -> bool:
    """Whether the step that was taken last is to be followed by a validation that it has not had yet."""
    step = state["step_count"]
    return 0 < step < steps and step % eval.interval == 0 and state["last_validation"] != step


def check_nonfinite(state: dict, result: StepResult, listed: str, on_nonfinite: Literal["stop", "skip"]) -> str:
    """What to say of a step whose loss or gradient was not finite, and where it is ``listed``, if the run may go on.

    Raises:
        UserError: it may not.
    """
    state["nonfinite_in_a_row"] += 1
    in_a_row = state["nonfinite_in_a_row"]
    what = f"Step {state['step_count']}: the loss is {result.loss}, the gradient norm {result.gradient_norm}"
    if on_nonfinite == "skip" and in_a_row < NONFINITE_LIMIT:
        return f"{what}; the step was dropped, {listed}"
    so_far = f", the last of {in_a_row} in a row" if in_a_row > 1 else ""
    raise UserError(
        f"{what}; the step was not taken{so_far}; {listed}.\nLower the optimizer's lr, set --train.max_norm, mend"
        " these samples, or use --on_nonfinite skip. The last checkpoint that was saved is as it was."
    )
