"""What memory this process has of its own, and how much at most: what the estimate predicts for a CPU."""

import threading

import psutil

PERIOD = 0.02
"""Seconds from one look to the next; a look takes 30 microseconds."""


def anonymous_memory() -> int:
    """Bytes of this process that no file backs: of mapped weights and data the kernel takes back what it needs."""
    memory = psutil.Process().memory_info()
    # not every system tells it
    return memory.rss - getattr(memory, "shared", 0)


class MemoryWatch:
    """The most anonymous memory that this process has had since it was made, in bytes, until it is closed."""

    def __init__(self, period: float = PERIOD) -> None:
        self.highest, self._period, self._ended = 0, period, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.look()
        self._thread.start()

    def look(self) -> int:
        """The most until now."""
        self.highest = max(self.highest, anonymous_memory())
        return self.highest

    def _watch(self) -> None:
        while not self._ended.wait(self._period):
            self.look()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
