"""Processes that fetch or prepare ahead: how many a container allows, and how they end with the main process."""

import atexit
import gc
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from litgpt_akl.files.changed_files import describe_cut
from litgpt_akl.messages import UserError

_MEMORY = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}
"""By the version of control groups: a group's files of limits, that of usage, and ``memory.stat``'s page cache."""


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can still take: what the machine has available, or less if a container has less left."""
    return min(psutil.virtual_memory().available, _least(root, "memory", _memory_left))


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores whose time this process's control groups allow it, such as 1.5; infinity if they set no limit."""
    return _least(root, "cpu", _cores)


def _least(root: Path, controller: str, ask: Callable[[str, Path], float]) -> float:
    """The least that this process's group or one above it allows; ``/proc`` and ``/sys`` are below ``root``."""
    least = math.inf
    for version, group in _groups(root, controller):
        # a group has files only for what it controls
        with suppress(OSError, ValueError):
            least = min(least, ask(version, group))
    return least


def _groups(root: Path, controller: str) -> Iterator[tuple[str, Path]]:
    """The directories of this process's groups, from its own up to the highest that is mounted, with their version."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        # no Linux
        return
    paths = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        version, _, options = after.split(" ", 2)
        own = paths.get(controller if version == "cgroup" else "")
        if version not in _MEMORY or own is None or (version == "cgroup" and controller not in options.split(",")):
            continue
        top, mounted_at = before.split()[3:5]
        top_directory = root / mounted_at.lstrip("/")
        # a container may see its own group as the top, or the path that the group has outside of it
        within = PurePosixPath(own).relative_to(top) if PurePosixPath(own).is_relative_to(top) else PurePosixPath()
        group = top_directory / within
        yield from ((version, above) for above in (group, *group.parents) if above.is_relative_to(top_directory))


def _memory_left(version: str, group: Path) -> float:
    limits, usage, page_cache = _MEMORY[version]
    limit = min(_number(group / name) for name in limits if (group / name).exists())
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # the kernel takes the page cache back when memory is short
    taken = _number(group / usage) - sum(int(fields.get(name, 0)) for name in page_cache)
    return max(0.0, limit - max(0.0, taken))


def _cores(version: str, group: Path) -> float:
    if version == "cgroup2":
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    quota, period = (_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota > 0 else math.inf


def _number(path: Path) -> float:
    text = path.read_text().strip()
    return math.inf if text == "max" else int(text)


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
    """Bytes that are free where tensors lie on their way between processes, 64 MB in most containers; or infinity."""
    return psutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf


def steps_ahead(size: int, num_workers: int, free: float) -> tuple[int, int]:
    """How many processes fetch ahead, and how many keys each, so that shared memory takes all; (0, 0) if it cannot.

    A worker for which it is full loses what it has fetched, and the main process waits for that for ever. ``size`` is
    that of what lies under one key, at most, and ``free`` that of shared memory, in bytes.
    """
    # the main process holds one that it works on and the one that it takes next
    room = math.inf if size == 0 else SHARE * free / size - 2
    if room >= num_workers * PREFETCHED:
        return num_workers, PREFETCHED if num_workers else 0
    return (min(num_workers, int(room)), 1) if room >= 1 else (0, 0)


def _until_they_fail(keys: Iterable, errors: list[Exception]) -> Iterator:
    """The keys; where they fail, None in place of a last one, since a loader that fails leaves its workers behind."""
    try:
        yield from keys
    except Exception as error:
        errors.append(error)
        yield None


class _Reporting(Dataset):
    """Hands a user's mistake over as a value: a loader would wrap it in the traceback of its worker."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return None if key is None else self.dataset[key]
        except UserError as error:
            return error


class Fetched(Iterator):
    """What a loader gives, in its order; a user's mistake in a worker, or the loss of one, is raised here."""

    def __init__(self, loader: DataLoader, fewer: str, errors: list[Exception]) -> None:
        self.loader, self._fewer, self._errors, self._iterator = loader, fewer, errors, iter(())
        try:
            with _undisturbed():
                self._iterator = iter(loader)
        except KeyboardInterrupt:
            self.stop()
            raise

    def __next__(self) -> Any:
        try:
            found = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            # a connection ends a moment before the process that had it
            self._check_workers(wait=0.0 if isinstance(error, RuntimeError) else 2.0)
            raise
        if found is None:
            raise self._errors[0]
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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """For a block that starts workers: one that is lost, or an interrupt, is told of afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = []
    # what a handler raises while Python forks is printed and forgotten; torch's own of SIGCHLD raises at any moment
    handlers = {signal.SIGCHLD: signal.getsignal(signal.SIGCHLD)}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


def fetch(dataset: Dataset, keys: Iterable, num_workers: int, fewer: str, prefetched: int = PREFETCHED) -> Fetched:
    """What ``dataset`` holds under each of the keys, in their order, fetched ahead; to be stopped in the end.

    The dataset is read in so many workers, each so many keys ahead; with none, in this process. Keys are read in this
    process; where they fail, what was fetched before comes first. ``fewer`` tells a user how to have fewer workers.
    """
    errors = []
    loader = DataLoader(
        _Reporting(dataset),
        sampler=_until_they_fail(keys, errors),
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
    return Fetched(loader, fewer, errors)


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
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@atexit.register
def _end_workers() -> None:
    """Python's own exit asks workers to end by SIGTERM, which they ignore, and then waits for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
