"""One process at a time writes into a directory: who gets it, whom it waits for, and what the dead leave."""

import errno
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from litgpt_akl import lock
from litgpt_akl.errors import UserError
from litgpt_akl.lock import LOCK, locked


@contextmanager
def another_process(directory: Path, beside: bool = False):
    """A process that has the lock, by its number, until it is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(directory, beside):
            os.write(writing, b".")
            signal.pause()
    os.read(reading, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


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
        assert f"process {process} on " in (told := capsys.readouterr().out) and "is gone without an end" in told
    assert not (tmp_path / LOCK).exists()


def test_without_locks_of_the_file_system_the_process_is_asked_for(tmp_path, without_locks, capsys):
    with another_process(tmp_path) as process:
        with pytest.raises(UserError, match=f"process {process} on .* is writing there"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):
        assert "is gone without an end" in capsys.readouterr().out
        content = json.loads((tmp_path / LOCK).read_text())
    # the same number, given to another process since
    (tmp_path / LOCK).write_text(json.dumps(content | {"process_began": content["process_began"] - 100}))
    with locked(tmp_path):
        assert "is gone without an end" in capsys.readouterr().out


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
    assert told.count("waiting up to") == 2 and told.count("is gone without an end") == 1
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
