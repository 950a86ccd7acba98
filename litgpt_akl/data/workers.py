"""Processes that fetch or prepare ahead, and how they end with the main process, however that ends."""

import atexit
import gc
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from litgpt_akl.data.cgroups import cpu_quota
from litgpt_akl.files.mapped_files import describe_cut
from litgpt_akl.messages import UserError

SHARED_MEMORY = "/dev/shm"
SHARE = 0.5
"""Of what is free in shared memory that fetching ahead may take: other libraries want some, too."""
PREFETCHED = 2
"""Keys that each process fetches ahead: PyTorch's default."""


def available_cores() -> int:
    """Cores that this process may use: those that it may run on, or as many as its container may use the time of."""
    # not every system can tell which those are
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(cores, cpu_quota()))


def free_shared_memory() -> float:
    """Bytes that are free where tensors lie on their way from process to process; infinity if there is no such place.

    A container has 64 MB of them, if it is not told to have more.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return math.inf
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def steps_ahead(size: int, num_workers: int, free: float) -> tuple[int, int]:
    """How many processes fetch ahead, and how many keys each, so that shared memory takes all; (0, 0) if it cannot.

    A worker for which it is full loses what it has fetched, and the main process waits for that for ever.

    Args:
        size: bytes of what lies under one key, at most.
        num_workers: how many processes are wished for.
        free: bytes of shared memory.
    """
    # the main process holds one that it works on and the one that it takes next
    room = math.inf if size == 0 else SHARE * free / size - 2
    if room >= num_workers * PREFETCHED:
        return num_workers, PREFETCHED if num_workers else 0
    return (min(num_workers, int(room)), 1) if room >= 1 else (0, 0)


class _Reporting(Dataset):
    """Hands a user's mistake over as a value: a loader would wrap it in the traceback of its worker."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


class Fetched(Iterator):
    """What a loader gives, in its order; a user's mistake in a worker, or the loss of one, is raised here."""

    def __init__(self, loader: DataLoader, fewer: str) -> None:
        self.loader, self._fewer = loader, fewer
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            self._iterator = iter(loader)
        finally:
            # torch's own would raise the loss of a worker wherever the main process is just then
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, handler)

    def __next__(self) -> Any:
        try:
            found = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            # a connection ends a moment before the process that had it
            self._check_workers(wait=0.0 if isinstance(error, RuntimeError) else 2.0)
            raise
        if isinstance(found, UserError):
            raise found
        return found

    def _check_workers(self, wait: float) -> None:
        workers = getattr(self._iterator, "_workers", [])
        ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=wait)
        for worker in workers:
            if worker.sentinel in ended:
                # its files are closed before it can be asked how it ended
                worker.join(timeout=wait)
        for number, worker in enumerate(workers, start=1):
            if worker.exitcode is not None and worker.exitcode < 0:
                by = signal.Signals(-worker.exitcode).name
                if by == "SIGBUS" and (message := describe_cut(read_to_the_end=True)):
                    raise UserError(message) from None
                raise UserError(
                    f"Worker {number} of {len(workers)}, process {worker.pid}, was killed while it fetched data ({by}):"
                    f" most likely memory or /dev/shm is full.\n{self._fewer}"
                ) from None

    def stop(self) -> None:
        """End the workers, also before the last key; they would go on for 10 s."""
        gc.unfreeze()
        if hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()


def fetch(dataset: Dataset, keys: Iterable, num_workers: int, fewer: str, prefetched: int = PREFETCHED) -> Fetched:
    """What ``dataset`` holds under each of the keys, in their order, fetched ahead; to be stopped in the end.

    Args:
        dataset: is read in the workers.
        keys: are read in this process.
        num_workers: processes that fetch; with 0 this process does.
        fewer: tells a user how to have fewer of them.
        prefetched: keys that each of them is ahead.
    """
    loader = DataLoader(
        _Reporting(dataset),
        sampler=keys,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetched if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_depend_on_the_main_process,
        # without one of its own, a loader draws from the random numbers of training
        generator=torch.Generator(),
    )
    if num_workers > 0:
        # a collection writes to every object there is, and so copies all memory that forked processes share
        gc.freeze()
    return Fetched(loader, fewer)


def _depend_on_the_main_process(worker: int) -> None:
    # terminals and schedulers signal the whole group, but the work at hand still needs its workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGBUS"):
        # torch's handler blames shared memory, also for a mapped file that was cut: the main process can tell
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
    # if the main process is killed, a worker may be in the middle of a message that nobody else ends
    end_with_parent()


def end_with_parent() -> None:
    """From now on this process ends when the one that started it does, whatever it is waiting for."""
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@atexit.register
def _end_workers() -> None:
    """Python's own exit asks workers to end by SIGTERM, which they ignore, and then waits for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
