"""Runs that are killed again and again, as few as `helpers.torture`, a command, can."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import torture


@pytest.mark.slow
def test_runs_that_are_killed_end_as_if_nothing_had_happened(tmp_path):
    options = ["--kills", "4", "--kinds", "streaming", "--processes", "1", "2", "--work_dir", str(tmp_path)]
    command = [sys.executable, "-m", "helpers.torture", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:-1]]
    assert [row[:3] for row in rows] == [["streaming", "1", "2"], ["streaming", "2", "2"]]
    assert all(int(runs) == int(identical) > 0 for *_, runs, identical in rows)


CHANGES = {
    "a weight": lambda run: torch.save({"w": torch.tensor([1.0, 2.5])}, run / "final" / "lit_model.pth"),
    "a checkpoint less": lambda run: (run / "step-000002" / "training_state.pth").unlink(),
    "a leftover": lambda run: (run / ".0c.partial").touch(),
    "another loss": lambda run: (run / "logs" / "csv" / "version_0" / "metrics.csv").write_text("step,loss\n1,3\n"),
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_what_differs_is_found(tmp_path, change):
    for name in ("first", "second"):
        run = tmp_path / name / "run"
        for directory in ("final", "step-000002", "logs/csv/version_0"):
            (run / directory).mkdir(parents=True)
        torch.save({"w": torch.tensor([1.0, float("nan")])}, run / "final" / "lit_model.pth")
        torch.save({"random": [{"torch": torch.arange(3)}], "step": 2}, run / "step-000002" / "training_state.pth")
        (run / "logs" / "csv" / "version_0" / "metrics.csv").write_text("step,loss\n1,2\n")
    if change is not None:
        CHANGES[change](run)
    assert (torture.difference(tmp_path / "first" / "run", run) is None) == (change is None)
