"""Directories that another process writes into."""

import os
import signal
from contextlib import contextmanager
from pathlib import Path

from litgpt_akl.files.lock import locked


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
