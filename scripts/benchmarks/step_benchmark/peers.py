"""The peers' environments and the commands that measure them."""

import subprocess
import sys
from pathlib import Path

import benchmark_loss
import torch

TRL_ENVIRONMENT = benchmark_loss.PEERS_ENVIRONMENT.with_name(".venv-peers-trl")
MODULES = {
    "trl_gkd": (TRL_ENVIRONMENT, "trl_peer", ["trl_gkd"]),
    "trl_distillation": (TRL_ENVIRONMENT, "trl_peer", ["trl_distillation"]),
    "torchtune": (benchmark_loss.PEERS_ENVIRONMENT, "torchtune_peer", []),
}
NOT_MEASURED = {"arcee DistillKit": "not on PyPI"}


def install_peers() -> None:
    """Make the peers' environments once, with the torch that is installed here."""
    benchmark_loss.install_peers()
    if TRL_ENVIRONMENT.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", TRL_ENVIRONMENT], check=True)
    version = f"torch=={torch.__version__.split('+')[0]}"
    for packages in ([version], ["trl==1.16.0", "transformers==5.24.0", version]):
        subprocess.run([TRL_ENVIRONMENT / "bin/pip", "install", "-q", *packages], check=True)


def command_of(name: str, job: Path) -> list[str]:
    environment, module, arguments = MODULES[name]
    return [str(environment / "bin/python"), "-m", f"step_benchmark.{module}", *arguments, str(job)]
