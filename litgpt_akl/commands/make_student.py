"""`litgpt make_student`: a student made from some of its teacher's layers."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import save_config

from litgpt_akl.config.args import check_at_least_one
from litgpt_akl.config.recipe import check_masked
from litgpt_akl.files.changed_files import check_unchanged, stamp_of
from litgpt_akl.files.directories import explain_failure, write_directory
from litgpt_akl.files.lock import new_directory_locked
from litgpt_akl.files.manifest import write_manifest
from litgpt_akl.files.reading import explain_damage
from litgpt_akl.messages import UserError, say
from litgpt_akl.models.depth import even_layers, influential_layers
from litgpt_akl.models.gpt import is_tied
from litgpt_akl.models.layerwise import LayerwiseModel
from litgpt_akl.models.model_files import copy_model_files, read_hf_config, write_json
from litgpt_akl.models.model_size import measure_size
from litgpt_akl.models.tensor_file import save_tensors
from litgpt_akl.models.vocabulary import config_without_padding, count_ids, describe_padding, without_padding
from litgpt_akl.models.weights import find_checkpoint_dir, model_paths, open_weights, read_config
from litgpt_akl.training.calibration import ids_in_use, read_samples, remove_layers, score, spread
from litgpt_akl.training.logging import silence_known_noise
from litgpt_akl.training.out_dir import check_apart

RECORDS, KL_RECORDS = 256, 10
"""Calibration records by default: for scores, and for forward KL."""
HF_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


RECORD = "make_student.json"
"""In the student's directory: how its layers were chosen."""
Method = Literal["greedy", "block_influence", "even"]


@dataclass
class StudentMaking:
    """One call of the command, checked, under the names of its signature; what was left out is chosen."""

    teacher_dir: Path
    out_dir: Path
    layers: int | list[int] | None
    params: float | None
    data: DataModule | None
    method: Method | None
    keep_ends: bool
    records: int | None
    kl_records: int | None
    max_seq_length: int | None
    precision: Literal["32-true", "bf16-true"] | None

    def __post_init__(self) -> None:
        if (self.layers is None) == (self.params is None):
            given = "neither is given" if self.layers is None else f"--layers {self.layers} --params {self.params}"
            raise UserError(f"How much of the teacher to keep is told by one of --layers and --params: {given}.")
        if self.params is not None and self.params <= 0:
            raise UserError(f"--params must be above 0, got {self.params}: a share up to 1, or a number of parameters.")
        numbers = ("records", "kl_records", "max_seq_length")
        check_at_least_one(**{name: getattr(self, name) for name in numbers})
        named = isinstance(self.layers, list)
        if self.data is None or named or self.method == "even":
            self._check_without_data(named)
        check_masked({"data": self.data})
        self.method = self.method or ("even" if self.data is None else "greedy")
        self.records, self.kl_records = self.records or RECORDS, self.kl_records or KL_RECORDS
        self.precision = self.precision or ("bf16-true" if torch.cuda.is_available() else "32-true")
        self.teacher_dir, self.out_dir = find_checkpoint_dir(self.teacher_dir, "teacher"), Path(self.out_dir)
        check_apart("out_dir", self.out_dir, {"teacher": self.teacher_dir})

    def _check_without_data(self, named: bool) -> None:
        """No option may be given that has no effect, as those of calibration records have where none are read."""
        if self.data is not None or (named and self.method):
            other = f"--layers {self.layers}" if named else f"--method {self.method}"
            option = f"--method {self.method}" if named and self.method else "--data"
            raise UserError(f"{option} has no effect with {other}; remove it.")
        if self.method not in (None, "even"):
            raise UserError(
                f"--method {self.method} chooses by calibration records, and there are none.\n"
                "Give --data, such as --data StreamingSFT --data.path records.jsonl, or --method even."
            )
        for name in ("records", "kl_records", "max_seq_length", "precision"):
            if (value := getattr(self, name)) is not None:
                raise UserError(f"--{name} {value} has no effect where no calibration records are read; remove it.")
        if not self.keep_ends:
            raise UserError("--keep_ends false has no effect where no calibration records are read; remove it.")

    @property
    def calibrates(self) -> bool:
        """Whether calibration records are read."""
        return self.data is not None


def make_student(
    teacher_dir: Path,
    out_dir: Path,
    *,
    layers: int | list[int] | None = None,
    params: float | None = None,
    data: DataModule | None = None,
    method: Method | None = None,
    keep_ends: bool = True,
    records: int | None = None,
    kl_records: int | None = None,
    max_seq_length: int | None = None,
    precision: Literal["32-true", "bf16-true"] | None = None,
) -> None:
    r"""Make a student from some of the layers of a teacher, for teachers that have no smaller sibling.

    The student keeps the teacher's embeddings, output head, final norm, tokenizer and chat template. It is a complete
    LitGPT checkpoint, to be trained by distillation: untrained it is a much worse model than its teacher. With
    ``--data`` the layers are kept that matter most on its records; without, they are evenly spread, a far worse start.

    Example, of 15 layers that are chosen, or of four that are named:
      litgpt make_student checkpoints/big checkpoints/small --layers 15 \
          --data StreamingSFT --data.path train.jsonl
      litgpt make_student checkpoints/big checkpoints/small --layers '[0,2,5,8]'

    Args:
        teacher_dir: The teacher's LitGPT checkpoint directory.
        out_dir: The student's checkpoint directory. It must not exist yet, or be empty.
        layers: How many layers to keep, or the numbers of the layers to keep, rising from 0: ``'[0,2,5,8]'``.
        params: In place of ``layers``, how many of the teacher's parameters to keep at most: up to 1 a share, such as
            0.5, above 1 a number, such as 3.6e8.
        data: Calibration records: data-related arguments as of finetune_akl. Those of the training to come are best.
        method: How layers are chosen. ``greedy`` (the default with data) removes one layer at a time, that without
            which the forward KL to the teacher is lowest. ``block_influence``, quicker and the worse the more layers
            go, removes those that turn their input least. ``even`` (the default without data) spreads them evenly from
            the first to the last.
        keep_ends: Whether the teacher's first and last layer stay in any case, when layers are chosen by data.
        records: Calibration records to score the teacher's parts by, evenly spread over the training records (default:
            256).
        kl_records: How many of these measure the forward KL (default: 10).
        max_seq_length: Tokens to which calibration records are cut (default: the teacher's context; longer ones are
            refused).
        precision: What the teacher is computed with on calibration records (default: bf16-true on a GPU, 32-true on a
            CPU). The student's weights have the type of the teacher's.
    """
    silence_known_noise()
    making = StudentMaking(**locals())
    teacher_dir, out_dir = making.teacher_dir, making.out_dir
    stamps = [*map(stamp_of, model_paths(teacher_dir))]
    teacher_config = read_config(teacher_dir)
    teacher_weights, ids = open_weights(teacher_dir, teacher_config), count_ids(teacher_dir)
    whole = config_without_padding(teacher_config, ids)
    tied = is_tied(teacher_dir, teacher_weights, None)
    layers = _count_layers(making, whole, tied)
    with new_directory_locked(out_dir):
        kept, record = _choose_layers(making, layers, teacher_config, teacher_weights)
        with write_directory(out_dir) as student_dir, explain_failure(out_dir):
            copy_model_files(teacher_dir, student_dir)
            config = _student_config(whole, kept)
            save_config(config, student_dir)
            if (student_dir / "config.json").is_file():
                with explain_damage(teacher_dir / "config.json", "the teacher's configuration"):
                    _edit_hf_config(student_dir / "config.json", teacher_config, kept, config.padded_vocab_size)
            if record:
                write_json(student_dir / RECORD, record)
            save_tensors(_student_weights(without_padding(teacher_weights, ids), kept), student_dir / "lit_model.pth")
            check_unchanged(stamps)
            write_manifest(student_dir, 0, None)
    sizes = (measure_size(of, tied).whole / 1e6 for of in (config, teacher_config))
    say(
        f"{out_dir}: a student with {len(kept)} of the {teacher_config.n_layer} layers of {teacher_dir} "
        f"({', '.join(map(str, kept))}), {next(sizes):.1f} M of its {next(sizes):.1f} M parameters."
    )
    if padding := describe_padding(teacher_config, ids):
        say(f"{padding} The student has none of them.")


def _count_layers(making: StudentMaking, config: Config, tied: bool) -> int | list[int]:
    """How many layers to keep, or which; raises UserError unless they are layers of the teacher."""
    layers, n_layer = making.layers, config.n_layer
    least = 2 if making.calibrates and making.keep_ends and n_layer > 1 else 1
    if making.params is not None:
        size = measure_size(config, tied)
        budget = making.params * size.whole if making.params <= 1 else making.params
        layers = n_layer if budget >= size.whole else int((budget - size.root) // size.block)
        if layers < least:
            raise UserError(
                f"--params {making.params} are {budget:,.0f} parameters, and {least} of the teacher's {n_layer} layers"
                f" with embeddings and LM head have {size.root + least * size.block:,}.\nGive --params"
                f" {math.ceil((size.root + least * size.block) / size.whole * 100) / 100:.2f} or more."
            )
    if isinstance(layers, list):
        _check_numbers(layers, n_layer)
    elif not least <= layers <= n_layer:
        ends = " The first and the last stay unless --keep_ends is false." if least > 1 and layers == 1 else ""
        raise UserError(
            f"layers is {layers}, but the teacher has {n_layer} layers. Give a number of {least} to {n_layer}.{ends}"
        )
    return layers


def _check_numbers(layers: list[int], n_layer: int) -> None:
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


def _choose_layers(
    making: StudentMaking, layers: int | list[int], config: Config, weights: dict[str, torch.Tensor]
) -> tuple[list[int], dict[str, Any] | None]:
    """The numbers of the layers to keep, and if calibration records were read, what is known from them."""
    if isinstance(layers, list):
        return layers, None
    n_layer = config.n_layer
    if not making.calibrates:
        if layers < n_layer:
            say(f"{layers} of {n_layer} layers, evenly spread: by --data those that matter most would be found.")
        return even_layers(layers, n_layer), None
    say(f"{making.teacher_dir}: choosing {layers} of {n_layer} layers ({making.method}).")
    samples = read_samples(making.data, making.teacher_dir, config, making.records, making.max_seq_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if making.precision == "bf16-true" else torch.float32
    model = LayerwiseModel(config, weights, device, dtype, max(len(sample.input_ids) for sample in samples))
    influence = score(model, samples).blocks
    record = {
        "teacher": str(making.teacher_dir),
        "method": making.method,
        "records": len(samples),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "block_influence": influence.tolist(),
    }
    if making.method == "block_influence":
        kept = influential_layers(influence, layers, making.keep_ends)
        return kept, {**record, "kept": kept}
    some = [samples[number] for number in spread(len(samples), making.kl_records)]
    vocab_size = ids_in_use(making.teacher_dir, config)
    removals = remove_layers(model, some, layers, making.keep_ends, vocab_size)
    kept = sorted({*range(n_layer)} - {removal.layer for removal in removals})
    if removals:
        say(f"Forward KL to the teacher on these records: {removals[-1].forward_kl:.3f} nats a response token.")
    measured = {"kl_records": len(some), "kl_response_tokens": sum(len(sample.positions) for sample in some)}
    return kept, {**record, **measured, "removed": [removal._asdict() for removal in removals], "kept": kept}


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
