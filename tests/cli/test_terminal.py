"""What a terminal or a pipe does to a command: odd characters, a reader that goes, a full disk, Ctrl-C at any time."""

import gc
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import start

from litgpt_akl.cli.terminal import LOADING, prepare_terminal, warn_of_load
from litgpt_akl.files.manifest import damage

ROOT = Path(__file__).parents[2]
WAYS_IN = {
    "litgpt": [str(Path(sys.executable).with_name("litgpt"))],
    "python -m litgpt": [sys.executable, "-m", "litgpt"],
    "litgpt-akl": [str(Path(sys.executable).with_name("litgpt-akl"))],
    "python -m litgpt_akl": [sys.executable, "-m", "litgpt_akl"],
}


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def wait_for_imports(process: subprocess.Popen) -> None:
    """Until torch is being imported, which takes seconds."""
    deadline = time.monotonic() + 60
    while "/torch/" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process has imported is asked of /proc")
@pytest.mark.parametrize("way_in", WAYS_IN)
@pytest.mark.parametrize("delay", [0.0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_ctrl_c_before_a_command_begins_says_one_line(tmp_path, way_in, delay):
    arguments = ["finetune_akl", "student", "--teacher_checkpoint_dir", "teacher", "--out_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*WAYS_IN[way_in], *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_imports(process)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, errors) == (130, "", "Interrupted.\n")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what a process has taken so far is asked of /proc")
@pytest.mark.parametrize("way_in", ["litgpt", "python -m litgpt_akl"])
def test_a_person_is_told_at_once_that_imports_take_seconds(tmp_path, way_in):
    terminal, end = os.openpty()
    arguments, output = [*WAYS_IN[way_in], "finetune_akl", "--help"], tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stdout=file, stderr=end)
    os.close(end)
    try:
        line = os.read(terminal, 1000).decode()
        # user and system time, whatever else the machine does: with the imports it would be 5 s and more
        taken = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        wait_for_imports(process)
        said_once = select.select([terminal], [], [], 0) == ([], [], [])
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert line.splitlines() == [LOADING] and said_once and output.read_text() == ""
    assert taken / os.sysconf("SC_CLK_TCK") < 1


@pytest.fixture(scope="module")
def command(student_dir: Path, teacher_dir: Path, tmp_path_factory) -> list[str]:
    """A run on a file whose name and whose records no terminal of one byte a character can show."""
    directory = tmp_path_factory.mktemp("terminal")
    path = directory / "данные-数据-é.jsonl"
    record = '{"instruction": "Скажи 你好 🙂 %d", "output": "Привет, 世界 é"}\n'
    path.write_text("".join(record % n for n in range(60)), encoding="utf-8")
    options = ["--data", "StreamingSFT", "--data.path", str(path), "--data.num_proc", "1", "--data.num_workers", "0"]
    options += ["--train.max_steps", "2", "--train.global_batch_size", "4", "--train.micro_batch_size", "4"]
    options += ["--train.lr_warmup_steps", "0", "--eval.interval", "1", "--eval.max_new_tokens", "4"]
    options += ["--distill.compile", "false", "--data.mask_prompt", "true"]
    return ["finetune_akl", str(student_dir), "--teacher_checkpoint_dir", str(teacher_dir), *options]


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory) -> dict[str, torch.Tensor]:
    out_dir = tmp_path_factory.mktemp("plain") / "out"
    log = out_dir.with_suffix(".log")
    assert start([*command, "--out_dir", str(out_dir)], log).wait(200) == 0, log.read_text()
    return torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)


@pytest.mark.parametrize("output", ["ascii", "latin-1", "closed pipe", "full disk"])
def test_what_the_output_does_not_take_ends_no_run(command, expected, tmp_path, output):
    arguments, said = [*command, "--out_dir", str(tmp_path / "вывод")], tmp_path / "output"
    place: Path | int = said
    if output == "closed pipe":
        reading, place = os.pipe()
        os.close(reading)
    elif output == "full disk":
        place = os.open("/dev/full", os.O_WRONLY)
    encoding = output if output in ("ascii", "latin-1") else None
    process = start(arguments, place, tmp_path / "errors", encoding=encoding)
    if isinstance(place, int):
        os.close(place)
    status, errors = process.wait(200), (tmp_path / "errors").read_text(errors="replace")
    assert status == 0 and "Traceback" not in errors, errors
    assert encoding is None or rb"\u0432\u044b\u0432\u043e\u0434" in said.read_bytes()
    cannot = {"closed pipe": "Broken pipe", "full disk": "No space left on device"}.get(output)
    if cannot:
        assert errors.count(f"The standard output cannot be written ({cannot}): the command goes on without it.") == 1
    final = tmp_path / "вывод" / "final"
    found = torch.load(final / "lit_model.pth", weights_only=True)
    assert damage(final) is None and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_outputs_that_nobody_else_holds_stay_open(tmp_path, monkeypatch, name):
    for each in ("stdout", "stderr"):
        monkeypatch.setattr(sys, each, (tmp_path / each).open("w"))
    before = signal.getsignal(signal.SIGINT)
    print("first", file=getattr(sys, name))
    try:
        prepare_terminal()
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()
    print("second \udcff", file=getattr(sys, name), flush=True)
    assert (tmp_path / name).read_text() == "first\nsecond \\udcff\n"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="of a machine with a GPU nothing is said")
@pytest.mark.parametrize(("load", "threads", "is_said"), [(4.0, None, True), (2.0, None, False), (4.0, "2", False)])
def test_a_busy_machine_is_said_to_be_slow(monkeypatch, capsys, load, threads, is_said):
    """The system's own figures are made up here: a test cannot keep a machine busy for a minute."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    warn_of_load()
    output, errors = capsys.readouterr()
    assert output == "" and ("(load 4.0 on 2 cores)" in errors and "With OMP_NUM_THREADS=1" in errors) == is_said
    assert len(errors.splitlines()) == 2 * is_said
