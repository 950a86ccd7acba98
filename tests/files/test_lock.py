"""One process at a time writes into a directory: who gets it, whom it waits for, and what the dead leave."""

import errno
import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers import torture
from helpers.commands import import_everything
from helpers.locks import another_process

from litgpt_akl.files import lock
from litgpt_akl.files.lock import LOCK, locked
from litgpt_akl.messages import UserError

ROUNDS = int(os.environ.get("LITGPT_AKL_ROUNDS", 2))
"""Of two runs in one ``--out_dir``."""
SEED = int(os.environ.get("LITGPT_AKL_SEED", 0))
"""Of the moments at which they start."""


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.5)


@pytest.mark.parametrize("beside", [False, True])
def test_it_is_held_by_one_and_gone_afterwards(tmp_path, beside):
    directory = tmp_path / "a" / "b"
    for _ in range(2):
        with locked(directory, beside):
            with pytest.raises(UserError, match=rf"b: process {os.getpid()} on \S+, since \S+, is writing there"):
                with locked(directory, beside):
                    pass
            with locked(tmp_path / "a" / "c", beside):
                pass
    with pytest.raises(ZeroDivisionError), locked(directory, beside):
        _ = 1 / 0
    assert not list(tmp_path.rglob(f"*{LOCK}"))


def test_a_killed_process_leaves_it_to_the_next(tmp_path, capsys):
    with another_process(tmp_path) as process:
        with pytest.raises(UserError, match=f"process {process} on .* is writing there.\nWait until"):
            with locked(tmp_path):
                pass
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert f"process {process} on " in (told := capsys.readouterr().out) and "was killed before its end" in told
    assert not (tmp_path / LOCK).exists()


def test_without_locks_of_the_file_system_the_process_is_asked_for(tmp_path, without_locks, capsys):
    with another_process(tmp_path) as process:
        with pytest.raises(UserError, match=f"process {process} on .* is writing there"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):
        assert "was killed before its end" in capsys.readouterr().out
        content = json.loads((tmp_path / LOCK).read_text())
    # the same number, given to another process since
    (tmp_path / LOCK).write_text(json.dumps(content | {"process_began": content["process_began"] - 100}))
    with locked(tmp_path):
        assert "was killed before its end" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"boot": "another machine"}, {"process_ids": "another container"}])
def test_a_process_that_cannot_be_asked_for_is_waited_for(tmp_path, change, without_locks, impatient, capsys):
    with locked(tmp_path):
        content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).write_text(json.dumps(json.loads(content) | change))
    began = time.monotonic()
    ended = threading.Event()

    def show_signs():
        while not ended.wait(0.05):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=show_signs)
    thread.start()
    with pytest.raises(UserError, match="is writing there"), locked(tmp_path):
        pass
    ended.set()
    thread.join()
    with locked(tmp_path):
        told = capsys.readouterr().out
    assert told.count("waiting up to") == 2 and told.count("was killed before its end") == 1
    assert 0.5 <= time.monotonic() - began < 5


def test_who_holds_it_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_worker_that_outlives_a_killed_process_does_not_hold_it(tmp_path):
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        with locked(tmp_path):
            worker = os.fork()
            if worker > 0:
                os.write(writing, str(worker).encode())
            signal.pause()
    worker = int(os.read(reading, 100))
    time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with locked(tmp_path):
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"process": 1}'])
def test_a_garbled_lock_is_nobodys(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_killed_process_leaves_no_unfinished_file(tmp_path):
    (tmp_path / ".0c1d.partial").write_text("half of")
    with another_process(tmp_path):
        pass
    (tmp_path / "mine.partial").write_text("whole")
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir() if path.name != LOCK] == ["mine.partial"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A recipe of a short run for so many processes, what it comes to when nobody else is there, and how long it takes.

    The function gives them.
    """
    base = tmp_path_factory.mktemp("alone")
    torture.write_material(base / "material")
    import_everything()
    known = {}

    def run(processes: int) -> tuple[list[str], Path, float]:
        if processes not in known:
            own, began = base / str(processes), time.monotonic()
            recipe = torture.tiny_recipe("json", processes, base / "material", own, steps=6)
            assert not any(torture.start(recipe, own / "run", own / "log", processes).wait())
            known[processes] = recipe, own / "run", time.monotonic() - began
        return known[processes]

    return run


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=pytest.mark.slow if number else ()) for number in range(ROUNDS)]
)
def test_of_two_runs_in_one_directory_one_goes_on(alone, tmp_path, number):
    draw = random.Random(f"{SEED} {number}")
    processes, resume = 1 + number % 2, draw.choice(("auto", None))
    recipe, expected, duration = alone(processes)
    out_dir, logs = tmp_path / "run", [tmp_path / name / "log" for name in ("first", "second")]
    delay, ends = draw.uniform(0, 0.7 * duration), []
    # a first run that comes to its end before the second one has looked does not meet it
    while not any("is writing there" in text for _, text in ends):
        for directory in (out_dir, *(log.parent for log in logs)):
            shutil.rmtree(directory, ignore_errors=True)
        first = torture.start(recipe, out_dir, logs[0], processes, resume)
        time.sleep(delay)
        second = torture.start(recipe, out_dir, logs[1], processes, resume)
        ends = list(zip((first.wait(), second.wait()), (log.read_text() for log in logs), strict=True))
        assert not any(ends[0][0]) or not any(ends[1][0])
        delay /= 2
        assert delay > 0.01 * duration, "they never met"
    assert sorted(all(statuses) for statuses, _ in ends) == sorted(any(statuses) for statuses, _ in ends) == [0, 1]
    told = next(text for statuses, text in ends if all(statuses))
    assert "Traceback" not in told and told.count(" is writing there.\nWait until it has ended, or give") == 1
    assert told.rstrip().splitlines()[-2].startswith(f"error: {out_dir}: process ")
    assert torture.difference(expected, out_dir) is None
