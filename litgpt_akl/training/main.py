"""What each process of a command runs: train a student from set-up to the last report, or fill a cache."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import lightning as L

from litgpt_akl.data.steps import MicroBatch
from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.examples import forget
from litgpt_akl.files.manifest import FINAL, FINAL_HF, RECIPE
from litgpt_akl.messages import UserError, progress_bar, reason, tell
from litgpt_akl.models.export import write_export
from litgpt_akl.models.parallel import wait_for_all
from litgpt_akl.teacher.cache import Caches, TeacherCache
from litgpt_akl.teacher.several import SeveralCaches
from litgpt_akl.teacher.teacher import Teacher
from litgpt_akl.training.launch import StopSignals, ending_together, is_loss_of_another, leave_if_stopped
from litgpt_akl.training.logging import continue_metrics, flushed_metrics
from litgpt_akl.training.loop import fit, save_final
from litgpt_akl.training.other_tokenizer import report_mass
from litgpt_akl.training.out_dir import out_dir_locked, set_evaluation_aside
from litgpt_akl.training.reporting import end_on_page, refresh_page, report
from litgpt_akl.training.run import Run, Splits
from litgpt_akl.training.setup import make_state, make_teacher, open_inputs
from litgpt_akl.training.summary import close
from litgpt_akl.training.teacher_accuracy import report_accuracy
from litgpt_akl.training.teachers import caches_of_each, of_each_teacher, runs_of_teachers
from litgpt_akl.training.top_k_cost import report_cost

WAY_ON = "The same command with --resume auto goes on from the last checkpoint."
"""After a signal."""
NOTHING = "No step was finished, and nothing was saved: start the run again."


@ending_together
def main(fabric: L.Fabric, run: Run) -> None:
    """Load, train, validate and export, in each process of a run."""
    with out_dir_locked(fabric, run.out_dir):
        inputs = open_inputs(fabric, run)
        if inputs is not None:
            train(fabric, run, *inputs)
        else:
            fabric.print(
                f"{run.out_dir} is already finished: nothing is trained. Use it: litgpt chat {run.out_dir / FINAL}\n"
                "To train anew give --overwrite true in place of --resume, or another --out_dir."
            )


def train(fabric: L.Fabric, run: Run, splits: Splits, caches: Caches | SeveralCaches) -> None:
    """Train from the start or from a checkpoint, and save, export and report."""
    state = make_state(fabric, run, splits, caches)
    if run.resume is not None:
        fabric.print(f"Resuming from {run.resume}, step {state['step_count']}")
    for part, teacher, of in zip(*of_each_teacher(run, state["teacher"], caches), strict=True):
        report_accuracy(fabric, part, teacher.model, splits[0], of)
    state["top_k_cost"] = report_cost(fabric, run, state["teacher"].model, splits[0], state["student"])
    report_mass(fabric, run, state)
    if fabric.is_global_zero:
        set_evaluation_aside(run.out_dir)
        with explain_failure(run.out_dir):
            write_file(run.out_dir / RECIPE, run.recipe.encode("utf-8"))
        if run.resume is None:
            forget(run.out_dir)
        else:
            continue_metrics(fabric, run.resume, state["step_count"])
            # it still says that the run was stopped
            refresh_page(fabric, run, state, tell, goes_on=True)
    with end_on_page(fabric, run, state), StopSignals(quiet=not fabric.is_global_zero) as stop:
        state["stop"] = stop
        if run.eval.initial_validation and state["step_count"] == 0:
            stop.doing = "ending before the first step"
            report(fabric, run, state)
            leave_if_stopped(fabric, stop, NOTHING)
            del stop.doing
        failures: list[str] = []
        with _noted_if_saved(state, failures, "The last step's end"):
            fit(fabric, run, state)
        if state["saved_student"] != state["step_count"]:
            # --train.max_time is over, or all steps had been taken before
            leave_if_stopped(fabric, stop, WAY_ON if state["step_count"] else NOTHING)
            save_final(run, state)
        stop.doing = "the student is saved; ending the report on it"
        _report_on_student(fabric, run, state, failures)
        leave_if_stopped(fabric, stop, f"The student is in {run.out_dir / FINAL}, and whole.")
    # in every process the student is there when this returns
    wait_for_all()
    if fabric.is_global_zero:
        close(run, flushed_metrics(fabric), len(run.validation_records(splits[1])))


def _report_on_student(fabric: L.Fabric, run: Run, state: dict, failures: list[str]) -> None:
    """Try to export a saved student, validate it, keep examples, draw the page; raises UserError with all failures."""
    final = run.out_dir / FINAL
    with _noted_if_saved(state, failures, f"{run.out_dir / FINAL_HF}"):
        if run.export_hf and fabric.is_global_zero:
            write_export(final, run.out_dir / FINAL_HF)
        elif (run.out_dir / FINAL_HF).exists():
            fabric.print(f"{run.out_dir / FINAL_HF} is not of this student: litgpt export_hf {final} NEW_DIR")
    with _noted_if_saved(state, failures, "The last report"):
        if run.eval.final_validation:
            report(fabric, run, state, failures=failures)
        else:
            refresh_page(fabric, run, state, failures.append)
    for of in caches_of_each(state["caches"]):
        with _noted_if_saved(state, failures, f"{of.directory}"):
            of.flush()
    for logger in fabric.loggers:
        with _noted_if_saved(state, failures, type(logger).__name__):
            logger.finalize("success")
    if failures:
        raise UserError(
            f"{final} is whole, but not all that follows it: {'; '.join(failures)}.\nWhat is missing can be made from"
            f" what is there: litgpt evaluate_akl {final}, litgpt report_akl {run.out_dir}, litgpt export_hf {final}."
        )


@contextmanager
def _noted_if_saved(state: dict, failures: list[str], what: str) -> Iterator[None]:
    """Once the student is saved a failure ends nothing: it is added to ``failures``, as that of ``what``."""
    try:
        yield
    except Exception as error:
        if state["saved_student"] != state["step_count"] or is_loss_of_another(error):
            raise
        failures.append(f"{what}: {type(error).__name__}: {reason(error)}")


@partial(ending_together, way_on="The others were ended; the same command fills what is missing.")
def fill(fabric: L.Fabric, run: Run) -> None:
    """Let each teacher read what its cache lacks, one after the other, in each process of a run."""
    splits, caches = open_inputs(fabric, run)
    for part, of in zip(runs_of_teachers(run), caches_of_each(caches), strict=True):
        _fill_one(fabric, part, splits, of)


def _fill_one(fabric: L.Fabric, run: Run, splits: Splits, caches: Caches) -> None:
    """One teacher, which is loaded only if its cache lacks something, and let go of."""
    if run.memory.teacher_role == "cached":
        fabric.print(f"{caches.directory} is full: there is nothing to do.")
        return
    teacher = make_teacher(fabric, run, caches)
    report_accuracy(fabric, run, teacher.model, splits[0], caches)
    report_cost(fabric, run, teacher.model, splits[0])
    # in the micro-batches of a run's first epoch, so that a run with these options finds its own numbers
    sampler, (first, parts) = run.step_sampler(splits[0]), run.teacher.part()
    steps = range(first, sampler.steps_per_epoch, parts)
    steps = [step for step in steps if len(caches.training.absent(sampler.step(0, step)))]
    with StopSignals(quiet=not fabric.is_global_zero) as stop:
        add = partial(_add_to_cache, fabric, teacher, stop)
        step_batches = run.fetch(run.step_batches(fabric, splits[0], caches.training), steps)
        try:
            batches = (step_batch.micro_batches for step_batch in step_batches)
            add(caches.training, "filling the cache", batches, len(steps))
        finally:
            step_batches.stop()
        if len(splits[1]) and first == 0 and stop.agreed(fabric) is None:
            batches = [[batch] for batch in run.validation_batches(fabric, splits[1], caches.validation)]
            add(caches.validation, "validation samples", batches, len(batches))
        caches.flush()
        leave_if_stopped(fabric, stop, "What was computed is kept; the same command goes on from there.")
    what = "all samples" if parts == 1 else f"part {first + 1} of {parts}"
    fabric.print(f"{caches.directory} has {what}: use it with --teacher.cache_dir {caches.directory}")


def _add_to_cache(
    fabric: L.Fabric,
    teacher: Teacher,
    stop: StopSignals,
    cache: TeacherCache,
    what: str,
    step_batches: Iterable[list[MicroBatch]],
    number: int,
) -> None:
    bar = progress_bar(step_batches, total=number, desc=what, unit="step", disable=not fabric.is_global_zero)
    for batches in bar:
        for _ in teacher.hidden_states(batches, cache):
            pass
        if stop.agreed(fabric) is not None:
            break
