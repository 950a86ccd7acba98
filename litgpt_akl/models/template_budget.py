"""How much time and memory a template may take: it is a program, and comes with a model that anybody may have made."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import jinja2.filters
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

if sys.platform == "linux":
    import resource
else:
    # others have no such limit, or do not keep to it
    resource = None

SECONDS = 10.0
"""Of one rendering, which usually takes a ten-thousandth of a second."""
MEMORY = 2**30
"""Bytes beyond what the process has."""
BITS = 2**16
"""Of a whole number."""
OF_DICT = frozenset(dir(dict))
OF_LOOP = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length"})
"""Numbers and truth values."""

Result = TypeVar("Result")


class OverBudget(Exception):
    """The message follows "the chat template": "does not end within 10 s"."""


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Templates that compute with no number of more than ``BITS`` bits: no signal ends what would take hours."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["round"] = _round

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power; raises OverBudget if it would have too many bits."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            _check_bits(bits * right if operator == "**" else bits + right.bit_length())
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """The sandbox's, which takes long to find that a field of a message, or a number of a loop, is no danger."""
        if type(obj) is dict and attribute in obj and attribute not in OF_DICT:
            return obj[attribute]
        if type(obj) is LoopContext and attribute in OF_LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    _check_bits(4 * abs(precision))
    return jinja2.filters.do_round(value, precision, method)


def _check_bits(bits: int) -> None:
    if bits > BITS:
        raise OverBudget(f"computes with a number of more than {BITS:,} bits")


def within_budget(function: Callable[[], Result]) -> Result:
    """What ``function`` returns, a part of a template's work.

    The time is not limited outside of a process's main thread, and neither is on systems without such limits.

    Raises:
        OverBudget: it takes more than ``SECONDS`` or ``MEMORY``.
    """
    try:
        with _budget:
            return function()
    except MemoryError:
        raise OverBudget(f"takes more than {MEMORY / 2**30:g} GiB of memory") from None


class _Budget:
    """The limits, set while it is entered; that takes as long as a few steps of a template, so it is done with care."""

    def __init__(self) -> None:
        self._is_armed = self._is_installed = self._is_over = False
        self._before: Any = None

    def __enter__(self) -> None:
        self._is_over = False
        if resource is not None:
            # RLIMIT_AS counts the stack as well, and a stack that cannot grow ends the process
            self._limits = resource.getrlimit(resource.RLIMIT_DATA)
            others = [limit for limit in self._limits if limit != resource.RLIM_INFINITY]
            most = min(_statistics.size() + MEMORY, *others, sys.maxsize)
            resource.setrlimit(resource.RLIMIT_DATA, (most, self._limits[1]))
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            if not self._is_installed:
                self._before, self._is_installed = signal.signal(signal.SIGALRM, self._end), True
            self._begin, self._is_armed = time.monotonic(), True
            # again and again, since what an exception meets on its way may drop it
            self._other = signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._is_armed:
            self._is_armed = False
            left, interval = self._other
            if left:
                left = max(1e-3, left - (time.monotonic() - self._begin))
            signal.setitimer(signal.ITIMER_REAL, left, interval)
        if resource is not None:
            resource.setrlimit(resource.RLIMIT_DATA, self._limits)
        if self._is_over and kind is not None:
            # now and then CPython loses an exception of a signal, and raises a SystemError in its place
            raise OverBudget(f"does not end within {SECONDS:g} s") from None

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed:
            self._is_over = True
            raise OverBudget
        if callable(self._before):
            self._before(number, frame)


class _Statistics:
    """What the system says of this process's memory: one file, opened once, which takes a seventh of the time."""

    def __init__(self) -> None:
        self._file: int | None = None

    def size(self) -> int:
        """Bytes of memory of its own that this process has asked for."""
        if self._file is None:
            self._file = os.open("/proc/self/statm", os.O_RDONLY)
        return int(os.pread(self._file, 256, 0).split()[5]) * resource.getpagesize()

    def close(self) -> None:
        """In a forked process the open file still tells of the process that opened it."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


_statistics = _Statistics()
if resource is not None:
    os.register_at_fork(after_in_child=_statistics.close)
_budget = _Budget()
