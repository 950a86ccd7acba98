"""The user-visible check of scripts/torture.py, in its smallest form."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "torture.py"


def test_a_run_that_is_killed_ends_as_if_nothing_had_happened(tmp_path):
    options = ["--kills", "3", "--workers", "2", "--noise", "with", "--steps", "120", "--work_dir", str(tmp_path)]
    result = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same weights, every step once in the metrics" in result.stdout
