"""The row that says on what was measured, and what the device does at its best."""

import os
import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu_benchmark.flops import published_peak
from gpu_benchmark.rows import Place, Row
from gpu_benchmark.timing import measure

PACKAGES = ("torch", "triton", "litgpt", "lightning", "bitsandbytes", "liger-kernel", "trl")
SIDE, TINY_SIDE = 8192, 256


def describe_machine(place: Place) -> dict[str, Any]:
    """Versions, the device, and the rates of one large product in bfloat16 and of one copy."""
    side = TINY_SIDE if place.tiny else SIDE
    left, right = (torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    product = measure(partial(torch.mm, left, right), place.device)
    copy = measure(partial(left.copy_, right), place.device)
    name = torch.cuda.get_device_name(place.device) if place.is_cuda else platform.processor() or "a CPU"
    peak = published_peak(name) if place.is_cuda else None
    return {
        "device": name,
        "devices": place.devices,
        "memory GB": torch.cuda.get_device_properties(place.device).total_memory / 1e9 if place.is_cuda else None,
        "cores": len(os.sched_getaffinity(0)),
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda,
        **{name: _version(name) for name in PACKAGES},
        "peak TFLOP/s, data sheet": None if peak is None else peak / 1e12,
        "peak TFLOP/s, a product": 2 * side**3 / product.median / 1e12,
        "GB/s, read and written": 2 * left.nbytes / copy.median / 1e9,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


FIRST = [Row("machine", "as found", describe_machine)]
