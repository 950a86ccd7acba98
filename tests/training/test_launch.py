"""A failure in one process ends the run in all, with its cause printed last; every way of starting them works."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.commands import LAUNCHERS, Command, start

from litgpt_akl.models.parallel import rank
from litgpt_akl.training import launch

STEPS = ["--train.max_steps", "6", "--train.global_batch_size", "6", "--train.micro_batch_size", "2"]


def command(student: Path, teacher: Path, data: Path, out_dir: Path, *options: str) -> list[str]:
    return [
        *("finetune_akl", str(student), "--teacher_checkpoint_dir", str(teacher), "--out_dir", str(out_dir)),
        *("--data", "JSON", "--data.json_path", str(data), "--data.mask_prompt", "true", "--data.num_workers", "0"),
        *("--data.prompt_style.class_path", "litgpt.prompts.Default"),
        *("--distill.compile", "false", "--eval.max_iters", "2", "--eval.max_new_tokens", "4", *STEPS, *options),
    ]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_anew(arguments: list[str], log: Path, launcher: tuple[str, ...] = ("litgpt",)) -> subprocess.Popen:
    """Not as a copy of this process."""
    inherited = {
        name: os.environ[name] for name in os.environ if name not in LAUNCHERS and not name.startswith("SLURM_")
    }
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, *arguments],
            stdout=file,
            stderr=file,
            env={**inherited, "OMP_NUM_THREADS": "1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"},
            start_new_session=True,
        )


def end(process: Command | subprocess.Popen, log: Path, seconds: float) -> str:
    """What was printed; the process must end by itself within that time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {seconds} s:\n{log.read_text()}")
    return log.read_text()


def weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)


@pytest.fixture(scope="module")
def alone(student_dir, teacher_dir, alice_json, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What one process makes of the student."""
    out_dir = tmp_path_factory.mktemp("alone") / "run"
    log = out_dir.with_suffix(".log")
    process = start(command(student_dir, teacher_dir, alice_json, out_dir), log)
    printed = end(process, log, 120)
    assert process.returncode == 0, printed
    return weights(out_dir)


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-6


def slurm_variables(task: int, nodes: int) -> dict[str, str]:
    """What srun, which is not here, would set for one of two tasks."""
    variables = {
        "JOB_ID": "4711",
        "JOB_NAME": "distil",
        "NODELIST": "127.0.0.1" if nodes == 1 else "127.0.0.1,127.0.0.2",
        "NNODES": str(nodes),
        "NTASKS": "2",
        "NTASKS_PER_NODE": str(2 // nodes),
        "PROCID": str(task),
        "LOCALID": str(task if nodes == 1 else 0),
        "NODEID": str(0 if nodes == 1 else task),
    }
    return {f"SLURM_{name}": value for name, value in variables.items()}


@pytest.mark.parametrize(
    "launcher",
    [
        "litgpt",
        pytest.param("torchrun", marks=pytest.mark.slow),
        "two nodes",
        pytest.param("SLURM's variables", marks=pytest.mark.slow),
        "SLURM's variables on two nodes",
    ],
)
def test_every_launcher(alone, student_dir, teacher_dir, alice_json, tmp_path, launcher):
    out_dir = tmp_path / "run"
    arguments = command(student_dir, teacher_dir, alice_json, out_dir)
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    if launcher == "litgpt":
        processes = [start_anew([*arguments, "--devices", "2"], logs[0])]
    elif launcher == "torchrun":
        torchrun = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "litgpt")
        processes = [start_anew([*arguments, "--devices", "2"], logs[0], torchrun)]
    elif launcher.startswith("SLURM"):
        nodes, port = (2 if "two nodes" in launcher else 1), free_port()
        options = ["--devices", str(2 // nodes), "--num_nodes", str(nodes)]
        processes = [
            start([*arguments, *options], log, MASTER_PORT=port, **slurm_variables(task, nodes))
            for task, log in enumerate(logs)
        ]
    else:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        options = ["--devices", "1", "--num_nodes", "2"]
        processes = [
            start([*arguments, *options], log, NODE_RANK=str(node), **address) for node, log in enumerate(logs)
        ]
    for process, log in zip(processes, logs, strict=False):
        printed = end(process, log, 120)
        assert process.returncode == 0, printed
        assert "Traceback" not in printed and "Warning" not in printed
    assert_equal(weights(out_dir), alone)


class FailsInOne(torch.optim.AdamW):
    """Fails at the third step of process 1."""

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3 and rank() == 1:
            raise ValueError("this process was made to fail")
        return super().step(closure)


class WaitsForAnother(FailsInOne):
    """Process 0 waits, as it would for ever on a GPU, for one that fails."""

    def step(self, closure=None):
        result = super().step(closure)
        if self.steps == 3:
            time.sleep(1000)
        return result


class SavesForHours(torch.optim.AdamW):
    """Process 0 is busy with its first save when process 1 ends."""

    def state_dict(self):
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)


LONG = ["--devices", "2", "--train.max_steps", "100000", "--train.epochs", "100000"]


def search_path() -> str:
    """With the classes of this file."""
    return os.pathsep.join(filter(None, sys.path))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Process 0 of each run, a copy of this one, waits less for others to notice by themselves what has happened."""
    monkeypatch.setattr(launch, "GRACE", 2.0)


@pytest.fixture
def long_run(student_dir, teacher_dir, alice_json, tmp_path):
    """Starts a run that would go on for hours in two processes; it is past its first steps."""
    started = []

    def start_it(*options: str):
        log = tmp_path / "run.log"
        arguments = command(student_dir, teacher_dir, alice_json, tmp_path / "run", *LONG, *options)
        process = start(arguments, log, PYTHONPATH=search_path())
        started.append(process)
        return process, log

    yield start_it
    for process in started:
        # whoever is left of the group
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(process: Command, out_dir: Path, log: Path) -> None:
    deadline = time.monotonic() + 90
    while not any(path.stat().st_size > 1000 for path in out_dir.glob("logs/csv/version_*/metrics.csv")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def child(process: Command) -> int:
    """The other process of a run of two."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


@pytest.mark.parametrize("optimizer", [FailsInOne, WaitsForAnother])
def test_an_error_in_one_process_ends_the_run_and_is_said_last(long_run, tmp_path, optimizer):
    name = f"test_launch.{optimizer.__name__}"
    process, log = long_run("--optimizer.class_path", name, "--optimizer.lr", "1e-3")
    printed = end(process, log, 60)
    assert process.returncode == 1
    assert "process 1: ValueError: this process was made to fail" in printed.splitlines()[-2]
    assert printed.count("Traceback") == 1


# unless it is told otherwise srun leaves the other tasks alone, and no task is another one's parent
def test_an_error_in_one_of_slurms_tasks_ends_the_other(student_dir, teacher_dir, alice_json, tmp_path):
    arguments = command(student_dir, teacher_dir, alice_json, tmp_path / "run", *LONG)
    arguments += ["--optimizer.class_path", "test_launch.WaitsForAnother", "--optimizer.lr", "1e-3"]
    logs, port = [tmp_path / f"{task}.log" for task in range(2)], free_port()
    variables = [{"MASTER_PORT": port, "PYTHONPATH": search_path(), **slurm_variables(task, 1)} for task in range(2)]
    processes = [start(arguments, log, **names) for log, names in zip(logs, variables, strict=True)]
    printed = [end(process, log, 60) for process, log in zip(processes, logs, strict=True)]
    assert [process.returncode for process in processes] == [1, 1]
    assert "process 1: ValueError: this process was made to fail" in printed[0].splitlines()[-2]
    assert [text.count("Traceback") for text in printed] == [0, 1]


def test_a_killed_process_ends_the_run(long_run, tmp_path):
    process, log = long_run()
    wait_for_steps(process, tmp_path / "run", log)
    os.kill(child(process), signal.SIGKILL)
    printed = end(process, log, 60)
    assert process.returncode == 1
    assert "has ended without a word" in printed.splitlines()[-2]
    assert "Traceback" not in printed


def test_a_process_that_is_killed_while_another_one_saves_ends_the_run(long_run):
    options = ("--optimizer.class_path", "test_launch.SavesForHours", "--optimizer.lr", "1e-3")
    process, log = long_run(*options, "--train.save_interval", "1")
    printed = end(process, log, 90)
    assert process.returncode == 1
    assert "has ended without a word" in printed.splitlines()[-2]


def test_the_others_end_with_a_killed_main_process(long_run, tmp_path):
    process, log = long_run()
    wait_for_steps(process, tmp_path / "run", log)
    other = child(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{other}").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("receiver", ["main", "group"])
def test_a_stop_signal_saves_in_all_processes(long_run, tmp_path, receiver):
    process, log = long_run("--resume", "auto")
    wait_for_steps(process, tmp_path / "run", log)
    (os.kill if receiver == "main" else os.killpg)(process.pid, signal.SIGTERM)
    printed = end(process, log, 60)
    assert process.returncode == 143, printed
    assert printed.count("SIGTERM: finishing this step and saving") == 1 and "Traceback" not in printed
    assert len(list((tmp_path / "run").glob("step-*"))) == 1
