"""Arguments of the objective, each with what it means: they are the help text."""

from dataclasses import dataclass, field
from operator import attrgetter

from litgpt_akl.config.refusals import check_at_least_one, refuse_changed
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.objective import DivergenceName, HeadRule, PairWeight, TailWeighting
from litgpt_akl.messages import UserError

KEYWORDS = {
    "akl.mu": "mu",
    "akl.head_rule": "head_rule",
    "mix.ratio": "mix_ratio",
    "jsd.beta": "beta",
    "skewed.skew": "skew",
    "alpha_beta.alpha": "alpha",
    "alpha_beta.beta": "beta",
    "tad.top_k": "top_k",
    "tad.tail_weight": "tail_weight",
    "tad.weighting": "tail_weighting",
    "csd.weight": "weight",
    "drkl.gamma": "gamma",
}
"""The options of one divergence, and the keywords that the loss has for them."""
TAKERS = {
    "mix": ("mix",),
    "jsd": ("jsd",),
    "skewed": ("skewed_fkl", "skewed_rkl"),
    "alpha_beta": ("alpha_beta",),
    "tad": ("tad",),
    "csd": ("csd",),
    "drkl": ("drkl",),
}
"""The divergences that alone depend on a group of options."""
SCHEDULED = {"mix_ratio": "mix.ratio", "skew": "skewed.skew", "temperature": "temperature"}
"""Keywords of the loss that may change from step to step, and the options that they stand in place of."""
OF_EVERY_DIVERGENCE = ("temperature", "kd_ratio", "block_tokens", "compile")


@dataclass
class AKLArgs:
    """Options of adaptive KL"""

    mu: float = 0.5
    """Mass of the teacher's distribution that counts as its head"""
    head_rule: HeadRule = "paper"
    """Whether the id that crosses mu belongs to the head (paper), or not, as in the authors' code (official)"""


@dataclass
class MixArgs:
    """Options of the mix of forward and reverse KL"""

    ratio: float = 0.5
    """Share of forward KL"""


@dataclass
class JSDArgs:
    """Options of the generalised Jensen-Shannon divergence"""

    beta: float = 0.5
    """Share of the teacher in the mixture. The divergence is divided by beta (1 - beta), so that it is as large as KL
    for every beta, forward KL at 0 and reverse KL at 1"""


@dataclass
class SkewedArgs:
    """Options of skewed KL"""

    skew: float = 0.1
    """Share of the teacher that the student is mixed with (skewed_fkl), or of the student that the teacher is mixed
    with (skewed_rkl)"""


@dataclass
class AlphaBetaArgs:
    """Options of the alpha-beta divergence"""

    alpha: float = 0.2
    """Exponent of the teacher (with beta 0, alpha 1 is forward KL; with beta 1, alpha 0 is reverse KL)"""
    beta: float = 0.7
    """Exponent of the student"""


@dataclass
class TADArgs:
    """Options of tail-aware KL"""

    top_k: int = 10
    """How many of the teacher's most probable ids stand apart from all others"""
    tail_weight: float = 1.0
    """Weight of KL among those others, renormalised; its mean over the tokens of a sequence"""
    weighting: TailWeighting = "sequence"
    """Whether that weight goes with the teacher's mass of those others, token by token (sequence), or is the same for
    all tokens (constant)"""


@dataclass
class CSDArgs:
    """Options of the concrete score divergence"""

    weight: PairWeight = "mean"
    """By what a pair of ids counts: both ids by the mean of teacher and student (mean), by the student (student) or by
    the teacher (teacher); or one by the teacher and the other one by the student (teacher_student)"""


@dataclass
class DRKLArgs:
    """Options of diversity-aware reverse KL"""

    gamma: float = 0.5
    """Weight of reverse KL among all ids but the label, renormalised"""


@dataclass
class ScheduleArgs:
    """Options that change evenly over the steps of a run: each is [at the first step, at the last step]"""

    mix_ratio: tuple[float, float] | None = None
    """In place of mix.ratio"""
    skew: tuple[float, float] | None = None
    """In place of skewed.skew"""
    temperature: tuple[float, float] | None = None
    """In place of temperature"""

    def __post_init__(self) -> None:
        for name, ends in self.given.items():
            if len(ends) != 2:
                raise UserError(
                    f"--distill.schedule.{name} takes two numbers, of the first step and of the last, got {ends}."
                )

    @property
    def given(self) -> dict[str, list[float]]:
        """Both ends of those that change, by their keywords."""
        return {name: list(ends) for name, ends in vars(self).items() if ends is not None}

    def at(self, done: float) -> dict[str, float]:
        """Their values where a share ``done``, from 0 to 1, of the way lies behind; at the ends they are exact."""
        return {name: (1 - done) * first + done * last for name, (first, last) in self.given.items()}


@dataclass
class DistillArgs:
    """Distillation-related arguments"""

    divergence: DivergenceName | str = "akl"
    """What to minimise between teacher and student: adaptive KL (akl), forward KL (fkl), reverse KL (rkl), a fixed mix
    of the two (mix), generalised Jensen-Shannon divergence (jsd), skewed forward or reverse KL (skewed_fkl,
    skewed_rkl), total variation (tv), token-wise KL (todi), alpha-beta divergence (alpha_beta), tail-aware KL (tad),
    concrete score divergence (csd), diversity-aware reverse KL (drkl), or a function of your own by its import path,
    such as my.module.function: it takes the teacher's and the student's logits, [n, vocab] each, divided by the
    temperature, and gives [n] numbers"""
    temperature: float = 1.0
    """Divides both models' logits in the divergence, whose value and gradient are multiplied by its square"""
    kd_ratio: float = 0.5
    """Share of the divergence in the loss; the rest is cross-entropy with the labels"""
    akl: AKLArgs = field(default_factory=AKLArgs)
    """Adaptive KL (akl); statistics of every divergence go by these options, too"""
    mix: MixArgs = field(default_factory=MixArgs)
    """Mix of forward and reverse KL (mix)"""
    jsd: JSDArgs = field(default_factory=JSDArgs)
    """Generalised Jensen-Shannon divergence (jsd)"""
    skewed: SkewedArgs = field(default_factory=SkewedArgs)
    """Skewed forward or reverse KL (skewed_fkl, skewed_rkl)"""
    alpha_beta: AlphaBetaArgs = field(default_factory=AlphaBetaArgs)
    """Alpha-beta divergence (alpha_beta)"""
    tad: TADArgs = field(default_factory=TADArgs)
    """Tail-aware KL (tad)"""
    csd: CSDArgs = field(default_factory=CSDArgs)
    """Concrete score divergence (csd)"""
    drkl: DRKLArgs = field(default_factory=DRKLArgs)
    """Diversity-aware reverse KL (drkl)"""
    schedule: ScheduleArgs = field(default_factory=ScheduleArgs)
    """Options that change over the run, such as {mix_ratio: [1.0, 0.5]}"""
    block_tokens: int | None = None
    """Tokens that go through the LM heads at a time (default: as many as 100 MiB of logits hold on a CPU, 1 GiB on a
    GPU). Changes memory and speed, never the result"""
    compile: bool | None = None
    """Whether torch.compile fuses the element-wise part of the loss (default: on a GPU, if there is
    a compiler)"""
    on_policy: float = 0.0
    """Share of the prompts, drawn anew in each epoch, that the student answers itself, from its current weights; the
    teacher then judges those tokens in place of the recorded response, by the divergence alone: kd_ratio times it, no
    cross-entropy"""
    on_policy_tokens: int = 256
    """Tokens of such an answer at most"""
    on_policy_temperature: float = 1.0
    """Divides the student's logits before it draws an id of such an answer; with 0 it takes the most probable one"""

    def __post_init__(self) -> None:
        self._check_on_policy()
        names = self._options() | {keyword: f"schedule.{keyword}" for keyword in self.schedule.given}
        for done in (0.0, 1.0):
            try:
                self.loss(done)
            except ValueError as error:
                keyword, _, rest = str(error).partition(" ")
                raise UserError(f"--distill.{names.get(keyword, keyword)} {rest}") from None
        self._check_schedule()
        for group, divergences in TAKERS.items():
            if self.divergence not in divergences:
                way_out = f"Use --distill.divergence {' or '.join(divergences)}"
                without = f"with --distill.divergence {self.divergence}"
                refuse_changed(f"distill.{group}", getattr(self, group), "", without, way_out)

    def _check_on_policy(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise UserError(f"--distill.on_policy must be from 0 to 1, got {self.on_policy}.")
        check_at_least_one("distill.", on_policy_tokens=self.on_policy_tokens)
        if not self.on_policy_temperature >= 0:
            raise UserError(f"--distill.on_policy_temperature must not be negative, got {self.on_policy_temperature}.")
        if self.on_policy > 0 and self.kd_ratio == 0:
            raise UserError(
                f"--distill.on_policy {self.on_policy} with --distill.kd_ratio 0: the student's responses are judged by"
                " the divergence alone. Raise kd_ratio, or leave on_policy out."
            )
        if self.on_policy == 0:
            way_out = "Give --distill.on_policy"
            refuse_changed("distill", self, "on_policy_", "without on-policy samples", way_out)

    def _check_schedule(self) -> None:
        """See that what changes is an option of the divergence, and has no other value; raises UserError."""
        for keyword, ends in self.schedule.given.items():
            name, given = SCHEDULED[keyword], f"--distill.schedule.{keyword} {ends}"
            takers = TAKERS.get(name.partition(".")[0], (self.divergence,))
            if self.divergence not in takers:
                raise UserError(
                    f"{given} has no effect with --distill.divergence {self.divergence}."
                    f" Use --distill.divergence {' or '.join(takers)}, or leave it out."
                )
            value = attrgetter(name)(self)
            if value != attrgetter(name)(DistillArgs()):
                raise UserError(f"--distill.{name} {value} has no effect with {given}; remove it.")

    def _options(self) -> dict[str, str]:
        """The options that the divergence takes: keywords of the loss, and their names here."""
        groups = ["akl", *(group for group, divergences in TAKERS.items() if self.divergence in divergences)]
        return {keyword: name for name, keyword in KEYWORDS.items() if name.partition(".")[0] in groups}

    def loss(self, done: float = 1.0) -> DistillationLoss:
        """The loss where a share ``done``, from 0 to 1, of the run lies behind; by default that of its end."""
        options = {name: getattr(self, name) for name in ("divergence", *OF_EVERY_DIVERGENCE)}
        own = {keyword: attrgetter(name)(self) for keyword, name in self._options().items()}
        return DistillationLoss(**options | own | self.schedule.at(done))

    def loss_of_step(self, step: int, steps: int) -> DistillationLoss:
        """The loss of a step, counted from 0, of a run of so many: a resumed run needs to know nothing else."""
        return self.loss(step / (steps - 1) if steps > 1 else 0.0)
