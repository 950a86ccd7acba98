"""`litgpt finetune_akl`: its signature is the whole configuration."""

import inspect
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import Alpaca, DataModule
from litgpt.types import LoggerChoice
from litgpt.utils import init_out_dir, num_parameters, parse_devices

from litgpt_akl.args import DistillArgs, TeacherArgs, check_training_args, choose_precision, optimizer_config
from litgpt_akl.checkpoint import find_training_state, save_student, save_training_state
from litgpt_akl.data.plan import Plan
from litgpt_akl.data.prepare import prepare_stores
from litgpt_akl.data.stores import Store
from litgpt_akl.data.windows import Window, Windows, load
from litgpt_akl.data.workers import end_with_parent, stop_workers
from litgpt_akl.errors import UserError
from litgpt_akl.loggers import continue_metrics, flushed_metrics, make_logger
from litgpt_akl.memory_report import report_memory
from litgpt_akl.monitor import Progress, silence_known_noise
from litgpt_akl.pair import check_pair
from litgpt_akl.planning import device_bytes, find_models, longest_sample, make_plan, models_of
from litgpt_akl.processes import ending_together
from litgpt_akl.recipe import recipe_as_yaml
from litgpt_akl.run import Run, export_options, make_optimizer, make_state
from litgpt_akl.sharding import make_strategy, return_freed_memory
from litgpt_akl.signals import StopSignals
from litgpt_akl.train import StepResult, check_nonfinite, fit, make_scheduler, total_steps
from litgpt_akl.validation import describe, example_answer, example_prompt, validate

NOT_IN_RECIPE = ("access_token", "dry_run")
"""Options that a repeated run is not to have."""


def setup(
    checkpoint_dir: Path,
    *,
    teacher_checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/akl"),
    precision: str | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    hybrid_sharding: bool = False,
    resume: bool | Literal["auto"] | Path = False,
    accept_changes: bool = False,
    keep_last: int | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    data: DataModule | None = None,
    teacher: TeacherArgs = TeacherArgs(),
    distill: DistillArgs = DistillArgs(),
    train: TrainArgs = TrainArgs(
        save_interval=1000,
        log_interval=1,
        global_batch_size=16,
        micro_batch_size=4,
        lr_warmup_steps=None,
        epochs=5,
        max_norm=1.0,
        min_lr=0.0,
    ),
    eval: EvalArgs = EvalArgs(interval=600, max_new_tokens=100, max_iters=100, initial_validation=True),
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    logger_name: LoggerChoice = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    dry_run: bool = False,
    device_memory: float | None = None,
) -> None:
    """Distil a teacher into a student: finetune the student on the teacher's whole output distribution.

    Arguments:
        checkpoint_dir: The student's checkpoint directory, or a model id that LitGPT can download.
        teacher_checkpoint_dir: The teacher's checkpoint directory, or a model id; it must have the student's tokenizer.
        out_dir: Directory in which to save checkpoints and logs; ``final/`` in it is the trained student. If running in
            a Lightning Studio Job, look for it in /teamspace/jobs/<job-name>/share.
        precision: The precision to use: "32-true", "bf16-true" or "bf16-mixed" (default: bf16-mixed on a GPU, 32-true
            on a CPU).
        devices: How many devices to use on each node. With more than one in all, teacher and student are sharded.
        num_nodes: How many nodes the code is being run on.
        hybrid_sharding: Whether every node holds whole models, sharded over its own devices only: more memory, less
            traffic between nodes.
        resume: Path to a ``step-...`` directory of an interrupted run to go on from, ``true`` for the latest one in
            ``out_dir``, or ``auto`` for the latest one if there is one. A damaged one is passed over.
        accept_changes: Whether a resumed run may differ from the interrupted one in what changes its result.
        keep_last: How many ``step-...`` directories to keep, beside the one with the lowest validation loss (default:
            all).
        on_nonfinite: What to do when the loss or the gradient is not finite: ``stop``, or ``skip`` the step, but not
            more than two in a row. The samples are listed in a file in ``out_dir``.
        data: Data-related arguments. If not provided, the default is ``litgpt.data.Alpaca``.
        teacher: Teacher-related arguments. See ``litgpt_akl.args.TeacherArgs`` for details.
        distill: Distillation-related arguments. See ``litgpt_akl.args.DistillArgs`` for details.
        train: Training-related arguments. See ``litgpt.args.TrainArgs`` for details. An iteration is an optimizer step
            here. Without ``lr_warmup_steps`` or ``lr_warmup_fraction``, a tenth of the run warms up, at most 100 steps.
        eval: Evaluation-related arguments. See ``litgpt.args.EvalArgs`` for details. Every validation reads the same
            ``max_iters`` micro-batches, so that they can be compared.
        log: Logging-related arguments. See ``litgpt.args.LogArgs`` for details.
        optimizer: An optimizer name (such as "AdamW") or config.
        logger_name: The name of the logger to send metrics to.
        seed: The random seed to use for reproducibility.
        access_token: Optional API token to access models with restrictions.
        dry_run: Whether to check the options, print how much memory the run would take on each device, and end. Nothing
            is loaded, downloaded or written, and neither the models nor the devices need to be there: the models may be
            names that LitGPT knows, such as ``Llama-3.1-8B``.
        device_memory: Memory of a device in GB that a run may take; one that needs more is refused (default: what a GPU
            has; on a CPU what is free, shared out among the processes). With ``dry_run`` it stands for GPUs that are
            not here.
    """
    optimizer = optimizer_config(optimizer)
    recipe = recipe_as_yaml({name: value for name, value in locals().items() if name not in NOT_IN_RECIPE})
    silence_known_noise()
    check_training_args(train, eval)
    # a misspelt optimizer is found before anything is loaded
    make_scheduler(make_optimizer(optimizer, torch.nn.Linear(1, 1)), warmup=0, steps=1, min_lr=train.min_lr)
    cuda = torch.cuda.is_available() or (dry_run and device_memory is not None)
    precision = choose_precision(precision, cuda)
    if keep_last is not None and keep_last < 1:
        raise UserError(f"--keep_last must be at least 1, got {keep_last}. Leave it out (null) to keep all.")
    devices = parse_devices(devices)
    if hybrid_sharding and (num_nodes == 1 or devices == 1):
        raise UserError(
            f"--hybrid_sharding true with --num_nodes {num_nodes} --devices {devices}: it is for several nodes with"
            " several devices each. Leave it out."
        )
    if dry_run:
        models = find_models(checkpoint_dir, teacher_checkpoint_dir, train.tie_embeddings)
    else:
        pair = check_pair(checkpoint_dir, teacher_checkpoint_dir, access_token)
        models = models_of(pair, train.tie_embeddings)
    if train.max_seq_length is not None and train.max_seq_length > models.context_length:
        raise UserError(
            f"--train.max_seq_length {train.max_seq_length} is more than the {models.context_length} tokens that the"
            f" {models.name_shorter_context()} reads. Set it to {models.context_length} or less."
        )
    plan = make_plan(
        models,
        partial(make_optimizer, optimizer),
        distill,
        train,
        data,
        precision=precision,
        cuda=cuda,
        devices=devices,
        num_nodes=num_nodes,
        hybrid_sharding=hybrid_sharding,
        teacher_dtype=teacher.dtype(cuda),
    )
    if dry_run:
        report_memory(plan, device_bytes(device_memory, cuda, devices), inspect.signature(setup).parameters)
        return
    run = Run(
        pair=pair,
        plan=plan,
        device_memory=device_memory,
        data=Alpaca() if data is None else data,
        distill=distill,
        teacher_dtype=plan.teacher_dtype,
        train=train,
        eval=eval,
        optimizer=optimizer,
        seed=seed,
        resume=resume,
        accept_changes=accept_changes,
        keep_last=keep_last,
        on_nonfinite=on_nonfinite,
        out_dir=init_out_dir(out_dir),
        recipe=recipe,
    )
    logger = make_logger(
        logger_name,
        run.out_dir,
        name=f"distill-{pair.student_config.name}",
        resume=bool(resume),
        log_interval=train.log_interval,
        log=log,
    )
    fabric = L.Fabric(
        devices=devices,
        num_nodes=num_nodes,
        strategy=make_strategy(devices, num_nodes, hybrid_sharding),
        precision=precision,
        loggers=logger,
    )
    fabric.launch(main, run)


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
        plan = replace(run.plan, sequence_length=longest_sample(stores[0]))
        limit = device_bytes(run.device_memory, plan.device == "cuda", plan.devices)
        report_memory(plan, limit, inspect.signature(setup).parameters)
    # no other process goes on if that is too much
    fabric.barrier()
    fabric.seed_everything(run.seed, verbose=False)
    state = make_state(fabric, run, stores[0])
    announce(fabric, run, state, stores)
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


def _make_writable(out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir} cannot be made ({error.strerror}). Give another directory.") from error
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {out_dir} is not writable. Give another directory.")
