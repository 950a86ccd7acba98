"""Processes that fetch data ahead: what is said when one of them is killed, or meets a user's mistake."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.ranks import in_processes
from helpers.runs import alice, distil
from test_streaming import splits, write
from torch.utils.data import Dataset

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.data.workers import fetch
from litgpt_akl.messages import UserError

FEWER = "Have fewer."
UNSEEN = {"initial_validation": False, "final_validation": False}
LONG = {"max_steps": 1_000_000, "global_batch_size": 4, "micro_batch_size": 2}


def _lose(worker: int) -> None:
    os.kill(worker, signal.SIGKILL)
    raise ConnectionResetError("reset by peer")


class Lost:
    """Reading it in the main process kills the worker that sent it, and finds the connection gone at once."""

    def __reduce__(self):
        return _lose, (os.getpid(),)


class Numbers(Dataset):
    """Gives keys back; some do harm."""

    def __getitem__(self, key):
        if key == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if key == "crash":
            os.kill(os.getpid(), signal.SIGBUS)
        if key == "lost":
            return Lost()
        if key == "mistake":
            raise UserError("This record is wrong.\nMend it.")
        if key == "fault":
            raise LookupError("a fault of the program")
        return key


def read(keys: list, workers: int) -> list:
    fetched, found = fetch(Numbers(), keys, workers, FEWER), []
    try:
        for value in fetched:
            found.append(value)
    finally:
        fetched.stop()
    return found


@pytest.mark.parametrize(
    ("workers", "what", "name"), [(1, "kill", "SIGKILL"), (2, "crash", "SIGBUS"), (2, "lost", "SIGKILL")]
)
def test_a_killed_worker_is_named(workers, what, name):
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError) as caught:
        read([*range(5), what, *range(20)], workers)
    first, second = str(caught.value).splitlines()
    assert f" of {workers}, process " in first and f"({name}): most likely memory or /dev/shm is full" in first
    assert second == FEWER
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_mistake_is_told_as_it_is_and_a_fault_keeps_its_traceback(workers):
    with pytest.raises(UserError) as caught:
        read([0, "mistake", 1], workers)
    assert str(caught.value) == "This record is wrong.\nMend it."
    with pytest.raises(LookupError, match="a fault of the program"):
        read([0, "fault", 1], workers)
    assert read(list(range(7)), workers) == list(range(7))


def failing(good: int, error: Exception) -> Iterator[int]:
    yield from range(good)
    raise error


@pytest.mark.parametrize("error", [UserError("This file is wrong.\nMend it."), LookupError("a fault of the program")])
@pytest.mark.parametrize(
    "good", [0, pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(50, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_keys_that_fail_leave_no_workers_behind(workers, good, error):
    found = []
    fetched = fetch(Numbers(), failing(good, error), workers, FEWER)
    with pytest.raises(type(error)) as caught:
        found.extend(fetched)
    assert caught.value is error and found == list(range(good))
    fetched.stop()
    assert gc.get_freeze_count() == 0
    assert not multiprocessing.active_children()
    deadline = time.monotonic() + 5
    while any(thread.name == "QueueFeederThread" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # what was fetched is collected, and closes nothing that somebody else has opened by now
    pipes = [os.pipe() for _ in range(20)]
    del fetched, caught
    gc.collect()
    for reading, writing in pipes:
        os.close(reading)
        os.close(writing)


INTERRUPTED = []
"""While there is something in it, a process that starts another one is interrupted just then."""
os.register_at_fork(after_in_parent=lambda: INTERRUPTED and signal.raise_signal(INTERRUPTED.pop()))


def test_an_interrupt_while_workers_are_started_is_not_lost():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    INTERRUPTED.append(signal.SIGINT)
    try:
        # of what such a function of the system raises, Python only prints that it is ignored
        with pytest.raises(KeyboardInterrupt):
            read(list(range(100)), 2)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert INTERRUPTED == [] and not multiprocessing.active_children() and gc.get_freeze_count() == 0


def kill_first_worker() -> None:
    """Soon after this process has one."""

    def kill() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        time.sleep(0.2)
        # they are in no order
        os.kill(min(worker.pid for worker in workers), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def end_of_run(out_dir: Path, processes: int, student, teacher, data, changes: dict) -> None:
    """Writes what each process of a run says whose last one loses a worker."""
    rank = int(os.environ["RANK"])
    if rank == processes - 1:
        kill_first_worker()
    try:
        distil(student, teacher, data, out_dir / "run", eval=UNSEEN, train=LONG, devices=processes, **changes)
    except (UserError, SystemExit) as error:
        (out_dir / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode", ["auto", "fill"])
def test_a_run_ends_with_a_killed_worker(monkeypatch, student_dir, teacher_dir, alice_json, tmp_path, processes, mode):
    # as many workers as are asked for, also on a machine with fewer cores
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    data, changes = alice(alice_json), {}
    data.num_workers = 2
    if mode == "fill":
        changes["teacher"] = TeacherArgs(cache_dir=str(tmp_path / "cache"), cache_mode="fill")
    run = partial(end_of_run, tmp_path, processes, student_dir, teacher_dir, data, changes)
    in_processes(processes, run)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(processes)]
    assert said[-1].startswith("UserError: Worker 1 of 2, process ") and "(SIGKILL)" in said[-1]
    assert said[-1].splitlines()[1].startswith("Lower --data.num_workers 2; with 0")
    if processes == 2:
        assert said[0].startswith("UserError: process 1: UserError: Worker 1 of 2")
    assert not (tmp_path / "run" / "final").exists()


def test_preparation_ends_with_a_killed_worker(teacher_dir, tmp_path):
    records = [{"instruction": "say something " * 30, "output": "anything " * 60}] * 20_000
    path = write(tmp_path / "data.jsonl", records)
    kill_first_worker()
    with pytest.raises(UserError, match=r"Worker 1 of \d+, .*\(SIGKILL\).*\n.*--data.num_proc \d+"):
        splits(path, teacher_dir, tmp_path / "cache")
