"""Results are never replaced, mixed or written into what is read without a word: by any of the commands."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.locks import another_process
from helpers.pages import log
from helpers.ranks import in_processes
from helpers.runs import alice, distil

import litgpt_akl.training.main as main
from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.commands.report_akl import report_akl
from litgpt_akl.config.args import GenerationArgs, TeacherArgs
from litgpt_akl.files.manifest import damage, read_manifest
from litgpt_akl.messages import UserError

TRAIN = {"max_steps": 2, "save_interval": 1}
EVAL = {"max_iters": 1, "initial_validation": False}
OTHER_RATE = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def finished(teacher_dir, student_dir, alice_json, tmp_path_factory) -> Path:
    """A finished run's directory. Do not change it."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    distil(student_dir, teacher_dir, alice_json, out_dir, train=TRAIN, eval=EVAL)
    return out_dir


@pytest.fixture
def out_dir(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def run(teacher_dir, student_dir, alice_json, out_dir) -> Callable:
    """The run of ``finished`` once more, in ``out_dir``."""

    def again(**changes) -> dict[str, torch.Tensor]:
        options = {"train": TRAIN | changes.pop("train", {}), "eval": EVAL, **changes}
        return distil(student_dir, teacher_dir, alice_json, out_dir, **options)

    return again


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is loaded."""
    monkeypatch.setattr(main, "make_state", lambda *arguments: pytest.fail("models were loaded"))


def contents(directory: Path) -> dict[str, bytes]:
    """Of all files, by name."""
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths if path.is_file()}


def steps_in(out_dir: Path) -> list[str]:
    return sorted(path.name for path in out_dir.glob("step-*"))


def without_checkpoints(out_dir: Path) -> None:
    for path in out_dir.glob("step-*"):
        shutil.rmtree(path)


def test_a_finished_run_is_not_run_over(run, out_dir, untrained):
    before = contents(out_dir)
    for change in (lambda directory: None, without_checkpoints):
        change(out_dir)
        with pytest.raises(UserError, match=r"holds a trained student already: .*final.\nGive --overwrite true"):
            run()
    assert contents(out_dir) == {name: data for name, data in before.items() if not name.startswith("step-")}


def test_overwrite_replaces_what_a_run_wrote_and_nothing_else(run, out_dir, monkeypatch, capsys):
    (out_dir / "notes.txt").write_text("mine")
    shutil.copytree(out_dir / "step-000002", out_dir / "step-of-mine")
    with pytest.raises(UserError, match="step-of-mine, which --resume auto would go on from.*\nMove"):
        run(overwrite=True)
    (out_dir / "step-of-mine").rename(out_dir / "my-step")
    old, make_state = contents(out_dir / "final"), main.make_state

    def make_state_and_look(*arguments):
        assert contents(out_dir / "final") == old and not steps_in(out_dir)
        return make_state(*arguments)

    monkeypatch.setattr(main, "make_state", make_state_and_look)
    run(overwrite=True, optimizer=OTHER_RATE)
    assert "--overwrite true: removed step-000001, step-000002 in" in capsys.readouterr().out
    assert (out_dir / "notes.txt").read_text() == "mine" and (out_dir / "my-step").is_dir()
    assert damage(out_dir / "final") is None and contents(out_dir / "final")["lit_model.pth"] != old["lit_model.pth"]
    assert steps_in(out_dir) == ["step-000001", "step-000002"]
    assert "overwrite:" not in (out_dir / "hyperparameters.yaml").read_text()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_finished_run_is_left_as_it_is(run, out_dir, untrained, capsys, resume):
    if resume == "auto":
        without_checkpoints(out_dir)
    # evaluated it was, too
    (out_dir / "final" / "evaluate_akl").mkdir()
    (out_dir / "final" / "evaluate_akl" / "evaluation.json").write_text("{}")
    before = contents(out_dir)
    run(resume=resume)
    assert f"{out_dir} is already finished: nothing is trained" in capsys.readouterr().out
    assert contents(out_dir) == before


def cut_weights(out_dir: Path) -> None:
    os.truncate(out_dir / "final" / "lit_model.pth", 5000)


def without_manifest(out_dir: Path) -> None:
    without_checkpoints(out_dir)
    (out_dir / "final" / "manifest.json").unlink()


NOT_THIS_RUNS = {
    "another recipe": (without_checkpoints, {"optimizer": OTHER_RATE}, "is of another run .*lr .*no step-"),
    "a longer run": (without_checkpoints, {"train": {"max_steps": 3}, "accept_changes": True}, "for 2 steps, .* has 3"),
    "damage": (cut_weights, {}, r"finished, but not as .*lit_model.pth has 5,000 bytes"),
    "a student of an older version": (without_manifest, {}, r"not known how far .*no manifest.json"),
    "a step before the end": (lambda out_dir: None, {"resume": "step-000002"}, "after all 2 steps already"),
    "its own student": (
        lambda out_dir: None,
        {"resume": "final"},
        "is not a whole checkpoint .it is a student without the state",
    ),
}


@pytest.mark.parametrize("case", NOT_THIS_RUNS)
def test_what_going_on_would_lose_is_named(run, out_dir, untrained, case):
    change, options, message = NOT_THIS_RUNS[case]
    change(out_dir)
    before = contents(out_dir / "final")
    resume = options.get("resume", "auto")
    options = options | {"resume": resume if resume == "auto" else out_dir / resume}
    with pytest.raises(UserError, match=message) as raised:
        run(**options)
    assert len(str(raised.value).splitlines()) == 2 and contents(out_dir / "final") == before


def test_a_longer_run_goes_on_from_the_last_checkpoint(run, out_dir, capsys):
    run(resume="auto", accept_changes=True, train={"max_steps": 3})
    assert "step 2\n" in capsys.readouterr().out
    manifest = read_manifest(out_dir / "final")
    assert (manifest["step"], manifest["steps"]) == (3, 3)


def test_a_run_that_was_overwriting_is_gone_on_with(run, out_dir, monkeypatch):
    """The student that is still there is not taken for its own."""
    anew = {"optimizer": OTHER_RATE}
    monkeypatch.setattr("litgpt_akl.training.loop.save_final", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(overwrite=True, **anew)
    assert steps_in(out_dir) == ["step-000001"]
    monkeypatch.undo()
    weights = run(resume="auto", **anew)
    expected = run(overwrite=True, **anew)
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_overwrite_and_resume(run, out_dir, capsys):
    for resume in (True, "auto"):
        with pytest.raises(UserError, match="--overwrite true begins anew, and --resume"):
            run(overwrite=True, resume=resume)
    with pytest.raises(UserError, match="--overwrite true has no effect with --teacher.cache_mode fill; remove it"):
        run(overwrite=True, teacher=TeacherArgs(cache_dir=str(out_dir / "cache"), cache_mode="fill"))
    before = contents(out_dir / "final")
    run(overwrite=True, resume=out_dir / "step-000001")
    assert "removed step-000002" in capsys.readouterr().out
    assert contents(out_dir / "final")["lit_model.pth"] == before["lit_model.pth"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("final", "a file"),
        ("final/notes.txt", "mine"),
        ("final/evaluate_akl/evaluation.json", "{}"),
        ("report.html", "<html>another page</html>"),
        ("examples.json", "[1, 2]"),
        ("hyperparameters.yaml", "epochs: 3"),
        ("logs", "a file"),
    ],
)
def test_what_no_run_wrote_is_never_replaced(run, out_dir, untrained, name, content):
    if name in ("final", "logs"):
        shutil.rmtree(out_dir / name)
    (out_dir / name).parent.mkdir(exist_ok=True)
    (out_dir / name).write_text(content)
    ways = [{"overwrite": True}]
    if name.startswith("final/"):
        ways.append({"resume": "auto", "accept_changes": True, "train": {"max_steps": 3}})
    for options in ways:
        with pytest.raises(UserError, match=f"{name.split('/')[0]}.* would be lost"):
            run(**options)
    assert (out_dir / name).read_text() == content


def test_a_run_does_not_write_into_what_it_reads(
    run, out_dir, student_dir, teacher_dir, alice_json, untrained, tmp_path
):
    own = {name: shutil.copytree(path, tmp_path / name) for name, path in {"s": student_dir, "t": teacher_dir}.items()}
    (tmp_path / "link").symlink_to(own["t"])
    before = contents(tmp_path)
    cases = [
        (own["s"], own["s"], {}, "is the student's own directory"),
        (own["s"], own["t"] / "runs" / "1", {}, "lies in the teacher's directory"),
        (own["s"], tmp_path / "link" / "runs", {}, "lies in the teacher's directory"),
        (out_dir / "final", out_dir, {"overwrite": True}, "the run replaces .*final, and the student is read from"),
        (out_dir / "step-000001", out_dir, {"overwrite": True}, "the run replaces .*step-000001, and the student"),
    ]
    for student, place, options, message in cases:
        with pytest.raises(UserError, match=message):
            distil(student, own["t"], alice_json, place, train=TRAIN, **options)
    for directory, options, message in (
        (own["t"], {}, "--teacher.cache_dir .* is the teacher's own directory"),
        (own["s"] / "cache", {"cache_mode": "fill"}, "--teacher.cache_dir .* lies in the student's directory"),
        (out_dir / "final" / "cache", {}, "--teacher.cache_dir .* lies in .*final, which the run replaces"),
        (out_dir / "step-000007", {}, "--teacher.cache_dir .* lies in .*step-000007, which the run replaces"),
    ):
        with pytest.raises(UserError, match=message):
            teacher = TeacherArgs(cache_dir=str(directory), **options)
            distil(own["s"], own["t"], alice_json, out_dir, teacher=teacher, overwrite=not options, train=TRAIN)
    assert contents(tmp_path) == before


def put_file(target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    target.write_text("mine")


COMMANDS: dict[str, Callable] = {
    "finetune_akl": lambda place, given, **options: distil(
        given["student"], given["teacher"], given["data"], place, train=TRAIN, eval=EVAL, **options
    ),
    "make_student": lambda place, given, **options: make_student(given["teacher"], place, layers=1, **options),
    "export_hf": lambda place, given, **options: export_hf(given["student"], place, **options),
    "evaluate_akl": lambda place, given, **options: evaluate_akl(
        given["student"],
        teacher_checkpoint_dir=given["teacher"],
        data=alice(given["data"]),
        out_dir=place,
        max_records=2,
        generation=GenerationArgs(seeds=[]),
        **options,
    ),
    "report_akl": lambda place, given, **options: report_akl([given["run"]], out=place, **options),
}
"""Each writes to a place, from what is given."""
TABLE = {
    # finished already; a foreign file in the place; what is read; held by another process
    "finetune_akl": (
        "--overwrite true",
        "is a file|cannot be made",
        "is the student's own directory",
        "is writing there",
    ),
    "make_student": ("is not empty", "is a file", "is the teacher's own directory", "is writing there"),
    "export_hf": ("is not empty", "is a file", "is the model's own directory", "is writing there"),
    "evaluate_akl": ("--overwrite true", "cannot be made", "is the student's own directory", "is writing there"),
    # a page is written in one moment: a new one takes the place of an old one, and two at once leave a whole one
    "report_akl": (None, "--overwrite true", "is a file of the run", None),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_to_replace(command, student_dir, teacher_dir, alice_json, tmp_path):
    given = {"student": student_dir, "teacher": teacher_dir, "run": tmp_path / "logged", "data": alice_json}
    for role in ("student", "teacher"):
        given[role] = shutil.copytree(given[role], tmp_path / role)
    log(given["run"], "step,loss\n1,2\n2,1\n")
    write, (finished, foreign, read, held) = COMMANDS[command], TABLE[command]
    # a file that is read, for the one command that writes a file
    inputs = {"make_student": given["teacher"], "report_akl": next(given["run"].rglob("metrics.csv"))}
    if command == "report_akl":
        (tmp_path / "out").mkdir()

    def refused(place: Path, message: str, **options) -> None:
        before = contents(tmp_path)
        with pytest.raises(UserError, match=message) as raised:
            write(place, given, **options)
        assert contents(tmp_path) == before and len(str(raised.value).splitlines()) <= 2

    overwrite = {"overwrite": True} if command in ("finetune_akl", "evaluate_akl", "report_akl") else {}
    place = tmp_path / "out" / "result"
    if held:
        with another_process(place, beside=command in ("make_student", "export_hf")):
            refused(place, held)
    write(place, given)
    if finished:
        refused(place, finished)
    if overwrite or not finished:
        write(place, given, **overwrite)
    put_file(tmp_path / "file")
    refused(tmp_path / "file", foreign)
    refused(inputs.get(command, given["student"]), read, **overwrite)
    assert not list(tmp_path.rglob("*.akl.lock"))


def test_two_at_once_make_one_student(teacher_dir, tmp_path):
    """The slower one neither deletes what the quicker one writes nor replaces it."""
    place = tmp_path / "student"
    with another_process(place, beside=True):
        with pytest.raises(UserError, match="is writing there"):
            make_student(teacher_dir, place, layers=1)
        with pytest.raises(UserError, match="is writing there"):
            export_hf(teacher_dir, place)
    make_student(teacher_dir, place, layers=1)
    assert json.loads((place / "config.json").read_text())["num_hidden_layers"] == 1


def go_on_in_processes(*arguments) -> None:
    torch.set_num_threads(1)
    main.make_state = lambda *arguments: pytest.fail("models were loaded")
    distil(*arguments, devices=2, train=TRAIN, eval=EVAL, resume="auto")


def test_all_processes_know_that_a_run_is_finished(student_dir, teacher_dir, alice_json, out_dir):
    before = contents(out_dir)
    in_processes(2, go_on_in_processes, student_dir, teacher_dir, alice_json, out_dir)
    assert contents(out_dir) == before
