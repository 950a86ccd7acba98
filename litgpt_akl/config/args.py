"""Arguments of distillation, each with what it means: they are the help text."""

import dataclasses
import re
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule

from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.objective import DivergenceName, HeadRule, PairWeight, TailWeighting
from litgpt_akl.messages import UserError

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
"""What LitGPT's LoRA adapts."""


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


def changed(args: Any) -> dict[str, Any]:
    """The arguments of a group that are not as they are by default, with their values."""
    return {
        field.name: getattr(args, field.name)
        for field in fields(args)
        if field.default is not dataclasses.MISSING and getattr(args, field.name) != field.default
    }


def check_at_least_one(group: str = "", /, **values: float | None) -> None:
    """Refuse numbers below 1, which are named by their options; None is no number. Raises UserError."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{group}{name} must be at least 1, got {value}.")


def _refuse_changed(group: str, args: Any, prefix: str, why: str, way_out: str) -> None:
    """Refuse arguments whose names begin so, unless they are as by default; raises UserError."""
    for name, value in changed(args).items():
        if name.startswith(prefix):
            raise UserError(f"--{group}.{name} {value} has no effect {why}. {way_out}, or leave {name} out.")


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
                _refuse_changed(f"distill.{group}", getattr(self, group), "", without, way_out)

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
            _refuse_changed("distill", self, "on_policy_", "without on-policy samples", way_out)

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


@dataclass
class LoRAArgs:
    """LoRA-related arguments"""

    r: int | None = None
    """Rank of LitGPT's LoRA adapters, which alone are trained; the student's own weights are frozen (default: no
    adapters, the whole student is trained)"""
    alpha: int = 16
    """What the adapters give is multiplied by alpha / r"""
    dropout: float = 0.05
    """Share of an adapter's inputs that are dropped at random in training. Each process draws its own: only with 0 are
    the steps the same for any number of them"""
    query: bool = True
    """Whether the queries in attention have an adapter"""
    key: bool = False
    """Whether the keys in attention have one"""
    value: bool = True
    """Whether the values in attention have one"""
    projection: bool = False
    """Whether the output projection in attention has one"""
    mlp: bool = False
    """Whether the MLP's layers have one each"""
    head: bool = False
    """Whether the LM head has one; the trained student's embeddings and head are two matrices then"""

    def __post_init__(self) -> None:
        if self.r is None:
            _refuse_changed("lora", self, "", "without --lora.r", "Give it, the adapters' rank")
            return
        if self.r < 1:
            raise UserError(f"--lora.r must be at least 1, got {self.r}. Leave it out (null) for no adapters.")
        check_at_least_one("lora.", alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout must be at least 0 and below 1, got {self.dropout}.")
        if not self.targets:
            raise UserError(
                f"--lora.r {self.r}, but there is nothing to adapt: set one of --lora.{', '.join(TARGETS)}."
            )

    @property
    def targets(self) -> list[str]:
        """What has adapters."""
        return [name for name in TARGETS if getattr(self, name)]


@dataclass
class TeacherArgs:
    """Teacher-related arguments"""

    precision: Literal["32-true", "bf16-true"] | None = None
    """What the teacher's weights are held in and computed with, whatever the student trains in (default: bf16-true on a
    GPU, 32-true on a CPU; the student's, if the teacher is the base of a LoRA student)"""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the weights of the teacher's blocks in 8 or 4 bits, by bitsandbytes; on one device"""
    cpu_offload: bool = False
    """Whether the processes' shares of the teacher lie in CPU memory, from where they are copied to the GPUs block by
    block in its forward: less GPU memory, more time; with several GPUs"""
    use_base: bool = False
    """Whether the teacher is the student as it was before training: with --lora.r, in place of a teacher's directory"""
    cache_dir: str | None = None
    """A folder that keeps the teacher's final hidden states at response tokens. What is there is not computed
    again, in later epochs and later runs; once all of it is, the teacher is not loaded. May be a URL, with cache_mode
    read"""
    cache_mode: Literal["auto", "fill", "read"] = "auto"
    """Fill what the cache lacks while the student is trained (auto); only fill it, without a student, whose place the
    teacher's directory can take (fill); or refuse to start if anything is missing (read)"""
    cache_dtype: Literal["bf16", "fp8"] | None = None
    """What hidden states are stored as (default: what the teacher computes in, which changes nothing)"""
    cache_part: str | None = None
    """With cache_mode fill, which share of the data this job is to fill, such as 2/4 for the second of four; all may
    write into one folder, or into several whose files are put together"""

    def __post_init__(self) -> None:
        if self.cache_dir is None:
            _refuse_changed("teacher", self, "cache_", "without --teacher.cache_dir", "Give it")
            return
        if "://" in self.cache_dir and self.cache_mode != "read":
            raise UserError(
                f"--teacher.cache_dir {self.cache_dir} is remote, and is only read: use --teacher.cache_mode read.\n"
                "Fill a local folder, and copy it there."
            )
        if self.cache_part is not None and self.cache_mode != "fill":
            raise UserError(
                f"--teacher.cache_part {self.cache_part} is for --teacher.cache_mode fill, not {self.cache_mode}."
                " Leave it out."
            )
        self.part()

    def part(self) -> tuple[int, int]:
        """Which share a job fills, from 0, and of how many."""
        if self.cache_part is None:
            return 0, 1
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.cache_part)
        if found is None or int(found[1]) > int(found[2]):
            raise UserError(f"--teacher.cache_part must be such as 2/4, the second of four, got {self.cache_part!r}.")
        return int(found[1]) - 1, int(found[2])

    def dtype(self, device_type: str) -> torch.dtype:
        """Of the teacher's weights, and of what a quantized one computes in."""
        return _dtype(self.precision, device_type)


def _dtype(precision: str | None, device_type: str) -> torch.dtype:
    precision = precision or ("bf16-true" if device_type == "cuda" else "32-true")
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


@dataclass
class CacheArgs:
    """Arguments of a teacher whose hidden states come from elsewhere"""

    cache_dir: str | None = None
    """The folder that is to hold the teacher's hidden states, for finetune_akl's option of this name"""
    precision: Literal["32-true", "bf16-true"] | None = None
    """What the teacher's final norm and LM head are computed in, as finetune_akl will be told (default: bf16-true on a
    GPU, 32-true on a CPU)"""
    cache_dtype: Literal["bf16", "fp8"] | None = None
    """What hidden states are stored as (default: the precision)"""

    def __post_init__(self) -> None:
        if self.cache_dir is not None and "://" in self.cache_dir:
            raise UserError(
                f"--teacher.cache_dir {self.cache_dir} is remote, and is to be written here.\n"
                "Give a local folder, and copy it there."
            )

    def dtype(self, device_type: str) -> torch.dtype:
        """Of the hidden states that the final norm gives, as that of :class:`TeacherArgs` with these options."""
        return _dtype(self.precision, device_type)


@dataclass
class GenerationArgs:
    """Arguments of the answers that are rated"""

    seeds: list[int] = field(default_factory=lambda: [10, 20, 30, 40, 50])
    """Each prompt is answered once for each of these seeds; none ([]) leaves answers out"""
    max_new_tokens: int = 256
    """Tokens of an answer at most"""
    temperature: float = 1.0
    """Divides the logits before an id is drawn; with 0 the most probable id is taken, and seeds make no difference"""
    no_repeat_ngram: int | None = 6
    """No sequence of so many ids comes twice in prompt and answer together; null for no such rule"""
    batch_size: int = 16
    """Prompts that are answered together. Changes speed and memory, not the answers, up to rounding"""
    max_prompts: int | None = None
    """How many prompts are answered (default: those of all records that are evaluated)"""
    teacher: bool = True
    """Whether the teacher's answers are rated, too"""

    def __post_init__(self) -> None:
        if not self.seeds:
            _refuse_changed("generation", self, "", "with --generation.seeds []", "Give seeds")
        counts = ("max_new_tokens", "no_repeat_ngram", "batch_size", "max_prompts")
        check_at_least_one("generation.", **{name: getattr(self, name) for name in counts})
        if not self.temperature >= 0:
            raise UserError(f"--generation.temperature must not be negative, got {self.temperature}.")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0:
            raise UserError(f"--generation.seeds must be different numbers from 0 on, got {self.seeds}.")


@dataclass
class Options:
    """The options of ``litgpt finetune_akl``, under the names that its signature has and its docstring explains."""

    checkpoint_dir: Path
    teacher_checkpoint_dir: Path | None
    data: DataModule | None
    optimizer: str | dict
    out_dir: Path | None
    precision: str | None
    devices: int | str
    num_nodes: int
    hybrid_sharding: bool
    activation_checkpointing: bool
    compile: bool
    resume: bool | Literal["auto"] | Path | None
    accept_changes: bool
    overwrite: bool
    save_minutes: float | None
    keep_last: int | None
    export_hf: bool
    on_nonfinite: Literal["stop", "skip"]
    teacher: TeacherArgs
    lora: LoRAArgs
    distill: DistillArgs
    train: TrainArgs
    eval: EvalArgs
    log: LogArgs
    logger_name: str
    seed: int
    access_token: str | None
    dry_run: bool
    device_memory: float | None

    @property
    def cuda(self) -> bool:
        """Whether the devices are GPUs, which in a dry run need not be there."""
        return torch.cuda.is_available() or (self.dry_run and self.device_memory is not None)

    @property
    def processes(self) -> int:
        """Of the whole run, once the devices are counted."""
        return self.devices * self.num_nodes

    @property
    def teacher_dir(self) -> Path | None:
        """Where the teacher is, as it was given."""
        return self.checkpoint_dir if self.teacher.use_base else self.teacher_checkpoint_dir


OPTIONS = tuple(field.name for field in fields(Options))
"""Their names."""
