"""Command lines in copies of this process: what takes ten seconds to import is imported once."""

import faulthandler
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import datasets
import torch

POLL = 0.005
"""Seconds between two looks at a command."""
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
"""What a launcher that runs the tests may have set."""


def import_everything() -> None:
    """Imports what a run imports, so that copies of this process need not."""
    import bokeh.plotting  # noqa: F401
    import litgpt.__main__  # noqa: F401

    import litgpt_akl.commands.export_hf
    import litgpt_akl.commands.finetune_akl
    import litgpt_akl.report.page  # noqa: F401

    # each run fills LitGPT's table of commands anew
    del sys.modules["litgpt.__main__"]


class Command:
    """A command in a copy of this process, with what a test asks of a ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("litgpt", timeout)
            time.sleep(POLL)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def start(
    words: list[str],
    log: Path | int,
    errors: Path | int | None = None,
    *,
    stdin: str = "",
    directory: Path | None = None,
    encoding: str | None = None,
    **environment: str,
) -> Command:
    """Runs ``litgpt`` with those words in a session of its own; what it prints is added to ``log``, a path or a file.

    ``errors`` is where the standard error goes, if not there too; ``encoding`` is that of the standard output.
    """
    import_everything()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        for name in [name for name in os.environ if name in LAUNCHERS or name.startswith("SLURM_")]:
            del os.environ[name]
        os.environ.update(environment)
        os.chdir(directory or os.getcwd())
        written = _open(log)
        _redirect(stdin, written, written if errors is None else _open(errors), encoding)
        run(words)
    return Command(child)


def run(words: list[str]) -> None:
    """Ends this process, a copy of another one, with the command and its exit status."""
    from litgpt_akl.cli.main import main

    # what a test, in whose copy this may run, has set
    importlib.reload(warnings)
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    torch.set_grad_enabled(True)
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    datasets.config.HF_DATASETS_CACHE = Path(os.environ.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE))
    # what further processes of a run are started as
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("litgpt.__main__")
    sys.argv = ["litgpt", *words]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            traceback.print_exc()
            status = status or 120
        finally:
            # a copy of a process must not go on with what that process does
            os._exit(status)


def complete(words: list[object], timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """Runs ``litgpt`` with those words and the options of :func:`start` to its end."""
    words = [str(word) for word in words]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        command = start(words, output.fileno(), errors.fileno(), **options)
        try:
            status = command.wait(timeout)
        finally:
            command.kill()
        printed = []
        for file in (output, errors):
            file.seek(0)
            printed.append(file.read().decode())
    return subprocess.CompletedProcess(["litgpt", *words], status, *printed)


def _open(place: Path | int) -> int:
    return place if isinstance(place, int) else os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _redirect(stdin: str, output: int, errors: int, encoding: str | None) -> None:
    reading, writing = os.pipe()
    os.write(writing, stdin.encode())
    os.close(writing)
    for number, place in enumerate((reading, output, errors)):
        os.dup2(place, number)
    sys.stdin = os.fdopen(0, "r")
    sys.stdout = os.fdopen(1, "w", encoding=encoding)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding=encoding, errors="backslashreplace")
