"""Several processes that run the same function together, as a launcher would start them."""

import gc
import os
import socket
import time
from collections.abc import Callable
from functools import partial

import torch.multiprocessing as multiprocessing

from helpers import fresh

TIMEOUT = 240


def in_processes(processes: int, function: Callable, *arguments, nodes: int = 1) -> None:
    """Calls ``function(*arguments)`` in each of the processes that torchrun would have started: copies of this one.

    Raises:
        multiprocessing.ProcessException: one of them has failed; the others are ended.
        TimeoutError: they did not come to an end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.start_processes(
        _work,
        (processes, nodes, port, function, arguments),
        nprocs=processes,
        join=False,
        start_method="fork",
    )
    deadline = time.monotonic() + TIMEOUT
    while not context.join(1, grace_period=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{processes} processes did not end within {TIMEOUT} s")


def in_fresh_processes(processes: int, function: Callable, *arguments) -> None:
    """The same in processes without the memory that this one has used and freed: copies of what it once was."""
    fresh.call(partial(in_processes, processes, function, *arguments))


def _work(rank: int, processes: int, nodes: int, port: int, function: Callable, arguments: tuple) -> None:
    # a search for garbage in what a copied process has made would copy its memory
    gc.freeze()
    each = processes // nodes
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank % each,
        "GROUP_RANK": rank // each,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": each,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    function(*arguments)
