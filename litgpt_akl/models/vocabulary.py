"""Ids that only pad an embedding to a round number: a student that leaves here has no rows for them.

No loss lowers what no token has, and LitGPT and Transformers draw from all rows of an LM head.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt.config import Config
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config
from torch import Tensor

from litgpt_akl.files.reading import explain_damage, read_json
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.models.tokenizer import token_map
from litgpt_akl.models.weights import read_config

PADDED = ("lm_head.weight", "lm_head.bias", "transformer.wte.weight")
"""Tensors with a row for each id, by LitGPT's names."""


def count_ids(checkpoint_dir: Path, tokenizer: Tokenizer | None = None) -> int:
    """How many ids some reader of a checkpoint knows: those from here on are padding.

    Beside the tokenizer's own these are what Hugging Face's files add to it or name, such as ``pad_token_id``.

    Raises:
        UserError: one of these files is damaged.
    """
    highest = max(token_map(read_tokenizer(checkpoint_dir) if tokenizer is None else tokenizer))
    for name, ids_in in NAMED_IN.items():
        if (path := checkpoint_dir / name).is_file():
            content = read_json(path)
            with explain_damage(path, "a file that names ids"):
                highest = max([highest, *map(int, ids_in(content))])
    return 1 + highest


def _ids_of_model(config: dict[str, Any]) -> Iterable[int]:
    for part in (config, config.get("text_config") or {}):
        for entry, value in part.items():
            if entry.endswith("_token_id"):
                yield from (id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int))


NAMED_IN: dict[str, Callable[[dict[str, Any]], Iterable]] = {
    "added_tokens.json": dict.values,
    "tokenizer_config.json": lambda config: config.get("added_tokens_decoder") or {},
    "config.json": _ids_of_model,
}
"""Files that name ids, and the ids in their content."""


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
