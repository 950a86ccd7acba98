"""A LitGPT checkpoint directory as it is read: is it there, whole, of its configuration, and which one?"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from zipfile import ZipFile, is_zipfile

import torch
import xxhash
from litgpt.config import Config, configs
from litgpt.model import GPT
from litgpt.utils import auto_download_checkpoint, extend_checkpoint_dir
from torch import Tensor

from litgpt_akl.files.changed_files import Stamp, check_unchanged, stamp_of
from litgpt_akl.files.directories import check_name, default_cache_dir, write_file
from litgpt_akl.files.manifest import MANIFEST, METRICS_COPY, METRICS_MARK, damage
from litgpt_akl.files.reading import explain_damage, file_checksum, read_yaml, with_checksum, without_checksum
from litgpt_akl.messages import UserError, not_permitted, progress_bar
from litgpt_akl.models import hf as hf_weights
from litgpt_akl.models.config_agreement import check_agreement
from litgpt_akl.models.lora import ADAPTERS
from litgpt_akl.models.model_files import check_model_files, files_beside_weights, read_hf_config
from litgpt_akl.models.tensor_file import check_tensors, read_tensors

READ_LATER = ("lit_model.pth", ADAPTERS, "training_state.pth", METRICS_MARK, METRICS_COPY)
"""Files of a saved directory that are checked when they are read, if they are."""
OPTIONS = {"student": "checkpoint_dir", "teacher": "--teacher_checkpoint_dir", "model": "checkpoint_dir"}
"""By which a command is given a checkpoint in each role, where it has no other one for it."""
CONVERT_AGAIN = "Download or convert the model again."


def find_checkpoint_dir(
    path: Path,
    role: Literal["student", "teacher", "model"],
    access_token: str | None = None,
    weights_needed: bool = True,
    option: str | None = None,
) -> Path:
    """The checkpoint directory that ``path`` names; a model id that LitGPT knows is downloaded if it is not there.

    Args:
        path: a directory, one below ``checkpoints/``, or a model id such as ``Qwen/Qwen2.5-0.5B``.
        role: what a message calls it.
        access_token: for models with restrictions.
        weights_needed: whether a directory without weights lacks something.
        option: what a message calls the option that gave it (default: that of ``finetune_akl``).

    Raises:
        UserError: the directory does not exist, or lacks files.
    """
    try:
        return _find_checkpoint_dir(path, role, access_token, weights_needed, option or OPTIONS[role])
    except PermissionError as error:
        raise not_permitted(error, path) from error


def _find_checkpoint_dir(path: Path, role: str, access_token: str | None, weights_needed: bool, option: str) -> Path:
    directory = extend_checkpoint_dir(Path(path))
    known = {f"{config['hf_config']['org']}/{config['hf_config']['name']}" for config in configs}
    if not directory.exists() and str(path) in known:
        return auto_download_checkpoint(model_name=path, access_token=access_token)
    if not directory.is_dir():
        raise UserError(
            f"The {role}'s checkpoint directory {path} does not exist.\n"
            f"Give a LitGPT checkpoint directory, or a model id from `litgpt download list`, as {option}."
        )
    files = {name: (directory / name).is_file() for name in ("lit_model.pth", "model_config.yaml")}
    if role == "teacher" and not files["lit_model.pth"] and hf_weights.files_in(directory):
        # of a student more is needed: what it was made from is copied to what it becomes
        files = {"model_config.yaml (or the name of a LitGPT configuration)": _has_config(directory)}
    if not weights_needed:
        files.pop("lit_model.pth", None)
    files["tokenizer_config.json"] = (directory / "tokenizer_config.json").is_file()
    files["tokenizer.json or tokenizer.model"] = any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    )
    if missing := [name for name, exists in files.items() if not exists]:
        way_out = "`litgpt convert_to_litgpt` makes one from a Hugging Face model."
        if "lit_model.pth" in missing and (directory / ADAPTERS).is_file():
            way_out = f"Merge its LoRA weights first: litgpt merge_lora {path}"
        lacking = f"it lacks {', '.join(missing)}"
        raise UserError(f"The {role}'s directory {path} is not a LitGPT checkpoint: {lacking}.\n{way_out}")
    check_name(directory.absolute(), f"The {role}'s directory", "Rename it, or give a link to it.")
    _check_written(directory, lambda name: name not in READ_LATER)
    check_model_files(directory)
    for file in weights_files(directory):
        # whether they are there and may be read; what is in them takes longer to see
        with explain_damage(file, "weights", CONVERT_AGAIN):
            file.open("rb").close()
    return directory


def _has_config(directory: Path) -> bool:
    return (directory / "model_config.yaml").is_file() or any(config["name"] == directory.name for config in configs)


def _check_written(directory: Path, chosen: Callable[[str], bool]) -> bool:
    """See that chosen files of a directory are as its manifest says, if it has one; whether it has."""
    if not (directory / MANIFEST).is_file():
        return False
    if what := damage(directory, chosen):
        raise UserError(
            f"{directory} is not as it was written: {what}.\n"
            f"Copy it again or take another one; if the change is meant, delete its {MANIFEST}."
        )
    return True


def read_config(checkpoint_dir: Path) -> Config:
    """The model's configuration.

    Raises:
        UserError: model_config.yaml is none, or no model can be made by it, or config.json describes another model.
    """
    path = checkpoint_dir / "model_config.yaml"
    with explain_damage(path, "a model configuration", CONVERT_AGAIN):
        if path.is_file() and "vocab_size" not in read_yaml(path, CONVERT_AGAIN):
            # the last entry of a file by LitGPT
            raise ValueError("it lacks vocab_size")
        config = Config.from_checkpoint(checkpoint_dir)
        for name, kind in get_type_hints(Config).items():
            if not _is_of_kind(getattr(config, name), kind):
                raise ValueError(f"{name} is {getattr(config, name)!r}, and should be {kind}")
        with torch.device("meta"):
            _check_forward(GPT(config))
    if (checkpoint_dir / "config.json").is_file():
        check_agreement(checkpoint_dir, config, read_hf_config(checkpoint_dir / "config.json"))
    return config


@torch.no_grad()
def _check_forward(model: GPT) -> None:
    """Let two layers of a model without weights read a text: some entries fail only then."""
    model.transformer.h = model.transformer.h[:2]
    if model.config.n_expert:
        for block in model.transformer.h:
            # which expert reads a token depends on the weights
            block.mlp = torch.nn.Identity()
    model(torch.zeros((1, 2), dtype=torch.int64))


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is what a type hint of LitGPT's configuration says; one number is as good as another."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of_kind(value, option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def is_said_to_be_tied(checkpoint_dir: Path) -> bool | None:
    """What config.json says of embeddings and LM head, if it does; the weights decide."""
    path = checkpoint_dir / "config.json"
    return read_hf_config(path).get("tie_word_embeddings") if path.is_file() else None


def open_weights(checkpoint_dir: Path, config: Config) -> dict[str, Tensor]:
    """Tensors by name, memory-mapped from a flat file or from the ``model`` entry of one.

    The file is first read once, to hold it against the directory's manifest or its own checksums. Without such a file,
    the tensors are those of Hugging Face's safetensors files, which have none.

    Raises:
        UserError: a file is truncated or has changed, holds something else, or does not fit ``config``.
    """
    path = checkpoint_dir / "lit_model.pth"
    if not weights_files(checkpoint_dir):
        raise UserError(
            f"{checkpoint_dir} has no weights: neither lit_model.pth nor safetensors files. Put them there."
        )
    if not path.is_file():
        return _open_hf_weights(checkpoint_dir, config)
    weights = read_tensors(path, "weights", CONVERT_AGAIN)
    if not _check_written(checkpoint_dir, lambda name: name == path.name):
        _check_own_checksums(stamp_of(path))
    weights = weights.get("model", weights) if isinstance(weights, dict) else {}
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    _check_fit(weights, config, path)
    return weights


# a run opens its teacher's weights more than once
@lru_cache(maxsize=64)
def _check_own_checksums(stamp: Stamp) -> None:
    check_tensors(stamp.path, "weights", CONVERT_AGAIN)


def _open_hf_weights(checkpoint_dir: Path, config: Config) -> dict[str, Tensor]:
    way_out = f"Download them again, or convert them: litgpt convert_to_litgpt {checkpoint_dir}"
    found = hf_weights.read(checkpoint_dir, way_out)
    if is_said_to_be_tied(checkpoint_dir) is False and not any(name.endswith(hf_weights.HEADS) for name in found):
        # LitGPT would take the embeddings in its place
        raise UserError(
            f"The safetensors files of {checkpoint_dir} have no LM head ({hf_weights.HEADS[0]}), and its config.json"
            f" says tie_word_embeddings: false.\n{way_out}"
        )
    with explain_damage(checkpoint_dir, f"{config.name} in safetensors files", way_out):
        weights = hf_weights.translate(config, found)
    _check_fit(weights, config, checkpoint_dir)
    return weights


def weights_files(checkpoint_dir: Path) -> list[Path]:
    """LitGPT's file, or Hugging Face's."""
    flat = checkpoint_dir / "lit_model.pth"
    return [flat] if flat.is_file() else hf_weights.files_in(checkpoint_dir)


def model_paths(checkpoint_dir: Path) -> list[Path]:
    """All files of a checkpoint that are read: its weights, and what lies beside them."""
    return [*weights_files(checkpoint_dir), *files_beside_weights(checkpoint_dir)]


def _check_fit(weights: dict[str, Tensor], config: Config, path: Path) -> None:
    if any("lora_" in name for name in weights):
        raise UserError(f"{path} holds LoRA weights. Merge them first: litgpt merge_lora {path.parent}")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit its model_config.yaml: it lacks {len(missing)} of {len(expected)} tensors"
            f" {missing[:1]} and has {len(extra)} others {extra[:1]}.\nDownload or convert the model again."
        )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, its model_config.yaml says {tuple(shape)}.\n"
                "Download or convert the model again."
            )


MARK = "2-"
"""How fingerprints begin. Those of before have no mark: they are of samples of the files, and miss most changes."""
CLOCK_STEP = 2 * 10**9
"""Nanoseconds between two times that every file system tells apart; FAT's are the farthest."""


def fingerprint(checkpoint_dir: Path, like: str | None = None) -> str:
    """Tells two checkpoints apart, wherever they lie: by their configuration, and by all of each weights file.

    What ``torch.save`` has written says so itself, by a checksum of each tensor. Other files are read once, and it is
    remembered beside prepared data what was found; they are read again when they have changed. One that is ``like``
    another one, with which it is to be compared, has the form of that.

    Raises:
        UserError: a file cannot be read, or changes meanwhile.
    """
    paths, start = weights_files(checkpoint_dir), repr(read_config(checkpoint_dir)).encode()
    if like is not None and not like.startswith(MARK):
        return _fingerprint_of_samples(paths, start)
    digest = xxhash.xxh3_128(start)
    for path in paths:
        with explain_damage(path, "weights", CONVERT_AGAIN):
            digest.update((_checksums_within(path) or _checksum(path)).encode())
    return MARK + digest.hexdigest()


def is_of(recorded: str, checkpoint_dir: Path) -> bool:
    """Whether a fingerprint, of whichever form, is that of a checkpoint; one without weights has none."""
    return bool(weights_files(checkpoint_dir)) and fingerprint(checkpoint_dir, like=recorded) == recorded


def _fingerprint_of_samples(paths: list[Path], start: bytes) -> str:
    """By the size of each file and 64 samples of its bytes."""
    digest, block = xxhash.xxh3_128(start), 2**16
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for position in range(0, size, max(block, size // 64)):
                file.seek(position)
                digest.update(file.read(block))
    return digest.hexdigest()


def _checksums_within(path: Path) -> str | None:
    """The checksums that a file of ``torch.save`` keeps of its tensors, by their names; None if it keeps none."""
    if not is_zipfile(path):
        return None
    with ZipFile(path) as archive:
        entries = archive.infolist()
    # torch.serialization.set_crc32_options(False) leaves zeros
    if any(entry.file_size and not entry.CRC for entry in entries):
        return None
    return json.dumps([[entry.filename, entry.file_size, entry.CRC] for entry in entries])


_known: dict[Stamp, str] = {}
"""Checksums that this process has computed: where it cannot keep them on the disk, it asks more than once, too."""


def _checksum(path: Path) -> str:
    """Of all of a file; from memory, if it has not changed since."""
    stamp = stamp_of(path)
    found = _known.get(stamp) or _recall(stamp)
    if found is None:
        began = time.time_ns()
        options = {"unit": "B", "unit_scale": True, "leave": False, "delay": 2}
        with progress_bar(total=stamp.size, desc=f"reading {path.name}", **options) as bar:
            found = file_checksum(path, bar.update)
        check_unchanged([stamp])
        # a change right after the one before leaves a file's times as they are
        if began - max(stamp.modified, stamp.changed) > CLOCK_STEP:
            _known[stamp] = found
            _remember(stamp, found)
    return found


def _memory_of(path: Path) -> Path:
    place = xxhash.xxh3_128_hexdigest(os.fsencode(path.resolve()))
    return default_cache_dir() / "weights" / f"{place}.json"


def _recall(stamp: Stamp) -> str | None:
    """What :func:`_remember` kept of a file that has not changed; of a memory that is damaged nothing is taken."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        kept = without_checksum(json.loads(_memory_of(stamp.path).read_text(encoding="utf-8")), required=True)
        if kept.get("stamp") == _plain(stamp):
            return kept.get("content")
    return None


def _remember(stamp: Stamp, checksum: str) -> None:
    memory = _memory_of(stamp.path)
    content = {"path": str(stamp.path.resolve()), "stamp": _plain(stamp), "content": checksum}
    # where nothing can be kept, the file is read anew the next time
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_file(memory, json.dumps(with_checksum(content)).encode())


def _plain(stamp: Stamp) -> list[int]:
    return [*astuple(stamp)[1:]]
