"""Processes that take tasks, one after the other, and end with the process that started them."""

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _serve(tasks: Connection, threads: int, log: Path) -> None:
    """In a worker: do what comes, and answer with None or with what went wrong."""
    # a Ctrl-C is for the process that decides
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = log.open("a", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file.fileno(), stream.fileno())
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    # its own is a semaphore, which Python complains of when this process is ended
    tqdm.set_lock(threading.RLock())
    while (task := tasks.recv()) is not None:
        function, arguments = task
        try:
            function(*arguments)
            tasks.send(None)
        except BaseException:
            tasks.send(traceback.format_exc())


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def work(
    due: Callable[[], Sequence[Hashable]],
    call_of: Callable[[Hashable], tuple[Callable, tuple]],
    *,
    workers: int,
    log: Path,
) -> None:
    """Do what is due, as it becomes due, until nothing is.

    Args:
        due: what can be done now, the most urgent first; asked again after each task.
        call_of: the function that does a task, and its arguments.
        workers: how many processes, among which the cores are shared out.
        log: takes what they print; one file each, numbered.

    Raises:
        SystemExit: a task failed; what was done before stays.
    """
    context, threads = multiprocessing.get_context("spawn"), max(1, len(os.sched_getaffinity(0)) // workers)
    processes, idle, busy = [], [], {}
    try:
        for number in range(workers):
            here, there = context.Pipe()
            arguments = there, threads, log.with_stem(f"{log.stem}-{number + 1}")
            processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            there.close()
            idle.append(here)
        while True:
            waiting = [task for task in due() if task not in busy.values()]
            while idle and waiting:
                worker, task = idle.pop(), waiting.pop(0)
                worker.send(call_of(task))
                busy[worker] = task
            if not busy:
                break
            for worker in wait(list(busy)):
                task = busy.pop(worker)
                failure = _answer(worker)
                if failure is not None:
                    raise SystemExit(f"{task} failed; see {log.parent}\n{failure}")
                idle.append(worker)
        for worker in idle:
            worker.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(worker: Connection) -> str | None:
    try:
        return worker.recv()
    except EOFError:
        return "Its process ended."
