"""Students with LoRA adapters on all sorts of layers, and what LitGPT itself makes of their files."""

from pathlib import Path

import torch
from litgpt import lora as litgpt_lora
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.config.args import LoRAArgs
from litgpt_akl.models.lora import ADAPTERS, lora_config
from litgpt_akl.models.weights import read_config

IDS = torch.arange(4, 132).view(2, 64)
ALL = dict.fromkeys(("query", "key", "value", "projection", "mlp", "head"), True)
TARGETS = {
    "default": {},
    "key": {"query": False, "key": True, "value": False},
    "query, key": {"key": True, "value": False},
    "projection, mlp": {"query": False, "value": False, "projection": True, "mlp": True},
    "head": {"query": False, "value": False, "head": True},
    "all": ALL,
}


def adapted(targets: str, **changes) -> LoRAArgs:
    return LoRAArgs(**{"r": 4, "dropout": 0.0, **TARGETS[targets], **changes})


def read(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "lit_model.pth", weights_only=True)


def read_adapters(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / ADAPTERS, weights_only=True)["model"]


def litgpt_model(source: Path, weights: dict[str, torch.Tensor]) -> GPT:
    model = GPT(Config.from_file(source / "model_config.yaml"))
    model.load_state_dict(weights)
    return model.eval()


def litgpt_lora_model(source: Path, lora: LoRAArgs, adapters: dict[str, torch.Tensor]) -> litgpt_lora.GPT:
    """LitGPT's own, loaded as LitGPT does it."""
    model = litgpt_lora.GPT(lora_config(read_config(source), lora))
    litgpt_lora.mark_only_lora_as_trainable(model)
    missing, unexpected = model.load_state_dict(read(source) | adapters, strict=False)
    assert (missing, unexpected) == ([], [])
    return model.eval()
