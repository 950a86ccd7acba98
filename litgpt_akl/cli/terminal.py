"""The terminal as a long run needs it: a word at once, nothing ends for an odd character, and Ctrl-C is no accident."""

import io
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import TextIO

LOADING = "Loading PyTorch and LitGPT, which takes some seconds ..."


def prepare_terminal() -> None:
    """Make the standard outputs take every character, and let a run go on without them; to be called before imports.

    A person at a terminal is told of the imports, once for all processes. A file or a pipe is not: whoever reads it may
    want what the command says, and nothing else. Until :func:`interrupt_as_usual` Ctrl-C ends the process at once:
    nothing has begun that would have to be tidied up.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _steady(stream, says_so=name == "stdout"))
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _leave)
    if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(LOADING, file=sys.stderr, flush=True)


def interrupt_as_usual() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt where the program is."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


BUSY = 1.5
"""Programs that want a core, for each core there is: from then on threads wait for each other."""


def warn_of_load() -> None:
    """Say if other programs keep the cores busy, unless the user has chosen the number of threads, or there is a GPU.

    PyTorch gives each core a part of every product, which takes as long as the part that has to wait for its core.
    """
    if "OMP_NUM_THREADS" in os.environ or os.path.exists("/dev/nvidia0") or not hasattr(os, "getloadavg"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    if cores > 1 and load > BUSY * cores:
        print(
            f"Other programs keep this machine busy (load {load:.1f} on {cores} cores), which can make this many times"
            " slower.\nWith OMP_NUM_THREADS=1 before the command its threads do not wait for each other.",
            file=sys.stderr,
        )


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(128 + number)


def _steady(stream: io.TextIOWrapper, says_so: bool) -> TextIO:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_SteadyFile(stream, says_so)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _SteadyFile(io.RawIOBase):
    """A file whose writes do not fail: a reader that has gone, or a full disk, takes what is printed and no more."""

    def __init__(self, stream: io.TextIOWrapper, says_so: bool) -> None:
        # a stream that nobody holds closes its file
        self._stream, self._says_so = stream, says_so
        self._raw = getattr(stream.buffer, "raw", stream.buffer)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: memoryview) -> int:
        try:
            return self._raw.write(data)
        except OSError as error:
            if self._says_so:
                self._says_so = False
                message = f"The standard output cannot be written ({error.strerror}): the command goes on without it.\n"
                # maybe nobody is there to be told
                with suppress(OSError):
                    os.write(2, message.encode())
            return len(data)
