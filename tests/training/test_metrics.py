"""The rows of metrics behind a checkpoint: marked, not copied, and found again whatever became of the log."""

import csv
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.checkpoints import in_a_copy

from litgpt_akl.files.manifest import METRICS_MARK
from litgpt_akl.training.logging import MetricsLogger
from litgpt_akl.training.metrics import MetricsMarker, copy_marked_rows

ROWS = 40


def make_logger(out_dir: Path) -> tuple[MetricsLogger, Path]:
    logger = MetricsLogger(out_dir / "logs", name="csv")
    return logger, logger.experiment.path


def log(logger: MetricsLogger, steps: range, **more: float) -> None:
    for step in steps:
        logger.log_metrics({"loss": 1 / (step + 3), "h": float("nan"), **more}, step)
    logger.save()


@pytest.fixture
def marked(tmp_path) -> tuple[Path, Path, str]:
    """A checkpoint of step 40, the log, which has gone on and has other columns now, and what it was at that step."""
    logger, path = make_logger(tmp_path)
    log(logger, range(1, ROWS))
    log(logger, range(ROWS, ROWS + 1), val_loss=2.5)
    checkpoint, text = tmp_path / "step-000040", path.read_bytes().decode()
    checkpoint.mkdir()
    (checkpoint / METRICS_MARK).write_text(json.dumps(MetricsMarker().mark(path, tmp_path)))
    log(logger, range(ROWS + 1, ROWS + 9), own_answers_time=0.5, a_first_column=1.0)
    return checkpoint, path, text


def test_columns_and_rows_that_came_later_are_cut(marked, tmp_path):
    checkpoint, path, text = marked
    columns, told = copy_marked_rows(checkpoint, ROWS, tmp_path / "next.csv")
    assert told is None and (tmp_path / "next.csv").read_bytes().decode() == text
    assert columns == text.splitlines()[0].split(",")
    # as it is before a column is added
    path.write_text(text + text.splitlines()[-1] + "\r\n", newline="")
    assert copy_marked_rows(checkpoint, ROWS, tmp_path / "next.csv") == (columns, None)
    assert (tmp_path / "next.csv").read_bytes().decode() == text


def rewrite(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    return lambda path: path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "gone": (Path.unlink, "is gone", 0),
    "empty": (lambda path: path.write_text(""), "is not as it was then", 0),
    "a directory": (replace_by_a_directory, "cannot be read", 0),
    "cut": (rewrite(lambda lines: [*lines[:11], lines[11][:-9]]), "is not as it was then", 10),
    "a byte": (
        rewrite(lambda lines: [*lines[:5], lines[5].replace(".", "x"), *lines[6:]]),
        "is not as it was then",
        ROWS - 1,
    ),
    "a date": (rewrite(lambda lines: [*lines[:5], lines[5].replace(".", "-11-")] + lines[6:]), "is not", ROWS - 1),
    "a row lost": (rewrite(lambda lines: lines[:7] + lines[8:]), "is not as it was then", ROWS - 1),
    "rows twice": (rewrite(lambda lines: [*lines[:9], *lines[2:5], *lines[9:]]), "is not as it was then", ROWS),
    "columns doubled": (rewrite(lambda lines: [f"{line[:-1]},{line}" for line in lines[:9]]), "is not", 0),
    "a column lost": (rewrite(lambda lines: [lines[0].replace("loss", "lost")] + lines[1:]), "is not", ROWS),
    "no header": (rewrite(lambda lines: lines[1:]), "is not as it was then", 0),
    "UTF-16": (lambda path: path.write_text(path.read_text(), encoding="utf-16"), "is not as it was then", 0),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 9), "is not as it was then", 0),
    "one long line": (lambda path: path.write_text("step," * 500_000), "is not as it was then", 0),
    "another table": (lambda path: path.write_text("day,price\nMonday,3\n"), "is not as it was then", 0),
}


def test_columns_that_something_has_added_are_left_out(marked, tmp_path):
    checkpoint, path, text = marked
    rewrite(lambda lines: [f"{line[:-1]},{line}" for line in lines])(path)
    assert copy_marked_rows(checkpoint, ROWS, tmp_path / "next.csv")[1] is None
    assert (tmp_path / "next.csv").read_bytes().decode() == text


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_left_of_a_damaged_log_is_taken_over_and_told_once(marked, tmp_path, name):
    checkpoint, path, text = marked
    harm, what, left = DAMAGES[name]
    harm(path)
    following = tmp_path / "next.csv"
    columns, told = copy_marked_rows(checkpoint, ROWS, following)
    assert f"{path} {what}" in told and f"of the {ROWS} rows of metrics up to step {ROWS}, {left} are" in told
    assert following.exists() == (columns != []) == (left > 0)
    if left:
        rows = list(csv.DictReader(following.read_text().splitlines()))
        assert len(rows) == left and columns == text.splitlines()[0].split(",")
        # nothing but what was logged
        logged = {row["step"]: row for row in csv.DictReader(text.splitlines())}
        assert all(value in ("", logged[row["step"]][key]) for row in rows for key, value in row.items())


def test_a_checkpoint_with_a_copy_of_its_metrics_is_gone_on_from(tmp_path):
    checkpoint = tmp_path / "step-000003"
    checkpoint.mkdir()
    (checkpoint / "metrics.csv").write_text("loss,step\n1.5,3\n")
    assert copy_marked_rows(checkpoint, 3, tmp_path / "next.csv") == (["loss", "step"], None)
    assert (tmp_path / "next.csv").read_text() == "loss,step\n1.5,3\n"


def test_without_a_logged_row_there_is_nothing_to_find(tmp_path):
    checkpoint = tmp_path / "step-000003"
    checkpoint.mkdir()
    assert copy_marked_rows(checkpoint, 3, tmp_path / "next.csv") == ([], None)
    (checkpoint / METRICS_MARK).write_text(json.dumps(MetricsMarker().mark(tmp_path / "none.csv", tmp_path)))
    assert copy_marked_rows(checkpoint, 3, tmp_path / "next.csv") == ([], None)
    assert not (tmp_path / "next.csv").exists()


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_mark_reads_what_has_come_since_the_last_and_is_that_of_a_whole_look(tmp_path):
    logger, path = make_logger(tmp_path)
    marker = MetricsMarker()
    for turn in range(1, 6):
        log(logger, range(turn * 10_000, (turn + 1) * 10_000))
        before, size = bytes_read(), path.stat().st_size
        mark = marker.mark(path, tmp_path)
        read = bytes_read() - before
        assert read < size / turn + 200_000
        assert mark == MetricsMarker().mark(path, tmp_path) and mark["bytes"] == size
        assert mark["rows"] == turn * 10_000 and len(json.dumps(mark)) < 1000
    log(logger, range(60_000, 60_001), val_loss=1.0)
    assert marker.mark(path, tmp_path) == MetricsMarker().mark(path, tmp_path)


def add_a_column_without_room(out_dir: str) -> None:
    logger, path = make_logger(Path(out_dir))
    log(logger, range(1000))
    before = path.read_text()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    log(logger, range(1000, 1001), val_loss=1.0)
    assert path.read_text() == before and [found.name for found in path.parent.iterdir()] == [path.name]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log(logger, range(1001, 1002))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [*range(1002)]
    assert [row["val_loss"] for row in rows[999:]] == ["", "1.0", ""]


def test_rows_survive_a_column_that_cannot_be_added(tmp_path):
    said = in_a_copy(add_a_column_without_room, tmp_path)
    assert said.count("metrics.csv cannot be written (File too large)") == len(said.splitlines()) == 1
