"""Two descriptions of one model: an entry of config.json that is changed is refused, or changes no logit."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.families import FAMILIES, write_family
from helpers.marks import with_all_slow_but
from litgpt.config import Config, configs
from litgpt.model import GPT
from transformers import AutoConfig, AutoModelForCausalLM

from litgpt_akl.messages import UserError
from litgpt_akl.models.config_agreement import disagreements
from litgpt_akl.models.export import write_export
from litgpt_akl.models.hf import translate_back
from litgpt_akl.models.weights import _check_forward, open_weights, read_config

KINDS = ("model_type", "architectures")
IDS = torch.arange(4, 68).view(1, 64)
TEXTS = {"hidden_act": "relu", "hidden_activation": "relu", "activation": "relu"}
NOT_READ = (
    # what every configuration has, and no model's forward pass
    *(
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "id2label",
        "label2id",
        "problem_type",
        "model_type",
    ),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder"),
    # which ids texts begin and end with, and how many there are, is the tokenizer's and the weights'
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "tie_word_embeddings"),
    # a limit on lengths, beyond which no text comes
    *("max_position_embeddings", "original_max_position_embeddings"),
)


def other_values(name: str, value) -> list:
    """Values that an entry could have in place of its own."""
    if name in TEXTS:
        return [TEXTS[name]]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2, value + 1]
    if value is None:
        return [4, True]
    if name == "layer_types":
        return [value[::-1], ["full_attention"] * len(value)]
    if isinstance(value, dict):
        changed = []
        for key, inner in value.items():
            changed += [{**value, key: other} for other in other_values(key, inner)]
        return [*changed, {**value, "rope_type": "linear", "factor": 8.0}]
    return []


def logits(hf_config: dict, state: dict, exported: Path | None) -> torch.Tensor | None:
    """Transformers', if it can make a model of a configuration and these weights."""
    if exported is not None:
        # its classes have the experts' weights in other tensors than its files
        (exported / "config.json").write_text(json.dumps(hf_config))
        try:
            options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
            model, loading = AutoModelForCausalLM.from_pretrained(exported, **options)
        except Exception:
            return None
        with torch.no_grad():
            return None if any(loading.values()) else model.eval()(IDS, use_cache=False).logits
    entries = {
        name: value for name, value in deepcopy(hf_config).items() if name not in ("model_type", "architectures")
    }
    try:
        config = AutoConfig.for_model(hf_config["model_type"], **entries)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or [name for name in missing if "inv_freq" not in name and "lm_head" not in name]:
            return None
        with torch.no_grad():
            return model(IDS, use_cache=False).logits
    except Exception:
        return None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_entry_is_refused_or_changes_nothing(tmp_path, name):
    write_family(name, directory := tmp_path / "model", tied=False)
    config = read_config(directory)
    hf_config = json.loads((directory / "config.json").read_text())
    assert disagreements(config, hf_config) == []
    state = dict(translate_back(config, open_weights(directory, config)))
    exported = None
    if config.n_expert:
        write_export(directory, exported := tmp_path / "exported")
        hf_config = json.loads((exported / "config.json").read_text())
    expected = logits(hf_config, state, exported)
    assert expected is not None
    entries = {name: value for name, value in hf_config.items() if name not in KINDS}
    whole = AutoConfig.for_model(hf_config["model_type"], **deepcopy(entries)).to_dict()
    tried = refused = 0
    for entry, value in {**whole, **hf_config}.items():
        if entry in NOT_READ:
            continue
        others = [{**hf_config, entry: other} for other in other_values(entry, value)]
        # where it says nothing, its class has a default
        if entry in hf_config and not (entry == "rms_norm_eps" and "Gemma" in name):
            others.append({other: hf_config[other] for other in hf_config if other != entry})
        for changed in others:
            tried += 1
            if disagreements(config, changed):
                refused += 1
                continue
            found = logits(changed, state, exported)
            # a configuration of which Transformers makes no model for these weights is refused by itself
            assert found is None or torch.equal(found, expected), (entry, value, changed.get(entry))
    assert tried > 20 and refused > 10


def other_entries(value) -> list:
    """Values that an entry of LitGPT's configuration could have in place of its own."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2, value + 1]
    if isinstance(value, str):
        return ["other", "LayerNorm", "GemmaMLP", "GptNeoxMLP", "LLaMAMoE", "tanh", "per_head", "Llama-3.2-1B"]
    if isinstance(value, list):
        return [value[::-1], [0] * len(value)]
    if isinstance(value, dict):
        return [None, *({**value, key: other} for key, inner in value.items() for other in other_entries(inner))]
    return [4, True, 0.5, [1, 0]]


def litgpt_logits(directory: Path) -> torch.Tensor:
    config = read_config(directory)
    model = GPT(config).eval()
    model.load_state_dict(open_weights(directory, config))
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("name", with_all_slow_but(["Llama-3.2-1B", "Gemma-3-1b-it", "falcon-7b"], FAMILIES))
def test_a_changed_entry_of_litgpts_configuration_is_refused_or_changes_nothing(tmp_path, name):
    write_family(name, directory := tmp_path / "model", tied=False)
    expected, path = litgpt_logits(directory), directory / "model_config.yaml"
    entries = yaml.safe_load(path.read_text())
    tried = refused = 0
    for entry, value in entries.items():
        for other in other_entries(value):
            if other == value:
                continue
            path.write_text(yaml.safe_dump({**entries, entry: other}))
            tried += 1
            try:
                found = litgpt_logits(directory)
            except UserError as error:
                assert "model_config.yaml" in str(error)
                refused += 1
            else:
                assert torch.equal(found, expected), (entry, value, other)
    assert tried > 120 and refused > 70


@pytest.mark.slow
def test_litgpts_own_configurations_are_all_read():
    """The check of a model's first layers takes what LitGPT has."""
    for entry in configs:
        config = Config.from_name(entry["name"])
        with torch.device("meta"):
            _check_forward(GPT(replace(config, n_layer=min(2, config.n_layer))))


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
PUBLISHED = {
    "Llama-2-7b-hf": ("llama", (4096, 11008, 32, 32, 32), {"rms_norm_eps": 1e-5, "rope_scaling": None}),
    "CodeLlama-7b-hf": ("llama", (4096, 11008, 32, 32, None), {"rms_norm_eps": 1e-5, "rope_theta": 1000000}),
    "Mistral-7B-v0.1": ("mistral", (4096, 14336, 32, 32, 8), {"rms_norm_eps": 1e-5, "sliding_window": 4096}),
    "Mixtral-8x7B-v0.1": ("mixtral", (4096, 14336, 32, 32, 8), {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "Gemma-7b": ("gemma", (3072, 24576, 16, 28, 16), {"head_dim": 256, "hidden_act": "gelu", "rms_norm_eps": 1e-6}),
    "Gemma-2-2b": ("gemma2", (2304, 9216, 8, 26, 4), {"rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256}),
    "pythia-160m": ("gpt_neox", (768, 3072, 12, 12, None), {"rotary_pct": 0.25, "use_parallel_residual": True}),
    "phi-2": ("phi", (2560, 10240, 32, 32, 32), {"partial_rotary_factor": 0.4, "hidden_act": "gelu_new"}),
    "Phi-3-mini-4k-instruct": ("phi3", (3072, 8192, 32, 32, 32), {"sliding_window": 2047, "rms_norm_eps": 1e-5}),
    "falcon-7b": ("falcon", (4544, None, 71, 32, None), {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-40b": ("falcon", (8192, None, 128, 60, None), {"multi_query": True, "new_decoder_architecture": True}),
    "Qwen2.5-7B-Instruct": (
        "qwen2",
        (3584, 18944, 28, 28, 4),
        {"rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False},
    ),
    "Qwen3-8B": ("qwen3", (4096, 12288, 32, 36, 8), {"head_dim": 128, "rope_theta": 1000000, "rope_scaling": None}),
    "OLMo-2-1124-7B": ("olmo2", (4096, 11008, 32, 32, 32), {"rms_norm_eps": 1e-6, "rope_theta": 500000}),
    "Gemma-3-4b-it": (
        "gemma3_text",
        (2560, 10240, None, 34, None),
        {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    ),
}
"""What publishers say of a model in config.json, as far as it is of interest here."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_publishers_say_agrees_with_litgpts_configurations(name):
    kind, sizes, entries = PUBLISHED[name]
    stated = {entry: size for entry, size in zip(SIZES, sizes, strict=True) if size is not None}
    assert disagreements(Config.from_name(name), {"model_type": kind, **stated, **entries}) == []


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_class_that_would_leave_out_the_weights_bias_is_refused(kind):
    config = Config.from_name("Qwen2.5-0.5B")
    (found,) = [each for each in disagreements(config, {"model_type": kind}) if each[0] == "attention_bias"]
    assert found[1:] == (None, True)
    for described in ({"model_type": kind, "attention_bias": True}, {"model_type": "qwen2"}):
        assert "attention_bias" not in [each[0] for each in disagreements(config, described)]


@pytest.mark.parametrize("name", ["Gemma-2b", "Gemma-2-2b"])
def test_an_export_of_gemma_has_the_epsilon_that_litgpt_computes_with(tmp_path, name):
    """Which is ten times the publisher's."""
    write_family(name, directory := tmp_path / "model", tied=False)
    hf_config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**hf_config, "rms_norm_eps": 1e-6}))
    write_export(directory, tmp_path / "exported")
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["rms_norm_eps"] == Config.from_name(name).norm_eps == 1e-5
    found = logits(exported, {}, tmp_path / "exported")
    assert (found - litgpt_logits(directory)).abs().max() < 1e-4
