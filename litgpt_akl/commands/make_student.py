"""`litgpt make_student`: a student made from some of its teacher's layers."""

import math
from dataclasses import dataclass
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
from litgpt_akl.models.importance import Importance
from litgpt_akl.models.layerwise import LayerwiseModel, Sample
from litgpt_akl.models.model_files import copy_model_files, write_json
from litgpt_akl.models.model_size import ModelSize, measure_size
from litgpt_akl.models.slicing import Kept, choose_parts, slice_weights, write_weights
from litgpt_akl.models.student_config import SIZES, edit_hf_config, model_type, student_config, student_sizes
from litgpt_akl.models.vocabulary import config_without_padding, count_ids, describe_padding, without_padding
from litgpt_akl.models.weights import find_checkpoint_dir, model_paths, open_weights, read_config
from litgpt_akl.training.calibration import ids_in_use, read_samples, remove_layers, score, spread
from litgpt_akl.training.logging import silence_known_noise
from litgpt_akl.training.out_dir import check_apart

RECORDS, KL_RECORDS = 256, 10
"""Calibration records by default: for scores, and for forward KL."""


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
    width: float | None
    mlp: float | None
    heads: float | None
    experts: float | None
    data: DataModule | None
    method: Method | None
    keep_ends: bool
    records: int | None
    kl_records: int | None
    max_seq_length: int | None
    precision: Literal["32-true", "bf16-true"] | None

    def __post_init__(self) -> None:
        if self.layers is not None and self.params is not None:
            raise UserError(
                f"--layers {self.layers} and --params {self.params} both tell the depth.\nGive one of them."
            )
        if self.layers is self.params is None and not self.narrower:
            raise UserError(
                "How much of the teacher to keep is not told.\nGive --layers or --params, or with --data one of"
                " --width, --mlp, --heads and --experts."
            )
        if self.params is not None and self.params <= 0:
            raise UserError(f"--params must be above 0, got {self.params}: a share up to 1, or a number of parameters.")
        numbers = ("records", "kl_records", "max_seq_length")
        check_at_least_one(**{name: getattr(self, name) for name in numbers})
        self._check_effects()
        check_masked({"data": self.data})
        self.method = self.method or ("even" if self.data is None else "greedy")
        self.records, self.kl_records = self.records or RECORDS, self.kl_records or KL_RECORDS
        self.precision = self.precision or ("bf16-true" if torch.cuda.is_available() else "32-true")
        self.teacher_dir, self.out_dir = (
            find_checkpoint_dir(self.teacher_dir, "teacher", option="teacher_dir"),
            Path(self.out_dir),
        )
        check_apart("out_dir", self.out_dir, {"teacher": self.teacher_dir})

    def _check_effects(self) -> None:
        """Refuse options that have no effect, such as those of calibration records where none are read."""
        named = isinstance(self.layers, list)
        if named and self.method:
            raise UserError(f"--method {self.method} has no effect with --layers {self.layers}; remove it.")
        if self.data is not None and not self.narrower and (named or self.method == "even"):
            other = f"--layers {self.layers}" if named else f"--method {self.method}"
            raise UserError(f"--data has no effect with {other}; remove it.")
        if self.data is not None:
            return
        chosen = [("method", self.method)] if self.method not in (None, "even") else [*self.narrower.items()]
        for name, value in chosen:
            raise UserError(
                f"--{name} {value} is decided by calibration records, and there are none.\n"
                "Give --data, such as --data StreamingSFT --data.path records.jsonl, or leave it out."
            )
        for name in ("records", "kl_records", "max_seq_length", "precision"):
            if (value := getattr(self, name)) is not None:
                raise UserError(f"--{name} {value} has no effect where no calibration records are read; remove it.")
        if not self.keep_ends:
            raise UserError("--keep_ends false has no effect where no calibration records are read; remove it.")

    @property
    def narrower(self) -> dict[str, float]:
        """Sizes that are to be smaller than the teacher's, as they were given."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}


def make_student(
    teacher_dir: Path,
    out_dir: Path,
    *,
    layers: int | list[int] | None = None,
    params: float | None = None,
    width: float | None = None,
    mlp: float | None = None,
    heads: float | None = None,
    experts: float | None = None,
    data: DataModule | None = None,
    method: Method | None = None,
    keep_ends: bool = True,
    records: int | None = None,
    kl_records: int | None = None,
    max_seq_length: int | None = None,
    precision: Literal["32-true", "bf16-true"] | None = None,
) -> None:
    r"""Make a student of some of a teacher's layers, channels and heads, for teachers that have no smaller sibling.

    The student keeps the teacher's tokenizer and chat template, and the weights of all that it has. It is a complete
    LitGPT checkpoint, to be trained by distillation: untrained it is a much worse model than its teacher. With
    ``--data`` it keeps what matters most on these records; without, evenly spread layers, a far worse start.

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
        width: How many channels of the hidden states to keep, or up to 1 the share of them. A share gives a multiple of
            64, or of 8 below 512. Embeddings, too, have fewer numbers then.
        mlp: The same of the channels within each MLP, or each expert.
        heads: The same of the query heads in each layer. Groups that share keys and values all keep as many.
        experts: The same of the experts in each layer.
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
    sizes = student_sizes(teacher_config, making.narrower, model_type(teacher_dir))
    layers = _count_layers(making, student_config(whole, range(whole.n_layer), sizes), measure_size(whole, tied), tied)
    with new_directory_locked(out_dir):
        kept, record = _choose(making, layers, sizes, teacher_config, teacher_weights)
        with write_directory(out_dir) as student_dir, explain_failure(out_dir):
            copy_model_files(teacher_dir, student_dir)
            config = student_config(whole, kept.layers, sizes)
            save_config(config, student_dir)
            if (student_dir / "config.json").is_file():
                with explain_damage(teacher_dir / "config.json", "the teacher's configuration"):
                    edit_hf_config(student_dir / "config.json", teacher_config, config, kept.layers)
            if record:
                write_json(student_dir / RECORD, record)
            weights = slice_weights(without_padding(teacher_weights, ids), teacher_config, kept)
            write_weights(student_dir / "lit_model.pth", weights)
            check_unchanged(stamps)
            write_manifest(student_dir, 0, None)
    counts = (measure_size(of, tied).whole / 1e6 for of in (config, teacher_config))
    say(
        f"{out_dir}: a student with {len(kept.layers)} of the {teacher_config.n_layer} layers of {teacher_dir} "
        f"({', '.join(map(str, kept.layers))}), {next(counts):.1f} M of its {next(counts):.1f} M parameters."
    )
    if padding := describe_padding(teacher_config, ids):
        say(f"{padding} The student has none of them.")


def _count_layers(making: StudentMaking, config: Config, teacher: ModelSize, tied: bool) -> int | list[int]:
    """How many layers to keep, or which; ``config`` is that of a student with all of them.

    Raises:
        UserError: these are no layers of the teacher, or no number of layers is as small as it should be.
    """
    layers, n_layer = making.layers, config.n_layer
    least = 2 if making.data is not None and making.method != "even" and making.keep_ends and n_layer > 1 else 1
    if making.params is not None:
        size = measure_size(config, tied)
        budget = making.params * teacher.whole if making.params <= 1 else making.params
        layers = n_layer if budget >= size.whole else int((budget - size.root) // size.block)
        if layers < least:
            fewest = size.root + least * size.block
            raise UserError(
                f"--params {making.params} are {budget:,.0f} parameters, and {least} of {n_layer} layers with"
                f" embeddings and LM head have {fewest:,}.\n"
                f"Give --params {math.ceil(fewest / teacher.whole * 100) / 100:.2f} or more."
            )
    if isinstance(layers, list):
        _check_numbers(layers, n_layer)
    elif layers is None:
        layers = n_layer
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


def _choose(
    making: StudentMaking,
    layers: int | list[int],
    sizes: dict[str, int],
    config: Config,
    weights: dict[str, torch.Tensor],
) -> tuple[Kept, dict[str, Any] | None]:
    """What of the teacher to keep, and if calibration records were read, what is known from them."""
    n_layer = config.n_layer
    if making.data is None:
        if isinstance(layers, int):
            if layers < n_layer:
                say(f"{layers} of {n_layer} layers, evenly spread: by --data those that matter most would be found.")
            layers = even_layers(layers, n_layer)
        return Kept(layers), None
    count = layers if isinstance(layers, int) else len(layers)
    narrower = "".join(f", {name} {sizes[name]}" for name in making.narrower)
    how = "as named" if isinstance(layers, list) else making.method
    say(f"{making.teacher_dir}: choosing {count} of {n_layer} layers ({how}){narrower}.")
    samples = read_samples(making.data, making.teacher_dir, config, making.records, making.max_seq_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if making.precision == "bf16-true" else torch.float32
    model = LayerwiseModel(config, weights, device, dtype, max(len(sample.input_ids) for sample in samples))
    importance = score(model, samples)
    record = {
        "teacher": str(making.teacher_dir),
        "method": how,
        "records": len(samples),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "block_influence": importance.blocks.tolist(),
        "sizes": sizes,
    }
    if isinstance(layers, int):
        layers, measured = _choose_layers(making, layers, model, samples, importance)
        record |= measured
    return choose_parts(importance, config, layers, sizes), {**record, "kept": layers}


def _choose_layers(
    making: StudentMaking, count: int, model: LayerwiseModel, samples: list[Sample], importance: Importance
) -> tuple[list[int], dict[str, Any]]:
    """Which layers to keep by the method, and what was measured for it."""
    n_layer = model.config.n_layer
    if making.method == "even":
        return even_layers(count, n_layer), {}
    if making.method == "block_influence":
        return influential_layers(importance.blocks, count, making.keep_ends), {}
    some = [samples[number] for number in spread(len(samples), making.kl_records)]
    vocab_size = ids_in_use(making.teacher_dir, model.config)
    removals = remove_layers(model, some, count, making.keep_ends, vocab_size) if count < n_layer else []
    if removals:
        say(f"Forward KL to the teacher on these records: {removals[-1].forward_kl:.3f} nats a response token.")
    measured = {"kl_records": len(some), "kl_response_tokens": sum(len(sample.positions) for sample in some)}
    layers = sorted({*range(n_layer)} - {removal.layer for removal in removals})
    return layers, {**measured, "removed": [removal._asdict() for removal in removals]}
