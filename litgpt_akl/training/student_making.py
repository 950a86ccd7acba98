"""What `make_student` is asked for: its options, checked."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from litgpt.data import DataModule

from litgpt_akl.config.recipe import check_masked
from litgpt_akl.config.refusals import check_at_least_one
from litgpt_akl.messages import UserError
from litgpt_akl.models.student_config import SIZES
from litgpt_akl.models.weights import find_checkpoint_dir
from litgpt_akl.training.out_dir import check_apart

RECORDS, KL_RECORDS = 256, 10
"""Calibration records by default: for scores, and for forward KL."""
TRIAL_STEPS = 50
"""By default, of candidates that are compared."""
Method = Literal["greedy", "block_influence", "even"]
BUDGETS = ("params", "memory", "speed")
"""Options that say how much of the teacher to keep, in place of how many layers."""
SIZE = re.compile(r"(\d+\.?\d*|\.\d+) ?([KMGT]?)(i?)B", re.IGNORECASE)


@dataclass
class StudentMaking:
    """One call of the command, checked, under the names of its signature; what was left out is chosen."""

    teacher_dir: Path
    out_dir: Path
    layers: int | list[int] | None
    params: float | None
    memory: str | None
    speed: float | None
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
        self._check_budget()
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

    def _check_budget(self) -> None:
        """See that exactly one option says how many layers to keep, and that its value means something."""
        told = [f"--{name} {value}" for name in ("layers", *BUDGETS) if (value := getattr(self, name)) is not None]
        if len(told) > 1:
            raise UserError(f"{told[0]} and {told[1]} both tell the depth.\nGive one of them.")
        if not told and not self.narrower:
            raise UserError(
                "How much of the teacher to keep is not told.\nGive --layers, --params, --memory or --speed, or with"
                " --data one of --width, --mlp, --heads and --experts."
            )
        if self.params is not None and self.params <= 0:
            raise UserError(f"--params must be above 0, got {self.params}: a share up to 1, or a number of parameters.")
        if self.memory is not None:
            bytes_of(self.memory)
        if self.speed is not None and not 1 < self.speed < math.inf:
            raise UserError(
                f"--speed must be above 1, got {self.speed:g}: a multiple of the teacher's tokens in a second.\n"
                "Give one such as 1.5."
            )

    def _check_candidates(self) -> None:
        if self.candidates is None:
            if self.trial_steps is not None:
                raise UserError(f"--trial_steps {self.trial_steps} has no effect without --candidates; remove it.")
            return
        if self.candidates < 2:
            raise UserError(f"--candidates must be at least 2, got {self.candidates}.\nLeave it out for one student.")
        if self.trial_steps is not None and self.trial_steps < 0:
            raise UserError(f"--trial_steps must not be negative, got {self.trial_steps}.")
        if all(getattr(self, name) is None for name in BUDGETS):
            raise UserError(
                f"--candidates {self.candidates} are students of as many parameters, bytes or tokens/s as is told.\n"
                "Give --params, such as 0.8, or --memory or --speed."
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


def bytes_of(size: str) -> float:
    """Bytes of a size such as ``500MB``; units of 1024 have an i, as ``2GiB``.

    Raises:
        UserError: it has no unit.
    """
    found = SIZE.fullmatch(size.strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(
            f"--memory must be a size above 0 with its unit, got {size}.\nGive one such as 500MB or 2GiB; a share of"
            " the teacher's parameters is --params, such as 0.8."
        )
    return float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
