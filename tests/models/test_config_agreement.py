"""Two descriptions of one model: an entry of config.json that is changed is refused, or changes no logit."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES, write_family
from transformers import AutoConfig, AutoModelForCausalLM

from litgpt_akl.models.config_agreement import disagreements
from litgpt_akl.models.export import write_export
from litgpt_akl.models.hf import translate_back
from litgpt_akl.models.weights import open_weights, read_config

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
        for other in [] if entry in NOT_READ else other_values(entry, value):
            changed = {**hf_config, entry: other}
            tried += 1
            if disagreements(config, changed):
                refused += 1
                continue
            found = logits(changed, state, exported)
            # a configuration of which Transformers makes no model for these weights is refused by itself
            assert found is None or torch.equal(found, expected), (entry, value, other)
    assert tried > 20 and refused > 10
