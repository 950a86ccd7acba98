"""A Hugging Face checkpoint's safetensors files read as LitGPT's weights, without a converted copy on the disk."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from litgpt.config import Config
from litgpt.scripts import convert_hf_checkpoint as convert
from safetensors.torch import load_file
from torch import Tensor

BY_NAME: dict[str, Callable] = {
    "gemma-2": lambda config: partial(convert.copy_weights_gemma_2, {}),
    "gemma-3": lambda config: partial(convert.copy_weights_gemma_3, {}, config=config),
    "phi": lambda config: partial(convert.copy_weights_phi, config, {}),
    "qwen2.5": lambda config: partial(convert.copy_weights_qwen_2_5, config, {}),
    "qwq": lambda config: partial(convert.copy_weights_qwen_2_5, config, {}),
    "olmo-2-": lambda config: partial(convert.copy_weights_olmo2, config, {}),
    "qwen3": lambda config: partial(convert.copy_weights_qwen_3, config, {}),
}
"""LitGPT's own translations, by how the name of a configuration begins; which one it takes is not to be asked of it."""


def files_in(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face checkpoint, in the order of their names."""
    return sorted(directory.glob("*.safetensors"))


def read(directory: Path, config: Config) -> dict[str, Tensor]:
    """Tensors by LitGPT's names, memory-mapped but for the joined query, key and value weights."""
    found = {name: tensor for path in files_in(directory) for name, tensor in load_file(path).items()}
    weights: dict[str, Tensor] = {}
    _translation(config)(weights, found)
    return weights


def _translation(config: Config) -> Callable:
    for begin, translation in BY_NAME.items():
        if config.name.lower().startswith(begin):
            return translation(config)
    if "falcon" in config.name:
        return partial(convert.copy_weights_falcon, config)
    if config.mlp_class_name in ("LLaMAMLP", "GemmaMLP", "LLaMAMoE"):
        return partial(convert.copy_weights_hf_llama, config, {})
    return partial(convert.copy_weights_gpt_neox, config)
