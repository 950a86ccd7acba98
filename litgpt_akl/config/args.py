"""Arguments of distillation, each with what it means: they are the help text."""

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule

from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.config.refusals import check_at_least_one, refuse_changed
from litgpt_akl.config.teachers import ListedTeacher
from litgpt_akl.loss.top_k import k_of
from litgpt_akl.messages import UserError

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
"""What LitGPT's LoRA adapts."""


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
            refuse_changed("lora", self, "", "without --lora.r", "Give it, the adapters' rank")
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
    tokenizer: Literal["same", "other"] = "same"
    """Whether the teacher's tokenizer is the student's, or may be another one: the teacher then reads each record in
    its own tokens and its own chat template, and both are compared over the ids and the chunks of text that they share
    (other)"""
    min_aligned: float = 0.25
    """With tokenizer other, the least share of response tokens that must be one token for both models, and the least
    mass that the teacher must give there to ids which both have; below either the run is refused"""
    chunk_temperature: float = 100.0
    """With tokenizer other, the root that is taken of the probabilities of a chunk of several tokens before they are
    compared: at 1 improbable chunks hardly count"""
    cache_dir: str | None = None
    """A folder that keeps the teacher's final hidden states at response tokens. What is there is not computed
    again, in later epochs and later runs; once all of it is, the teacher is not loaded. May be a URL, with cache_mode
    read"""
    cache_mode: Literal["auto", "fill", "read"] = "auto"
    """Fill what the cache lacks while the student is trained (auto); only fill it, without a student, whose place the
    teacher's directory can take (fill); or refuse to start if anything is missing (read)"""
    cache_dtype: str | None = None
    """What is stored: hidden states as bf16 or fp8 (default: as the teacher computes them, which changes nothing); or,
    by topk:64, in little space, the 64 most probable ids and the mass of all others. That is another objective, which
    akl, fkl, rkl, mix and tad have; what it costs is measured and printed"""
    cache_part: str | None = None
    """With cache_mode fill, which share of the data this job is to fill, such as 2/4 for the second of four; all may
    write into one folder, or into several whose files are put together"""

    def __post_init__(self) -> None:
        self._check_tokenizer()
        if "://" in (self.cache_dir or "") and self.cache_mode != "read":
            raise UserError(
                f"--teacher.cache_dir {self.cache_dir} is remote, and is only read: use --teacher.cache_mode read.\n"
                "Fill a local folder, and copy it there."
            )
        if self.cache_part is not None and self.cache_mode != "fill":
            raise UserError(
                f"--teacher.cache_part {self.cache_part} is for --teacher.cache_mode fill, not {self.cache_mode}."
                " Leave it out."
            )
        _check_cache_dtype(self.cache_dtype)
        self.part()

    def _check_tokenizer(self) -> None:
        if self.tokenizer == "same":
            for name in ("min_aligned", "chunk_temperature"):
                way_out = "Give --teacher.tokenizer other"
                refuse_changed("teacher", self, name, "where both models have one tokenizer", way_out)
        if not 0 <= self.min_aligned <= 1:
            raise UserError(f"--teacher.min_aligned must be from 0 to 1, got {self.min_aligned}.")
        if not 1 <= self.chunk_temperature < math.inf:
            raise UserError(f"--teacher.chunk_temperature must be at least 1, got {self.chunk_temperature}.")

    def part(self) -> tuple[int, int]:
        """Which share a job fills, from 0, and of how many."""
        if self.cache_part is None:
            return 0, 1
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.cache_part)
        if found is None or int(found[1]) > int(found[2]):
            raise UserError(f"--teacher.cache_part must be such as 2/4, the second of four, got {self.cache_part!r}.")
        return int(found[1]) - 1, int(found[2])

    @property
    def k(self) -> int | None:
        """How many ids the cache keeps; None if it keeps hidden states, or there is none."""
        return k_of(self.cache_dtype)

    def dtype(self, device_type: str) -> torch.dtype:
        """Of the teacher's weights, and of what a quantized one computes in."""
        return _dtype(self.precision, device_type)


def _check_cache_dtype(cache_dtype: str | None) -> None:
    if cache_dtype not in (None, "bf16", "fp8") and k_of(cache_dtype) is None:
        raise UserError(
            f"--teacher.cache_dtype must be bf16, fp8, or topk: with the number of ids to keep, got {cache_dtype!r}.\n"
            "Give topk:64, or leave it out."
        )


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
    cache_dtype: str | None = None
    """What is stored: hidden states as bf16 or fp8 (default: the precision), or by topk:64 the 64 most probable ids and
    the mass of all others"""

    def __post_init__(self) -> None:
        if self.cache_dir is not None and "://" in self.cache_dir:
            raise UserError(
                f"--teacher.cache_dir {self.cache_dir} is remote, and is to be written here.\n"
                "Give a local folder, and copy it there."
            )
        _check_cache_dtype(self.cache_dtype)

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
            refuse_changed("generation", self, "", "with --generation.seeds []", "Give seeds")
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
    teachers: list[ListedTeacher] | None
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
    def teacher_dirs(self) -> list[Path]:
        """Where the teachers are, as they were given; mostly one."""
        if self.teachers:
            return [teacher.directory for teacher in self.teachers]
        given = self.checkpoint_dir if self.teacher.use_base else self.teacher_checkpoint_dir
        return [] if given is None else [given]

    @property
    def teacher_dir(self) -> Path | None:
        """Where the teacher is, the first of several."""
        return next(iter(self.teacher_dirs), None)

    @property
    def args_of_teachers(self) -> list[TeacherArgs]:
        """The options of each teacher, which differ in their caches."""
        if not self.teachers:
            return [self.teacher]
        live = {name: field.default for name, field in TeacherArgs.__dataclass_fields__.items() if "cache_" in name}
        changes = ({"cache_dir": of.cache_dir} if of.cache_dir else live for of in self.teachers)
        return [replace(self.teacher, **of) for of in changes]


OPTIONS = tuple(field.name for field in fields(Options))
"""Their names."""
