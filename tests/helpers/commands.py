"""Work in copies of this process, above all command lines: what takes ten seconds to import is imported once."""

import faulthandler
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import datasets
import torch
from lightning.fabric.strategies.launchers import subprocess_script

from litgpt_akl.cli.main import COMMANDS, without_traceback
from litgpt_akl.cli.parser import Parser
from litgpt_akl.files import changed_files

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
    """A copy of this process that is at work, with what a test asks of a ``subprocess.Popen``."""

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


def fork(
    work: Callable[[], object],
    log: Path | int,
    errors: Path | int | None = None,
    *,
    stdin: str = "",
    encoding: str | None = None,
) -> Command:
    """Calls ``work`` in a copy of this process, in a session of its own, which ends as a new process would.

    What it prints is added to ``log``, a path or an open file; ``errors`` is where the standard error goes, if not
    there too; ``encoding`` is that of the standard output.
    """

    def redirected() -> None:
        os.setsid()
        output = _open(log)
        _redirect(stdin, output, output if errors is None else _open(errors), encoding)
        work()

    return _copy(redirected)


def _copy(work: Callable[[], object]) -> Command:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _forget_tests()
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            _end(status)
    return Command(child)


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
    """Runs ``litgpt`` with those words in a copy of this process, with the options of :func:`fork`."""
    import_everything()

    def work() -> None:
        for name in [name for name in os.environ if name in LAUNCHERS or name.startswith("SLURM_")]:
            del os.environ[name]
        os.environ.update(environment)
        os.chdir(directory or os.getcwd())
        datasets.config.HF_DATASETS_CACHE = Path(os.environ.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE))
        run(words)

    return fork(work, log, errors, stdin=stdin, encoding=encoding)


def run(words: list[str]) -> None:
    """Runs the command in this process, a copy of another one; so are the processes that it starts."""
    from litgpt_akl.cli.main import main

    sys.argv = ["litgpt", *words]
    subprocess_script.subprocess = SimpleNamespace(Popen=_start_another)
    main()


def _start_another(command: list[str], env: dict[str, str], cwd: None) -> Command:
    """Stands for what Fabric starts a run's other processes by: each runs this process's command from its beginning."""

    def work() -> None:
        os.environ.clear()
        os.environ.update(env)
        del sys.modules["litgpt.__main__"]
        run(sys.argv[1:])

    return _copy(work)


def complete(words: list[object], timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """Runs ``litgpt`` with those words and the options of :func:`start` to its end."""
    words = [str(word) for word in words]
    return _complete(partial(start, words, **options), timeout)


def complete_call(work: Callable[[], object], timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """Calls ``work`` in a copy of this process, with the options of :func:`fork`, to its end."""
    return _complete(partial(fork, work, **options), timeout)


def call(parser: Parser, words: list[str], directory: Path) -> None:
    """What LitGPT's main function does with the words of a command line."""
    os.chdir(directory)
    given = parser.instantiate_classes(parser.parse_args(words))
    options = {name: value for name, value in vars(given[given.subcommand]).items() if name != "config"}
    without_traceback(resolve_name(COMMANDS[given.subcommand]))(**options)


def complete_here(work: Callable[[], None]) -> subprocess.CompletedProcess:
    """The same as ``complete_call``, in this process: a copy of it would take longer than what is refused at once."""
    code, directory = 0, Path.cwd()
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            work()
        except SystemExit as error:
            code = error.code
        finally:
            os.chdir(directory)
    return subprocess.CompletedProcess(work, code, out.getvalue(), err.getvalue())


def _complete(begin: Callable[[int, int], Command], timeout: float) -> subprocess.CompletedProcess:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        command = begin(output.fileno(), errors.fileno())
        try:
            status = command.wait(timeout)
        finally:
            command.kill()
        printed = []
        for file in (output, errors):
            file.seek(0)
            printed.append(file.read().decode())
    return subprocess.CompletedProcess(begin.args, status, *printed)


def _forget_tests() -> None:
    """Undoes in a copy of the process what a test, or pytest, has set."""
    # what the other process has made is not this one's to free: a search for garbage in it would copy its memory
    gc.freeze()
    # pytest tells of signals elsewhere; with its handlers go those that were set after them
    faulthandler.disable()
    for state in (changed_files._handlers, changed_files._watched, changed_files._read_to_the_end):
        state.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(warnings)
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    torch.set_grad_enabled(True)


def _open(place: Path | int) -> int:
    return place if isinstance(place, int) else os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _end(status: int) -> None:
    """Ends this process: a copy must not go on with what the other one does."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        traceback.print_exc()
        status = status or 120
    finally:
        os._exit(status)


def _redirect(stdin: str, output: int, errors: int, encoding: str | None) -> None:
    reading, writing = os.pipe()
    os.write(writing, stdin.encode())
    os.close(writing)
    for number, place in enumerate((reading, output, errors)):
        os.dup2(place, number)
    sys.stdin = os.fdopen(0, "r")
    sys.stdout = os.fdopen(1, "w", encoding=encoding)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding=encoding, errors="backslashreplace")
