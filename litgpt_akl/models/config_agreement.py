"""Two files describe one model, config.json and model_config.yaml: what both say must be the same."""

from collections.abc import Callable
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.config import Config

from litgpt_akl.messages import UserError

WAY_OUT = "Correct the one that is wrong, or take both files from the model's publisher again."
ACTIVATIONS = {
    "LLaMAMLP": ("silu", "swish"),
    "LLaMAMoE": ("silu", "swish"),
    "tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "none": ("gelu", "gelu_python"),
}
"""Hugging Face's names of what LitGPT's MLP computes; of GptNeoxMLP and GemmaMLP by the kind of GELU."""
ACTIVATION_ENTRIES = {"falcon": "activation", **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "hidden_activation")}
"""Entries of config.json by model type, where it is not hidden_act."""
GEMMAS = ("gemma", "gemma2", "gemma3", "gemma3_text")
KINDS = {
    "norm_class_name": {"gpt_neox": "LayerNorm", "phi": "LayerNorm", "falcon": "LayerNorm", "stablelm": "LayerNorm"},
    "norm_qk": {"qwen3": True, "qwen3_moe": True, "gemma3": True, "gemma3_text": True, "olmo2": True},
    "scale_embeddings": dict.fromkeys(GEMMAS, True),
    "attn_bias": {"qwen2": True},
    "post_mlp_norm": {"gemma2": True, "gemma3": True, "gemma3_text": True, "olmo2": True},
}
"""What a model_type stands for: entries of LitGPT's configuration that its class in Transformers cannot change."""
OTHERWISE = {"norm_class_name": "RMSNorm", "norm_qk": False, "scale_embeddings": False, "post_mlp_norm": False}
"""The same for all other model types that are named here."""
KNOWN = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "olmo2",
    "phi3",
    *GEMMAS,
    "gpt_neox",
    "phi",
    "falcon",
)
UNKNOWN_TO_LITGPT = {
    "clip_qkv": None,
    "alibi": False,
    "qk_layernorm": False,
    "logit_scale": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "logits_scaling": 1.0,
    "use_bidirectional_attention": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_ln_in_parallel_attn": None,
}
"""Entries that change a model's logits, and the values at which they do not; LitGPT knows no others of most."""
GEMMA_3 = ("gemma3", "gemma3_text")
DEFAULTS: tuple[tuple[tuple[str, ...], Any, dict[str, Any]], ...] = (
    (("attn_logit_softcapping",), None, {"gemma2": 50.0}),
    (("final_logit_softcapping",), None, {"gemma2": 30.0}),
    (("query_pre_attn_scalar",), None, dict.fromkeys(GEMMAS[1:], 256)),
    (("rope_theta", "rotary_emb_base", "rope_parameters"), 1e4, dict.fromkeys(("mixtral", *GEMMA_3), 1e6)),
    (("rope_local_base_freq", "rope_parameters"), None, dict.fromkeys(GEMMA_3, 1e4)),
    (("partial_rotary_factor", "rotary_pct", "rope_parameters"), 1.0, {"gpt_neox": 0.25, "phi": 0.5}),
    (("use_parallel_residual", "parallel_attn"), False, dict.fromkeys(("gpt_neox", "phi", "falcon"), True)),
    (("sliding_window",), None, dict.fromkeys(("mistral", *GEMMAS[1:]), 4096)),
    (("sliding_window_pattern", "layer_types"), None, {"gemma2": 2, **dict.fromkeys(GEMMA_3, 6)}),
    (("num_experts_per_tok",), None, {"mixtral": 2, "qwen3_moe": 8}),
    (("norm_topk_prob",), True, {"qwen3_moe": False}),
    (
        ("num_attention_heads", "n_head"),
        32,
        {"gpt_neox": 64, "falcon": 71, "gemma": 16, **dict.fromkeys(GEMMAS[1:], 8)},
    ),
)
"""Where config.json has an entry under none of these names, Transformers' class of a known model type takes this value,
or that of its own."""
DEFAULT_ACTIVATIONS = {
    **{"gpt_neox": "gelu", "falcon": "gelu", "phi": "gelu_new"},
    **dict.fromkeys(GEMMAS, "gelu_pytorch_tanh"),
}
"""The same for the activation, which is silu elsewhere."""
LITGPTS_GEMMA_EPS = 1e-5
"""In LitGPT's configurations of Gemma, where the publisher has 1e-6: by this it runs, and an export says so."""
NORM_ENTRIES = {"gpt_neox": "layer_norm_eps", "phi": "layer_norm_eps", "falcon": "layer_norm_epsilon"}
"""Entries of config.json by model type, where it is not rms_norm_eps."""
DEFAULT_NORM_EPS = dict.fromkeys(("mixtral", "olmo2", "phi3", "gpt_neox", "phi", "falcon"), 1e-5)
"""As for the others; 1e-6 elsewhere."""


class Disagreement(NamedTuple):
    """An entry of config.json, and what model_config.yaml has in its place."""

    entry: str
    value: Any
    expected: Any


def check_agreement(checkpoint_dir: Path, config: Config, hf_config: dict[str, Any]) -> None:
    """See that a folder's two descriptions are of one model; what only one of them says is passed.

    Args:
        checkpoint_dir: where both lie.
        config: model_config.yaml's.
        hf_config: config.json's.

    Raises:
        UserError: they disagree; the message has both values.
    """
    found = disagreements(config, hf_config)
    if found:
        first, more = found[0], f", and {len(found) - 1} entries more differ" if len(found) > 1 else ""
        raise UserError(
            f"{checkpoint_dir / 'config.json'} is of another model: {first.entry} is {first.value!r}, and"
            f" model_config.yaml says {first.expected!r}{more}.\n{WAY_OUT}"
        )


def disagreements(config: Config, hf_config: dict[str, Any]) -> list[Disagreement]:
    """All entries of a config.json that describe another model than LitGPT's configuration does."""
    # models with several parts describe the language model in an entry of its own
    described = _with_defaults({**hf_config, **hf_config.get("text_config", {})})
    found = [Disagreement(*each) for each in _kinds(config, described)]
    for names, expected in ENTRIES:
        for name in names:
            if described.get(name) is not None and not _is_same(described[name], wanted := expected(config)):
                found.append(Disagreement(name, described[name], wanted))
    for check in (_norm_eps, _multi_query, _activation, _window, _layer_types, _rope, _bias, _unstated):
        found += check(config, described)
    for name, harmless in UNKNOWN_TO_LITGPT.items():
        if name in described and described[name] not in (harmless, None):
            found.append(Disagreement(name, described[name], harmless))
    return found


def _with_defaults(described: dict[str, Any]) -> dict[str, Any]:
    """A config.json's entries, and of a known model type those that its class takes besides."""
    kind = described.get("model_type")
    if kind not in KNOWN:
        return described
    unstated = {NORM_ENTRIES.get(kind, "rms_norm_eps"): DEFAULT_NORM_EPS.get(kind, 1e-6)}
    unstated |= {
        names[0]: by_type.get(kind, common)
        for names, common, by_type in DEFAULTS
        if all(described.get(name) is None for name in names) and names[0] not in described
    }
    return {**unstated, **described}


def _is_same(value: Any, expected: Any) -> bool:
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return isclose(value, expected, rel_tol=1e-9)
    return value == expected


ENTRIES: tuple[tuple[tuple[str, ...], Callable[[Config], Any]], ...] = (
    (("num_hidden_layers", "n_layer"), lambda config: config.n_layer),
    (("hidden_size", "n_embd"), lambda config: config.n_embd),
    (("num_attention_heads", "n_head"), lambda config: config.n_head),
    (("num_key_value_heads", "num_kv_heads"), lambda config: config.n_query_groups),
    (("head_dim",), lambda config: config.head_size),
    (("intermediate_size", "ffn_hidden_size"), lambda config: config.intermediate_size),
    (("attn_logit_softcapping",), lambda config: config.attention_logit_softcapping),
    (("final_logit_softcapping",), lambda config: config.final_logit_softcapping),
    (("query_pre_attn_scalar",), lambda config: config.attention_scores_scalar or config.head_size),
    (("num_experts", "num_local_experts"), lambda config: config.n_expert),
    (("num_experts_per_tok",), lambda config: config.n_expert_per_token),
    (("moe_intermediate_size",), lambda config: config.moe_intermediate_size or config.intermediate_size),
    # LitGPT's experts are weighed by a softmax over those that were chosen
    (("norm_topk_prob",), lambda config: True),
    (("use_parallel_residual", "parallel_attn"), lambda config: config.parallel_residual),
)
"""Names of an entry in config.json, and what LitGPT's configuration says."""

Found = list[Disagreement]


def _kinds(config: Config, described: dict[str, Any]) -> Found:
    kind = described.get("model_type")
    if kind not in KNOWN:
        return []
    wanted = {name: kinds.get(kind, OTHERWISE.get(name)) for name, kinds in KINDS.items()}
    flaws = [name for name, value in wanted.items() if value is not None and getattr(config, name) != value]
    # LitGPT takes it from the name
    if ("Gemma" in config.name) != (kind in GEMMAS):
        return [Disagreement("model_type", kind, f"name: {config.name}")]
    return [Disagreement("model_type", kind, f"{name}: {getattr(config, name)}") for name in flaws[:1]]


def _unstated(config: Config, described: dict[str, Any]) -> Found:
    """What model_config.yaml says of a model of a known type, and config.json would have to say, too."""
    if described.get("model_type") not in KNOWN:
        return []
    scaled = "rope_scaling" in described or "rope_parameters" in described
    own = [
        ("attn_logit_softcapping", config.attention_logit_softcapping, None),
        ("final_logit_softcapping", config.final_logit_softcapping, None),
        ("query_pre_attn_scalar", config.attention_scores_scalar or config.head_size, config.head_size),
        ("rope_scaling", {} if scaled else _own_scaling(config), {}),
        ("rope_interleave", config.rope_interleave, False),
        ("routed_scaling_factor", config.routed_scaling_factor, 1.0),
        # Qwen2's class has a bias without being told, the others would leave out the one that the weights have
        ("attention_bias", config.attn_bias and described["model_type"] not in KINDS["attn_bias"], False),
    ]
    if "rope_parameters" not in described:
        own.append(("rope_local_base_freq", config.rope_local_base_freq or config.rope_base, config.rope_base))
    return [
        Disagreement(name, None, value)
        for name, value, harmless in own
        if value != harmless and not described.get(name)
    ]


def _norm_eps(config: Config, described: dict[str, Any]) -> Found:
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    stated = {name: described[name] for name in names if described.get(name) is not None}
    if described.get("model_type") in GEMMAS and config.norm_eps == LITGPTS_GEMMA_EPS:
        stated = {name: value for name, value in stated.items() if not _is_same(value, 1e-6)}
    return [Disagreement(*each, config.norm_eps) for each in stated.items() if not _is_same(each[1], config.norm_eps)]


def _multi_query(config: Config, described: dict[str, Any]) -> Found:
    """Whether all heads share keys and values, which Falcon's later architecture does not ask."""
    stated, expected = described.get("multi_query"), config.n_query_groups == 1
    if stated in (None, expected) or described.get("new_decoder_architecture"):
        return []
    return [Disagreement("multi_query", stated, expected)]


def _activation(config: Config, described: dict[str, Any]) -> Found:
    names = ACTIVATIONS.get(config.mlp_class_name) or ACTIVATIONS.get(config.gelu_approximate, ())
    kind = described.get("model_type")
    entry = ACTIVATION_ENTRIES.get(kind, "hidden_act")
    stated = described.get(entry) or (DEFAULT_ACTIVATIONS.get(kind, "silu") if kind in KNOWN else None)
    # Gemma's publisher says gelu, and its class took the approximation all the same
    if stated in (None, *names) or (kind == "gemma" and stated == "gelu"):
        return []
    return [Disagreement(entry, stated, names[0] if names else config.mlp_class_name)]


def _window(config: Config, described: dict[str, Any]) -> Found:
    """Of a window that no text reaches nothing depends; LitGPT has Phi-3's one token wider."""
    window = None if described.get("use_sliding_window") is False else described.get("sliding_window")
    limit = config.block_size
    own = config.sliding_window_size
    applied = own if config.sliding_window_indices is not None and any(config.sliding_window_indices) else None
    for declared in (own, applied):
        if min(window or limit, limit) == min(declared or limit, limit):
            return []
    if described.get("model_type") == "phi3" and window is not None and own is not None and abs(window - own) <= 1:
        return []
    if window is None and described.get("model_type") not in KNOWN and "sliding_window" not in described:
        # its class may have a default
        return []
    return [Disagreement("sliding_window", window, own)]


def _layer_types(config: Config, described: dict[str, Any]) -> Found:
    """Which layers have a window: a list of names, or that every so-many-th has none."""
    types, pattern = described.get("layer_types"), described.get("sliding_window_pattern")
    if config.sliding_window_size is None or not config.sliding_window_indices:
        return []
    own = [bool(index) for index in config.sliding_window_indices[: config.n_layer]]
    if config.rope_indices is not None and [bool(index) for index in config.rope_indices[: config.n_layer]] != own:
        # of LitGPT's two kinds of positions one is of the layers with a window
        return [Disagreement("layer_types", types or pattern, f"rope_indices: {config.rope_indices}")]
    if types is not None:
        if [kind == "sliding_attention" for kind in types] == own:
            return []
        expected = ["sliding_attention" if slides else "full_attention" for slides in own]
        return [Disagreement("layer_types", types, expected)]
    if isinstance(pattern, int) and [(layer + 1) % pattern != 0 for layer in range(config.n_layer)] != own:
        return [Disagreement("sliding_window_pattern", pattern, own)]
    return []


def _rope(config: Config, described: dict[str, Any]) -> Found:
    """Bases and scaling of the rotary positions, in any of the places where versions of Transformers have them."""
    parameters = described.get("rope_parameters") or {}
    by_layer = {kind: entry for kind, entry in parameters.items() if isinstance(entry, dict)}
    general = by_layer.get("full_attention", parameters if not by_layer else {})
    local = by_layer.get("sliding_attention", {})
    own_local = config.rope_local_base_freq or config.rope_base
    stated = [
        *((name, described.get(name), config.rope_base) for name in ("rope_theta", "rotary_emb_base")),
        ("rope_parameters: rope_theta", general.get("rope_theta"), config.rope_base),
        ("rope_local_base_freq", described.get("rope_local_base_freq"), own_local),
        ("rope_parameters: rope_theta of sliding_attention", local.get("rope_theta"), own_local),
        *((name, described.get(name), config.rotary_percentage) for name in ("partial_rotary_factor", "rotary_pct")),
        ("rope_parameters: partial_rotary_factor", general.get("partial_rotary_factor"), config.rotary_percentage),
    ]
    found = [Disagreement(*each) for each in stated if each[1] is not None and not _is_same(each[1], each[2])]
    scalings = [("rope_scaling", described.get("rope_scaling"), _own_scaling(config))]
    scalings += [("rope_parameters", general, _own_scaling(config))] if general else []
    # LitGPT scales no layer with a window
    scalings += [("rope_parameters: sliding_attention", local, {})] if local else []
    for name, scaling, own in scalings:
        if (name in described or ":" in name) and _scaling(scaling) != own:
            found.append(Disagreement(name, _scaling(scaling), own))
    return found


def _scaling(entry: dict[str, Any] | None) -> dict[str, Any]:
    """How positions are scaled, without what says nothing."""
    entry = {name: value for name, value in (entry or {}).items() if value is not None}
    kind = entry.pop("rope_type", entry.pop("type", "default"))
    if kind == "default":
        return {}
    for name in ("type", "rope_theta", "partial_rotary_factor"):
        entry.pop(name, None)
    if kind == "linear":
        entry = {"factor": entry.get("factor")}
    return {"rope_type": kind, **{name: float(v) if isinstance(v, (int, float)) else v for name, v in entry.items()}}


def _own_scaling(config: Config) -> dict[str, Any]:
    own = dict(config.rope_adjustments or {})
    if not own:
        ratio = config.rope_condense_ratio
        return {} if ratio == 1 else _scaling({"type": "linear", "factor": ratio})
    if own.keys() == {"factor"}:
        return _scaling({"type": "linear", **own})
    if "original_max_seq_len" in own:
        own["original_max_position_embeddings"] = own.pop("original_max_seq_len")
    kind = "llama3" if "low_freq_factor" in own else "yarn"
    if config.rope_condense_ratio != 1:
        own["rope_condense_ratio"] = config.rope_condense_ratio
    return _scaling({"type": kind, **own})


def _bias(config: Config, described: dict[str, Any]) -> Found:
    """Whether linear maps add a vector: in the attention, in the MLP, or in both."""
    own = {
        "attention_bias": config.bias or config.attn_bias,
        "use_qkv_bias": config.bias or config.attn_bias,
        "mlp_bias": config.bias,
        "use_bias": config.bias,
        "bias": config.bias,
    }
    return [
        Disagreement(name, described[name], expected)
        for name, expected in own.items()
        if isinstance(described.get(name), bool) and described[name] != expected
    ]
