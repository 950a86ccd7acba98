"""What is left of a run's checkpoints when a save is killed or refused, and how much memory a save takes."""

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import fresh
from helpers.checkpoints import EXPORT, find, in_a_copy, make_state, names, save, save_steps, train
from helpers.memory_runs import held, watched

from litgpt_akl.files.manifest import damage, read_manifest
from litgpt_akl.messages import UserError
from litgpt_akl.models.model_files import ModelFiles, read_model_files
from litgpt_akl.training.checkpoint import load_training_state, save_student


def kill_at_every_moment(base: str, source: str, reading: str) -> None:
    """Dies before every single access to a file while a checkpoint is replaced, a new one saved, an old one removed.

    Without ``reading`` it does not die before a file is read if nothing was changed since the moment before.
    """
    torch.set_num_threads(1)
    template, out, state = Path(base, "template"), Path(base, "out"), make_state()
    save_steps(template, Path(source), [1, 2])
    moment, survived = 0, False
    while not survived:
        shutil.copytree(template, out)
        child = os.fork()
        if child == 0:
            die_at(moment, bool(reading))
            for step in (2, 3):
                save(out, {**state, "step_count": step}, Path(source), keep_last=2)
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        check_after_kill(out, Path(source), make_state(), at_least=2)
        shutil.rmtree(out)
        moment += 1
    print(moment)


def die_at(moment: int, reading: bool) -> None:
    moments, changed = iter(range(moment)), True

    def hook(event: str, arguments: tuple) -> None:
        nonlocal changed
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        before, changed = changed, event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if (reading or before or changed) and next(moments, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def check_after_kill(out: Path, source: Path, state: dict, at_least: int) -> int:
    """Nothing visible is damaged, and the next save leaves two checkpoints and nothing else; its step."""
    found, warnings = find("auto", out)
    assert not warnings and read_manifest(found)["step"] >= at_least
    load_training_state(found, state)
    state["step_count"] += 10
    save(out, state, source, keep_last=2)
    assert names(out) == [found.name, f"step-{state['step_count']:06d}"]
    return state["step_count"]


def kill_at_any_time(base: str, source: str) -> None:
    """Dies at times of the clock, most of them in the middle of writing, since the model is larger."""
    torch.set_num_threads(1)
    out, state, step = Path(base), make_state(width=500), 1
    save(out, {**state, "step_count": step}, Path(source))
    for _ in range(20):
        child = os.fork()
        while child == 0:
            step += 1
            save(out, {**state, "step_count": step}, Path(source), keep_last=2)
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = check_after_kill(out, Path(source), state, at_least=step)


@pytest.mark.parametrize("reading", ["", pytest.param("too", marks=pytest.mark.slow)])
def test_after_a_kill_there_is_a_whole_checkpoint(student_dir, tmp_path, reading):
    assert int(in_a_copy(kill_at_every_moment, tmp_path, student_dir, reading)) > (150 if reading else 50)


def test_after_a_kill_at_any_time_there_is_a_whole_checkpoint(student_dir, tmp_path):
    in_a_copy(kill_at_any_time, tmp_path / "out", student_dir)


def fail_to_save(out: Path, state: dict, source: Path | ModelFiles, directory: Path | None = None) -> None:
    """Prints the message of a save; the checkpoint before is as it was and nothing is left over."""
    before, step = names(out), state["step_count"] + 1
    with pytest.raises(UserError) as caught:
        if directory is None:
            save(out, {**state, "step_count": step}, source)
        else:
            save_student(directory, state, steps=step, model_files=read_model_files(source), **EXPORT)
    assert names(out) == before and damage(out / before[0]) is None
    print(caught.value)


def limit_file_size(base: str, source: str) -> None:
    state = make_state(width=200)
    train(state, 1)
    directory, limits = save(Path(base), state, Path(source)), resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("lit_model.pth", "training_state.pth"):
        limit = (directory / name).stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        fail_to_save(Path(base), state, Path(source))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill_the_disk(base: str, source: str) -> None:
    """First nothing fits, then not the student, then not what training goes on from."""
    out, state = Path(base) / "out", make_state(width=200)
    train(state, 1)
    directory = save(out, state, Path(source))
    for left in (0, 100_000, 300_000):
        (Path(base) / "filler").unlink(missing_ok=True)
        (Path(base) / "filler").write_bytes(bytes(shutil.disk_usage(base).free - left))
        fail_to_save(out, state, Path(source))
        if left <= 100_000:
            fail_to_save(out, state, Path(source), directory)


def forbid(base: str, source: str) -> None:
    out, state = Path(base) / "out", make_state()
    save(out, state, Path(source))
    # the student's directory may not be for others to read
    model_files = read_model_files(Path(source))
    os.chmod(out, 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    fail_to_save(out, state, model_files)


def test_a_file_too_large(student_dir, tmp_path):
    lines = in_a_copy(limit_file_size, tmp_path / "out", student_dir).splitlines()
    for line, following in zip(lines[::2], lines[1::2], strict=True):
        start, end = line.split("; ")
        assert start == f"{tmp_path / 'out' / 'step-000002'} cannot be written (File too large)"
        assert int(end.removesuffix(" bytes are free on its disk.").replace(",", "")) > 10**6
        assert following == "What was saved before is as it was. Make room, or give another directory."
    assert len(lines) == 4


def mount_and_fill_the_disk(base: str, source: str) -> None:
    """As the first words of ``MOUNT`` would do it for a new process."""
    identities = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    assert ctypes.CDLL(None).unshare(NEW_USERS | NEW_MOUNTS) == 0
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in identities.items():
        Path("/proc/self", name).write_text(f"0 {number} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", base], check=True)
    fill_the_disk(base, source)


NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000
"""Flags of Linux's unshare."""
MOUNT = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4m none "$0" && "$@"')


def test_a_full_disk(student_dir, tmp_path):
    try:
        subprocess.run([*MOUNT, tmp_path, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here")
    messages = in_a_copy(mount_and_fill_the_disk, tmp_path, student_dir)
    assert messages.count("cannot be written (No space left on device") == 5
    assert messages.count("bytes are free on its disk.\nWhat was saved before is as it was.") == 5


def test_a_directory_that_must_not_be_written(student_dir):
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        message = in_a_copy(forbid, base, student_dir)
        os.chmod(Path(base) / "out", 0o755)
    assert "step-000001 cannot be written (Permission denied" in message


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_other_errors_are_not_explained_away(student_dir, tmp_path, error):
    class Broken:
        def __reduce__(self):
            raise error("nothing to do with the disk")

    save_steps(tmp_path, student_dir, [10])
    with pytest.raises(error, match="nothing to do with the disk"):
        save(tmp_path, {**make_state(), "data": Broken(), "step_count": 11}, student_dir)
    assert names(tmp_path) == ["step-000010"]


def memory(name: str) -> int:
    """Bytes, such as VmRSS (now) or VmHWM (the most there ever were)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure_save(base: Path, source: Path) -> None:
    """Prints what saving took beyond what was there, and the bytes of model and optimizer."""
    state = make_state(width=4000)
    train(state, 1)
    save(base, make_state(), source)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    directory = save(base, state, source)
    print(memory("VmHWM") - before, sum(path.stat().st_size for path in directory.glob("*.pth")))


def measure_load(base: Path, name: str) -> None:
    """Prints what loading took at its height beyond what was there, and what it left."""
    state = make_state(width=4000)
    with watched() as result:
        load_training_state(base / name, state)
        result["left"] = held() - result["start"]
    print(result["growth"], result["left"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_there_is_no_second_copy_in_memory(student_dir, tmp_path):
    growth, total = map(int, fresh.call(partial(measure_save, tmp_path, student_dir)).split())
    assert total > 190e6 and growth < 0.05 * total
    peak, left = map(int, fresh.call(partial(measure_load, tmp_path, "step-000001")).split())
    # the optimizer's two thirds are new in this process, the model's third was there
    assert left == pytest.approx(total * 2 / 3, rel=0.05) and peak < left + 0.05 * total
    print(f"{total / 1e6:.0f} MB: saving takes {growth / 1e6:.1f}, loading {(peak - left) / 1e6:.1f} beyond what stays")
