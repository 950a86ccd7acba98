"""What is there when a run fails: after its last step the student, before that most of the way."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.ranks import in_processes
from helpers.runs import distil

import litgpt_akl.training.loop as loop
import litgpt_akl.training.main as main
import litgpt_akl.training.reporting as reporting
from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.report_akl import report_akl
from litgpt_akl.files.manifest import damage, read_manifest
from litgpt_akl.messages import UserError
from litgpt_akl.models.parallel import rank
from litgpt_akl.training.logging import Progress

STEPS = 2
OPTIONS = {"train": {"max_steps": STEPS}, "eval": {"max_iters": 1, "max_new_tokens": 2, "initial_validation": False}}


def fail(*arguments, **options) -> None:
    raise RuntimeError("made to fail")


def after_validation(do: Callable[[Path], None]) -> Callable:
    """A validation that is followed by ``do(out_dir)`` after the last step."""

    def change(patch: pytest.MonkeyPatch, out_dir: Path) -> None:
        validate = reporting.validate

        def validate_and_do(fabric, run, state, *arguments):
            found = validate(fabric, run, state, *arguments)
            if state["step_count"] == STEPS:
                do(out_dir)
            return found

        patch.setattr(reporting, "validate", validate_and_do)

    return change


def taken_by_a_directory(name: str) -> Callable:
    def put(out_dir: Path) -> None:
        (out_dir / name).unlink(missing_ok=True)
        (out_dir / name).mkdir()

    return after_validation(put)


def failing_export(patch: pytest.MonkeyPatch, out_dir: Path) -> None:
    patch.setattr(main, "write_export", fail)


def failing_examples(patch: pytest.MonkeyPatch, out_dir: Path) -> None:
    keep = reporting.keep_examples
    patch.setattr(reporting, "keep_examples", lambda *of: fail() if of[2]["step_count"] == STEPS else keep(*of))


def failing_file_of_examples(patch: pytest.MonkeyPatch, out_dir: Path) -> None:
    def fail_to_write(*arguments) -> None:
        raise OSError("made to fail")

    patch.setattr("litgpt_akl.training.examples.write_examples", fail_to_write)


def fail_to_log(patch: pytest.MonkeyPatch, step: int) -> None:
    """As a logger without a connection fails, after a step and before it is saved."""
    log = Progress.log
    patch.setattr(Progress, "log", lambda *given: fail() if given[1]["step_count"] == step else log(*given))


def failing_log(patch: pytest.MonkeyPatch, out_dir: Path) -> None:
    fail_to_log(patch, STEPS)


def failing_logger(patch: pytest.MonkeyPatch, out_dir: Path) -> None:
    patch.setattr("lightning.fabric.loggers.CSVLogger.finalize", fail)


AFTERWARDS = {
    "validation": (after_validation(fail), "The last report: RuntimeError: made to fail"),
    "answers": (failing_examples, "The last report: RuntimeError: made to fail"),
    "file of answers": (failing_file_of_examples, "examples.json cannot be written .made to fail"),
    "page": (taken_by_a_directory("report.html"), r"report.html was not refreshed \(IsADirectoryError"),
    "export": (failing_export, "final-hf: RuntimeError: made to fail"),
    "log": (failing_log, "The last step's end: RuntimeError: made to fail"),
    "logger": (failing_logger, "MetricsLogger: RuntimeError: made to fail"),
    "signal": (after_validation(lambda out_dir: os.kill(os.getpid(), signal.SIGTERM)), None),
}


@pytest.fixture(scope="module")
def undisturbed(teacher_dir, student_dir, alice_json, tmp_path_factory) -> dict[str, torch.Tensor]:
    return distil(student_dir, teacher_dir, alice_json, tmp_path_factory.mktemp("undisturbed"), **OPTIONS)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], weight) for name, weight in other.items())


def load(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "lit_model.pth", weights_only=True)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.page) if what == "page" else what for what in AFTERWARDS]
)
def test_a_failure_after_the_last_step_leaves_the_student(
    teacher_dir, student_dir, alice_json, tmp_path, undisturbed, monkeypatch, what
):
    change, message = AFTERWARDS[what]
    out_dir = tmp_path / "run"
    change(monkeypatch, out_dir)
    with pytest.raises((UserError, SystemExit)) as ended:
        distil(student_dir, teacher_dir, alice_json, out_dir, export_hf=what == "export", **OPTIONS)
    assert_equal(load(out_dir / "final"), undisturbed)
    assert damage(out_dir / "final") is None and read_manifest(out_dir / "final")["step"] == STEPS
    if message is None:
        assert ended.value.code == 128 + signal.SIGTERM
        return
    ended.match(f"final is whole, but .*{message}")
    assert len(str(ended.value).splitlines()) == 2
    monkeypatch.undo()
    if what == "export":
        # two of the three ways out; evaluate_akl takes any checkpoint
        report_akl([out_dir], out=tmp_path / "page.html")
        export_hf(out_dir / "final", tmp_path / "exported")


def steps_saved(out_dir: Path) -> dict[int, bool]:
    """Whether only the clock asked for it, by step."""
    manifests = [read_manifest(directory) for directory in sorted(out_dir.glob("step-*"))]
    return {manifest["step"]: manifest["timed"] for manifest in manifests}


def test_a_crash_loses_no_more_than_some_minutes(teacher_dir, student_dir, alice_json, tmp_path, monkeypatch):
    train = {"max_steps": 6, "save_interval": 3}
    arguments = student_dir, teacher_dir, alice_json
    whole = distil(*arguments, tmp_path / "whole", train=train)
    assert steps_saved(tmp_path / "whole") == {3: False, 6: False}
    # every step takes longer than these minutes
    options = {"train": train, "save_minutes": 1e-9, "resume": "auto"}
    for failing, saved in ((3, {2: True}), (5, {3: False, 4: True})):
        with monkeypatch.context() as patch:
            fail_to_log(patch, failing)
            with pytest.raises(RuntimeError, match="made to fail"):
                distil(*arguments, tmp_path / "run", **options)
        assert steps_saved(tmp_path / "run") == saved
    assert_equal(distil(*arguments, tmp_path / "run", **options), whole)
    assert steps_saved(tmp_path / "run") == {3: False, 6: False}


def with_clocks_apart(*arguments) -> None:
    """Process 0 has the fast one, and after a minute there is to be a checkpoint."""
    torch.set_num_threads(1)
    ticks = itertools.count(step=100 if rank() == 0 else 0)
    loop.time = SimpleNamespace(perf_counter=lambda: next(ticks))
    distil(*arguments, devices=2, train={"max_steps": 3}, save_minutes=1.0)


def test_one_clock_decides_for_all_processes(teacher_dir, student_dir, alice_json, tmp_path):
    in_processes(2, with_clocks_apart, student_dir, teacher_dir, alice_json, tmp_path)
    assert steps_saved(tmp_path) == {2: True}
