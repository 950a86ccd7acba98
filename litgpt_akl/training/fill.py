"""A run that only fills a cache: the teacher reads the data, and there is no student."""

from collections.abc import Iterator, Sequence
from functools import partial

import lightning as L

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import MicroBatch
from litgpt_akl.messages import progress_bar
from litgpt_akl.teacher.cache import Caches, TeacherCache
from litgpt_akl.teacher.teacher import Teacher
from litgpt_akl.training.accuracy import report_accuracy
from litgpt_akl.training.beginning import begin
from litgpt_akl.training.launch import StopSignals, ending_together, leave_if_stopped
from litgpt_akl.training.run import Run, load_step_batches, make_step_batches, step_sampler, validation_batches
from litgpt_akl.training.state import make_teacher


@partial(ending_together, way_on="The others were ended; the same command fills what is missing.")
def fill(fabric: L.Fabric, run: Run) -> None:
    """Let the teacher read what a cache lacks, in each process of a run."""
    splits, caches = begin(fabric, run)
    if run.plan.teacher_role == "remembered":
        fabric.print(f"{caches.directory} is full: there is nothing to do.")
        return
    teacher = make_teacher(fabric, run, caches)
    report_accuracy(fabric, run, teacher.model, splits[0], caches)
    with StopSignals(quiet=not fabric.is_global_zero) as stop:
        _fill_training(fabric, run, teacher, splits[0], caches, stop)
        if stop.agreed(fabric) is None:
            _fill_validation(fabric, run, teacher, splits[1], caches, stop)
        caches.flush()
        leave_if_stopped(fabric, stop, "What was computed is kept; the same command goes on from there.")
    first, parts = run.teacher.part()
    what = "all samples" if parts == 1 else f"part {first + 1} of {parts}"
    fabric.print(f"{caches.directory} has {what}: use it with --teacher.cache_dir {caches.directory}")


def _fill_training(
    fabric: L.Fabric, run: Run, teacher: Teacher, dataset: TokenizedDataset, caches: Caches, stop: StopSignals
) -> None:
    """In the micro-batches of a run's first epoch, so that a run with these options finds its own numbers."""
    plan, (first, parts) = step_sampler(run, dataset), run.teacher.part()
    steps = [
        step for step in range(first, plan.steps_per_epoch, parts) if len(caches.training.absent(plan.step(0, step)))
    ]
    step_batches = load_step_batches(run, make_step_batches(fabric, run, dataset, caches.training), steps)
    batches = (step_batch.micro_batches for step_batch in step_batches)
    try:
        _ask(fabric, teacher, batches, len(steps), caches.training, stop, "filling the cache")
    finally:
        step_batches.stop()


def _fill_validation(
    fabric: L.Fabric, run: Run, teacher: Teacher, dataset: TokenizedDataset, caches: Caches, stop: StopSignals
) -> None:
    if len(dataset) and run.teacher.part()[0] == 0:
        batches = [[batch] for batch in validation_batches(fabric, run, dataset, caches.validation)]
        _ask(fabric, teacher, batches, len(batches), caches.validation, stop, "validation samples")


def _ask(
    fabric: L.Fabric,
    teacher: Teacher,
    step_batches: Sequence[list[MicroBatch]] | Iterator[list[MicroBatch]],
    number: int,
    cache: TeacherCache,
    stop: StopSignals,
    what: str,
) -> None:
    bar = progress_bar(step_batches, total=number, desc=what, unit="step", disable=not fabric.is_global_zero)
    for batches in bar:
        for _ in teacher.answers(batches, cache):
            pass
        if stop.agreed(fabric) is not None:
            break
