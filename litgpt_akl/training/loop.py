"""The loop: step batch, teacher, student's loss, backward, step; and when to log, validate, save and stop."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import lightning as L
import torch

from litgpt_akl.data.steps import StepBatch
from litgpt_akl.files.changed_files import check_mapped_files
from litgpt_akl.files.directories import write_file
from litgpt_akl.files.manifest import FINAL
from litgpt_akl.messages import UserError, entry, reason
from litgpt_akl.models.gpt import distillation_loss
from litgpt_akl.models.parallel import all_reduce_max_each, gather_full
from litgpt_akl.training.checkpoint import save_student, save_training_state
from litgpt_akl.training.logging import Progress, flushed_metrics
from litgpt_akl.training.other_tokenizer import loss_of_batch, per_position
from litgpt_akl.training.reporting import report
from litgpt_akl.training.run import Run
from litgpt_akl.training.teacher_accuracy import doubt_teacher
from litgpt_akl.training.validation import Sums

NONFINITE_LIMIT = 3
"""Steps in a row that may be dropped for a loss or gradient that is not finite, before the run stops."""


def fit(fabric: L.Fabric, run: Run, state: dict) -> None:
    """Train from ``state``'s position to the last step, a stop signal, or the end of ``train.max_time`` seconds.

    A stop signal and the end of ``max_time`` let the step at hand be finished, and save it. After the last step the
    student is saved before anything else is done. Raises UserError if a loss or gradient is not finite.
    """
    train, steps, stop = run.train, state["steps"], state["stop"]
    with (
        _step_batches(fabric, run, state) as step_batches,
        closing(Progress(fabric, steps, state["step_count"])) as progress,
    ):
        start = state["saved_at"] = time.perf_counter()
        # the run may have been stopped between a step and its validation
        _validate_if_due(fabric, run, state, progress)
        for step_batch in step_batches:
            if step_batch.epoch > state["epoch"]:
                state["caches"].share(fabric)
            state["loss"] = run.distill.loss_of_step(state["step_count"], steps)
            seen = partial(progress.within_step, state["step_count"] + 1)
            result = take_step(fabric, state, step_batch, train.max_norm, seen)
            state.update(epoch=step_batch.epoch, step_count=state["step_count"] + 1)
            state["tokens"] += step_batch.tokens
            state["nonfinite_in_a_row"] = 0 if result.finite else state["nonfinite_in_a_row"] + 1
            progress.step(step_batch)
            if not result.finite:
                progress.write(_drop_step(fabric, run, state, step_batch, result))
            step = state["step_count"]
            if step == steps:
                save_final(run, state)
            if fabric.is_global_zero and run.distill.on_policy == 0:
                # what the student writes no teacher needs to know
                doubt_teacher(run, state, result.means["teacher_cross_entropy"])
            if step % train.log_interval == 0 or step == steps:
                scheduled = {name: getattr(state["loss"], name) for name in run.distill.schedule.given}
                told = {"loss": result.loss, **result.means, **scheduled, "gradient_norm": result.gradient_norm}
                progress.log(state, told)
            _validate_if_due(fabric, run, state, progress)
            now = time.perf_counter()
            over = now - start >= (train.max_time or math.inf)
            # the clock of process 0 decides for all
            due = fabric.is_global_zero and now - state["saved_at"] >= 60 * (run.save_minutes or math.inf)
            over, due, stopping = all_reduce_max_each(fabric, [over, due, over or stop.received is not None])
            _save_if_due(fabric, run, state, progress, due, stopping)
            if over:
                progress.write(f"Step {step}: --train.max_time {train.max_time} s is over")
            if stopping:
                break


@contextmanager
def _step_batches(fabric: L.Fabric, run: Run, state: dict) -> Iterator[Iterator[StepBatch]]:
    """This process's share of the steps that are left, fetched ahead, with on-policy samples in them."""
    step_batches = run.step_batches(fabric, state["dataset"], state["caches"].training)
    own = state["on_policy_samples"]
    if own is not None:
        step_batches = own.share_of(step_batches)
    fetched = run.fetch(step_batches, range(state["step_count"], state["steps"]))
    try:
        yield fetched if own is None else (own.complete(step_batch, step_batches) for step_batch in fetched)
    finally:
        fetched.stop()
    if own is not None:
        fabric.print(f"On-policy: the student has answered {own.count:,} prompts itself")


@dataclass
class StepResult:
    """What an optimizer step came to."""

    loss: float
    """In nats per response token."""
    means: dict[str, float]
    """Over the response tokens, of what the loss tells of each."""
    gradient_norm: float
    """Before clipping."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def take_step(
    fabric: L.Fabric,
    state: dict,
    step_batch: StepBatch,
    max_norm: float | None,
    seen: Callable[[int, int], object] = lambda done, total: None,
) -> StepResult:
    """One optimizer step, its sums divided once by the response tokens of the whole step.

    If the loss or the gradient is not finite, weights and optimizer are left as they were; the learning rate's schedule
    goes on. ``seen`` is told how many micro-batches are done, and of how many, after each.
    """
    student, teacher, optimizer = state["student"], state["teacher"], state["optimizer"]
    sums = Sums(fabric)
    micro_batches = teacher.hidden_states(step_batch.micro_batches, state["caches"].training)
    for done, (batch, teacher_hidden) in enumerate(micro_batches, start=1):
        targets = batch.input_ids, batch.positions, batch.labels, teacher_hidden
        loss, weight = state["loss"], 1.0
        if batch.is_on_policy:
            # what the student wrote is no label
            loss, weight = replace(loss, kd_ratio=1.0), loss.kd_ratio
        loss = loss_of_batch(state, loss, batch)
        result = distillation_loss(student, teacher.model, loss, *targets, state["vocab_size"])
        # sharding averages gradients over the processes
        fabric.backward(result.loss * (weight * fabric.world_size / step_batch.response_tokens))
        sums.add(loss=result.loss.detach() * weight, **result.stats)
        seen(done, len(step_batch.micro_batches))
    norm = clip_gradients(student, max_norm or math.inf)
    total = sums.of_all()
    loss = total.pop("loss").item() / step_batch.response_tokens
    means = torch.stack([*total.values()]) / step_batch.response_tokens
    result = StepResult(loss, per_position(dict(zip(total, means.tolist(), strict=True))), norm)
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


def _drop_step(fabric: L.Fabric, run: Run, state: dict, step_batch: StepBatch, result: StepResult) -> str:
    """What to say of a step that was not finite, once its samples are listed; UserError unless the run may go on."""
    listed, in_a_row = _list_samples(fabric, run, state, step_batch, result), state["nonfinite_in_a_row"]
    what = f"Step {state['step_count']}: the loss is {result.loss}, the gradient norm {result.gradient_norm}"
    if run.on_nonfinite == "skip" and in_a_row < NONFINITE_LIMIT:
        return f"{what}; the step was dropped, {listed}"
    so_far = f", the last of {in_a_row} in a row" if in_a_row > 1 else ""
    raise UserError(
        f"{what}; the step was not taken{so_far}; {listed}.\nLower the optimizer's lr, set --train.max_norm, mend"
        " these samples, or use --on_nonfinite skip. The last checkpoint that was saved is as it was."
    )


def _list_samples(fabric: L.Fabric, run: Run, state: dict, step_batch: StepBatch, result: StepResult) -> str:
    """Write in process 0 which samples made a step, and where they come from; returns where that is, in words."""
    path = run.out_dir / f"nonfinite-step-{state['step_count']:06d}.json"
    if fabric.is_global_zero:
        place = state["dataset"].place
        samples = [{"number": number, "place": place(number)} for number in step_batch.numbers.tolist()]
        values = {"loss": str(result.loss), "gradient_norm": str(result.gradient_norm)}
        content = {"step": state["step_count"], "epoch": step_batch.epoch, **values, "samples": samples}
        try:
            write_file(path, json.dumps(content, indent=1).encode("utf-8"))
        except OSError as error:
            return f"its samples cannot be listed in {path} ({reason(error)})"
    return f"its samples are listed in {path}"


def _validate_if_due(fabric: L.Fabric, run: Run, state: dict, progress: Progress) -> None:
    """Validate if the step that was taken last is to be followed by a validation, and has not had it yet."""
    step = state["step_count"]
    if 0 < step < state["steps"] and step % run.eval.interval == 0 and state["last_validation"] != step:
        with progress.paused():
            report(fabric, run, state, with_example=True)


def _save_if_due(fabric: L.Fabric, run: Run, state: dict, progress: Progress, due: bool, stopping: bool) -> None:
    """Save a ``step-...`` directory by ``train.save_interval``, before a stop, or since it is ``due`` by the clock."""
    step, interval = state["step_count"], run.train.save_interval
    by_interval = interval is not None and step % interval == 0
    # at the end there is the student
    if not by_interval and (step == state["steps"] or not (stopping or due)):
        return
    with progress.paused():
        # a run that resumes from here then reads what this one would have read
        state["caches"].flush()
        check_mapped_files()
        directory = run.out_dir / f"step-{step:06d}"
        log = flushed_metrics(fabric) if fabric.is_global_zero else None
        metrics = None if log is None else state["metrics_marker"].mark(log, run.out_dir)
        options = {"keep_last": run.keep_last, "timed": not by_interval and not stopping, **run.beside_weights(state)}
        save_training_state(directory, state, metrics=metrics, **options)
        if fabric.is_global_zero:
            entry(f"Step {step:>4}", f"saved {directory}")
    state["saved_at"] = time.perf_counter()


def save_final(run: Run, state: dict) -> None:
    """Write ``final/``, as the student is now."""
    check_mapped_files()
    save_student(run.out_dir / FINAL, state, steps=state["steps"], **run.beside_weights(state))
    state["saved_student"] = state["step_count"]
