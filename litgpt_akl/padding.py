"""Ids that only pad an embedding to a round number: a student that leaves here has no rows for them.

No loss lowers what no token has, and LitGPT and Transformers draw from all rows of an LM head.
"""

import json
from dataclasses import replace
from pathlib import Path

from litgpt.config import Config
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config
from torch import Tensor

from litgpt_akl.model_files import read_tokenizer
from litgpt_akl.pair import token_map
from litgpt_akl.weights import read_config

PADDED = ("lm_head.weight", "lm_head.bias", "transformer.wte.weight")
"""Tensors with a row for each id, by LitGPT's names."""


def count_ids(checkpoint_dir: Path, tokenizer: Tokenizer | None = None) -> int:
    """How many ids some reader of a checkpoint knows: those from here on are padding.

    Beside the tokenizer's own these are what Hugging Face's files add to it or name, such as ``pad_token_id``.

    Args:
        checkpoint_dir: the checkpoint's.
        tokenizer: its, if it has been read already.
    """
    highest = max(token_map(read_tokenizer(checkpoint_dir) if tokenizer is None else tokenizer))
    added = _read(checkpoint_dir / "added_tokens.json").values()
    listed = _read(checkpoint_dir / "tokenizer_config.json").get("added_tokens_decoder", {})
    config = _read(checkpoint_dir / "config.json")
    named = [
        id
        for part in (config, config.get("text_config") or {})
        for entry, value in part.items()
        if entry.endswith("_token_id")
        for id in (value if isinstance(value, list) else [value])
        if isinstance(id, int)
    ]
    return 1 + max([highest, *added, *map(int, listed), *named])


def _read(path: Path) -> dict:
    # a config.json that is none is refused by who needs it
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def config_without_padding(config: Config, ids: int) -> Config:
    """The configuration of a model with rows for the first ``ids`` ids only, if it has more."""
    return replace(config, padded_vocab_size=ids) if ids < config.padded_vocab_size else config


def write_config_without_padding(source_dir: Path, out_dir: Path, ids: int) -> None:
    """Write the model_config.yaml of a checkpoint whose padding was left out; one without padding stays as it is."""
    config = read_config(source_dir)
    if ids < config.padded_vocab_size:
        save_config(config_without_padding(config, ids), out_dir)


def without_padding(weights: dict[str, Tensor], ids: int) -> dict[str, Tensor]:
    """A model's weights with rows for the first ``ids`` ids only; what shares memory goes on to share it."""
    return {name: tensor[:ids] if name in PADDED else tensor for name, tensor in weights.items()}


def describe_padding(config: Config, ids: int) -> str:
    """A sentence for people; empty if there is no padding."""
    rows = config.padded_vocab_size
    if ids >= rows:
        return ""
    return f"Of the {rows:,} rows of embeddings and LM head the last {rows - ids:,} only pad: no token has their ids."
