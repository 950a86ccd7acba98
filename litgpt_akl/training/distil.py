"""A run in one of its processes: load, train, validate, export; and what is said meanwhile."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from litgpt.utils import num_parameters

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import StepBatch
from litgpt_akl.files.changes import check_mapped_files
from litgpt_akl.files.directories import explain_failure, make_writable, write_file
from litgpt_akl.files.lock import locked
from litgpt_akl.files.manifest import FINAL, FINAL_HF, RECIPE
from litgpt_akl.messages import UserError, reason
from litgpt_akl.models.export import write_export
from litgpt_akl.models.padding import describe_padding
from litgpt_akl.models.parallel import wait_for_all
from litgpt_akl.report.runs import forget
from litgpt_akl.teacher.cache import Caches
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.accuracy import report_accuracy
from litgpt_akl.training.beginning import begin
from litgpt_akl.training.checkpoint import save_student, save_training_state
from litgpt_akl.training.launch import StopSignals, ending_together, is_loss_of_another, leave_if_stopped
from litgpt_akl.training.logging import Progress, continue_metrics, flushed_metrics
from litgpt_akl.training.metrics import MetricsMarker
from litgpt_akl.training.reporting import refresh_page, remember
from litgpt_akl.training.run import Run, export_options, load_step_batches, make_step_batches
from litgpt_akl.training.state import make_state
from litgpt_akl.training.train import StepResult, check_nonfinite, fit, total_steps
from litgpt_akl.training.validate import describe, example_answer, example_prompt, validate

WAY_ON = "The same command with --resume auto goes on from the last checkpoint."
"""After a signal."""


@ending_together
def main(fabric: L.Fabric, run: Run) -> None:
    """Load, train, validate and export, in each process of a run."""
    with _out_dir_of(fabric, run):
        begun = begin(fabric, run)
        if begun is not None:
            carry_out(fabric, run, *begun)
        else:
            fabric.print(
                f"{run.out_dir} is already finished: nothing is trained. Use it: litgpt chat {run.out_dir / FINAL}\n"
                "To train anew give --overwrite true in place of --resume, or another --out_dir."
            )


@contextmanager
def _out_dir_of(fabric: L.Fabric, run: Run) -> Iterator[None]:
    """While entered, ``out_dir`` is this run's alone."""
    if not fabric.is_global_zero:
        yield
        return
    make_writable(run.out_dir)
    with locked(run.out_dir):
        yield


def carry_out(fabric: L.Fabric, run: Run, splits: tuple[TokenizedDataset, TokenizedDataset], caches: Caches) -> None:
    """Train from the start or from where the run was, and save, export and report."""
    state = make_state(fabric, run, splits[0], caches)
    announce(fabric, run, state, splits)
    report_accuracy(fabric, run, state["teacher"].model, splits[0], caches)
    if fabric.is_global_zero:
        with explain_failure(run.out_dir):
            write_file(run.out_dir / RECIPE, run.recipe.encode("utf-8"))
        if run.resume is None:
            forget(run.out_dir)
        else:
            continue_metrics(fabric, run.resume, state["step_count"])
    with StopSignals(quiet=not fabric.is_global_zero) as stop:
        if run.eval.initial_validation and state["step_count"] == 0:
            report(fabric, run, state, splits[1], stop)
            leave_if_stopped(fabric, stop, WAY_ON)
        failures: list[str] = []
        with noted_if_saved(state, failures, "The last step's end"):
            distil(fabric, run, state, splits, stop)
        if state["saved_student"] != state["step_count"]:
            # --train.max_time is over, or all steps had been taken before
            leave_if_stopped(fabric, stop, WAY_ON)
            write_student(run, state, splits[0])
        report_on_student(fabric, run, state, splits[1], stop, failures)
        leave_if_stopped(fabric, stop, f"The student is in {run.out_dir / FINAL}, and whole.")
    # in every process the student is there when this returns
    wait_for_all()
    fabric.print(f"The student is in {run.out_dir / FINAL}: litgpt chat {run.out_dir / FINAL}")
    if run.export_hf:
        fabric.print(f"For Transformers, vLLM and llama.cpp it is in {run.out_dir / FINAL_HF}")


def write_student(run: Run, state: dict, dataset: TokenizedDataset) -> None:
    """Write ``final/``, as the student is now."""
    check_mapped_files()
    options = export_options(run, state)
    save_student(run.out_dir / FINAL, state, steps=total_steps(run.train, len(dataset)), **options)
    state["saved_student"] = state["step_count"]


def report_on_student(
    fabric: L.Fabric, run: Run, state: dict, dataset: TokenizedDataset, stop: StopSignals, failures: list[str]
) -> None:
    """What is made of a student that is saved: export, last validation, examples, page; each of them is tried.

    Raises:
        UserError: names all ``failures``, those from before included.
    """
    final = run.out_dir / FINAL
    with noted_if_saved(state, failures, f"{run.out_dir / FINAL_HF}"):
        if run.export_hf and fabric.is_global_zero:
            write_export(final, run.out_dir / FINAL_HF)
        elif (run.out_dir / FINAL_HF).exists():
            fabric.print(f"{run.out_dir / FINAL_HF} is not of this student: litgpt export_hf {final} NEW_DIR")
    with noted_if_saved(state, failures, "The last report"):
        if run.eval.final_validation:
            report(fabric, run, state, dataset, stop, None, failures.append)
        else:
            refresh_page(fabric, run, state, fabric.print, failures.append)
    with noted_if_saved(state, failures, f"{run.teacher.cache_dir}"):
        state["caches"].flush()
    for logger in fabric.loggers:
        with noted_if_saved(state, failures, type(logger).__name__):
            logger.finalize("success")
    if failures:
        raise UserError(
            f"{final} is whole, but not all that follows it: {'; '.join(failures)}.\nWhat is missing can be made from"
            f" what is there: litgpt evaluate_akl {final}, litgpt report_akl {run.out_dir}, litgpt export_hf {final}."
        )


@contextmanager
def noted_if_saved(state: dict, failures: list[str], what: str) -> Iterator[None]:
    """Once the student is saved a failure ends nothing: it is added to ``failures``, as that of ``what``."""
    try:
        yield
    except Exception as error:
        if state["saved_student"] != state["step_count"] or is_loss_of_another(error):
            raise
        failures.append(f"{what}: {type(error).__name__}: {reason(error)}")


def distil(
    fabric: L.Fabric, run: Run, state: dict, splits: tuple[TokenizedDataset, TokenizedDataset], stop: StopSignals
) -> None:
    """Train from ``state``'s position on."""
    dataset, train = splits[0], run.train
    steps, marker = total_steps(train, len(dataset)), MetricsMarker()

    def save(timed: bool) -> Path:
        # a run that goes on from here then reads what this one would have read
        state["caches"].flush()
        check_mapped_files()
        directory = run.out_dir / f"step-{state['step_count']:06d}"
        log = flushed_metrics(fabric) if fabric.is_global_zero else None
        metrics = None if log is None else marker.mark(log, run.out_dir)
        options = {"keep_last": run.keep_last, "timed": timed, **export_options(run, state)}
        save_training_state(directory, state, metrics=metrics, **options)
        return directory

    def on_nonfinite(step_batch: StepBatch, result: StepResult) -> str:
        path = run.out_dir / f"nonfinite-step-{state['step_count']:06d}.json"
        listed = f"its samples are listed in {path}"
        if fabric.is_global_zero:
            samples = [{"number": number, "place": dataset.place(number)} for number in step_batch.numbers.tolist()]
            values = {"loss": str(result.loss), "gradient_norm": str(result.gradient_norm)}
            content = {"step": state["step_count"], "epoch": step_batch.epoch, **values, "samples": samples}
            try:
                write_file(path, json.dumps(content, indent=1).encode("utf-8"))
            except OSError as error:
                listed = f"its samples cannot be listed in {path} ({reason(error)})"
        return check_nonfinite(state, result, listed, run.on_nonfinite)

    step_batches, on_policy_samples = (
        make_step_batches(fabric, run, dataset, state["caches"].training),
        state["on_policy_samples"],
    )
    if on_policy_samples is not None:
        step_batches = on_policy_samples.share_of(step_batches)
    fetched = load_step_batches(run, step_batches, range(state["step_count"], steps))
    try:
        fit(
            fabric,
            state,
            fetched
            if on_policy_samples is None
            else (on_policy_samples.complete(step_batch, step_batches) for step_batch in fetched),
            train,
            run.eval,
            steps=steps,
            save_minutes=run.save_minutes,
            validate=lambda progress: report(fabric, run, state, splits[1], stop, progress),
            save=save,
            save_student=lambda: write_student(run, state, dataset),
            on_nonfinite=on_nonfinite,
            stop=stop,
        )
    finally:
        fetched.stop()
    if on_policy_samples is not None:
        fabric.print(f"On-policy: the student has answered {on_policy_samples.answered:,} prompts")


def report(
    fabric: L.Fabric,
    run: Run,
    state: dict,
    dataset: TokenizedDataset,
    stop: StopSignals,
    progress: Progress | None = None,
    complain: Callable[[str], None] | None = None,
) -> None:
    """Validate, log, print and refresh the page; during training also print an example answer.

    What cannot be written is handed to ``complain``, or printed.
    """
    tell = progress.write if progress else fabric.print
    complain = complain or tell
    if len(dataset) > 0:
        metrics = validate(fabric, run, state, dataset, stop)
        state["caches"].flush()
        if metrics is None:
            return
        fabric.log_dict(metrics, step=state["step_count"])
        tell(f"Step {state['step_count']}: {describe(metrics)}")
        if progress is not None and run.eval.max_new_tokens is not None:
            tell_example(fabric, run, state, dataset, tell)
        remember(fabric, run, state, dataset, tell, complain)
    refresh_page(fabric, run, state, tell, complain)


def tell_example(
    fabric: L.Fabric, run: Run, state: dict, dataset: TokenizedDataset, tell: Callable[[str], None]
) -> None:
    """Print the student's answer to the prompt that was asked for, if there is one that it can read."""
    prompt = example_prompt(run.data, dataset, run.pair.tokenizer, run.eval)
    if prompt is not None:
        options = run.eval.max_new_tokens, state["step_count"]
        answer = example_answer(fabric, state["student"], run.pair, prompt, *options)
        if answer is not None:
            tell(f"{answer}\n")


def announce(fabric: L.Fabric, run: Run, state: dict, splits: tuple[TokenizedDataset, TokenizedDataset]) -> None:
    """A few lines that say what is about to happen."""
    for role, directory in run.pair.directories.items():
        model = state["student"] if role == "student" else state["teacher"].model
        layers, parameters = model.config.n_layer, num_parameters(model) / 1e6
        kept = "its LM head" if isinstance(model, HeadOnly) else f"{layers} layers"
        fabric.print(f"{role.capitalize()}: {directory}, {kept}, {parameters:,.1f} M parameters")
    if padding := describe_padding(run.pair.student_config, state["student"].config.padded_vocab_size):
        fabric.print(f"{padding} The student is trained and written without them.")
    if run.lora.r is not None:
        trained, shares = num_parameters(state["student"], requires_grad=True) / 1e6, run.plan.shares_base
        fabric.print(
            f"LoRA: rank {run.lora.r} on {', '.join(run.lora.targets)}, {trained:,.2f} M parameters are trained"
            f"{'; the teacher is the base, held in memory once' if shares else ''}"
        )
    for name, dataset in zip(("Training", "Validation"), splits, strict=True):
        fabric.print(f"{name}: {len(dataset):,} samples, {dataset.tokens:,} tokens")
    if len(splits[1]) == 0:
        fabric.print("There are no validation samples: validation is off.")
    kind = fabric.device.type
    fused = "compiled by torch.compile" if state["loss"].compiles_on(kind) else "eager"
    fabric.print(
        f"Loss: {run.distill.divergence}, kd_ratio {run.distill.kd_ratio}, {run.pair.vocab_size:,} ids,"
        f" {state['loss'].tokens_per_block(run.pair.vocab_size, kind)} tokens a block, element-wise part {fused}"
    )
    if run.distill.kd_ratio == 0:
        fabric.print("With kd_ratio 0 the loss is cross-entropy alone: the divergence is measured, and teaches nothing")
    if run.resume is not None:
        fabric.print(f"Resuming from {run.resume}, step {state['step_count']}")
