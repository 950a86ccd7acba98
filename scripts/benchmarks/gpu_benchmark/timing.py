"""Seconds and bytes of what runs on a device, with the device's own clock where it has one."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """Of repeated calls."""

    median: float
    least: float
    calls: int


def measure(
    function: Callable[[], Any], device: torch.device, warmup: int = 3, calls: int = 7, limit: float = 10.0
) -> Seconds:
    """Time calls after some that are not counted; after ``limit`` seconds no more are begun, and at least three are."""
    for _ in range(warmup):
        function()
    found, start = [], time.perf_counter()
    while len(found) < calls and (len(found) < 3 or time.perf_counter() - start < limit):
        found.append(_seconds_of(function, device))
    return Seconds(statistics.median(found), min(found), len(found))


def _seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def free(device: torch.device) -> None:
    """Give up what nothing refers to any more, so that the next row finds an empty device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Memory:
    """What a device holds beyond what it held when this was made; nothing is known of a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = (0, 0)
        self.reset()
        if device.type == "cuda":
            self._before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def reset(self) -> None:
        """Begin anew to look for the most; what the allocator holds for later is given back."""
        free(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks_gb(self) -> tuple[float, float] | tuple[None, None]:
        """The most that was allocated and reserved at a time since :meth:`reset`."""
        if self.device.type != "cuda":
            return None, None
        torch.cuda.synchronize(self.device)
        most = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return tuple((now - before) / 1e9 for now, before in zip(most, self._before, strict=True))
