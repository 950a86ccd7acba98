"""Small random models of the families that LitGPT converts in different ways, with their Hugging Face config.json."""

import json
from pathlib import Path

import materials
import torch
from litgpt.config import Config
from litgpt.model import GPT

from helpers.export_cases import SIZES

COMMON = {name: getattr(materials.STUDENT_CONFIG, name) for name in SIZES}
KINDS = {"sliding_window_indices": [1, 0], "attention_scores_scalar": COMMON["head_size"]}
LAYER_TYPES = {
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": COMMON["head_size"],
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 16,
}

FAMILIES: dict[str, tuple[dict, str, str, dict]] = {
    "Llama-3.2-1B": (
        {},
        "LlamaForCausalLM",
        "llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Qwen2.5-0.5B": ({}, "Qwen2ForCausalLM", "qwen2", {"rope_theta": 1000000.0}),
    "Qwen3-0.6B": ({}, "Qwen3ForCausalLM", "qwen3", {"rope_theta": 1000000.0}),
    "Gemma-2b": ({}, "GemmaForCausalLM", "gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    "Gemma-2-2b": (
        {**KINDS, "sliding_window_size": 16, "final_logit_softcapping": 2.0},
        "Gemma2ForCausalLM",
        "gemma2",
        {**LAYER_TYPES, "final_logit_softcapping": 2.0},
    ),
    "Gemma-3-1b-it": (
        {**KINDS, "sliding_window_size": 16, "rope_indices": [1, 0]},
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**LAYER_TYPES, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
    ),
    "OLMo-2-1124-7B": ({}, "Olmo2ForCausalLM", "olmo2", {"rope_theta": 500000.0}),
    "Phi-3-mini-4k-instruct": (
        {"sliding_window_size": None},
        "Phi3ForCausalLM",
        "phi3",
        {"pad_token_id": 0, "sliding_window": None},
    ),
    "Phi-4-reasoning": ({}, "Phi3ForCausalLM", "phi3", {"pad_token_id": 0, "rope_theta": 500000.0}),
    "pythia-14m": ({"n_query_groups": COMMON["n_head"]}, "GPTNeoXForCausalLM", "gpt_neox", {"hidden_act": "gelu"}),
    "phi-2": (
        {"n_query_groups": COMMON["n_head"]},
        "PhiForCausalLM",
        "phi",
        {"num_key_value_heads": None, "hidden_act": "gelu_new", "partial_rotary_factor": 0.4},
    ),
    "falcon-7b": (
        {"n_query_groups": 1, "intermediate_size": 4 * COMMON["n_embd"]},
        "FalconForCausalLM",
        "falcon",
        {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False},
    ),
    "Qwen3-30B-A3B": (
        {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 32},
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "rope_theta": 1000000.0,
        },
    ),
    "Mixtral-8x7B-v0.1": (
        {"n_expert": 4, "intermediate_size": 176},
        "MixtralForCausalLM",
        "mixtral",
        {"num_local_experts": 4, "intermediate_size": 176, "num_experts_per_tok": 2, "rope_theta": 1000000.0},
    ),
}
"""By LitGPT's names: what is small in LitGPT's configuration; class, type and further entries of config.json."""


def write_family(
    name: str, directory: Path, *, tied: bool, ids: int = COMMON["vocab_size"], layers: int = COMMON["n_layer"]
) -> None:
    """A LitGPT checkpoint of two layers, or more, in which no two parameters are alike, and no norm does nothing."""
    changes, architecture, model_type, entries = FAMILIES[name]
    changes, entries = (
        {key: value * (layers // 2) if isinstance(value, list) else value for key, value in of.items()}
        for of in (changes, entries)
    )
    sizes = {"vocab_size": ids, "padded_vocab_size": ids, "n_layer": layers}
    config = Config.from_name(name, **{**COMMON, **sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.1)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    materials.write_checkpoint(directory, config, model.state_dict(), tied=tied)
    epsilon = {"layer_norm_eps": config.norm_eps, "rms_norm_eps": config.norm_eps}
    hf_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if model_type == "falcon":
        # its class works it out and takes none
        del hf_config["head_dim"]
    own = {"architectures": [architecture], "model_type": model_type, **epsilon, **entries}
    materials.write_json(directory / "config.json", {**hf_config, **own})
