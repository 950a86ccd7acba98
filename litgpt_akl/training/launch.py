"""A command's processes: started together, and ended together, by a failure or by a signal."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from torch import distributed

from litgpt_akl.files.changed_files import check_mapped_files
from litgpt_akl.messages import UserError, reason
from litgpt_akl.models.parallel import all_reduce_max, make_strategy, rank, world_size
from litgpt_akl.training.logging import SpeakingFabric

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def start(function: Callable[[L.Fabric, Any], None], options: Any, cpu_offload: bool = False, loggers=()) -> None:
    """Call a function in each of the processes that a command's options ask for, which shard models if they are many.

    ``cpu_offload`` says whether the frozen one's shares lie in CPU memory. Raises UserError if nodes would wait for
    each other in vain.
    """
    machine = {"devices": options.devices, "num_nodes": options.num_nodes}
    strategy = make_strategy(*machine.values(), options.hybrid_sharding, cpu_offload)
    fabric = SpeakingFabric(**machine, strategy=strategy, precision=options.precision, loggers=loggers)
    _check_nodes(fabric, options.num_nodes)
    fabric.launch(function, options)


def _check_nodes(fabric: L.Fabric, num_nodes: int) -> None:
    environment = getattr(fabric.strategy, "cluster_environment", None)
    by_hand = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK"}
    if num_nodes > 1 and isinstance(environment, LightningEnvironment) and by_hand.isdisjoint(os.environ):
        raise UserError(
            f"--num_nodes {num_nodes}: nothing says where the other nodes are.\nStart the command on each of them by"
            " torchrun or srun, or with MASTER_ADDR, MASTER_PORT and NODE_RANK set; or give --num_nodes 1."
        )


def leave_if_stopped(fabric: L.Fabric, stop: "StopSignals", way_on: str) -> None:
    """End the process as a shell says that a signal ended it; says how to go on."""
    received = stop.agreed(fabric)
    if received is not None:
        fabric.print(f"Stopped. {way_on}")
        # one status for the run: launchers take any other process's for an accident
        raise SystemExit(128 + received if fabric.is_global_zero else 0)


class StopSignals:
    """While entered, notes the first stop signal and lets a second one act at once; says so, unless it is quiet."""

    received: signal.Signals | None = None
    doing = "finishing this step and saving"
    """What a person is told of the first signal; whoever enters this says so if it is something else."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def agreed(self, fabric: L.Fabric) -> signal.Signals | None:
        """The signal that any process has received; all processes must ask together."""
        number = all_reduce_max(fabric, self.received or 0)
        return signal.Signals(number) if number else None

    def __enter__(self) -> "StopSignals":
        # Python takes handlers in the main thread only
        signals = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if not self.quiet:
            # print is not safe here: the interrupted code may be in the middle of one
            text = f"\n{self.received.name}: {self.doing}; a second signal stops at once.\n"
            os.write(2, text.encode())


FAILURE = "litgpt_akl/failure"
"""The key under which the processes' common store holds the first failure."""
PERIOD = 0.5
"""Seconds from one look at the other processes to the next."""
PATIENCE = 2.0
"""Seconds to wait for a word of a process that has gone."""
GRACE = 10.0
"""Seconds for a process to notice by itself that another one has gone."""
WAY_ON = "The others were ended; the same command with --resume auto goes on from the last checkpoint."
"""What to do after a process has gone, where a run saves checkpoints."""


def ending_together(main: Callable, way_on: str = WAY_ON) -> Callable:
    """The same function, except that a failure in one of the processes that run it ends it in all.

    ``way_on`` is what a user is told if a process has ended without a word.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        if world_size() == 1:
            return _blaming_changed_data(main, *args, **kwargs)
        ended, asking = threading.Event(), threading.Lock()
        _watch_others(ended, asking, way_on)
        try:
            return _blaming_changed_data(main, *args, **kwargs)
        except Exception as error:
            if not is_loss_of_another(error):
                _tell(f"process {rank()}: {type(error).__name__}: {reason(error)}")
                raise
            if rank() > 0:
                raise SystemExit(1) from None
            raise UserError(_what_was_told(_common_store(), way_on)) from None
        finally:
            ended.set()
            # Python aborts if it ends while another thread is in a call to the store
            if asking.acquire(timeout=PATIENCE):
                asking.release()

    return run


def _blaming_changed_data(main: Callable, *args, **kwargs) -> Any:
    """Call ``main``; if it fails after somebody has changed the data that it reads, that is what the user is told."""
    try:
        return main(*args, **kwargs)
    except Exception as error:
        # the end of a page of data that were cut reads as zeros, from which any failure may follow
        if not isinstance(error, UserError) and not is_loss_of_another(error):
            check_mapped_files()
        raise


def is_loss_of_another(error: Exception) -> bool:
    """Is it what the backends raise in a process when another one has gone?"""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _common_store() -> distributed.Store:
    return distributed.distributed_c10d._get_default_store()


def _tell(what: str) -> None:
    try:
        _common_store().compare_set(FAILURE, "", what)
        if rank() == 0 and not distributed.is_torchelastic_launched():
            # the store, which torchrun keeps elsewhere, goes with this process: the others are to look once more before
            time.sleep(2 * PERIOD)
    except (RuntimeError, ValueError):
        # process 0, which keeps the store, has gone first
        pass


def _what_was_told(store: distributed.Store, way_on: str) -> str:
    try:
        store.wait([FAILURE], timedelta(seconds=PATIENCE))
    except (RuntimeError, ValueError):
        return f"A process of this run has ended without a word: it was killed, or ran out of memory.\n{way_on}"
    return f"{store.get(FAILURE).decode()}\nThe other processes were ended."


def _watch_others(ended: threading.Event, asking: threading.Lock, way_on: str) -> None:
    """End this process if another one fails before ``ended`` is set: it may be waiting for it on a GPU for ever.

    ``asking`` is held while the processes' common store is asked.

    It does also the work of Lightning's observer of the processes it has started, which kills process 0 without a word.
    """
    children: list[subprocess.Popen] = []
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            children += thread._child_processes
            thread._child_processes = []
    speaks = rank() == 0 or bool(children)
    # a connection of its own: that of the main thread may be waiting for an answer
    store = _common_store().clone()

    def child_has_failed() -> bool:
        return any(child.poll() for child in children)

    def another_has_failed() -> bool:
        """Has a process told that it failed, or has process 0 gone, which keeps the store?"""
        with asking:
            try:
                return not ended.is_set() and store.check([FAILURE])
            except RuntimeError:
                return True

    def end_with_others() -> None:
        while not child_has_failed() and not another_has_failed():
            time.sleep(PERIOD)
        # one that has nothing to say goes before process 0 does: PyTorch writes a page when it misses the common store
        time.sleep(GRACE if speaks else PERIOD / 2)
        if ended.is_set() and not child_has_failed():
            return
        if speaks:
            print(f"\nerror: {_what_was_told(store, way_on)}", file=sys.stderr, flush=True)
        for child in children:
            child.kill()
        os._exit(1)

    threading.Thread(target=end_with_others, daemon=True).start()
