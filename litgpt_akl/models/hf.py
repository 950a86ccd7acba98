"""Hugging Face's formats: safetensors files read as LitGPT's weights, and LitGPT's checkpoints written for them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from litgpt.config import Config
from litgpt.scripts import convert_hf_checkpoint as convert
from litgpt.scripts import convert_lit_checkpoint as convert_back
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt_akl.files.changed_files import watch
from litgpt_akl.files.reading import explain_damage, plain_names, read_json
from litgpt_akl.messages import UserError, reason
from litgpt_akl.models.config_agreement import GEMMAS, check_agreement
from litgpt_akl.models.model_files import describe_weights, read_hf_config, read_tokenizer, write_json

SIZES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_query_groups",
}
"""Entries that every config.json has, and LitGPT's names of them."""

NOT_OF_THE_MODEL = ("auto_map", "quantization_config", "_name_or_path", "id2label", "label2id", "problem_type")
"""Entries of a config.json that say how its own weights lie there, or where code for them is; both are others now."""

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
    """The content of a config.json for weights of a ``dtype``: from the one in the checkpoint directory if it has one.

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
    check_agreement(checkpoint_dir, config, hf_config)
    if hf_config["model_type"] in GEMMAS:
        hf_config["rms_norm_eps"] = config.norm_eps
    for entry in NOT_OF_THE_MODEL:
        hf_config.pop(entry, None)
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
        **{entry: getattr(config, name) for entry, name in SIZES.items()},
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.block_size,
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


INDEX = "model.safetensors.index.json"
"""Says which tensor is in which of several files."""
WHOLE = "model.safetensors"
"""Holds all of them, if there is no index."""
HEADS = ("lm_head.weight", "embed_out.weight")
"""Hugging Face's names of an LM head."""
OTHER_FORMATS = ("consolidated", "adapter_")
"""How names of files begin in which tensors have other names, or are of a LoRA adapter alone."""


def _phi_back(config: Config, state_dict: dict[str, Tensor], lit_weights: dict[str, Tensor]) -> None:
    # of models named Phi-4 in LitGPT's spelling its translation loses the LM head, also where it is not tied
    convert_back.copy_weights_phi(replace(config, name=config.name.lower()), state_dict, lit_weights)


def _olmo_2_back(config: Config, state_dict: dict[str, Tensor], lit_weights: dict[str, Tensor]) -> None:
    # LitGPT's translation knows one of its own model's norms by another name
    renamed = {name.replace(".post_attention_norm.", ".norm_2."): tensor for name, tensor in lit_weights.items()}
    convert_back.copy_weights_olmo2(config, state_dict, renamed)


BY_NAME: dict[str, tuple[Callable, Callable]] = {
    # LitGPT asks for gemma-2, which Gemma-2b begins with, too
    "gemma-2-": (convert.copy_weights_gemma_2, convert_back.copy_weights_gemma_2),
    "gemma-3": (convert.copy_weights_gemma_3, convert_back.copy_weights_gemma_3),
    "phi": (convert.copy_weights_phi, _phi_back),
    "qwen2.5": (convert.copy_weights_qwen_2_5, convert_back.copy_weights_qwen_2_5),
    "qwq": (convert.copy_weights_qwen_2_5, convert_back.copy_weights_qwen_2_5),
    "olmo-2-": (convert.copy_weights_olmo2, _olmo_2_back),
    "qwen3": (convert.copy_weights_qwen_3, convert_back.copy_weights_qwen_3),
}
"""LitGPT's own translations from Hugging Face's names and back, by how the name of a configuration begins; which one it
takes is not to be asked of it."""


def files_in(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face checkpoint: those that its index names, else ``model.safetensors``.

    Without either they are all that there are, but for Mistral's own format and adapters.

    Raises:
        UserError: the index is damaged, or names something else than files beside it.
    """
    places = _read_index(directory)
    if places is not None:
        return [directory / name for name in sorted(set(places.values()))]
    if (directory / WHOLE).is_file():
        return [directory / WHOLE]
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith(OTHER_FORMATS))


def _read_index(directory: Path) -> dict[str, str] | None:
    """The names of tensors, and of the files that they are in; None if there is no index."""
    path = directory / INDEX
    if not path.is_file():
        return None
    places = read_json(path).get("weight_map")
    with explain_damage(path, "an index of safetensors files"):
        plain_names(dict.fromkeys(places.values()), path)
    return places


def read(directory: Path, way_out: str) -> dict[str, Tensor]:
    """Tensors by Hugging Face's names, memory-mapped.

    Raises:
        UserError: a file is damaged or missing, or lacks what the index says is in it; ``way_out`` is its second line.
    """
    found: dict[str, Tensor] = {}
    places = _read_index(directory) or {}
    for path in files_in(directory):
        with explain_damage(path, "safetensors", way_out):
            watch([path])
            tensors = load_file(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{path} holds {twice[0]}, which another file of {directory} holds, too.\n{way_out}")
        if lacking := sorted(name for name, place in places.items() if place == path.name and name not in tensors):
            raise UserError(f"{path} lacks {lacking[0]}, which is in it by {directory / INDEX}.\n{way_out}")
        found |= tensors
    return found


def translate(config: Config, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by LitGPT's names from those by Hugging Face's; new are only joined query, key and value weights."""
    translation, weights = _translations(config)[0], {}
    known = {"config": config, "qkv_weights": {}, "state_dict": weights, "hf_weights": found}
    translation(**{name: known[name] for name in signature(translation).parameters.keys() & known})
    return weights


def _translations(config: Config) -> tuple[Callable, Callable]:
    for begin, translations in BY_NAME.items():
        if config.name.lower().startswith(begin):
            return translations
    if "falcon" in config.name:
        return convert.copy_weights_falcon, convert_back.copy_weights_falcon
    if config.mlp_class_name in ("LLaMAMLP", "GemmaMLP", "LLaMAMoE"):
        return convert.copy_weights_hf_llama, convert_back.copy_weights_llama
    return convert.copy_weights_gpt_neox, convert_back.copy_weights_gpt_neox


def translate_back(config: Config, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors and Hugging Face's names of them, from LitGPT's; one layer at a time, since some are put together anew.

    Raises:
        UserError: LitGPT has no names for them.
    """
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        parts = name.split(".")
        layers[".".join(parts[:3]) if parts[:2] == ["transformer", "h"] else name][name] = tensor
    translation = _translations(config)[1]
    # the LM head is never left out: whether it is tied, a name does not tell
    kept = {"untie_weights": False} if "untie_weights" in signature(translation).parameters else {}
    for layer in layers.values():
        translated: dict[str, Tensor] = {}
        try:
            # the one for Phi-3 fails where a layer begins with its MLP
            translation(config, translated, dict(sorted(layer.items())), **kept)
        except (KeyError, NotImplementedError) as error:
            raise UserError(
                f"LitGPT cannot convert {config.name} to Hugging Face's names ({type(error).__name__}:"
                f" {reason(error)}).\nIt chooses the conversion by the name in model_config.yaml: is that the model's?"
            ) from error
        yield from translated.items()


def write(directory: Path, config: Config, weights: dict[str, Tensor], max_shard_size: int | str) -> None:
    """Write LitGPT's weights as safetensors files, with an index if they are several; one file at a time is in memory.

    The weights may be memory-mapped, and have no LM head if it is tied. A file has at most ``max_shard_size`` bytes,
    which may be a text such as ``5GB``.

    Raises:
        UserError: LitGPT has no names for the weights.
        OSError: a file cannot be written.
    """
    on_meta = {name: tensor.to("meta") for name, tensor in weights.items()}
    # tensors of their own: of a part, the size of the whole would count
    described = {name: torch.empty_like(tensor) for name, tensor in translate_back(config, on_meta)}
    plan = split_torch_state_dict_into_shards(described, max_shard_size=max_shard_size)
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in translate_back(config, weights):
        file_name = plan.tensor_to_filename[name]
        files[file_name][name] = tensor.contiguous()
        if len(files[file_name]) == len(plan.filename_to_tensors[file_name]):
            try:
                save_file(files.pop(file_name), directory / file_name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(reason(error)) from error
            # safetensors keeps its files from all other users
            (directory / file_name).chmod(directory.stat().st_mode & 0o666)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(directory / INDEX, index)
