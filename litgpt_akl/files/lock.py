"""One process at a time writes into a directory, on whatever machine it runs."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from litgpt_akl.files.directories import check_new_directory, clear_unfinished_files, explain_failure
from litgpt_akl.messages import UserError, say

LOCK = ".akl.lock"
BEAT = 5.0
"""Seconds from one sign of life to the next: the time of the file's last change."""
PATIENCE = 60.0
"""Seconds without a sign after which a process that cannot be asked for counts as gone."""

_held: set[int] = set()


@contextmanager
def locked(directory: Path, beside: bool = False) -> Iterator[None]:
    """While entered, no other process that asks for the same directory gets it; raises UserError if another one has it.

    The kernel's lock decides where there is one; over the network some file systems have it on each machine by itself,
    or not at all. There the signs of life decide. The lock is a file in the directory, or ``beside`` one that is not
    there yet.
    """
    directory = directory.resolve()
    file = directory.with_name(f".{directory.name}{LOCK}") if beside else directory / LOCK
    with explain_failure(directory):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(file, directory)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
    _held.add(descriptor)
    ended = threading.Event()

    def show_signs() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                os.utime(descriptor)

    thread = threading.Thread(target=show_signs, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            if _is_at(descriptor, file):
                file.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


@contextmanager
def new_directory_locked(out_dir: Path) -> Iterator[None]:
    """While entered, no other process makes ``out_dir``; raises UserError if something is, or is being written."""
    check_new_directory(out_dir)
    with locked(out_dir, beside=True):
        # another one may have been quicker
        check_new_directory(out_dir)
        yield


def _take(file: Path, directory: Path) -> int:
    """An open file that this process has locked, and that no other one counts as its own."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder, has_locks = _read(descriptor), True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _taken(directory, holder) from None
            except OSError:
                # the file system has none
                has_locks = False
            holder = _read(descriptor)
            if holder and _is_alive(holder, file, has_locks):
                raise _taken(directory, holder)
            # whoever had it may have deleted it since it was opened
            if not _is_at(descriptor, file):
                os.close(descriptor)
                continue
        except BaseException:
            os.close(descriptor)
            raise
        if holder:
            say(f"{directory}: {_describe(holder)} was killed before its end; this process takes its place.")
            clear_unfinished_files(directory)
        return descriptor


def _is_alive(holder: dict[str, Any], file: Path, has_locks: bool) -> bool:
    """Whether the process that wrote a lock which this one has got is still there."""
    here = _this_process()
    if holder["boot"] == here["boot"]:
        if has_locks:
            # one kernel knows all its locks, those of other containers too
            return False
        if holder["process_ids"] == here["process_ids"]:
            with suppress(psutil.Error):
                # numbers come again
                return abs(psutil.Process(holder["process"]).create_time() - holder["process_began"]) < 2
            return False
    before, deadline = _changed(file), time.monotonic() + PATIENCE
    say(f"{file} is of {_describe(holder)}; waiting up to {PATIENCE:.0f} s for a sign of life.")
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE / 5))
        if _changed(file) != before:
            # it is gone if the process has ended
            return _changed(file) is not None
    return False


def _changed(file: Path) -> int | None:
    with suppress(OSError), file.open("rb") as opened:
        # over the network only an opened file is surely looked up
        return os.fstat(opened.fileno()).st_mtime_ns
    return None


def _this_process() -> dict[str, Any]:
    boot = process_ids = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        process_ids = os.readlink("/proc/self/ns/pid")
    return {
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "process_began": psutil.Process().create_time(),
        "boot": boot or socket.gethostname(),
        "process_ids": process_ids,
    }


def _read(descriptor: int) -> dict[str, Any] | None:
    """Who wrote a lock; None if nobody did, or if it is garbled."""
    with suppress(ValueError, AttributeError):
        found = json.loads(os.pread(descriptor, 2**16, 0))
        return found if found.keys() == _this_process().keys() else None
    return None


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['machine']}, since {holder['since']},"


def _taken(directory: Path, holder: dict[str, Any] | None) -> UserError:
    who = _describe(holder) if holder else "another process"
    return UserError(f"{directory}: {who} is writing there.\nWait until it has ended, or give another directory.")


def _is_at(descriptor: int, file: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def _leave_to_parent() -> None:
    """A forked process has the open file, too, and would hold the lock longer than its parent lives."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
