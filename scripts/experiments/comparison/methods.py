"""What is compared: the methods, and all that a comparison of them consists of."""

from dataclasses import dataclass
from typing import NamedTuple


class Method(NamedTuple):
    """A way to train a student."""

    label: str
    options: dict[str, str | float]
    """Of ``DistillArgs``, as plain numbers: ``mix_ratio`` for ``mix.ratio``, ``mix_from`` and ``mix_to`` for both ends
    of its schedule."""


REFERENCE, STATIC_MIX = "akl", "akl_mean_mix"
METHODS = {
    REFERENCE: Method("adaptive KL (AKL)", {"divergence": "akl"}),
    STATIC_MIX: Method("static mix at AKL's mean h", {"divergence": "mix"}),
    "mix": Method("static mix, half and half", {"divergence": "mix", "mix_ratio": 0.5}),
    "scheduled_mix": Method("mix, from forward KL to half", {"divergence": "mix", "mix_from": 1.0, "mix_to": 0.5}),
    "fkl": Method("forward KL", {"divergence": "fkl"}),
    "rkl": Method("reverse KL", {"divergence": "rkl"}),
    "jsd": Method("Jensen-Shannon, beta 0.5", {"divergence": "jsd"}),
    "skewed_fkl": Method("skewed forward KL, 0.1", {"divergence": "skewed_fkl"}),
    "skewed_rkl": Method("skewed reverse KL, 0.1", {"divergence": "skewed_rkl"}),
    "tv": Method("total variation", {"divergence": "tv"}),
    "todi": Method("ToDi", {"divergence": "todi"}),
    "alpha_beta": Method("alpha-beta (0.2, 0.7)", {"divergence": "alpha_beta"}),
    "tad": Method("tail-aware KL (TAD)", {"divergence": "tad"}),
    "csd": Method("concrete score (CSD)", {"divergence": "csd"}),
    "drkl": Method("diversity-aware reverse KL (DRKL)", {"divergence": "drkl"}),
    "cross_entropy": Method("cross-entropy only", {"divergence": "fkl", "kd_ratio": 0.0}),
}


@dataclass(frozen=True)
class Settings:
    """A comparison."""

    pair: str
    """Which models and records, see :mod:`comparison.material`."""
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    """The first one chooses the learning rates."""
    rates: tuple[float, ...]
    """Learning rates that each method tries, rising."""
    steps: int
    """Optimizer steps of a run."""
    batch: int
    """Records in a step."""
    kd_ratio: float
    """Share of the divergence in the loss, for all but cross-entropy only."""
    train_records: int
    validation_records: int
    """Choose the learning rates."""
    test_records: int
    """Held out; all results are on them."""
    prompts: int
    """How many of these the students also answer in their own words, for ROUGE-L."""
    new_tokens: int
    """Length of an answer, at most."""


QUICK = Settings(
    pair="glassllm",
    methods=tuple(METHODS),
    seeds=(1, 2, 3),
    rates=(1e-3, 3e-3, 1e-2),
    steps=150,
    batch=16,
    kd_ratio=1.0,
    train_records=400,
    validation_records=80,
    test_records=120,
    prompts=32,
    new_tokens=32,
)
FULL = Settings(
    pair="smollm2",
    methods=tuple(METHODS),
    seeds=(1, 2, 3),
    rates=(3e-4, 1e-3, 3e-3),
    steps=80,
    batch=6,
    kd_ratio=1.0,
    train_records=1200,
    validation_records=150,
    test_records=256,
    prompts=64,
    new_tokens=32,
)
