"""What control groups of Linux leave to this process: the limits of a container, which the machine does not show.

No library that this package depends on reads them: psutil, PyTorch and ``os.sched_getaffinity`` know neither a
container's memory nor its quota of CPU time.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil


class _Names(NamedTuple):
    """The files of a group in one of the two versions of control groups, and fields of its ``memory.stat``."""

    limits: tuple[str, ...]
    usage: str
    page_cache: tuple[str, ...]


_MEMORY = {
    "cgroup2": _Names(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
    "cgroup": _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can still take: what the machine has available, or less if a container has less left.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    return min(psutil.virtual_memory().available, _least(root, "memory", _memory_left))


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores whose time this process's control groups allow it, such as 1.5; infinity if they set no limit.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    return _least(root, "cpu", _cores)


def _least(root: Path, controller: str, ask: Callable[[str, Path], float]) -> float:
    """The least that this process's group or one above it allows; infinity if none says anything."""
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
    paths = {tuple(line.split(":", 2)[1].split(",")): line.split(":", 2)[2] for line in memberships}
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        version, _, options = after.split(" ", 2)
        own = next(
            (path for names, path in paths.items() if (controller if version == "cgroup" else "") in names), None
        )
        if version not in _MEMORY or own is None or (version == "cgroup" and controller not in options.split(",")):
            continue
        top, mounted_at = before.split()[3:5]
        top_directory = root / mounted_at.lstrip("/")
        # a container may see its own group as the top, or the path that the group has outside of it
        within = PurePosixPath(own).relative_to(top) if PurePosixPath(own).is_relative_to(top) else PurePosixPath()
        group = top_directory / within
        while group != top_directory:
            yield version, group
            group = group.parent
        yield version, top_directory


def _memory_left(version: str, group: Path) -> float:
    names = _MEMORY[version]
    limit = min(_number(group / name) for name in names.limits if (group / name).exists())
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # the kernel takes the page cache back when memory is short
    taken = _number(group / names.usage) - sum(int(fields.get(name, 0)) for name in names.page_cache)
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
