"""How many parameters a model has, of which kinds, from its configuration."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from litgpt import lora, model
from litgpt.config import Config
from torch import nn


@dataclass(frozen=True)
class HashableConfig:
    """A configuration that can be the key of a cache: plans that are compared have the same models."""

    text: str
    config: Config = field(compare=False, repr=False)

    @classmethod
    def of(cls, config: Config) -> "HashableConfig":
        return cls(repr(config), config)


class ModelSize(NamedTuple):
    """Numbers of parameters of a model."""

    whole: int
    block: int
    """The largest."""
    trained_block: int
    root: int
    """All that is not in a block."""
    head: int
    largest: tuple[int, int]
    """The two largest matrices that are trained."""
    trained: int
    products: int
    """In the weights of the blocks' linear layers."""
    trains_head: bool
    trains_embeddings: bool


@lru_cache
def measure_size(config: HashableConfig, tied: bool) -> ModelSize:
    """Count a model's parameters; tied, embeddings and head are one matrix."""
    config, model = config.config, _build_on_meta(config.config)
    head = config.padded_vocab_size * config.n_embd
    if tied:
        # LitGPT's layers with adapters have their weights one level down
        model.transformer.wte.weight = getattr(model.lm_head, "linear", model.lm_head).weight
    parameters = dict(model.named_parameters())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.transformer.h]
    whole = sum(parameter.numel() for parameter in parameters.values())
    trains_head = any(parameter.requires_grad for parameter in model.lm_head.parameters())
    trains_embeddings = model.transformer.wte.weight.requires_grad
    sizes = sorted((parameter.numel() for parameter in parameters.values() if parameter.requires_grad), reverse=True)
    linear = (module for module in model.transformer.h.modules() if isinstance(module, nn.Linear))
    return ModelSize(
        whole=whole,
        block=max(blocks),
        trained_block=max(_trained(block) for block in model.transformer.h),
        root=whole - sum(blocks),
        head=head,
        largest=tuple(sizes[:2]),
        trained=sum(sizes),
        products=sum(module.weight.numel() for module in linear),
        trains_head=trains_head,
        trains_embeddings=trains_embeddings,
    )


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _build_on_meta(config: Config) -> model.GPT:
    """LitGPT's model without memory for its parameters; of a LoRA configuration only LoRA's are trainable."""
    with torch.device("meta"):
        if not isinstance(config, lora.Config):
            return model.GPT(config)
        student = lora.GPT(config)
    lora.mark_only_lora_as_trainable(student)
    return student
