"""Copies of this process as it was before its first test: without the memory that tests have used and freed.

One copy, the keeper, is made then; it waits, and calls what it is asked for in copies of itself. A new process would
take ten seconds to import what is needed.
"""

import contextlib
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import datasets

_keeper: tuple[int, Connection] | None = None


def keep() -> None:
    """Makes the keeper, which ends with this process, or by :func:`end`."""
    global _keeper
    ours, theirs = Pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # its end is the keeper's, too
            ours.close()
            with contextlib.suppress(EOFError):
                while True:
                    theirs.send(_answer(*theirs.recv()))
        finally:
            os._exit(0)
    theirs.close()
    _keeper = pid, ours


def end() -> None:
    """Ends the keeper, if there is one."""
    if _keeper is not None:
        pid, connection = _keeper
        connection.close()
        os.waitpid(pid, 0)


def call(work: Callable[[], object], timeout: float = 240) -> str:
    """What ``work``, which can be pickled, prints in such a copy, in this one's directory and environment.

    Raises:
        RuntimeError: it has failed there; says how.
        TimeoutError: it did not come to an end.
    """
    _, connection = _keeper
    connection.send((pickle.dumps(work), os.getcwd(), dict(os.environ)))
    if not connection.poll(timeout):
        raise TimeoutError(f"{work} did not end within {timeout} s")
    status, printed = connection.recv()
    if status != 0:
        raise RuntimeError(f"ended with {status}\n{printed}")
    return printed


def _answer(work: bytes, directory: str, environment: dict[str, str]) -> tuple[int, str]:
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for number in (1, 2):
                    os.dup2(printed.fileno(), number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                os.environ.clear()
                os.environ.update(environment)
                os.chdir(directory)
                datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
                pickle.loads(work)()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        return ended, printed.read().decode(errors="replace")
