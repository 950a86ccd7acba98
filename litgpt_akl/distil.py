"""A run in one of its processes: load, train, validate, export; and what is said meanwhile."""

import json
import os
from dataclasses import replace
from pathlib import Path

import lightning as L
from litgpt.utils import num_parameters

from litgpt_akl.checkpoint import find_training_state, save_student, save_training_state
from litgpt_akl.data.plan import Plan
from litgpt_akl.data.prepare import prepare_stores
from litgpt_akl.data.stores import Store
from litgpt_akl.data.windows import Window, Windows, in_order, load
from litgpt_akl.data.workers import end_with_parent, stop_workers
from litgpt_akl.errors import UserError
from litgpt_akl.loggers import continue_metrics, flushed_metrics
from litgpt_akl.memory_report import report_memory
from litgpt_akl.monitor import Progress
from litgpt_akl.planning import device_bytes
from litgpt_akl.processes import ending_together
from litgpt_akl.quantize import loss_of_quantization
from litgpt_akl.run import Run, export_options, make_state
from litgpt_akl.sharding import return_freed_memory
from litgpt_akl.signals import StopSignals
from litgpt_akl.train import StepResult, check_nonfinite, fit, total_steps
from litgpt_akl.validation import describe, example_answer, example_prompt, validate
from litgpt_akl.weights import open_weights


@ending_together
def main(fabric: L.Fabric, run: Run) -> None:
    """Load, train, validate and export, in each process of a run."""
    if fabric.local_rank > 0:
        end_with_parent()
    if fabric.world_size > 1 and fabric.device.type == "cpu":
        return_freed_memory()
    open_out_dir(fabric, run)
    pair, train = run.pair, run.train
    # whatever is downloaded or prepared is then found by the other processes
    with fabric.rank_zero_first():
        stores = prepare_stores(run.data, pair.tokenizer, train, pair.context_length, pair.student_dir)
    if fabric.is_global_zero:
        plan = replace(run.plan, sequence_length=stores[0].longest)
        limit = device_bytes(run.device_memory, plan.device == "cuda", plan.devices)
        report_memory(plan, limit, run.options)
    # no other process goes on if that is too much
    fabric.barrier()
    fabric.seed_everything(run.seed, verbose=False)
    state = make_state(fabric, run, stores[0])
    announce(fabric, run, state, stores)
    if run.teacher.quantize is not None:
        fabric.print(describe_quantization(run, state, stores[0]))
    if fabric.is_global_zero:
        (run.out_dir / "hyperparameters.yaml").write_text(run.recipe, encoding="utf-8")
        if run.resume is not None:
            continue_metrics(fabric, run.resume / "metrics.csv")
    with StopSignals(quiet=not fabric.is_global_zero) as stop:
        if run.eval.initial_validation and state["step_count"] == 0:
            report(fabric, run, state, stores[1], stop)
            leave_if_stopped(fabric, stop)
        distil(fabric, run, state, stores, stop)
        leave_if_stopped(fabric, stop)
    if run.eval.final_validation:
        report(fabric, run, state, stores[1], stop)
    save_student(run.out_dir / "final", state, **export_options(run, state))
    for logger in fabric.loggers:
        logger.finalize("success")
    # in every process the student is there when this returns
    fabric.barrier()
    fabric.print(f"The student is in {run.out_dir / 'final'}: litgpt chat {run.out_dir / 'final'}")


def open_out_dir(fabric: L.Fabric, run: Run) -> None:
    """Make ``out_dir`` and find what to resume, in one process for all."""
    if fabric.is_global_zero:
        _make_writable(run.out_dir)
        run.resume = find_training_state(run.resume, run.out_dir, warn=print)
    run.resume = fabric.broadcast(run.resume)


def distil(fabric: L.Fabric, run: Run, state: dict, stores: tuple[Store, Store], stop: StopSignals) -> None:
    """Train from ``state``'s position on."""
    store, train = stores[0], run.train
    steps = total_steps(train, len(store))

    def save() -> Path:
        directory = run.out_dir / f"step-{state['step_count']:06d}"
        metrics_file = flushed_metrics(fabric) if fabric.is_global_zero else None
        options = export_options(run, state)
        save_training_state(directory, state, metrics_file=metrics_file, keep_last=run.keep_last, **options)
        return directory

    def on_nonfinite(window: Window, result: StepResult) -> str:
        path = run.out_dir / f"nonfinite-step-{state['step_count']:06d}.json"
        samples = [{"number": int(number), "place": store.place(int(number))} for number in window.numbers]
        values = {"loss": str(result.loss), "gradient_norm": str(result.gradient_norm)}
        content = {"step": state["step_count"], "epoch": window.epoch, **values, "samples": samples}
        if fabric.is_global_zero:
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return check_nonfinite(state, result, path, run.on_nonfinite)

    plan = Plan(len(store), train.global_batch_size, run.seed, store.lengths, store.chunk_ends)
    micro_batch_tokens = getattr(run.data, "micro_batch_tokens", None)
    share = fabric.global_rank, fabric.world_size
    windows = Windows(store, plan, train.micro_batch_size, micro_batch_tokens, *share)
    windows = load(windows, state["step_count"], steps, getattr(run.data, "num_workers", 0))
    try:
        fit(
            fabric,
            state,
            windows,
            train,
            run.eval,
            steps=steps,
            validate=lambda progress: report(fabric, run, state, stores[1], stop, progress),
            save=save,
            on_nonfinite=on_nonfinite,
            stop=stop,
        )
    finally:
        stop_workers(windows)


def report(
    fabric: L.Fabric, run: Run, state: dict, store: Store, stop: StopSignals, progress: Progress | None = None
) -> None:
    """Validate, log and print; during training also an example answer."""
    if len(store) == 0:
        return
    metrics = validate(fabric, state, store, run.eval.max_iters, run.train.micro_batch_size, stop)
    if metrics is None:
        return
    fabric.log_dict(metrics, step=state["step_count"])
    write = progress.write if progress else fabric.print
    write(f"Step {state['step_count']}: {describe(metrics)}")
    if progress is None or run.eval.max_new_tokens is None:
        return
    tokenizer = run.pair.tokenizer
    prompt = example_prompt(run.data, store, tokenizer, run.eval)
    if prompt is not None:
        answer = example_answer(fabric, state["student"], tokenizer, prompt, run.eval.max_new_tokens)
        if answer is not None:
            write(f"{answer}\n")


def leave_if_stopped(fabric: L.Fabric, stop: StopSignals) -> None:
    """End the process as a shell says that a signal ended it."""
    received = stop.agreed(fabric)
    if received is not None:
        fabric.print("Stopped; the same command with --resume auto goes on from the last checkpoint.")
        # one status for the run: launchers take any other process's for an accident
        raise SystemExit(128 + received if fabric.is_global_zero else 0)


def announce(fabric: L.Fabric, run: Run, state: dict, stores: tuple[Store, Store]) -> None:
    """A few lines that say what is about to happen."""
    for role, directory in run.pair.directories.items():
        layers, parameters = state[role].config.n_layer, num_parameters(state[role]) / 1e6
        fabric.print(f"{role.capitalize()}: {directory}, {layers} layers, {parameters:,.1f} M parameters")
    if run.lora.r is not None:
        trained, shares = num_parameters(state["student"], requires_grad=True) / 1e6, run.plan.shares_base
        fabric.print(
            f"LoRA: rank {run.lora.r} on {', '.join(run.lora.targets)}, {trained:,.2f} M parameters are trained"
            f"{'; the teacher is the base, held in memory once' if shares else ''}"
        )
    for name, store in zip(("Training", "Validation"), stores, strict=True):
        fabric.print(f"{name}: {len(store):,} samples, {store.tokens:,} tokens")
    if len(stores[1]) == 0:
        fabric.print("There are no validation samples: validation is off.")
    kind = fabric.device.type
    fused = "compiled by torch.compile" if state["loss"].compiles_on(kind) else "eager (no compiler, or switched off)"
    fabric.print(
        f"Loss: {run.distill.divergence}, kd_ratio {run.distill.kd_ratio}, {run.pair.vocab_size:,} ids,"
        f" {state['loss'].tokens_per_block(run.pair.vocab_size, kind)} tokens a block, element-wise part {fused}"
    )
    if run.resume is not None:
        fabric.print(f"Going on from {run.resume}, step {state['step_count']}")


def describe_quantization(run: Run, state: dict, store: Store) -> str:
    """What the teacher has lost, in a line."""
    weights = open_weights(run.pair.teacher_dir, run.pair.teacher_config)
    batch = next(in_order(store, range(min(4, len(store))), run.train.micro_batch_size))
    stats, tokens = loss_of_quantization(state["teacher"], run.pair.teacher_config, weights, batch, run.pair.vocab_size)
    return (
        f"The teacher in {run.teacher.quantize}: forward KL of its full weights to it"
        f" {stats['forward_kl'] / tokens:.4f} nats per token, the same top-1 id at {stats['agreement'] / tokens:.1%} of"
        f" {tokens} response tokens"
    )


def _make_writable(out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir} cannot be made ({error.strerror}). Give another directory.") from error
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {out_dir} is not writable. Give another directory.")
