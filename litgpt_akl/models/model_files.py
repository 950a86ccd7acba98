"""What lies beside a model's weights: copied to where a student goes, and made to say how the student was trained."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt.utils import fix_and_load_json

from litgpt_akl.files.reading import explain_damage, read_json, read_yaml
from litgpt_akl.messages import UserError
from litgpt_akl.models.token_agreement import check_one_template, check_tokens
from litgpt_akl.models.tokenizer import OneBosTokenizer, bos_rules, remove_limits, write_bos_rule

HF_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""What Hugging Face's libraries read beside config.json, tokenizer_config.json and the weights."""

COPIED_FILES = ("config.json", "model_config.yaml", "prompt_style.yaml", *HF_FILES)

AS_IN_JSON = "PreTrainedTokenizerFast"
"""Transformers' class that divides texts as tokenizer.json says."""


@dataclass(frozen=True)
class ModelFiles:
    """What lies beside a model's weights, as it was when it was read: nobody can change or remove it any more."""

    name: str
    """Of its directory, from which LitGPT reads rules."""
    contents: dict[str, bytes]
    """By file name."""

    @contextmanager
    def unpacked(self, parent: Path) -> Iterator[Path]:
        """While entered, a directory of that name with these files; it lies somewhere in ``parent``.

        Raises:
            OSError: they cannot be written there.
        """
        with TemporaryDirectory(dir=parent) as place:
            directory = Path(place) / self.name
            directory.mkdir()
            for name, content in self.contents.items():
                (directory / name).write_bytes(content)
            yield directory


def files_beside_weights(directory: Path) -> list[Path]:
    """Those of a checkpoint that say what the weights are and how they are used, as far as they are there."""
    paths = [directory / name for name in (*COPIED_FILES, "tokenizer_config.json")]
    # what is there and no file, such as a link to nowhere, is not to be skipped
    return [path for path in paths if os.path.lexists(path)]


def read_model_files(directory: Path) -> ModelFiles:
    """What lies beside the weights of a checkpoint now.

    Raises:
        UserError: a file cannot be read.
    """
    contents = {}
    for path in files_beside_weights(directory):
        with explain_damage(path, "a file of a model"):
            contents[path.name] = path.read_bytes()
    return ModelFiles(directory.resolve().name, contents)


def check_model_files(directory: Path) -> None:
    """See that what lies beside a model's weights can be read, as far as it is there: much of it is only copied later.

    Raises:
        UserError: a file cannot be, or two have different chat templates; the message names them.
    """
    for path in files_beside_weights(directory):
        name = path.name
        if name == "config.json":
            read_hf_config(path)
        elif name == "generation_config.json":
            # some publishers' have commas too many, which LitGPT forgives
            with explain_damage(path, "JSON"):
                dict(fix_and_load_json(path.read_text(encoding="utf-8")))
        elif name == "prompt_style.yaml":
            read_yaml(path)
        elif path.suffix == ".json" and name != "tokenizer.json":
            read_json(path)
        elif path.suffix in (".txt", ".jinja"):
            with explain_damage(path, "text"):
                path.read_text(encoding="utf-8")
    check_one_template(directory)


def read_hf_config(path: Path) -> dict[str, Any]:
    """The entries of a config.json; raises UserError if there are none."""
    way_out = "Copy the original model's to there."
    hf_config = read_json(path, way_out)
    with explain_damage(path, "a model's configuration", way_out):
        # models with several parts describe the language model in an entry of its own
        dict(hf_config.get("text_config", {}))
    return hf_config


def read_tokenizer(directory: Path) -> OneBosTokenizer:
    """LitGPT's tokenizer of a checkpoint, under which no text gets a second BOS token.

    Raises:
        UserError: it cannot be read, or a file names tokens that it does not have.
    """
    names = ("tokenizer.json", "tokenizer.model")
    vocabulary = next((directory / name for name in names if (directory / name).is_file()), directory)
    with explain_damage(vocabulary, "a tokenizer with the tokens of tokenizer_config.json"):
        try:
            tokenizer = OneBosTokenizer(directory)
        except ImportError as error:
            raise UserError(
                f"{vocabulary} is read by {error.name}, which is not installed, and there is no tokenizer.json.\n"
                f"Install it (pip install {error.name}), or put the model's tokenizer.json there."
            ) from error
    check_tokens(directory, tokenizer)
    return tokenizer


def copy_model_files(source_dir: Path, out_dir: Path, style: PromptStyle | None = None) -> None:
    """Copies what a consumer reads beside the weights: configs, tokenizer, chat template and prompt style.

    LitGPT decides by the folder's name whether a text starts with a BOS token, so the same files mean something else
    in another folder, and Hugging Face tokenizers ask tokenizer.json instead: both are made to say what holds for the
    source, as in :func:`~litgpt_akl.models.tokenizer.bos_rules`. ``style`` makes its prompts, if not LitGPT's for it.

    Raises:
        UserError: The name of ``out_dir`` makes LitGPT add a BOS token that the source does not use.
    """
    use_bos = copy_hf_files(source_dir, out_dir, COPIED_FILES, style=style)
    if use_bos is not None and bool(Tokenizer.check_if_bos_token_used(None, out_dir)) != use_bos:
        raise UserError(
            f"In a folder named {out_dir.name} LitGPT puts a BOS token before every text; {source_dir} uses none.\n"
            "Give a directory whose name does not start with Llama-3, Meta-Llama-3 or SmolLM2."
        )


def copy_hf_files(
    source_dir: Path,
    out_dir: Path,
    names: tuple[str, ...] = HF_FILES,
    *,
    style: PromptStyle | None = None,
    for_transformers: bool = False,
) -> bool | None:
    """Copies ``names`` as far as they are there, and tokenizer_config.json with what holds about BOS tokens.

    Returns:
        Whether LitGPT begins texts with a BOS token; None without a tokenizer_config.json.
    """
    for name in names:
        if (source_dir / name).is_file():
            # copyfile, not copy: a read-only source must not make a read-only copy
            shutil.copyfile(source_dir / name, out_dir / name)
    if not (source_dir / "tokenizer_config.json").is_file():
        return None
    tokenizer_config = read_json(source_dir / "tokenizer_config.json")
    with explain_damage(source_dir / "tokenizer.json", "a tokenizer with the tokens of tokenizer_config.json"):
        rules = bos_rules(source_dir, style, for_transformers)
    tokenizer_config["add_bos_token"] = rules.add_bos_token
    # LitGPT opens no tokenizer that lacks it, and only decodes by it
    tokenizer_config["tokenizer_class"] = tokenizer_config.get("tokenizer_class") or AS_IN_JSON
    has_json = (source_dir / "tokenizer.json").is_file()
    if for_transformers and has_json and tokenizer_config["tokenizer_class"] != AS_IN_JSON:
        # a class of its own may make another tokenizer of the same tokens, as Transformers 5 does of Llama 2's
        tokenizer_config = {"clean_up_tokenization_spaces": False, **tokenizer_config, "tokenizer_class": AS_IN_JSON}
    write_json(out_dir / "tokenizer_config.json", tokenizer_config)
    if rules.changes_json:
        write_bos_rule(out_dir / "tokenizer.json", rules)
    if has_json:
        remove_limits(out_dir / "tokenizer.json")
    return rules.add_bos_token


def describe_to_hugging_face(path: Path, tied: bool, dtype: torch.dtype, ids: int | None = None) -> None:
    """Write into a config.json whether embeddings and LM head are one matrix, the weights' dtype, and how many ids."""
    hf_config = read_hf_config(path)
    describe_weights(hf_config, tied, dtype, ids)
    write_json(path, hf_config)


def describe_weights(hf_config: dict[str, Any], tied: bool, dtype: torch.dtype, ids: int | None = None) -> None:
    """What :func:`describe_to_hugging_face` writes, put into the content of a config.json."""
    # models with several parts, such as Gemma 3, describe the language model in an entry of its own
    for config in (hf_config, hf_config.get("text_config", hf_config)):
        config["tie_word_embeddings"] = tied
        for key in config.keys() & {"dtype", "torch_dtype"}:
            config[key] = str(dtype).removeprefix("torch.")
    if ids is not None:
        hf_config.get("text_config", hf_config)["vocab_size"] = ids


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As Hugging Face's libraries write it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
