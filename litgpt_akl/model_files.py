"""What lies beside a model's weights: copied to where a student goes, and made to say how the student was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from litgpt.tokenizer import Tokenizer
from litgpt.utils import fix_and_load_json
from tokenizers import Tokenizer as FastTokenizer

from litgpt_akl.errors import UserError
from litgpt_akl.reading import explain_damage, read_json, read_yaml

HF_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What Hugging Face's libraries read beside config.json, tokenizer_config.json and the weights."""

COPIED_FILES = ("config.json", "model_config.yaml", "prompt_style.yaml", *HF_FILES)


def check_model_files(directory: Path) -> None:
    """See that what lies beside a model's weights can be read, as far as it is there: much of it is only copied later.

    Raises:
        UserError: a file cannot be; the message names it.
    """
    for name in (*COPIED_FILES, "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
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


def read_hf_config(path: Path) -> dict[str, Any]:
    """The entries of a config.json; raises UserError if there are none."""
    way_out = "Copy the original model's to there."
    hf_config = read_json(path, way_out)
    with explain_damage(path, "a model's configuration", way_out):
        # models with several parts describe the language model in an entry of its own
        dict(hf_config.get("text_config", {}))
    return hf_config


def read_tokenizer(directory: Path) -> Tokenizer:
    """LitGPT's tokenizer of a checkpoint.

    Raises:
        UserError: it cannot be read, or names tokens that it does not have.
    """
    names = ("tokenizer.json", "tokenizer.model")
    vocabulary = next((directory / name for name in names if (directory / name).is_file()), directory)
    with explain_damage(vocabulary, "a tokenizer with the tokens of tokenizer_config.json"):
        return Tokenizer(directory)


def copy_model_files(source_dir: Path, out_dir: Path) -> None:
    """Copies what a consumer reads beside the weights: configs, tokenizer, chat template and prompt style.

    LitGPT decides by the folder's name whether a text starts with a BOS token, so the same files mean something else
    in another folder, and Hugging Face tokenizers ask tokenizer.json instead. The source's decision is written into
    both: as ``add_bos_token`` into tokenizer_config.json and as post-processor into tokenizer.json.

    Raises:
        UserError: The name of ``out_dir`` makes LitGPT add a BOS token that the source does not use.
    """
    copy_hf_files(source_dir, out_dir, COPIED_FILES)
    if (out_dir / "tokenizer_config.json").is_file() and _uses_bos(out_dir) != _uses_bos(source_dir):
        raise UserError(
            f"In a folder named {out_dir.name} LitGPT puts a BOS token before every text; {source_dir} uses none.\n"
            "Give a directory whose name does not start with Llama-3, Meta-Llama-3 or SmolLM2."
        )


def copy_hf_files(source_dir: Path, out_dir: Path, names: tuple[str, ...] = HF_FILES) -> None:
    """Copies ``names`` as far as they are there, and tokenizer_config.json with LitGPT's decision about BOS tokens."""
    for name in names:
        if (source_dir / name).is_file():
            # copyfile, not copy: a read-only source must not make a read-only copy
            shutil.copyfile(source_dir / name, out_dir / name)
    if not (source_dir / "tokenizer_config.json").is_file():
        return
    tokenizer_config = read_json(source_dir / "tokenizer_config.json")
    use_bos = _uses_bos(source_dir)
    tokenizer_config["add_bos_token"] = use_bos
    write_json(out_dir / "tokenizer_config.json", tokenizer_config)
    if (out_dir / "tokenizer.json").is_file():
        bos_id = read_tokenizer(source_dir).bos_id
        with explain_damage(source_dir / "tokenizer.json", "a tokenizer"):
            _write_bos_rule(out_dir / "tokenizer.json", bos_id, use_bos)


def _uses_bos(checkpoint_dir: Path) -> bool:
    with explain_damage(checkpoint_dir / "tokenizer_config.json", "JSON"):
        # LitGPT's rule needs no tokenizer, only the folder: reading the vocabulary for it would take seconds
        return bool(Tokenizer.check_if_bos_token_used(None, checkpoint_dir))


def _write_bos_rule(path: Path, bos_id: int | None, use_bos: bool) -> None:
    """Make a tokenizer.json start every text with the BOS token, or not."""
    processor = FastTokenizer.from_file(str(path))
    if bos_id is None or (processor.encode("a").ids[:1] == [bos_id]) == use_bos:
        return
    bos = processor.id_to_token(bos_id)
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    processors = _post_processors(tokenizer)
    templates = [entry for entry in processors if entry["type"] == "TemplateProcessing"]
    if use_bos and not templates:
        sequence = [{"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB")]
        templates = [{"type": "TemplateProcessing", "single": sequence[:1], "pair": sequence, "special_tokens": {}}]
        processors += templates
    for template in templates:
        for name in ("single", "pair"):
            kept = [piece for piece in template[name] if piece.get("SpecialToken", {}).get("id") != bos]
            template[name] = [{"SpecialToken": {"id": bos, "type_id": 0}}, *kept] if use_bos else kept
        template["special_tokens"][bos] = {"id": bos, "ids": [bos_id], "tokens": [bos]}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": processors}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _post_processors(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    whole = tokenizer.get("post_processor")
    if whole is None:
        return []
    return whole["processors"] if whole["type"] == "Sequence" else [whole]


def describe_to_hugging_face(path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Write into a config.json whether embeddings and LM head are one matrix, and the weights' dtype."""
    hf_config = read_hf_config(path)
    describe_weights(hf_config, tied, dtype)
    write_json(path, hf_config)


def describe_weights(hf_config: dict[str, Any], tied: bool, dtype: torch.dtype) -> None:
    """What :func:`describe_to_hugging_face` writes, put into the content of a config.json."""
    # models with several parts, such as Gemma 3, describe the language model in an entry of its own
    for config in (hf_config, hf_config.get("text_config", hf_config)):
        config["tie_word_embeddings"] = tied
        for key in config.keys() & {"dtype", "torch_dtype"}:
            config[key] = str(dtype).removeprefix("torch.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As Hugging Face's libraries write it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
