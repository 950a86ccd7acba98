"""A run in many processes ends as one: whoever fails says why, the others end, and process 0 repeats it last."""

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from torch import distributed

from litgpt_akl.errors import UserError, reason
from litgpt_akl.sharding import rank, world_size

FAILURE = "litgpt_akl/failure"
"""The key under which the processes' common store holds the first failure."""
PATIENCE = 2.0
"""Seconds to wait for a word of a process that has gone."""
GRACE = 10.0
"""Seconds for process 0 to notice by itself that another one has gone; it may be waiting for it on a GPU for ever."""


def ending_together(main: Callable) -> Callable:
    """The same function, except that a failure in one of the processes that run it ends it in all."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        _watch_children()
        try:
            return main(*args, **kwargs)
        except Exception as error:
            if world_size() == 1:
                raise
            if not _is_loss_of_another(error):
                _tell(f"process {rank()}: {type(error).__name__}: {reason(error)}")
                raise
            if rank() > 0:
                raise SystemExit(1) from None
            raise UserError(_what_was_told()) from None

    return run


def _is_loss_of_another(error: Exception) -> bool:
    """Is it what the backends raise in a process when another one has gone?"""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _tell(what: str) -> None:
    try:
        distributed.distributed_c10d._get_default_store().compare_set(FAILURE, "", what)
    except (RuntimeError, ValueError):
        # process 0, which keeps the store, has gone first
        pass


def _what_was_told() -> str:
    store = distributed.distributed_c10d._get_default_store()
    try:
        store.wait([FAILURE], timedelta(seconds=PATIENCE))
    except (RuntimeError, ValueError):
        return (
            "A process of this run has ended without a word: it was killed, or ran out of memory.\n"
            "The others were ended; the same command with --resume auto goes on from the last checkpoint."
        )
    return f"{store.get(FAILURE).decode()}\nThe other processes were ended."


def _watch_children() -> None:
    """Do the work of Lightning's observer of the processes it has started, which kills process 0 without a word."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            children = thread._child_processes
            thread._child_processes = []
            threading.Thread(target=_end_with, args=(children,), daemon=True).start()


def _end_with(children: list[subprocess.Popen]) -> None:
    while all(not child.poll() for child in children):
        time.sleep(0.5)
    time.sleep(GRACE)
    print(f"\nerror: {_what_was_told()}", file=sys.stderr, flush=True)
    for child in children:
        child.kill()
    os._exit(1)
