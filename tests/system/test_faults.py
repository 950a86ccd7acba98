"""Every file that a run reads or writes, and every fault: two lines, or the same result as without it."""

import os
import random
from collections.abc import Sequence
from itertools import product

import pytest
from helpers import material
from helpers.faults import BEFORE, DURING, REFUSALS
from helpers.marks import few_or_many
from helpers.material import KINDS
from helpers.survey import GOOD, Survey, table

pytestmark = pytest.mark.page

CELLS = pytest.mark.parametrize("number", few_or_many("LITGPT_AKL_FAULTS", 4, 12))
"""Of each of the three tables, how many are tried; 10000 are all."""
SEED = int(os.environ.get("LITGPT_AKL_SEED", 0))
"""Which those are."""
WRITERS = {
    "run": material.train_and_save,
    "adapters": material.train_adapters,
    "resumed run": material.resume_in_place,
    "new cache": material.start_cache,
    "cache": material.fill,
    "evaluation": material.evaluate,
    "student": material.halve("student"),
    "export": material.export("student"),
    "report": material.report,
}
MOMENTS = {
    "run": ("out/logs", "out/.step-000002.partial", "out/.final.partial"),
    "adapters": ("out/.step-000001.partial", "out/.final.partial"),
    "new cache": ("out/.final.partial",),
}
"""When something happens: before this is written."""
READ = {
    "run": {"student/*.*": 8, "teacher/*.*": 6, "data/chat.jsonl": 1, "prepared/**/*.*": 2},
    "adapters": {"student/lit_model.pth": 1, "student/*config*": 4, "data/*.json": 3, "datasets/**/*.*": 4},
    "new cache": {"teacher/lit_model.pth": 1, "new-cache/*.*": 2},
}
"""By what works with them, patterns of files, and how many of them there are."""


@pytest.fixture(scope="module")
def survey(teacher_dir, student_dir, alice_json, tmp_path_factory, pytestconfig) -> Survey:
    base, thorough = tmp_path_factory.mktemp("faults"), pytestconfig.option.all
    return Survey(base, teacher_dir, student_dir, alice_json, thorough=thorough)


def check(survey: Survey, number: int, cells: list[tuple], always: Sequence[tuple] = ()) -> None:
    """Try some cells, which are calls of the survey's methods, and a number of others: always the same ones."""
    survey.counts.clear()
    survey.bad.clear()
    chosen = [*always, *random.Random(SEED).sample(cells, min(number, len(cells)))]
    for function, *arguments in chosen:
        function(*arguments)
    print(f"\n{len(chosen)} of {len(cells)} cells\n{table(survey.counts)}")
    assert not survey.bad, "\n\n".join(survey.bad)
    assert survey.counts.total() == len(chosen) and {result for *_, result in survey.counts} <= {*GOOD}


@CELLS
def test_what_is_read(survey, number):
    files = {name: range(len(survey.files(kind))) for name, kind in KINDS.items()}
    cells = [
        (survey.damaged_before, name, place, fault, command)
        for name, kind in KINDS.items()
        for place, fault, command in product(files[name], BEFORE, dict.fromkeys(kind.commands))
    ]
    check(survey, number, cells)


@CELLS
def test_what_changes_meanwhile(survey, number):
    cells = [
        (survey.changed_during, pattern, place, fault, WRITERS[name], moment)
        for name, patterns in READ.items()
        for pattern, files in patterns.items()
        for place, fault, moment in product(range(files), DURING, MOMENTS[name])
    ]
    check(survey, number, cells)


@CELLS
def test_what_cannot_be_written(survey, number):
    cells = []
    for command in WRITERS.values():
        # these are made by the survey itself
        for path in sorted(survey.undamaged(command).written.keys() - {"out", "out/shown"}):
            cells += [(survey.refused_writing, path, how, command) for how in REFUSALS]
            if "*" not in path:
                cells.append((survey.in_the_way, path, command))
    metrics = "out/logs/csv/version_0/metrics.csv"
    always = [(survey.refused_writing, metrics, how, material.train_and_save) for how in REFUSALS]
    moment = MOMENTS["run"][1]
    always += [(survey.changed_during, metrics, 0, fault, material.train_and_save, moment) for fault in ("gone", "cut")]
    check(survey, number, cells, always)
