"""The limits of containers, read from made-up trees of both versions of control groups."""

import math
from functools import partial
from pathlib import Path

import psutil
import pytest

from litgpt_akl.data.workers import available_cores, available_memory, cpu_quota
from litgpt_akl.memory.fit import device_bytes

MB = 10**6
UNLIMITED = 9223372036854771712
"""What version 1 says where nothing is limited."""
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = [
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755",
    "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct ro,relatime - cgroup cgroup rw,cpu,cpuacct",
    "33 31 0:30 {top} /sys/fs/cgroup/memory ro,relatime master:9 - cgroup cgroup rw,memory",
]


def tree(root: Path, own: str, mounts: list[str], top: str, files: dict[str, str | int]) -> Path:
    """A machine whose process is in the group ``own``, with the files of groups under ``sys/fs/cgroup``."""
    mounts = ["23 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw", *(mount.format(top=top) for mount in mounts)]
    membership = [f"4:memory:{own}", f"2:cpu,cpuacct:{own}", "1:name=systemd:/"] if len(mounts) > 2 else []
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files |= {"proc/self/mountinfo": "\n".join(mounts), "proc/self/cgroup": "\n".join([*membership, f"0::{own}"])}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def group2(place: str, limit: str | int, high: str | int, used: int, cached: int, quota: str = "max 100000") -> dict:
    stat = f"anon {used - cached}\nfile {cached}\nactive_file {cached // 4}\ninactive_file {cached - cached // 4}"
    found = {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat, "cpu.max": quota}
    return {f"{place}{name}": text for name, text in found.items()}


def group1(place: str, limit: int, used: int, cached: int, quota: int = -1) -> dict:
    stat = f"cache 1\ntotal_cache {cached}\ntotal_active_file {cached // 4}\ntotal_inactive_file {cached - cached // 4}"
    memory = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    found = {f"memory/{place}memory.{name}": text for name, text in memory.items()}
    return found | {f"cpu,cpuacct/{place}cpu.cfs_{name}": n for name, n in (("quota_us", quota), ("period_us", 100000))}


NESTED2 = {"cpu.stat": "usage_usec 1"} | group2("pod/", 900 * MB, "max", 500 * MB, 100 * MB, "250000 100000")
NESTED1 = group1("", UNLIMITED, 9000 * MB, 0) | group1("pod/", 900 * MB, 500 * MB, 100 * MB, 250000)

CASES = {
    # a container of its own, which sees its group as the top
    "v2, 800 MB": ("/", [V2], "/", group2("", 800 * MB, "max", 500 * MB, 200 * MB, "150000 100000"), 500 * MB, 1.5),
    "v2, 600 MB": ("/", [V2], "/", group2("", 600 * MB, "max", 500 * MB, 200 * MB, "400000 100000"), 300 * MB, 4.0),
    "v2, no limit": ("/", [V2], "/", group2("", "max", "max", 500 * MB, 200 * MB), math.inf, math.inf),
    "v2, memory.high": ("/", [V2], "/", group2("", 800 * MB, 700 * MB, 500 * MB, 0), 200 * MB, math.inf),
    "v2, more than all": ("/", [V2], "/", group2("", 400 * MB, "max", 500 * MB, 0), 0, math.inf),
    "v1, 800 MB": ("/docker/c0", V1, "/docker/c0", group1("", 800 * MB, 500 * MB, 200 * MB, 150000), 500 * MB, 1.5),
    "v1, 600 MB": ("/docker/c0", V1, "/docker/c0", group1("", 600 * MB, 500 * MB, 200 * MB, 50000), 300 * MB, 0.5),
    "v1, no limit": (
        "/docker/c0",
        V1,
        "/docker/c0",
        group1("", UNLIMITED, 500 * MB, 0),
        UNLIMITED - 500 * MB,
        math.inf,
    ),
    # groups within groups: the tightest counts, wherever it is
    "v2, above": (
        *("/pod/c0", [V2], "/"),
        NESTED2 | group2("pod/c0/", 800 * MB, "max", 100 * MB, 0, "300000 100000"),
        *(500 * MB, 2.5),
    ),
    "v2, below": (
        *("/pod/c0", [V2], "/"),
        NESTED2 | group2("pod/c0/", 200 * MB, "max", 100 * MB, 0, "200000 100000"),
        *(100 * MB, 2.0),
    ),
    "v1, above": ("/pod/c0", V1, "/", NESTED1 | group1("pod/c0/", 800 * MB, 100 * MB, 0, 300000), 500 * MB, 2.5),
    "v1, below": ("/pod/c0", V1, "/", NESTED1 | group1("pod/c0/", 200 * MB, 100 * MB, 0, 200000), 100 * MB, 2.0),
    # a container that reads its path outside of it, and sees its own group only
    "v2, other path": ("/../c0", [V2], "/", group2("", 800 * MB, "max", 500 * MB, 0, "100000 50000"), 300 * MB, 2.0),
    # both versions at once: version 2 controls nothing
    "hybrid": (
        *("/c0", [*V1, "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"], "/"),
        group1("c0/", 800 * MB, 500 * MB, 0, 100000) | {"unified/c0/cpu.stat": "usage_usec 1"},
        *(300 * MB, 1.0),
    ),
    "nothing but the membership": ("/c0", [V2], "/", {}, math.inf, math.inf),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tightest_limit_of_all_groups(tmp_path, monkeypatch, case):
    own, mounts, top, files, memory, cores = CASES[case]
    root = tree(tmp_path, own, mounts, top, files)
    machine = psutil.virtual_memory()._replace(available=10**10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert (available_memory(root), cpu_quota(root)) == (min(memory, 10**10), cores)
    # what uses them
    monkeypatch.setattr("litgpt_akl.memory.fit.available_memory", partial(available_memory, root))
    monkeypatch.setattr("litgpt_akl.data.workers.cpu_quota", partial(cpu_quota, root))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    assert device_bytes(None, cuda=False, processes=2) == min(memory, 10**10) / 2
    assert available_cores() == max(1, min(8, math.ceil(min(cores, 8))))


def test_without_control_groups_the_machine_counts(tmp_path):
    assert cpu_quota(tmp_path) == math.inf
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_this_machine_can_be_asked():
    assert 0 < available_memory() <= psutil.virtual_memory().total
    assert cpu_quota() > 0 and available_cores() >= 1
