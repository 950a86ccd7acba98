"""LitGPT's LoRA adapters in a student: how they start, left out of a forward, merged and saved."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config as BaseConfig
from litgpt.lora import Config, LoRALayer, LoRALinear, lora_filter
from torch import Tensor, nn
from torch.func import functional_call

from litgpt_akl.config.args import LoRAArgs
from litgpt_akl.messages import UserError
from litgpt_akl.models.parallel import gather_full, unwrap
from litgpt_akl.models.tensor_file import TensorFile, read_tensors

ADAPTERS = "lit_model.pth.lora"
"""LitGPT's name for a file with adapters alone, under the key ``model``."""


def lora_config(config: BaseConfig, lora: LoRAArgs) -> Config:
    """LitGPT's configuration of a model with adapters."""
    adapters = {f"lora_{name}": value for name, value in asdict(lora).items()}
    return Config(**asdict(config), **adapters)


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name; none in a model without LoRA."""
    return {name: tensor for name, tensor in unwrap(model).named_parameters() if lora_filter(name, tensor)}


def with_new_adapters(model: nn.Module, base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The parameters that a LoRA run starts from, by ``model``'s names; the adapters change nothing yet.

    Of ``model``, which may be sharded, only the shapes are read; ``base`` are a checkpoint's weights.

    Raises:
        UserError: LitGPT's LoRA model lacks parts of the checkpoint's.
    """
    names = {_name_in_base(name) for name, _ in unwrap(model).named_parameters(remove_duplicate=False)}
    if lacking := sorted(base.keys() - names):
        raise UserError(
            f"LitGPT's LoRA model of {model.config.name} lacks {len(lacking)} of the student's tensors, {lacking[0]}"
            " among them.\nLeave --lora.r out to train the whole student."
        )
    adapters, generator = adapters_of(model), torch.Generator().manual_seed(seed)
    start = {}
    for name, parameter in unwrap(model).named_parameters():
        if name not in adapters:
            start[name] = base[_name_in_base(name)]
            continue
        start[name] = torch.zeros(parameter.shape)
        if name.endswith("lora_A"):
            # as LitGPT starts it, but from a seed of its own: the same for any number of processes
            nn.init.kaiming_uniform_(start[name], a=math.sqrt(5), generator=generator)
    return start


def _name_in_base(name: str) -> str:
    return name.replace(".linear.", ".")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model is its base, in which there is no dropout; one without adapters stays as it is."""
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    for layer in layers:
        # LitGPT's word for: the base's product is all of it
        layer.merged = True
    try:
        yield
    finally:
        for layer in layers:
            layer.merged = False


class _Update(nn.Module):
    """What a layer's adapter adds to its weight."""

    def __init__(self, layer: LoRALinear):
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.get_lora_AB()


def merged_weight(layer: LoRALinear) -> Tensor:
    """A layer's weight with its adapter, ``[out_features, in_features]`` on the CPU; rounded once to its dtype.

    All processes must ask for it together.
    """
    device = layer.linear.weight.device
    adapter = {f"layer.{name}": gather_full(getattr(layer, name)).to(device).float() for name in ("lora_A", "lora_B")}
    update, base = functional_call(_Update(layer), adapter, ()), gather_full(layer.linear.weight)
    return (base.float() + update.cpu()).to(base.dtype)


def store_merged(model: nn.Module, file: TensorFile) -> dict[str, Any]:
    """Write a model's parameters, adapters merged into the base one layer at a time, under the names of the base."""
    model, stored = unwrap(model), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if lora_filter(name, parameter):
            continue
        layer = model.get_submodule(name.removesuffix(".linear.weight")) if name.endswith(".linear.weight") else None
        # a layer that is no target has no adapter
        merge = hasattr(layer, "lora_A")
        stored[_name_in_base(name)] = file.write(merged_weight(layer)) if merge else file.store(parameter)
    return stored


def store_adapters(model: nn.Module, file: TensorFile) -> dict[str, Any]:
    """Write the adapters alone, as LitGPT's ``finetune_lora`` does."""
    return {"model": {name: file.store(parameter) for name, parameter in adapters_of(model).items()}}


def read_trained(directory: Path, model: nn.Module) -> dict[str, Tensor]:
    """What a run has trained, from a directory that it saved: the adapters, or without LoRA the student; memory-mapped.

    Raises:
        UserError: the run that saved it had other adapters than ``model``, or only one of the two has any.
    """
    adapters, path = adapters_of(model), directory / ADAPTERS
    if adapters and path.is_file():
        saved = read_tensors(path, "LoRA adapters")["model"]
        if {name: value.shape for name, value in saved.items()} == {name: p.shape for name, p in adapters.items()}:
            return saved
    elif not adapters and not path.is_file():
        return read_tensors(directory / "lit_model.pth", "weights")
    raise UserError(
        f"{directory} was saved with other --lora options ({'some' if path.is_file() else 'no'} adapters), and what is"
        " trained cannot change in a run.\nGive the --lora options that it was started with."
    )
