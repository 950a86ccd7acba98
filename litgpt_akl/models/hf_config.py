"""The config.json that Hugging Face's libraries, vLLM and llama.cpp read, of a LitGPT checkpoint."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config

from litgpt_akl.messages import UserError
from litgpt_akl.models.model_files import describe_weights, read_hf_config, read_tokenizer

SIZES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_query_groups",
}
"""Entries that a model made from another one may still have from it, and LitGPT's names of them."""

COMMON_TO_LLAMAS = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "bias": False,
}
"""What a model like Llama, Qwen2 or Qwen3 has in LitGPT."""

DESCRIBED = (
    *("name", "hf_config", "block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "padded_vocab_size"),
    *("norm_eps", "norm_qk", "n_head", "head_size", "n_query_groups", "attn_bias", "rope_base", "rope_adjustments"),
    "intermediate_size",
)
"""What such models differ in; in all else they have LitGPT's defaults."""


def make_hf_config(checkpoint_dir: Path, config: Config, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The content of a config.json for the weights in a checkpoint directory.

    Args:
        checkpoint_dir: its own config.json is taken if it has one.
        config: the model's.
        tied: whether embeddings and LM head are one matrix.
        dtype: of the weights.

    Raises:
        UserError: the checkpoint's config.json is none, or one of another model; or there is none and none can be made.
    """
    path = checkpoint_dir / "config.json"
    hf_config = _of_language_model(read_hf_config(path)) if path.is_file() else _make(checkpoint_dir, config)
    for entry in ("architectures", "model_type"):
        if not hf_config.get(entry):
            raise UserError(
                f"{path} does not say what the model is: it lacks {entry}. Copy the original model's to there."
            )
    for entry, name in SIZES.items():
        # some say null and mean a default
        if hf_config.get(entry) not in (None, getattr(config, name)):
            raise UserError(
                f"{path} is of another model: {entry} is {hf_config[entry]}, and model_config.yaml says"
                f" {getattr(config, name)}.\nCorrect it; `litgpt make_student` writes both."
            )
    # the module that it names is not here, and would be looked for where remote code is trusted
    hf_config.pop("auto_map", None)
    if not hf_config.keys() & {"dtype", "torch_dtype"}:
        # of the two names the one that every version knows
        hf_config["torch_dtype"] = None
    # what is in the file is what counts: it may be padded
    describe_weights(hf_config, tied, dtype, config.padded_vocab_size)
    return hf_config


def _of_language_model(hf_config: dict[str, Any]) -> dict[str, Any]:
    """LitGPT has the language model only, of which there is a class in Transformers of its own."""
    if "text_config" not in hf_config:
        return hf_config
    if hf_config.get("model_type") != "gemma3":
        raise UserError(
            f"config.json is of a model with several parts ({hf_config.get('model_type')}), of which LitGPT has one"
            " only.\nPut one there that describes the language model alone."
        )
    whole = {name: value for name, value in hf_config.items() if name.endswith("_token_id") or "dtype" in name}
    alone = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    return {**whole, **hf_config["text_config"], **alone}


def _make(checkpoint_dir: Path, config: Config) -> dict[str, Any]:
    """A config.json for a model like Llama, Qwen2 or Qwen3; raises UserError for others."""
    for field in fields(Config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        expected = COMMON_TO_LLAMAS.get(field.name, default)
        if field.name not in DESCRIBED and getattr(config, field.name) != expected:
            _refuse(checkpoint_dir, config, field.name)
    family = "qwen3" if config.norm_qk else "qwen2" if config.attn_bias else "llama"
    if config.norm_qk and config.attn_bias:
        _refuse(checkpoint_dir, config, "attn_bias")
    tokenizer = read_tokenizer(checkpoint_dir)
    hf_config = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": config.n_embd,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.block_size,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_query_groups,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_base),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    if config.rope_adjustments is not None:
        adjustments = dict(config.rope_adjustments)
        if "original_max_seq_len" not in adjustments:
            _refuse(checkpoint_dir, config, "rope_adjustments")
        adjustments["original_max_position_embeddings"] = adjustments.pop("original_max_seq_len")
        hf_config["rope_scaling"] = {"rope_type": "llama3", **adjustments}
    return hf_config


def _refuse(checkpoint_dir: Path, config: Config, name: str) -> None:
    raise UserError(
        f"{checkpoint_dir} has no config.json, and one can be made only for models like Llama, Qwen2 and Qwen3:"
        f" {name} is {getattr(config, name)!r}.\nCopy the config.json of {config.name} on Hugging Face to there."
    )
