"""`litgpt make_student`: a student made from some of its teacher's layers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.utils import save_config

from litgpt_akl.files.changed_files import check_unchanged, stamp_of
from litgpt_akl.files.directories import explain_failure, write_directory
from litgpt_akl.files.lock import new_directory_locked
from litgpt_akl.files.manifest import write_manifest
from litgpt_akl.files.reading import explain_damage
from litgpt_akl.messages import UserError, say
from litgpt_akl.models.model_files import copy_model_files, read_hf_config, write_json
from litgpt_akl.models.tensor_file import save_tensors
from litgpt_akl.models.vocabulary import config_without_padding, count_ids, describe_padding, without_padding
from litgpt_akl.models.weights import find_checkpoint_dir, model_paths, open_weights, read_config
from litgpt_akl.training.out_dir import check_apart

HF_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def make_student(teacher_dir: Path, out_dir: Path, *, layers: int | list[int]) -> None:
    """Make a student from some of the layers of a teacher, for teachers that have no smaller sibling.

    The student keeps the teacher's embeddings, output head, final norm, tokenizer and chat template. It is a complete
    LitGPT checkpoint, to be trained by distillation: untrained it is a much worse model than its teacher.

    Examples: ``litgpt make_student checkpoints/big checkpoints/small --layers 15`` and
    ``litgpt make_student checkpoints/big checkpoints/small --layers '[0,2,5,8]'``.

    Args:
        teacher_dir: The teacher's LitGPT checkpoint directory.
        out_dir: The student's checkpoint directory. It must not exist yet, or be empty.
        layers: How many layers to keep, spread evenly from the teacher's first to its last (``4`` of 30 keeps 0, 10, 19
            and 29), or the numbers of the layers to keep, rising from 0: ``'[0,2,5,8]'``.
    """
    teacher_dir, out_dir = find_checkpoint_dir(teacher_dir, "teacher"), Path(out_dir)
    check_apart("out_dir", out_dir, {"teacher": teacher_dir})
    stamps = [*map(stamp_of, model_paths(teacher_dir))]
    teacher_config = read_config(teacher_dir)
    kept = _kept_layers(layers, teacher_config.n_layer)
    teacher_weights, ids = open_weights(teacher_dir, teacher_config), count_ids(teacher_dir)
    with new_directory_locked(out_dir), write_directory(out_dir) as student_dir, explain_failure(out_dir):
        copy_model_files(teacher_dir, student_dir)
        config = config_without_padding(_student_config(teacher_config, kept), ids)
        save_config(config, student_dir)
        if (student_dir / "config.json").is_file():
            with explain_damage(teacher_dir / "config.json", "the teacher's configuration"):
                _edit_hf_config(student_dir / "config.json", teacher_config, kept, config.padded_vocab_size)
        student_weights = _student_weights(without_padding(teacher_weights, ids), kept)
        save_tensors(student_weights, student_dir / "lit_model.pth")
        check_unchanged(stamps)
        write_manifest(student_dir, 0, None)
    say(
        f"{out_dir}: a student with {len(kept)} of the {teacher_config.n_layer} layers of {teacher_dir} "
        f"({', '.join(map(str, kept))}), {_count_parameters(student_weights) / 1e6:.1f} M of its "
        f"{_count_parameters(teacher_weights) / 1e6:.1f} M parameters."
    )
    if padding := describe_padding(teacher_config, ids):
        say(f"{padding} The student has none of them.")


def _kept_layers(layers: int | list[int], n_layer: int) -> list[int]:
    """The numbers of the layers to keep, rising; raises UserError unless they are layers of an n_layer model."""
    if isinstance(layers, int):
        if not 1 <= layers <= n_layer:
            raise UserError(
                f"layers is {layers}, but the teacher has {n_layer} layers. Give a number of 1 to {n_layer}."
            )
        last = n_layer - 1
        return [round(index * last / (layers - 1)) for index in range(layers)] if layers > 1 else [last]
    if not layers:
        raise UserError(f"layers is empty. Give at least one of the teacher's layers, 0 to {n_layer - 1}.")
    outside = [layer for layer in layers if not 0 <= layer < n_layer]
    if outside:
        raise UserError(
            f"layers names {outside}, but the teacher's {n_layer} layers are numbered 0 to {n_layer - 1}. "
            "Leave out what is not there."
        )
    if layers != sorted(set(layers)):
        raise UserError(f"layers is {layers}: not rising, or a layer twice. Give {sorted(set(layers))}.")
    return layers


def _student_config(teacher: Config, kept: list[int]) -> Config:
    def subset(per_layer: list[int] | None) -> list[int] | None:
        return None if per_layer is None else [per_layer[layer] for layer in kept]

    return replace(
        teacher,
        n_layer=len(kept),
        sliding_window_indices=subset(teacher.sliding_window_indices),
        rope_indices=subset(teacher.rope_indices),
        first_k_dense_replace=_leading_layers(teacher.first_k_dense_replace, kept),
    )


def _leading_layers(count: int | None, kept: list[int]) -> int | None:
    return None if count is None else sum(layer < count for layer in kept)


def _edit_hf_config(path: Path, teacher: Config, kept: list[int], ids: int) -> None:
    """Makes a Hugging Face config.json describe a model of the kept layers only."""
    hf_config = read_hf_config(path)
    # models with several parts, such as Gemma 3, describe the language model in an entry of its own
    text_config: dict[str, Any] = hf_config.get("text_config", hf_config)
    text_config["num_hidden_layers"] = len(kept)
    text_config["vocab_size"] = ids
    for name in HF_LAYER_LISTS:
        if isinstance(text_config.get(name), list):
            text_config[name] = [text_config[name][layer] for layer in kept]
    if "first_k_dense_replace" in text_config:
        text_config["first_k_dense_replace"] = _leading_layers(text_config["first_k_dense_replace"], kept)
    if "layer_types" not in text_config and len(set(teacher.sliding_window_indices or [])) > 1:
        # Gemma's classes derive the kind of a layer from its number, which has changed
        kinds = {0: "full_attention", 1: "sliding_attention"}
        text_config["layer_types"] = [kinds[teacher.sliding_window_indices[layer]] for layer in kept]
    write_json(path, hf_config)


def _student_weights(teacher: dict[str, torch.Tensor], kept: list[int]) -> dict[str, torch.Tensor]:
    """The kept tensors under their new names; tensors that share storage in the teacher share it here."""
    new_number = {str(layer): str(number) for number, layer in enumerate(kept)}
    owned: dict[tuple, torch.Tensor] = {}
    student = {}
    for name, tensor in teacher.items():
        parts = name.split(".")
        if parts[:2] == ["transformer", "h"]:
            if parts[2] not in new_number:
                continue
            parts[2] = new_number[parts[2]]
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in owned:
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            # torch.save writes a view's whole storage: a part must become a tensor of its own
            owned[place] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        student[".".join(parts)] = owned[place]
    return student


def _count_parameters(weights: dict[str, torch.Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values())
