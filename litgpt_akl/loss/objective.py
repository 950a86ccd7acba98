"""What is minimised at a token: the options of an objective, their ranges, and which divergence each belongs to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from litgpt_akl.messages import UserError, reason

DivergenceName = Literal[
    "akl", "fkl", "rkl", "mix", "jsd", "skewed_fkl", "skewed_rkl", "tv", "todi", "alpha_beta", "tad", "csd", "drkl"
]
HeadRule = Literal["paper", "official"]
TailWeighting = Literal["sequence", "constant"]
PairWeight = Literal["mean", "teacher_student", "student", "teacher"]

OPTIONS: dict[str, dict[str, float | str]] = {
    "mix": {"mix_ratio": 0.5},
    "jsd": {"beta": 0.5},
    "skewed_fkl": {"skew": 0.1},
    "skewed_rkl": {"skew": 0.1},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "tad": {"top_k": 10, "tail_weight": 1.0, "tail_weighting": "sequence"},
    "csd": {"weight": "mean"},
    "drkl": {"gamma": 0.5},
}
"""The options that belong to some divergences alone, and their defaults; ``mu`` and ``head_rule`` are in statistics of
every one."""

_LIMITS: dict[str, dict[tuple[float, ...], str]] = {
    "mix": {(1,): "fkl", (0,): "rkl"},
    "jsd": {(0,): "fkl", (1,): "rkl"},
    "skewed_fkl": {(0,): "fkl"},
    "skewed_rkl": {(0,): "rkl"},
    "alpha_beta": {(1, 0): "fkl", (0, 1): "rkl"},
}
"""Values of the options at which a divergence is another one, whose code is simpler and exact there."""

_PAIR_SHARES: dict[PairWeight, dict[str, float]] = {
    "mean": {"share": 0.5, "difference": 0.0},
    "teacher_student": {"share": 0.5, "difference": 1.0},
    "student": {"share": 0.0, "difference": 0.0},
    "teacher": {"share": 1.0, "difference": 0.0},
}
"""The teacher's share in the weights of the two ids of a pair: its mean, and how much larger the first one's is."""

_INFINITY = float("inf")
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "mu": ("above 0 and at most 1", lambda mu: 0 < mu <= 1),
    "mix_ratio": ("between 0 and 1", lambda mix_ratio: 0 <= mix_ratio <= 1),
    "skew": ("at least 0 and below 1", lambda skew: 0 <= skew < 1),
    "top_k": ("at least 1", lambda top_k: top_k >= 1),
    "tail_weight": ("at least 0", lambda tail_weight: 0 <= tail_weight < _INFINITY),
    "gamma": ("at least 0", lambda gamma: 0 <= gamma < _INFINITY),
    "temperature": ("above 0", lambda temperature: 0 < temperature < _INFINITY),
    "kd_ratio": ("between 0 and 1", lambda kd_ratio: 0 <= kd_ratio <= 1),
}
_JSD_RANGE = ("between 0 and 1 for jsd", lambda beta: 0 <= beta <= 1)
_ALPHA_BETA_RANGE = (
    "above 0, except for the limits alpha 1, beta 0 (forward KL) and alpha 0, beta 1 (reverse KL)",
    lambda exponent: 0 < exponent < _INFINITY,
)


@dataclass(frozen=True)
class Objective:
    """What is minimised at a token."""

    divergence: DivergenceName | str = "akl"
    """One of the names, or the import path of a function."""
    mu: float = 0.5
    """Mass of the teacher's distribution that makes up the head, for akl."""
    head_rule: HeadRule = "paper"
    """Whether the id that crosses mu belongs to the head (paper) or not (official)."""
    mix_ratio: float = 0.5
    """Share of forward KL, for mix."""
    beta: float | None = None
    """Share of the teacher in the mixture, for jsd (default 0.5); exponent of the student, for alpha_beta (0.7)."""
    skew: float = 0.1
    """Share of the other model's distribution that is mixed in, for skewed_fkl and skewed_rkl."""
    alpha: float = 0.2
    """Exponent of the teacher, for alpha_beta."""
    top_k: int = 10
    """How many of the teacher's most probable ids stand apart from the rest, for tad."""
    tail_weight: float = 1.0
    """Weight of the divergence among the rest, for tad; its mean over the tokens of a sequence."""
    tail_weighting: TailWeighting = "sequence"
    """Whether that weight goes with the teacher's mass of the rest, token by token, or is the same for all, for tad."""
    weight: PairWeight = "mean"
    """By what a pair of ids counts, for csd."""
    gamma: float = 0.5
    """Weight of the divergence among all ids but the label, for drkl."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence; value and gradient are multiplied by its square."""
    kd_ratio: float = 0.5
    """Share of the divergence in the loss; the rest is cross-entropy."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: names the option, its value and its range, or says why a user's function cannot be had.
        """
        names = get_args(DivergenceName)
        if self.divergence not in names:
            if "." not in self.divergence:
                raise ValueError(
                    f"divergence must be one of {', '.join(names)}, or the import path of a function,"
                    f" got {self.divergence!r}"
                )
            user_function(self.divergence)
        for name, of in (("head_rule", HeadRule), ("tail_weighting", TailWeighting), ("weight", PairWeight)):
            if getattr(self, name) not in get_args(of):
                raise ValueError(f"{name} must be one of {', '.join(get_args(of))}, got {getattr(self, name)!r}")
        for name, allowed in _RANGES.items():
            _check(name, getattr(self, name), *allowed)
        if self.computed == self.divergence in ("jsd", "alpha_beta"):
            for name, value in self._own.items():
                _check(name, value, *(_JSD_RANGE if self.divergence == "jsd" else _ALPHA_BETA_RANGE))

    @property
    def _own(self) -> dict[str, float | str]:
        """The options that belong to the divergence alone, in the types of their defaults."""
        defaults = OPTIONS.get(self.divergence, {})
        given = {name: getattr(self, name) for name in defaults}
        return {
            name: type(default)(default if given[name] is None else given[name]) for name, default in defaults.items()
        }

    @property
    def computed(self) -> str:
        """The divergence that is computed: at the limits of its options it is another one than is named."""
        return _LIMITS.get(self.divergence, {}).get(tuple(self._own.values()), self.divergence)

    @property
    def weighs_tails(self) -> bool:
        """Whether tokens of one sequence are weighed against each other, by the teacher's mass beyond its top ids."""
        return self.divergence == "tad" and self.tail_weighting == "sequence"

    @property
    def options(self) -> dict[str, Any]:
        """What the divergence that is computed takes beside a tile; a bool among it decides about its code."""
        if self.divergence not in get_args(DivergenceName):
            return {"function": user_function(self.divergence)}
        if self.computed != self.divergence:
            return {}
        options = self._own
        if self.divergence == "tad":
            return {name: options[name] for name in ("top_k", "tail_weight")}
        if self.divergence == "csd":
            return _PAIR_SHARES[options["weight"]]
        return {**options, "teacher_outweighs": options["beta"] > 0.5} if self.divergence == "jsd" else options


def _check(name: str, value: float, words: str, allows: Callable[[float], bool]) -> None:
    if not allows(value):
        raise ValueError(f"{name} must be {words}, got {value}")


class UserFunction:
    """A user's ``function(teacher_logits, student_logits) -> [n]`` on a tile ``[n, vocab]``, with its gradient.

    Args:
        path: under which the function was found.
        function: see above; differentiable in its second argument.
    """

    def __init__(self, path: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.path, self.function, self.is_checked = path, function, False

    def differentiate(self, teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
        """The value ``[n]`` of each row, and its gradient ``[n, vocab]`` in the student's logits.

        Raises:
            UserError: the function gives something else than a number for each row, or is not differentiable.
        """
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_()
            value = self.function(teacher_logits.detach(), leaf)
            rows = leaf.shape[:1]
            if not isinstance(value, Tensor) or value.shape != rows:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UserError(
                    f"--distill.divergence {self.path} must give one number for each row of its logits"
                    f" {list(leaf.shape)}, a tensor {list(rows)}; it gave {found}."
                )
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise UserError(
                f"--distill.divergence {self.path} does not depend on the student's logits, its second argument, in a"
                " way that can be differentiated."
            )
        # an expanded one cannot be written to
        return value.detach().to(leaf.dtype), gradient.contiguous()

    def check_equality(self, logits: Tensor) -> None:
        """Call the function once where the student's logits equal the teacher's, ``[n, vocab]``.

        Raises:
            UserError: its value or its gradient is not finite there.
        """
        if len(logits) == 0:
            return
        for what, result in zip(("value", "gradient"), self.differentiate(logits, logits), strict=True):
            if not result.isfinite().all():
                raise UserError(
                    f"--distill.divergence {self.path} has a {what} that is not finite where the student's logits equal"
                    " the teacher's. Logits may be -inf, and a gradient must not be 0 times infinity."
                )
        self.is_checked = True


@cache
def user_function(path: str) -> UserFunction:
    """Import the function that ``path``, such as ``my.module.function``, names.

    Raises:
        ValueError: it cannot be imported, or cannot be called.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"divergence {path} cannot be imported: {reason(error)}. Modules are looked for where Python looks for"
            " them, such as in the folders of PYTHONPATH."
        ) from error
    if not callable(function):
        raise ValueError(
            f"divergence {path} must be a function of two blocks of logits, got a {type(function).__name__}"
        )
    return UserFunction(path, function)
