"""Whole runs on a GPU follow those on the CPU; options that only matter there do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import alice, distil, metrics
from test_memory_on_a_gpu import ESTIMATES, measure

from litgpt_akl.config.args import LoRAArgs, TeacherArgs
from litgpt_akl.teacher.teacher import Teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FLOAT32 = {"precision": "32-true", "teacher": TeacherArgs(precision="32-true")}
CASES = {
    "akl": {**FLOAT32},
    "fkl at temperature 2": {**FLOAT32, "distill": {"divergence": "fkl", "temperature": 2.0}},
    "loss compiled": {**FLOAT32, "distill": {"compile": True}},
    "blocks compiled": {**FLOAT32, "compile": True},
    "activations checkpointed": {**FLOAT32, "activation_checkpointing": True},
    "one micro-batch": {**FLOAT32, "train": {"micro_batch_size": 8}},
    "LoRA": {**FLOAT32, "lora": LoRAArgs(r=4)},
    "on policy": {**FLOAT32, "distill": {"on_policy": 0.5, "on_policy_tokens": 16}},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "int8": {"precision": "32-true", "teacher": TeacherArgs(precision="32-true", quantize="int8")},
    "nf4": {"precision": "32-true", "teacher": TeacherArgs(precision="32-true", quantize="nf4")},
}
"""Options of runs, in which the CPU computes the reference in float32 and without compilers."""
TOLERANCE = {"bf16-mixed": 0.02, "bf16-true": 0.02, "int8": 0.02, "nf4": 0.1, "on policy": 0.02}
"""Of a loss, relative; 1e-4 elsewhere. What is drawn on another device differs, so a run on policy is only near."""
PLAIN = {"compile": False, "activation_checkpointing": False, **FLOAT32}


def losses(out_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(out_dir) if "loss" in row]


@pytest.fixture(scope="module")
def on_cpu(student_dir, teacher_dir, alice_json, tmp_path_factory) -> dict[str, list[float]]:
    """Losses of the same runs in a process that sees no GPU."""
    directory = tmp_path_factory.mktemp("cpu")
    code = "import sys, test_runs_on_a_gpu as t; from pathlib import Path; t.run_all(*map(Path, sys.argv[1:]))"
    here = Path(__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "scripts"), *sys.path]),
    }
    places = [str(place) for place in (student_dir, teacher_dir, alice_json, directory)]
    subprocess.run([sys.executable, "-c", code, *places], check=True, env=environment, timeout=300)
    return {name: losses(directory / name) for name in CASES}


def run_all(student_dir: Path, teacher_dir: Path, data: Path, directory: Path) -> None:
    """The reference: every case without what is only about speed or memory."""
    for name, options in CASES.items():
        options = {**options, **PLAIN, "distill": {**options.get("distill", {}), "compile": False}}
        distil(student_dir, teacher_dir, alice(data), directory / name, **options)


@pytest.mark.parametrize("name", CASES)
def test_a_run_follows_the_cpu(name, on_cpu, student_dir, teacher_dir, alice_json, tmp_path):
    distil(student_dir, teacher_dir, alice_json, tmp_path / "run", **CASES[name])
    found = losses(tmp_path / "run")
    assert len(found) == 3
    assert found == pytest.approx(on_cpu[name], rel=TOLERANCE.get(name, 1e-4))
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert all(row["memory_reserved_gb"] >= row["memory_gb"] > 0 for row in rows)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cache_says_what_the_teacher_said(precision, student_dir, teacher_dir, alice_json, tmp_path):
    options = {"precision": precision, "distill": {"compile": False}}
    live = distil(student_dir, teacher_dir, alice_json, tmp_path / "live", **options)
    teacher = {"cache_dir": str(tmp_path / "cache")}
    for number, mode in enumerate(("auto", "auto", "read")):
        cached = TeacherArgs(**teacher, cache_mode=mode)
        run = distil(student_dir, teacher_dir, alice_json, tmp_path / f"cached-{number}", teacher=cached, **options)
        assert losses(tmp_path / f"cached-{number}") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
        assert all((run[key] - weight).abs().max() < 1e-4 for key, weight in live.items())


def test_a_teacher_on_its_own_stream_changes_nothing(student_dir, teacher_dir, alice_json, tmp_path, monkeypatch):
    options = {**FLOAT32, "distill": {"compile": False}, "train": {"micro_batch_size": 2}}
    ahead = distil(student_dir, teacher_dir, alice_json, tmp_path / "ahead", **options)
    monkeypatch.setattr(Teacher, "_ahead", Teacher._in_turn)
    in_turn = distil(student_dir, teacher_dir, alice_json, tmp_path / "in-turn", **options)
    assert losses(tmp_path / "ahead") == losses(tmp_path / "in-turn")
    assert all(torch.equal(ahead[key], weight) for key, weight in in_turn.items())


@pytest.mark.parametrize("name", ["akl", "one micro-batch", "LoRA", "bf16-mixed", "int8"])
def test_a_run_in_a_process_that_has_used_the_gpu_follows_the_cpu(
    name, on_cpu, student_dir, teacher_dir, alice_json, tmp_path
):
    """The allocator then hands out memory that others have written to, and does not wait for the driver."""
    measure(ESTIMATES["four micro-batches"], tmp_path, (3,))
    distil(student_dir, teacher_dir, alice_json, tmp_path / "run", **CASES[name])
    assert losses(tmp_path / "run") == pytest.approx(on_cpu[name], rel=TOLERANCE.get(name, 1e-4))
