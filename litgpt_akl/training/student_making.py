"""What `make_student` is asked for: its options, checked, and how many layers follow from them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from litgpt.data import DataModule

from litgpt_akl.config.recipe import check_masked
from litgpt_akl.config.refusals import check_at_least_one
from litgpt_akl.messages import UserError
from litgpt_akl.models.student_checkpoint import TeacherFiles
from litgpt_akl.models.student_config import SIZES, full_sizes
from litgpt_akl.models.weights import find_checkpoint_dir
from litgpt_akl.training.out_dir import check_apart

RECORDS, KL_RECORDS = 256, 10
"""Calibration records by default: for scores, and for forward KL."""
TRIAL_STEPS = 50
"""By default, of candidates that are compared."""
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
    candidates: int | None
    trial_steps: int | None
    data: DataModule | None
    method: Method | None
    keep_ends: bool
    records: int | None
    kl_records: int | None
    scores: Path | None
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
        self._check_candidates()
        self._check_effects()
        check_masked({"data": self.data})
        self.method = self.method or ("even" if self.data is None else "greedy")
        self.records, self.kl_records = self.records or RECORDS, self.kl_records or KL_RECORDS
        self.trial_steps = TRIAL_STEPS if self.trial_steps is None else self.trial_steps
        self.precision = self.precision or ("bf16-true" if torch.cuda.is_available() else "32-true")
        self.teacher_dir = find_checkpoint_dir(self.teacher_dir, "teacher", option="teacher_dir")
        self.out_dir = Path(self.out_dir)
        check_apart("out_dir", self.out_dir, {"teacher": self.teacher_dir})
        if self.scores is not None:
            self._check_scores()

    def _check_candidates(self) -> None:
        if self.candidates is None:
            if self.trial_steps is not None:
                raise UserError(f"--trial_steps {self.trial_steps} has no effect without --candidates; remove it.")
            return
        if self.candidates < 2:
            raise UserError(f"--candidates must be at least 2, got {self.candidates}.\nLeave it out for one student.")
        if self.trial_steps is not None and self.trial_steps < 0:
            raise UserError(f"--trial_steps must not be negative, got {self.trial_steps}.")
        if self.params is None:
            raise UserError(
                f"--candidates {self.candidates} are students of as many parameters as --params says.\n"
                "Give --params, such as 0.8."
            )
        for name, value in self.narrower.items():
            raise UserError(
                f"--{name} {value:g} has no effect with --candidates {self.candidates}, which have sizes of their own."
                f"\nLeave one of both out."
            )

    def _check_scores(self) -> None:
        """See that the scores can be written, where the student does not take their place."""
        self.scores = Path(self.scores)
        check_apart("--scores", self.scores, {"teacher": self.teacher_dir})
        if self.out_dir.resolve() in (self.scores.resolve(), *self.scores.resolve().parents):
            raise UserError(
                f"--scores {self.scores} lies in out_dir {self.out_dir}, which is to be new.\nGive a file elsewhere."
            )
        if self.scores.is_dir() or not self.scores.parent.is_dir():
            what = "is a directory" if self.scores.is_dir() else "lies in no directory that is there"
            raise UserError(f"--scores {self.scores} {what}.\nGive a file's name, such as scores.safetensors.")

    def _check_effects(self) -> None:
        """Refuse options that have no effect, such as those of calibration records where none are read."""
        named = isinstance(self.layers, list)
        if named and self.method:
            raise UserError(f"--method {self.method} has no effect with --layers {self.layers}; remove it.")
        chooses = self.narrower or self.candidates is not None
        if self.data is not None and not chooses and (named or self.method == "even"):
            other = f"--layers {self.layers}" if named else f"--method {self.method}"
            raise UserError(f"--data has no effect with {other}; remove it.")
        if self.data is not None:
            return
        chosen = [("method", self.method)] if self.method not in (None, "even") else [*self.narrower.items()]
        chosen += [] if self.candidates is None else [("candidates", self.candidates)]
        for name, value in chosen:
            raise UserError(
                f"--{name} {value} is decided by calibration records, and there are none.\n"
                "Give --data, such as --data StreamingSFT --data.path records.jsonl, or leave it out."
            )
        for name in ("records", "kl_records", "scores", "max_seq_length", "precision"):
            if (value := getattr(self, name)) is not None:
                raise UserError(f"--{name} {value} has no effect where no calibration records are read; remove it.")
        if not self.keep_ends:
            raise UserError("--keep_ends false has no effect where no calibration records are read; remove it.")

    @property
    def narrower(self) -> dict[str, float]:
        """Sizes that are to be smaller than the teacher's, as they were given."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}


def count_layers(making: StudentMaking, teacher: TeacherFiles, sizes: dict[str, int]) -> int | list[int]:
    """How many layers to keep, or which, in a student of these sizes.

    Raises:
        UserError: these are no layers of the teacher, or no number of layers is as small as it should be.
    """
    layers, n_layer, least = making.layers, teacher.config.n_layer, least_layers(making, teacher)
    if making.params is not None:
        size, budget = teacher.size_of(range(n_layer), sizes), count_parameters(making, teacher)
        layers = n_layer if budget >= size.whole else int((budget - size.root) // size.block)
        if layers < least:
            raise too_few_parameters(making, teacher, size.root + least * size.block)
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


def least_layers(making: StudentMaking, teacher: TeacherFiles) -> int:
    """How few layers a student may have: the first and the last, if they are kept."""
    keeps_both = making.data is not None and making.method != "even" and making.keep_ends
    return 2 if keeps_both and teacher.config.n_layer > 1 else 1


def count_parameters(making: StudentMaking, teacher: TeacherFiles) -> float:
    """How many parameters a student may have, of ``params``."""
    whole = teacher.size_of(range(teacher.config.n_layer), full_sizes(teacher.config)).whole
    return making.params * whole if making.params <= 1 else making.params


def too_few_parameters(making: StudentMaking, teacher: TeacherFiles, fewest: int) -> UserError:
    """An error that names the ``fewest`` parameters that a student can have."""
    whole = teacher.size_of(range(teacher.config.n_layer), full_sizes(teacher.config)).whole
    budget, least = count_parameters(making, teacher), least_layers(making, teacher)
    return UserError(
        f"--params {making.params} are {budget:,.0f} parameters, and {least} of {teacher.config.n_layer} layers with"
        f" embeddings and LM head have {fewest:,}.\nGive --params {math.ceil(fewest / whole * 100) / 100:.2f} or more."
    )


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
