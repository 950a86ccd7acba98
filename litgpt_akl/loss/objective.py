"""What is minimised at a token: its options, their ranges, and the table of the divergences in closed form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from litgpt_akl.loss import closed_forms
from litgpt_akl.loss.adaptive import HeadRule
from litgpt_akl.loss.closed_forms import Slope
from litgpt_akl.loss.own_divergence import OwnDivergence, own_divergence

DivergenceName = Literal[
    "akl", "fkl", "rkl", "mix", "jsd", "skewed_fkl", "skewed_rkl", "tv", "todi", "alpha_beta", "tad"
]


class _Entry(NamedTuple):
    function: Callable[..., Slope]
    defaults: dict[str, float]
    """The options that it depends on."""
    ends: dict[tuple[float, ...], float]
    """Values of the options that make it forward KL (1) or reverse KL (0)."""
    switches: Callable[..., dict[str, bool]] = lambda **options: {}
    """What the values of the options decide about its code."""


def _weigh(beta: float) -> dict[str, bool]:
    return {"teacher_outweighs": beta > 0.5}


_CLOSED_FORMS: dict[str, _Entry] = {
    "jsd": _Entry(closed_forms.generalised_jsd, {"beta": 0.5}, {(0,): 1.0, (1,): 0.0}, _weigh),
    "skewed_fkl": _Entry(closed_forms.skewed_forward_kl, {"skew": 0.1}, {(0,): 1.0}),
    "skewed_rkl": _Entry(closed_forms.skewed_reverse_kl, {"skew": 0.1}, {(0,): 0.0}),
    "tv": _Entry(closed_forms.total_variation, {}, {}),
    "todi": _Entry(closed_forms.token_wise_kl, {}, {}),
    "alpha_beta": _Entry(closed_forms.alpha_beta, {"alpha": 0.2, "beta": 0.7}, {(1, 0): 1.0, (0, 1): 0.0}),
    "tad": _Entry(closed_forms.tail_aware_kl, {"top_k": 10, "tail_weight": 1.0}, {}),
}


def takers(option: str) -> list[str]:
    """The divergences that depend on ``option``."""
    return (
        ["mix"] if option == "mix_ratio" else [name for name, form in _CLOSED_FORMS.items() if option in form.defaults]
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
    """Weight of the divergence among the rest, for tad."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence; value and gradient are multiplied by its square."""
    kd_ratio: float = 0.5
    """Share of the divergence in the loss; the rest is cross-entropy."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: names the option, its value and its range, or why an own function cannot be had.
        """
        names = get_args(DivergenceName)
        if self.divergence not in names:
            if "." not in self.divergence:
                raise ValueError(
                    f"divergence must be one of {', '.join(names)}, or the import path of a function,"
                    f" got {self.divergence!r}"
                )
            own_divergence(self.divergence)
        if self.head_rule not in get_args(HeadRule):
            raise ValueError(f"head_rule must be one of {', '.join(get_args(HeadRule))}, got {self.head_rule!r}")
        if not 0.0 < self.mu <= 1.0:
            raise ValueError(f"mu must be above 0 and at most 1, got {self.mu}")
        if not 0.0 <= self.mix_ratio <= 1.0:
            raise ValueError(f"mix_ratio must be between 0 and 1, got {self.mix_ratio}")
        if not 0.0 <= self.skew < 1.0:
            raise ValueError(f"skew must be at least 0 and below 1, got {self.skew}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0.0 <= self.tail_weight < float("inf"):
            raise ValueError(f"tail_weight must be at least 0, got {self.tail_weight}")
        if self.divergence == "jsd" and not 0.0 <= self.options["beta"] <= 1.0:
            raise ValueError(f"beta must be between 0 and 1 for jsd, got {self.beta}")
        if self.divergence == "alpha_beta" and self._end is None:
            for name, value in self.options.items():
                if not 0.0 < value < float("inf"):
                    raise ValueError(
                        f"{name} must be above 0, except for the limits alpha 1, beta 0 (forward KL) and alpha 0,"
                        f" beta 1 (reverse KL), got {value}"
                    )
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0.0 <= self.kd_ratio <= 1.0:
            raise ValueError(f"kd_ratio must be between 0 and 1, got {self.kd_ratio}")

    @property
    def options(self) -> dict[str, float]:
        """The options that a divergence in closed form depends on, and their values; none of an own function."""
        defaults = _CLOSED_FORMS[self.divergence].defaults if self.divergence in _CLOSED_FORMS else {}
        given = {name: getattr(self, name) for name in defaults}
        values = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
        return {name: type(defaults[name])(value) for name, value in values.items()}

    @property
    def switches(self) -> dict[str, bool]:
        """What :attr:`options` decide about the code of a divergence in closed form, beside being its numbers."""
        entry = _CLOSED_FORMS.get(self.divergence)
        return {} if entry is None else entry.switches(**self.options)

    @property
    def _end(self) -> float | None:
        entry = _CLOSED_FORMS.get(self.divergence)
        return None if entry is None else entry.ends.get(tuple(self.options.values()))

    @property
    def form(self) -> Callable[..., Slope] | None:
        """What gives value and gradient of a tile, from logits, comparison, :attr:`options` and :attr:`switches`.

        None where they are shares of forward and reverse KL.
        """
        if self.divergence in _CLOSED_FORMS:
            return _CLOSED_FORMS[self.divergence].function if self._end is None else None
        return None if self.divergence in get_args(DivergenceName) else own_divergence(self.divergence)

    def forward_share(self, adaptive_weight: Tensor) -> Tensor | float | None:
        """Share of forward KL where there is no form, the rest being reverse KL; None where there is no rest."""
        if self.divergence == "akl":
            return adaptive_weight
        share = {"fkl": 1.0, "rkl": 0.0, "mix": self.mix_ratio}[self.divergence] if self._end is None else self._end
        return None if share == 1.0 else share

    @property
    def working_blocks(self) -> int:
        """How many tensors as large as a block of logits are needed where all rows are worked on at once.

        What an own function needs depends on it: ten are enough for a few log-softmaxes and products under autograd.
        """
        if isinstance(self.form, OwnDivergence):
            return 10
        # a gradient that waits for its sum over the vocabulary, the student's distribution, and one to work in
        return 0 if self.form is None else 3
