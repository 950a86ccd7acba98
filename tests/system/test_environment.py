"""The scripts' environment takes the torch that the machine can use; here with programs that only note their calls."""

import os
import subprocess
from pathlib import Path

import pytest

import litgpt_akl

SCRIPT = Path(litgpt_akl.__file__).parents[1] / "scripts" / "environment.sh"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("driver", "index_answers", "from_cpu_index", "said"),
    [(True, True, 0, 0), (False, True, 1, 0), (False, False, 1, 1)],
    ids=["a GPU", "no GPU", "no GPU, and the index does not answer"],
)
def test_torch_is_the_build_for_cpus_where_there_is_no_driver(tmp_path, driver, index_answers, from_cpu_index, said):
    programs, calls = tmp_path / ".venv" / "bin", tmp_path / "calls"
    write_program(programs / "python", "exit 0")
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    write_program(programs / "uname", "echo Linux")
    write_program(programs / "nvidia-smi", f"exit {0 if driver else 9}")
    write_program(
        programs / "pip", f'echo "$*" >> {calls}\ncase "$*" in *{CPU_INDEX}*) exit {1 - index_answers};; esac'
    )
    (tmp_path / "pyproject.toml").touch()
    command = ["bash", "-euo", "pipefail", "-c", f"source {SCRIPT} demo; source {SCRIPT} demo"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=30, check=True)
    *torch, package = calls.read_text().splitlines()
    assert [CPU_INDEX in call for call in torch] == [True] * from_cpu_index + [False] * (1 - from_cpu_index + said)
    assert all("torch==2.13.0" in call for call in (*torch, package))
    assert package.endswith("-e .[demo]") and CPU_INDEX not in package
    assert done.stdout.count("taking PyPI's") == said and done.stderr == ""
