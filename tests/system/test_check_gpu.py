"""scripts/benchmarks/check_gpu.py says what it could not measure, and works where there is something to measure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "check_gpu.py"


def check(*options) -> str:
    finished = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_that_nothing_was_measured():
    assert "There is no GPU here: nothing was measured." in check()


@pytest.mark.slow
def test_its_rows_compare_runs(student_dir, teacher_dir, alice_json):
    pair = ("--student", student_dir, "--teacher", teacher_dir, "--data", alice_json / "train.json")
    short = ("--train.max_seq_length", "128", "--data.prompt_style.class_path", "litgpt.prompts.Default")
    cases = ("float32", "filling a teacher cache", "reading it")
    printed = check(*map(str, pair), "--on_cpu", "2", "--steps", "7", "--cases", *cases, "--", *short)
    row = r"^\| (.+, \d devices?) \| (\S+) \| (\S+)% \| ([\d,]+) \| (\S+) \| (\S+) \|$"
    rows = {name: tuple(map(float, found[:2])) for name, *found in re.findall(row, printed, re.MULTILINE)}
    alone, sharded, *cached = rows.values()
    assert [*rows] == ["float32, 1 device", "float32, 2 devices", *(f"{name}, 1 device" for name in cases[1:])]
    assert alone == (0, 0) and cached == [(0, 0), (0, 0)]
    assert 0 < sharded[0] < 1e-6 and sharded[1] < 0.01
    assert "nothing was measured on a GPU" in printed
