"""A LitGPT checkpoint written as Transformers, vLLM and llama.cpp's converter read models."""

from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.files.changed_files import check_unchanged, stamp_of
from litgpt_akl.files.directories import explain_failure, write_directory
from litgpt_akl.messages import say
from litgpt_akl.models.gpt import is_tied
from litgpt_akl.models.hf import make_hf_config, translate_back, write
from litgpt_akl.models.model_files import copy_hf_files, write_json
from litgpt_akl.models.vocabulary import config_without_padding, count_ids, describe_padding, without_padding
from litgpt_akl.models.weights import model_paths, open_weights, read_config

MAX_SHARD_SIZE = "5GB"
"""What Hugging Face recommends."""


def check_export(checkpoint_dir: Path, config: Config) -> None:
    """Whether :func:`write_export` will be able to write what is made from a checkpoint.

    Raises:
        UserError: LitGPT cannot convert it, or its config.json is missing or of another model.
    """
    with torch.device("meta"):
        weights = GPT(config).state_dict()
    for _ in translate_back(config, weights):
        pass
    make_hf_config(checkpoint_dir, config, tied=False, dtype=torch.float32)


def write_export(checkpoint_dir: Path, out_dir: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write a checkpoint directory for Hugging Face's libraries; one that is there is replaced when it is whole.

    Embeddings and LM head that are one matrix by :func:`~litgpt_akl.models.gpt.is_tied` are written once. A file of
    weights has at most ``max_shard_size`` bytes, which may be a text such as ``5GB``.

    Raises:
        UserError: the checkpoint cannot be read or converted, or ``out_dir`` not be written, which is then as it was.
    """
    stamps = [*map(stamp_of, model_paths(checkpoint_dir))]
    config = read_config(checkpoint_dir)
    weights, ids = open_weights(checkpoint_dir, config), count_ids(checkpoint_dir)
    padding = describe_padding(config, ids)
    weights, config = without_padding(weights, ids), config_without_padding(config, ids)
    check_export(checkpoint_dir, config)
    tied = is_tied(checkpoint_dir, weights, None)
    head = weights.pop("lm_head.weight")
    hf_config = make_hf_config(checkpoint_dir, config, tied, head.dtype)
    if not tied:
        # safetensors does not write what two names share
        shared = head.data_ptr() == weights["transformer.wte.weight"].data_ptr()
        weights["lm_head.weight"] = head.clone() if shared else head
    with write_directory(out_dir) as directory, explain_failure(out_dir):
        copy_hf_files(checkpoint_dir, directory, for_transformers=True)
        write_json(directory / "config.json", hf_config)
        write(directory, config, weights, max_shard_size)
        check_unchanged(stamps)
    if padding:
        say(f"{out_dir}: {padding} It has none of them.")
    if not tied and hf_config["model_type"].startswith("gemma"):
        say(
            f"{out_dir}: vLLM refuses a Gemma whose embeddings and LM head are two matrices, and llama.cpp's converter"
            " may leave the head out; Transformers reads both."
        )
