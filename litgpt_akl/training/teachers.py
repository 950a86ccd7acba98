"""A run of several teachers: what it is with each of them alone, their caches, and how they are set up together."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import lightning as L

from litgpt_akl.config.teachers import shares
from litgpt_akl.teacher.cache import Caches
from litgpt_akl.teacher.several import SeveralCaches, SeveralTeachers
from litgpt_akl.teacher.teacher import Teacher
from litgpt_akl.training.run import Run, Splits


def runs_of_teachers(run: Run) -> list[Run]:
    """A run with each of its teachers alone; the run itself, if it has one."""
    if not run.pair.others:
        return [run]
    parts = zip(run.args_of_teachers, run.pair.of_each, run.memory.of_each, strict=True)
    return [
        replace(run, teachers=None, teacher_checkpoint_dir=pair.teacher_dir, teacher=args, pair=pair, memory=memory)
        for args, pair, memory in parts
    ]


def open_caches_of(
    fabric: L.Fabric, run: Run, splits: Splits, open_one: Callable[[L.Fabric, Run, Splits], tuple[Caches, str]]
) -> tuple[Caches | SeveralCaches, str]:
    """The cache of each teacher that has one, by ``open_one``, and in process 0 what they hold, in words.

    Which teachers are all cached is noted in the run's estimate of memory.
    """
    parts, found = runs_of_teachers(run), []
    for part in parts:
        found.append((Caches(), "") if part.teacher.cache_dir is None else open_one(fabric, part, splits))
    caches, told = [of[0] for of in found], "\n".join(filter(None, (of[1] for of in found)))
    if not run.pair.others:
        return caches[0], told
    run.memory = run.memory.with_roles([part.memory.teacher_role for part in parts])
    return SeveralCaches(caches), told


def caches_of_each(caches: Caches | SeveralCaches) -> Sequence[Caches]:
    """The caches of each teacher."""
    return caches.of_each if isinstance(caches, SeveralCaches) else [caches]


def make_teachers(
    fabric: L.Fabric,
    run: Run,
    caches: Caches | SeveralCaches,
    make_one: Callable[[L.Fabric, Run, Caches], Teacher],
) -> Teacher | SeveralTeachers:
    """The teacher, or all of several, each by ``make_one``."""
    parts = zip(runs_of_teachers(run), caches_of_each(caches), strict=True)
    teachers = [make_one(fabric, part, of) for part, of in parts]
    return SeveralTeachers(teachers, shares(run.teachers)) if run.pair.others else teachers[0]


def of_each_teacher(
    run: Run, teacher: Teacher | SeveralTeachers, caches: Caches | SeveralCaches
) -> tuple[Sequence[Run], Sequence[Teacher], Sequence[Caches]]:
    """What a run has of each teacher: the run with it alone, itself, and its caches."""
    teachers = teacher.of_each if isinstance(teacher, SeveralTeachers) else [teacher]
    return runs_of_teachers(run), teachers, caches_of_each(caches)
