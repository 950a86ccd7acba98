"""scripts/benchmarks/gpu.py, rehearsed on a CPU; and what training needs of other packages."""

import json
import re
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from gpu_benchmark import comparison_rows, flops, loss_rows, runs, table, worker
from gpu_benchmark.rows import NotHere, Place, Row
from helpers.absent import environment_without
from loss_benchmark import option_pairs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt_akl.models.gpt import build_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "gpu.py"
NOT_NEEDED = ("bokeh", "datasets", "nltk", "pandas", "pyarrow", "rouge_score", "scipy", "sklearn", "scikit_learn")
NOT_NEEDED += ("aiohttp", "litdata", "lm_eval", "matplotlib", "requests", "transformers", "accelerate", "bitsandbytes")
NOT_NEEDED += ("PIL", "pillow", "colorama", "dill", "pygments", "regex", "rich")
OF_TORCH = {"torch", "triton", "setuptools", "sympy", "mpmath", "networkx", "typing-extensions", "markupsafe", "jinja2"}
"""What comes with torch."""
LOADED = """
import sys
from importlib.metadata import packages_distributions
import gpu_benchmark.worker, litgpt_akl.training.main, litgpt_akl.commands.finetune_akl
found = packages_distributions()
print(*sorted({d.lower().replace("_", "-") for n in sys.modules for d in found.get(n.split(".")[0], ())}))
"""


def benchmark(*options, environment=None, timeout=110) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def results_in(directory: Path) -> dict[str, dict]:
    return {row["title"]: row for row in map(json.loads, (directory / "gpu.jsonl").read_text().splitlines())}


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(torch.device("cpu"), tiny=True, devices=1, scratch=tmp_path)


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The variables of a Python that has only what is needed."""
    (tmp_path / "site").mkdir()
    return environment_without(NOT_NEEDED, tmp_path / "site")


def test_what_training_loads_is_what_is_said_to_be_required(bare):
    bare["PYTHONPATH"] = f"{bare['PYTHONPATH']}:{SCRIPT.parent}"
    loaded = subprocess.run([sys.executable, "-c", LOADED], env=bare, capture_output=True, text=True, check=True)
    listed = benchmark("--requirements").stdout.split()
    assert set(loaded.stdout.split()) - OF_TORCH - {"litgpt-akl"} <= set(listed)


def test_on_a_bare_python_a_step_a_loss_and_runs_are_measured(bare, tmp_path):
    out = tmp_path / "out"
    rows = ["step: qwen3, bf16-mixed, live", "akl, eager", "host waits a step: live", "a teacher cache", "reading it"]
    finished = benchmark("--tiny", "--device", "cpu", "--output", out, "--rows", *rows, environment=bare)
    assert finished.returncode == 0, finished.stderr
    results = results_in(out)
    steps = {name: row for name, row in results.items() if name.startswith("step")}
    assert {row["error"] for row in steps.values() if "error" in row} == {"bitsandbytes is not installed"}
    first = steps["step: qwen3, bf16-mixed, live"]["figures"]
    assert first["steps"] == 40 and first["tokens/s"] > 0 and first["predicted GB"] > 0 and first["MFU"] is None
    for name in ("filling a teacher cache", "reading it"):
        found = results[f"runs, to the first in float32: {name}"]["figures"]
        assert found["weights, at most"] == found["losses, at most"] == 0
    waits = results["host waits a step: live"]["figures"]
    assert waits["at the step's end"] == 3 and "training/loop.py: clip_gradients" in str(waits["places"])
    assert "no figure here says anything" in finished.stdout
    assert (out / "gpu.md").read_text() in finished.stdout
    assert re.search(r"^\| akl, eager \|", finished.stdout, re.MULTILINE)


def test_rows_that_fail_are_written_and_the_next_goes_on(place, monkeypatch, capsys):
    def fails(_: Place) -> dict:
        raise ValueError("no\nsecond line")

    def is_not_here(_: Place) -> dict:
        raise NotHere("not installed")

    rows = [Row("a", "fails", fails), Row("a", "is not here", is_not_here), Row("b", "works", lambda _: {"x": 1.5})]
    monkeypatch.setattr(worker, "ROWS", {row.title: row for row in rows})
    assert worker.run_rows(place, [row.title for row in rows], time.time() + 60, sys.stdout) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [line for line in lines if "begun" not in line]
    assert found[0]["error"] == "ValueError: no" and found[0]["at"][-1].endswith("fails")
    assert found[1]["error"] == "not installed" and found[2]["figures"] == {"x": 1.5}
    text = table.tables(found)
    assert "- not measured: fails: ValueError: no" in text and "| works | 1.500 |" in text
    assert worker.run_rows(place, [rows[2].title], time.time() - 1, sys.stdout) == 0
    assert capsys.readouterr().out == ""


def test_what_takes_too_long_or_was_not_reached_is_named(tmp_path):
    measure = runpy.run_path(str(SCRIPT))["measure"]
    rows = {row.title: row for row in (*loss_rows.FIRST[::-1], *comparison_rows.ALL_DEVICES)}
    arguments = Namespace(limit=350.0, row_limit=0.5, device="cpu", devices=1, tiny=True)
    found = measure(arguments, rows, tmp_path, time.time() + 1)
    assert [row["title"] for row in found] == list(results_in(tmp_path))
    errors = {row["title"]: row["error"] for row in found}
    first, second = (errors.pop(row.title) for row in loss_rows.FIRST[::-1])
    assert first.startswith("ended by --row_limit after")
    assert "--limit" in second
    assert set(errors.values()) == {"there is one device"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_that_nothing_was_measured(tmp_path):
    assert "There is no GPU here: nothing was measured." in benchmark("--output", tmp_path / "out").stderr
    assert not (tmp_path / "out").exists()


def test_operations_are_those_that_pytorch_counts(place):
    estimate = place.estimate("qwen3")
    shape = estimate.global_batch_size, estimate.sequence_length
    counted = {}
    for role, config, tied in (("student", estimate.student, True), ("teacher", estimate.teacher, False)):
        model = build_model(config, tied)
        # written out, attention is the only product of batches of matrices
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = model(torch.zeros(shape, dtype=torch.int64))
            if role == "student":
                output.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        attention = counts[torch.ops.aten.bmm]
        assert attention > 0
        # half of its squares is masked
        counted[role] = sum(counts.values()) - attention // 2
    assert flops.step_operations(estimate) == counted["student"] + counted["teacher"]
    cached = place.estimate("qwen3", teacher_role="cached")
    head = flops.head_forward(estimate.teacher, shape[0] * shape[1])
    assert flops.step_operations(cached) == counted["student"] + head


def test_drawn_weights_are_the_same_each_time_and_as_peaked_as_told(place):
    config = place.estimate("qwen3").teacher
    drawn = runs.DrawnWeights(config, "teacher", confidence=2.0)
    assert torch.equal(drawn["lm_head.weight"], runs.DrawnWeights(config, "teacher", confidence=2.0)["lm_head.weight"])
    assert not torch.equal(drawn["lm_head.weight"], runs.DrawnWeights(config, "student")["lm_head.weight"])
    hidden = torch.nn.functional.rms_norm(torch.randn(64, config.n_embd), (config.n_embd,))
    assert (hidden @ drawn["lm_head.weight"].T).std().item() == pytest.approx(2.0, rel=0.1)
    assert torch.equal(drawn["transformer.ln_f.weight"], torch.ones(config.n_embd))


@pytest.mark.slow
def test_every_row_is_rehearsed(tmp_path):
    out = tmp_path / "out"
    options = "--tiny", "--device", "cpu", "--devices", 2, "--limit", 1000, "--row_limit", 300
    finished = benchmark(*options, "--output", out, timeout=1100)
    assert finished.returncode == 0, finished.stderr
    results = results_in(out)
    assert set(results) == set(worker.ROWS)
    failed = {name: row for name, row in results.items() if "error" in row and not row.get("not_here")}
    assert failed == {}
    peers = {row.title for row in loss_rows.PEERS}
    assert {name for name, row in results.items() if row.get("not_here")} <= peers
    compiled = [row["figures"] for row in results.values() if row["group"] == "compiled - eager"]
    assert len(compiled) == len(option_pairs.SETS) and all(figures["all below 1e-05"] for figures in compiled)
    exact = [f"runs, to the first in float32: {row.name}" for row in comparison_rows.ONE_DEVICE[:3]]
    assert all(results[name]["figures"]["weights, at most"] == 0 for name in exact)
    sharded = [f"runs, to the first in float32: {row.name}" for row in comparison_rows.ALL_DEVICES]
    assert all(0 < results[name]["figures"]["weights, at most"] < 1e-2 for name in sharded)
    for name in (sharded[0], sharded[-1]):
        # float32
        assert results[name]["figures"]["weights, at most"] < 1e-5
