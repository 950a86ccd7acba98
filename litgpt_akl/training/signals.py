"""SIGTERM and SIGINT as wishes: the step at hand is finished and saved first, unless the signal comes twice."""

import os
import signal
import threading
from types import FrameType, TracebackType

import lightning as L

from litgpt_akl.models.parallel import highest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def leave_if_stopped(fabric: L.Fabric, stop: "StopSignals", way_on: str) -> None:
    """End the process as a shell says that a signal ended it; says how to go on."""
    received = stop.agreed(fabric)
    if received is not None:
        fabric.print(f"Stopped. {way_on}")
        # one status for the run: launchers take any other process's for an accident
        raise SystemExit(128 + received if fabric.is_global_zero else 0)


class StopSignals:
    """While entered, notes the first stop signal and lets a second one act at once; says so, unless it is quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    received: signal.Signals | None = None

    def agreed(self, fabric: L.Fabric) -> signal.Signals | None:
        """The signal that any process has received; all processes must ask together."""
        number = highest(fabric, self.received or 0)
        return signal.Signals(number) if number else None

    def __enter__(self) -> "StopSignals":
        # Python takes handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        else:
            self._previous = {}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self.quiet:
            return
        # print is not safe here: the interrupted code may be in the middle of one
        message = f"\n{self.received.name}: finishing this step and saving; a second signal stops at once.\n"
        os.write(2, message.encode())
