"""Logs, examples, pages and what they are made of: gone, damaged or of another kind, they never end a run."""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.ranks import in_processes
from helpers.runs import distil

import litgpt_akl.training.reporting as reporting
from litgpt_akl.commands.report_akl import report_akl
from litgpt_akl.files.examples import read_examples, take_examples
from litgpt_akl.files.manifest import damage
from litgpt_akl.files.reading import with_checksum, without_checksum
from litgpt_akl.messages import UserError
from litgpt_akl.report.figures import draw_panels
from litgpt_akl.report.history import read_history
from litgpt_akl.report.page import make_page
from litgpt_akl.report.runs import read_run, read_runs
from litgpt_akl.training.logging import MetricsLogger, SpeakingFabric
from litgpt_akl.training.metrics import ROWS_KEPT

STEPS = 6
OPTIONS = {
    "train": {"max_steps": STEPS, "save_interval": 4, "global_batch_size": 2, "micro_batch_size": 2},
    "eval": {"interval": 1, "max_iters": 1, "max_new_tokens": 2},
}


@pytest.fixture(scope="module")
def finished(teacher_dir, student_dir, alice_json, tmp_path_factory) -> Path:
    """An undisturbed run's directory. Do not change it."""
    out_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    distil(student_dir, teacher_dir, alice_json, out_dir, **OPTIONS)
    return out_dir


@pytest.fixture
def run(teacher_dir, student_dir, alice_json, finished, tmp_path, monkeypatch, capsys) -> Callable:
    """The run of ``finished`` once more, with something done before the validation of some steps."""

    def disturbed(changes: dict[int, Callable[[Path], None]], **options) -> tuple[Path, str]:
        out_dir, validate = tmp_path / "run", reporting.validate

        def change_and_validate(fabric, run, state, *arguments):
            changes.get(state["step_count"], lambda directory: None)(out_dir)
            return validate(fabric, run, state, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(reporting, "validate", change_and_validate)
            weights = distil(student_dir, teacher_dir, alice_json, out_dir, **OPTIONS, **options)
        undisturbed = torch.load(finished / "final" / "lit_model.pth", weights_only=True)
        assert weights.keys() == undisturbed.keys()
        assert all(torch.equal(weights[name], weight) for name, weight in undisturbed.items())
        assert damage(out_dir / "final") is None
        return out_dir, capsys.readouterr().out

    return disturbed


def put_a_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def log_of(out_dir: Path) -> Path:
    return out_dir / "logs" / "csv" / "version_0" / "metrics.csv"


def steps_in(path: Path, column: str = "step") -> list[int]:
    """The steps of the rows that have something in a column."""
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row[column]]


def make_logger(base: Path) -> tuple[MetricsLogger, Path]:
    logger = MetricsLogger(base / "logs", name="csv")
    return logger, logger.experiment.path


def log(logger: MetricsLogger, steps: range, **more: float) -> None:
    for step in steps:
        logger.log_metrics({"loss": 0.5, **more}, step)
    logger.save()


@contextlib.contextmanager
def no_room(path: Path) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # in the middle of a row
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def not_to_be_written(path: Path) -> Iterator[None]:
    modes = {name: name.stat().st_mode for name in (path, path.parent)}
    user = os.geteuid()
    for name in modes:
        name.chmod(0o500)
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)
    for name, mode in modes.items():
        name.chmod(mode)


@contextlib.contextmanager
def a_directory(path: Path) -> Iterator[None]:
    kept = path.rename(path.with_name("kept"))
    path.mkdir()
    yield
    path.rmdir()
    kept.rename(path)


@contextlib.contextmanager
def a_pipe(path: Path) -> Iterator[None]:
    kept = path.rename(path.with_name("kept"))
    os.mkfifo(path)
    yield
    path.unlink()
    kept.rename(path)


@contextlib.contextmanager
def a_file_for_its_folder(path: Path) -> Iterator[None]:
    kept = path.parent.rename(path.parent.with_name("kept"))
    path.parent.write_text("")
    yield
    path.parent.unlink()
    kept.rename(path.parent)


@pytest.mark.parametrize("when", [no_room, not_to_be_written, a_directory, a_pipe, a_file_for_its_folder])
@pytest.mark.parametrize("more", [{}, {"val_loss": 1.0}], ids=["rows", "a column"])
def test_rows_wait_until_they_can_be_written(tmp_path, capsys, when, more):
    logger, path = make_logger(tmp_path)
    log(logger, range(10))
    before = path.read_bytes()
    with when(path):
        for step in range(10, 20):
            log(logger, range(step, step + 1), **more)
    assert path.read_bytes() == before
    told = capsys.readouterr().out
    assert told.startswith(f"{path} cannot be written (") and len(told.splitlines()) == 1
    log(logger, range(20, 22))
    logger.finalize("success")
    assert steps_in(path) == [*range(22)] and os.listdir(path.parent) == ["metrics.csv"]
    assert steps_in(path, [*more, "loss"][0]) == [*range(10, 20)] if more else [*range(22)]
    assert capsys.readouterr().out == ""


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


CHANGES = {
    "gone": (lambda path: path.unlink(), "is gone, with the rows in it", [*range(10, 20)], []),
    "folder": (lambda path: shutil.rmtree(path.parents[2]), "is gone, with the rows in it", [*range(10, 20)], []),
    "empty": (lambda path: path.write_text(""), "was emptied", [*range(10, 20)], []),
    "cut": (cut, "was cut", [*range(9), *range(10, 20)], []),
    "other": (lambda path: path.write_text("a,b\n1,2\n"), "renamed to metrics.csv.other", [*range(10, 20)], ["other"]),
    "binary": (lambda path: path.write_bytes(bytes(9)), "renamed to metrics.csv.other", [*range(10, 20)], ["other"]),
    "UTF-16": (
        lambda path: path.write_text(path.read_text(), encoding="utf-16"),
        "renamed to metrics.csv.other",
        [*range(10, 20)],
        ["other"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("more", [{}, {"val_loss": 1.0}], ids=["rows", "a column"])
def test_a_log_goes_on_after_something_has_changed_it(tmp_path, capsys, name, more):
    change, what, steps, others = CHANGES[name]
    logger, path = make_logger(tmp_path)
    log(logger, range(10))
    change(path)
    for step in range(10, 20):
        log(logger, range(step, step + 1), **more)
    logger.finalize("success")
    told = capsys.readouterr().out
    assert told.startswith(f"{path} ") and what in told and len(told.splitlines()) == 1
    assert steps_in(path) == steps
    assert sorted(os.listdir(path.parent)) == ["metrics.csv", *(f"metrics.csv.{other}" for other in others)]


def test_rows_that_wait_take_bounded_memory(tmp_path, capsys):
    logger, path = make_logger(tmp_path)
    path.mkdir(parents=True)
    log(logger, range(ROWS_KEPT + 7))
    logger.finalize("success")
    assert len(logger.experiment.metrics) == ROWS_KEPT
    assert f"lacks {ROWS_KEPT + 7:,} rows" in capsys.readouterr().out
    path.rmdir()
    logger.finalize("success")
    assert steps_in(path) == [*range(7, ROWS_KEPT + 7)]
    assert "lacks 7 rows" in capsys.readouterr().out


def test_a_log_takes_a_number_that_nothing_has(tmp_path):
    versions = tmp_path / "logs" / "csv"
    for name, number in (("version_0.bak", 1), ("version_x", 1), ("version_\u00b2", 1), ("version_3_old", 4)):
        (versions / name).mkdir(parents=True)
        assert make_logger(tmp_path)[1].parent.name == f"version_{number}"
    (versions / "version_7").write_text("")
    logger, path = make_logger(tmp_path)
    log(logger, range(2))
    assert path == versions / "version_8" / "metrics.csv" and steps_in(path) == [0, 1]


class FailingLogger(MetricsLogger):
    """As one whose server is gone."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if step >= self.fails_from:
            raise ConnectionError("no server")


def test_a_logger_that_fails_later_is_told_of_once(tmp_path, capsys):
    loggers = FailingLogger(tmp_path / "other"), MetricsLogger(tmp_path / "logs", name="csv")
    fabric = SpeakingFabric(devices=1, accelerator="cpu", loggers=[*loggers])
    loggers[0].fails_from = 3
    for step in range(6):
        fabric.log_dict({"loss": 1.0}, step=step)
    loggers[1].save()
    assert capsys.readouterr().out == "FailingLogger fails (no server): what follows may be missing there.\n"
    assert steps_in(loggers[1].experiment.path) == [*range(6)]
    fabric = SpeakingFabric(devices=1, accelerator="cpu", loggers=[loggers[0]])
    with pytest.raises(ConnectionError):
        fabric.log_dict({"loss": 1.0}, step=3)


@pytest.mark.page
def test_a_run_goes_on_whatever_becomes_of_its_log(run):
    def clear(out_dir: Path) -> None:
        log_of(out_dir).rmdir()

    changes = {
        1: lambda out_dir: shutil.rmtree(out_dir / "logs"),
        2: lambda out_dir: put_a_directory(log_of(out_dir)),
        4: clear,
        5: lambda out_dir: log_of(out_dir).write_text("a,b\n1,2\n"),
    }
    out_dir, told = run(changes)
    assert told.count("metrics.csv is gone, with the rows in it") == 1
    assert told.count("metrics.csv cannot be written (something else has its name)") == 1
    assert told.count("is renamed to metrics.csv.other") == 1 and told.count("metrics.csv ") == 3
    assert steps_in(log_of(out_dir)) == [5, 6, 6] and (out_dir / "report.html").is_file()


def test_a_run_without_any_log_ends_well(run):
    out_dir, told = run({1: lambda out_dir: put_a_directory(log_of(out_dir))})
    waiting = STEPS - 1 + STEPS
    assert told.count("metrics.csv cannot be written") == told.count(f"metrics.csv lacks {waiting} rows") == 1


def distil_without_room(student: Path, teacher: Path, data: Path, out_dir: Path, limited: range) -> None:
    validate = reporting.validate

    def limit_and_validate(fabric, run, state, *arguments):
        path = log_of(out_dir)
        if state["step_count"] in limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, resource.RLIM_INFINITY))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return validate(fabric, run, state, *arguments)

    reporting.validate, said = limit_and_validate, io.StringIO()
    # files that pytest keeps have the same limit
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        distil(student, teacher, data, out_dir, **OPTIONS)
    (out_dir / "said").write_text(said.getvalue())


def test_a_run_whose_disk_is_full_for_a_while_lacks_nothing(teacher_dir, student_dir, alice_json, finished, tmp_path):
    in_processes(1, distil_without_room, student_dir, teacher_dir, alice_json, tmp_path, range(2, 4))
    assert (tmp_path / "said").read_text().count("metrics.csv cannot be written (File too large)") == 1
    assert steps_in(log_of(tmp_path)) == steps_in(log_of(finished))
    weights = [directory / "final" / "lit_model.pth" for directory in (tmp_path, finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes() and damage(tmp_path / "final") is None


def put(content: bytes | str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def put_changed(*keys: str | int, value: object) -> Callable[[Path], None]:
    """Another value at a place of the examples; their checksum is right."""

    def change(path: Path) -> None:
        content = place = without_checksum(json.loads(path.read_text()))
        for key in keys[:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        path.write_text(json.dumps(with_checksum(content)))

    return change


def put_a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def put_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


POSITION = ("latest", "positions", 0)
OTHER_EXAMPLES = {
    "empty": put(""),
    "a list": put("[1, 2]"),
    "a number": put("3"),
    "null": put("null"),
    "a text": put('"first"'),
    "nothing in it": put("{}"),
    "too deep": put("[" * 100_000),
    "not UTF-8": put(b'{"first": "\xff\xfe"}'),
    "UTF-16": lambda path: path.write_text(path.read_text(), encoding="utf-16"),
    "binary": put(bytes(range(256))),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a changed text": lambda path: path.write_text(path.read_text().replace('"note": ""', '"note": "x"', 1)),
    "a directory": put_a_directory,
    "a link": put_a_link_to_nothing,
    "a pipe": put_a_pipe,
    "snapshots of numbers": put('{"first": 1, "latest": 2}'),
    "steps alone": put('{"first": {"step": 3}, "latest": {"step": 3}}'),
    "a step in words": put_changed("first", "step", value="three"),
    "no answers": put_changed("latest", "answers", value=None),
    "an answer of words": put_changed("latest", "answers", 1, value="one"),
    "an answer without a prompt": put_changed("latest", "answers", 1, "prompt", value=None),
    "an answer of numbers": put_changed("latest", "answers", 1, "student", value=[1, 2]),
    "answers in a mapping": put_changed("latest", "answers", value={"a": 1}),
    "a teacher of words": put_changed("first", "answers", 0, "teacher", value="abc"),
    "a teacher's ids in words": put_changed("first", "answers", 0, "teacher", "ids", value=["abc"]),
    "a text without its rest": put_changed("first", "answers", 0, "recorded", "rest", value=None),
    "a token that is no text": put_changed("latest", "answers", 0, "recorded", "tokens", 0, 0, value=5),
    "a token without a view": put_changed("latest", "answers", 0, "recorded", "tokens", 0, value=["a", 0.5]),
    "a negative KL": put_changed("latest", "answers", 0, "recorded", "tokens", 0, 1, value=-0.5),
    "a likely token in words": put_changed("latest", "answers", 0, "recorded", "tokens", 0, 2, 0, 1, value="much"),
    "steps in words": put_changed("latest", "run", "steps", value="many"),
    "no positions": put_changed("first", "positions", value=None),
    "positions of numbers": put_changed("first", "positions", value=[1, 2]),
    "no head": put_changed(*POSITION, "head", value=None),
    "a head in words": put_changed(*POSITION, "head", value="one"),
    "a token that is a number": put_changed(*POSITION, "tokens", 0, value=5),
    "fewer tokens": put_changed(*POSITION, "tokens", value=["a"]),
    "a probability in words": put_changed(*POSITION, "q", 0, value="much"),
    "a negative probability": put_changed(*POSITION, "p", 0, value=-0.5),
    "a huge gap": put_changed(*POSITION, "head_gap", value=1e300),
    "a sample of numbers": put_changed("latest", "sample", "texts", value=3),
    "a sample without a place": put_changed("first", "sample", "place", value=None),
    "a part that is no pair": put_changed("latest", "sample", "parts", 0, value="text"),
    "a mark in words": put_changed("latest", "sample", "parts", 0, 0, value="yes"),
    "a note of numbers": put_changed("latest", "note", value=[3]),
}


@pytest.mark.parametrize("name", OTHER_EXAMPLES)
def test_what_are_no_examples_is_set_aside(finished, tmp_path, name):
    path, told = tmp_path / "examples.json", []
    for number in ("", "1"):
        shutil.copyfile(finished / "examples.json", path)
        assert take_examples(tmp_path, True, told.append) == read_examples(finished) and not told
        OTHER_EXAMPLES[name](path)
        content = path.read_bytes() if path.is_file() else None
        assert take_examples(tmp_path, True, told.append) is None
        other = path.with_name(f"examples.json.other{number}")
        assert not os.path.lexists(path) and os.path.lexists(other)
        assert content is None or other.read_bytes() == content
        (line,) = told
        assert line.startswith(f"{path} ") and f"renamed to {other.name}, and new examples begin" in line
        assert "\n" not in line
        told.clear()
    assert take_examples(tmp_path, True, told.append) is None and told == [f"{path} is gone: new examples begin."]
    assert take_examples(tmp_path, False, told.append) is None and len(told) == 1


def test_a_run_goes_on_whatever_becomes_of_its_examples(run):
    changes = dict(
        enumerate(OTHER_EXAMPLES[name] for name in ("a list", "steps alone", "a directory", "no head", "not UTF-8"))
    )
    changes = {step + 1: lambda out_dir, do=do: do(out_dir / "examples.json") for step, do in changes.items()}
    changes[STEPS] = lambda out_dir: (out_dir / "examples.json").unlink()
    out_dir, told = run(changes)
    assert told.count("and new examples begin") == 5 and told.count("examples.json is gone") == 1
    assert sorted(path.name for path in out_dir.glob("*.other*")) == [
        f"examples.json.other{number}" for number in ("", *range(1, 5))
    ]
    assert {name: snapshot["step"] for name, snapshot in read_examples(out_dir).items()} == {
        "first": STEPS,
        "latest": STEPS,
    }


@pytest.mark.page
def test_a_run_is_resumed_whatever_lies_beside_its_checkpoints(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("hyperparameters.yaml", "report.html", "examples.json"):
        put("[1, 2]")(tmp_path / "run" / name)
    shutil.rmtree(tmp_path / "run" / "final")
    out_dir, told = run({}, resume="auto")
    for name in ("hyperparameters.yaml", "report.html", "examples.json"):
        assert told.count(f"{name} is not what this run has written: it is renamed to {name}.other") == 1
        assert (out_dir / f"{name}.other").read_text() == "[1, 2]" and (out_dir / name).read_text() != "[1, 2]"


def rewrite(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    return lambda path: path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def in_encoding(name: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text(), encoding=name)


def change_column(name: str, value: Callable[[int, str], str]) -> Callable[[Path], None]:
    """Other cells in a column, by row number and cell."""

    def change(path: Path) -> None:
        header, *rows = csv.reader(path.read_text().splitlines())
        place = header.index(name)
        rows = [[*row[:place], value(number, row[place]), *row[place + 1 :]] for number, row in enumerate(rows)]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    return change


def double_columns(path: Path) -> None:
    rewrite(lambda lines: [f"{line.rstrip()},{line}" for line in lines])(path)


DAY = "2026-11-27"
DAMAGED_LOGS = {
    "columns doubled": (double_columns, "columns named twice", 13),
    "dates": (change_column("loss", lambda row, cell: cell and DAY), "6 cells that are no numbers", 13),
    "words": (change_column("loss", lambda row, cell: cell and "much"), "6 cells that are no numbers", 13),
    "truth": (change_column("loss", lambda row, cell: cell and "true"), "6 cells that are no numbers", 13),
    "a word": (change_column("h", lambda row, cell: "x" if row == 4 else cell), "1 cells that are no", 13),
    "a date among the steps": (
        change_column("step", lambda row, cell: DAY if row == 4 else cell),
        "1 rows without",
        12,
    ),
    "a huge step": (change_column("step", lambda row, cell: "1e300" if row == 4 else cell), "1 rows without", 12),
    "steps in halves": (change_column("step", lambda row, cell: f"{cell}.5" if row == 4 else cell), "1 rows", 12),
    "a huge number": (change_column("loss", lambda row, cell: cell and "1e300"), None, 13),
    "no tokens": (change_column("tokens", lambda row, cell: ""), None, 13),
    "UTF-16": (in_encoding("utf-16"), "it is read as UTF-16", 13),
    "UTF-16 without a mark": (in_encoding("utf-16-be"), "it is read as UTF-16", 13),
    "UTF-32": (in_encoding("utf-32"), "it is read as UTF-32", 13),
    "a mark": (in_encoding("utf-8-sig"), None, 13),
    "ragged": (rewrite(lambda lines: [*lines[:4], "1,2\n", *lines[4:], "1,2,3\n"]), "2 rows of another length", 13),
    "cut in a row": (lambda path: os.truncate(path, path.stat().st_size - 40), None, 12),
    "NUL": (rewrite(lambda lines: [*lines[:4], lines[4].replace(".", "\0", 1), *lines[5:]]), "1 cells", 13),
    "ends in NUL": (lambda path: path.write_bytes(path.read_bytes() + bytes(4096)), None, 13),
    "ends in one long line": (
        lambda path: path.write_bytes(path.read_bytes() + b'"' + b"x" * 10**6 + b"\n"),
        "no table",
        13,
    ),
    "not UTF-8": (lambda path: path.write_bytes(path.read_bytes() + b"\xff\xfe,1\n"), "1 rows of another", 13),
}


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The files of a run that a page is made of."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("step-*", "final"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DAMAGED_LOGS)
def test_what_is_left_of_a_log_is_shown(finished, copy, name):
    damage_log, what, rows = DAMAGED_LOGS[name]
    damage_log(log_of(copy))
    told = []
    shown = read_run(copy, told.append)
    assert len(told) == (what is not None)
    assert not told or (told[0].startswith(f"{log_of(copy)} was damaged: ") and what in told[0] and "\n" not in told[0])
    assert sum(len(columns["step"]) for columns in (shown.history.training, shown.history.validation)) == rows
    assert shown.examples == read_examples(finished)
    # no number is another one than was logged
    logged, training = read_history(finished).training, shown.history.training
    for column in ("loss", "h", "gradient_norm", "learning_rate"):
        for step, value in zip(training["step"], training[column], strict=True):
            assert not np.isfinite(value) or value == logged[column][logged["step"] == step]
    if name in ("columns doubled", "words", "no tokens"):
        assert "0.5 akl + 0.5 cross-entropy" in make_page([shown])
        assert len(draw_panels([shown.history])) == 12


LOST_LOGS = {
    "empty": put(""),
    "spaces": put("  \n\n"),
    "a header": rewrite(lambda lines: lines[:1]),
    "binary": put(bytes(range(256)) * 4),
    "NUL": put(bytes(4096)),
    "another table": put("day,price\nMonday,3\n"),
    "no step": rewrite(lambda lines: [lines[0].replace("step,", "stop,"), *lines[1:]]),
    "words alone": put("step,loss\n1,much\n2,little\n"),
    "a directory": put_a_directory,
    "a link": put_a_link_to_nothing,
    "a pipe": put_a_pipe,
    "gone": Path.unlink,
    "folder gone": lambda path: shutil.rmtree(path.parent),
    "logs gone": lambda path: shutil.rmtree(path.parents[2]),
    "a file for the folder": lambda path: (shutil.rmtree(path.parents[1]), path.parents[1].write_text("")),
}


@pytest.mark.parametrize("name", LOST_LOGS)
def test_a_run_without_a_log_shows_its_examples(finished, copy, name):
    LOST_LOGS[name](log_of(copy))
    told = []
    shown = read_run(copy, told.append)
    assert len(told) == 1 and told[0].startswith(str(copy)) and "without metrics of this run" in told[0]
    assert shown.examples == read_examples(finished)
    (copy / "examples.json").unlink()
    told.clear()
    with pytest.raises(UserError) as alone:
        read_runs([copy], told.append)
    assert len(str(alone.value).splitlines()) == 2 and not told
    assert [*read_runs([copy, finished], told.append)] == [finished]
    assert len(told) == 1 and told[0].startswith(str(copy)) and told[0].endswith("This run is left out.")


@pytest.mark.parametrize("name", LOST_LOGS)
def test_an_older_log_is_shown_in_place_of_a_lost_one(copy, name):
    if name in ("logs gone", "a file for the folder"):
        return
    newer = log_of(copy).parent.with_name("version_10") / "metrics.csv"
    shutil.copytree(log_of(copy).parent, newer.parent)
    LOST_LOGS[name](newer)
    told = []
    assert len(read_run(copy, told.append).history.training["step"]) == STEPS
    assert len(told) == (name != "folder gone") and all(
        f"An older log is shown: {log_of(copy)}" in line for line in told
    )


def test_what_is_no_log_of_a_run_is_skipped(copy):
    versions = log_of(copy).parents[1]
    for name in ("version_0.bak", "version_x", "version_", "version_\u00b2", "version_7 (copy)"):
        shutil.copytree(versions / "version_0", versions / name)
    (versions / "version_1").write_text("a file")
    told = []
    shown = read_run(copy, told.append)
    assert len(shown.history.training["step"]) == STEPS
    names = "version_, version_0.bak, version_1, version_7 (copy), version_x, version_\u00b2"
    assert told == [f"{versions}: skipped {names}, which no run has named so."]


def recipe_with(**sections: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))


DAMAGED_RECIPES = {
    "empty": put(""),
    "a list": put("- 1\n- 2\n"),
    "a number": put("3"),
    "a text": put("abc"),
    "no YAML": put("a: [1, 2"),
    "a tag": put("!!python/object/apply:os.getcwd []"),
    "too deep": put("[" * 5000),
    "not UTF-8": put(b"distill: \xff\xfe"),
    "UTF-16": in_encoding("utf-16"),
    "binary": put(bytes(range(256))),
    "a directory": put_a_directory,
    "a link": put_a_link_to_nothing,
    "a pipe": put_a_pipe,
    "a list of options": recipe_with(distill=[1, 2]),
    "a text of options": recipe_with(train="abc"),
    "data of numbers": recipe_with(data=3),
    "data with a list": recipe_with(data={"class_path": "litgpt.data.JSON", "init_args": [1]}),
    "a share in words": recipe_with(distill={"kd_ratio": "half"}),
    "no share": recipe_with(distill={"kd_ratio": None}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DAMAGED_RECIPES)
def test_a_recipe_that_cannot_be_read_is_left_out(copy, name):
    path = copy / "hyperparameters.yaml"
    DAMAGED_RECIPES[name](path)
    told = []
    shown = read_run(copy, told.append)
    (line,) = told
    assert line.startswith(str(path)) and line.endswith("The page is without the options of this run.")
    assert "\n" not in line and len(line) < 900
    assert len(shown.history.training["step"]) == STEPS and shown.examples is not None
    path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
    told.clear()
    assert read_run(copy, told.append).history.recipe == {} and told == []


def test_a_page_shows_what_is_left(finished, copy, tmp_path, capsys):
    """Of one run, of one of which only examples are left, and of two of which one has nothing left."""
    page = tmp_path / "page.html"
    put("- 1")(copy / "hyperparameters.yaml")
    put('{"first": 1, "latest": 2}')(copy / "examples.json")
    report_akl([copy], out=page)
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and last == f"{page}: run"
    text = page.read_text()
    assert text.count('<div class="figure" id=') == 12 and "To prompts of the validation data" not in text
    shutil.copyfile(finished / "examples.json", copy / "examples.json")
    put("")(log_of(copy))
    report_akl([copy], out=page)
    assert len(capsys.readouterr().out.splitlines()) == 3
    text = page.read_text()
    assert text.count('<div class="figure" id=') == 0 and "To prompts of the validation data" in text
    (copy / "examples.json").unlink()
    report_akl([copy, finished], out=page)
    line, last = capsys.readouterr().out.splitlines()
    assert line.endswith("This run is left out.") and last == f"{page}: {finished.name}"
    with pytest.raises(UserError, match="metrics.csv .*cannot be read as a table of numbers.*it is empty") as alone:
        report_akl([copy], out=page)
    assert len(str(alone.value).splitlines()) == 2


@pytest.mark.page
def test_a_run_keeps_its_page_whatever_becomes_of_what_it_shows(run):
    def spoil(out_dir: Path) -> None:
        put("- 1")(out_dir / "hyperparameters.yaml")
        double_columns(log_of(out_dir))
        (log_of(out_dir).parents[1] / "version_0.bak").mkdir()

    out_dir, told = run({2: spoil})
    assert told.count("The page is without the options of this run") == told.count("skipped version_0.bak") == 1
    assert told.count("metrics.csv is not what this run has written: it is renamed to metrics.csv.other") == 1
    assert "not refreshed" not in told and "Distillation report" in (out_dir / "report.html").read_text()


def test_a_step_that_cannot_be_listed_is_dropped_all_the_same(teacher_dir, student_dir, alice_json, tmp_path, capsys):
    path = tmp_path / "nonfinite-step-000002.json"
    path.mkdir()
    options = {
        "train": OPTIONS["train"] | {"max_steps": 2, "max_norm": None, "lr_warmup_steps": 0},
        "eval": {"initial_validation": False, "final_validation": False},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e20, "foreach": False}},
    }
    distil(student_dir, teacher_dir, alice_json, tmp_path, on_nonfinite="skip", **options)
    assert f"its samples cannot be listed in {path} (Is a directory)" in capsys.readouterr().out
    assert damage(tmp_path / "final") is None
