"""How much memory a run will take on each device, from its options alone, and what to change if that is too much.

A step has moments at which most is in memory. Each is the sum of what is held then, in bytes of one device; the highest
is what a run needs. Not counted are what the libraries take for themselves and what an allocator cannot use between its
blocks. What a model's blocks take is measured on fake tensors; to follow whole steps on them takes 10 s for 70 billion
parameters, where a search for ways out compares up to a hundred runs.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from litgpt.args import TrainArgs
from litgpt.config import Config
from torch import Tensor, nn

from litgpt_akl.config.args import DistillArgs, LoRAArgs, TeacherArgs
from litgpt_akl.data.workers import available_memory
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.messages import UserError
from litgpt_akl.models.generation import BATCH
from litgpt_akl.models.lora import lora_config
from litgpt_akl.models.model_size import ModelSize, measure_block, measure_blocks, measure_size
from litgpt_akl.models.pair import Models

PARTS = STUDENT, GRADIENTS, OPTIMIZER, TEACHER, GATHERED, COPIES, ACTIVATIONS, LOSS, TABLES, STREAM = (
    *("student weights", "gradients", "optimizer", "teacher weights", "heads and blocks gathered"),
    *("weights in another type", "activations", "loss blocks", "position tables", "teacher's stream"),
)
"""What memory is needed for; the rows of the table."""
GB, FLOAT32 = 1e9, 4
MOST_DEVICES = 64
"""That are tried; a node has up to eight, which are the most that many machines have."""
QUANTIZED = {"int8": 1, "nf4": 0.5 + 4 / 64}
"""Bytes of a weight; for nf4 with a float32 scale for every 64."""


class Moment(NamedTuple):
    """One of the moments at which much is in memory."""

    name: str
    parts: dict[str, float]
    """Bytes of one device by :data:`PARTS`."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """What the memory of a run depends on, and what follows from that."""

    student: Config
    """LitGPT's; one of ``litgpt.lora`` if LoRA is trained."""
    teacher: Config
    student_tied: bool
    """Whether embeddings and LM head are one matrix."""
    teacher_tied: bool
    vocab_size: int
    """Ids that tokenizer and both heads have."""
    loss: DistillationLoss
    device: Literal["cpu", "cuda"]
    devices: int
    """On each node."""
    num_nodes: int
    hybrid_sharding: bool
    precision: Literal["32-true", "bf16-true", "bf16-mixed"]
    teacher_dtype: torch.dtype
    optimizer_states: float
    """Numbers that the optimizer keeps for a parameter."""
    optimizer_is_fused: bool
    """Whether it steps without copies of parameters."""
    global_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None
    sequence_length: int
    """Tokens of the longest sample."""
    activation_checkpointing: bool = False
    shares_base: bool = False
    """Whether the teacher is the base of a LoRA student, held once."""
    quantize: Literal["int8", "nf4"] | None = None
    cpu_offload: bool = False
    teacher_role: Literal["live", "cached", "fill"] = "live"
    """Whether all of it is there, its LM head only, or it fills a cache and there is no student."""
    on_policy_prompts: int = 0
    """From which the student writes together in a process."""

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    @property
    def shards(self) -> int:
        """Processes that a model is spread over."""
        return self.devices if self.hybrid_sharding else self.processes

    @property
    def samples(self) -> int:
        """In a micro-batch of the longest ones."""
        if self.micro_batch_tokens is not None:
            return max(1, min(self.micro_batch_tokens // self.sequence_length, self.global_batch_size))
        return min(self.micro_batch_size, self.global_batch_size)

    @property
    def student_dtype(self) -> torch.dtype:
        """Of weights, gradients and optimizer."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    @property
    def sizes(self) -> tuple[ModelSize, ModelSize]:
        """Of student and teacher."""
        return measure_size(self.student, self.student_tied), measure_size(self.teacher, self.teacher_tied)

    @cached_property
    def moments(self) -> list[Moment]:
        """What a device holds at the moments of a step, in their order."""
        step, found = _Step(self), {}
        if self.on_policy_prompts and self.teacher_role != "fill":
            found["student's on-policy samples"] = step.on_policy_samples()
        if self.teacher_role != "cached":
            found["teacher's forward"] = step.teacher_forward()
        if self.teacher_role != "fill":
            found |= {"student's forward": step.student_forward(), "student's loss": step.student_loss()}
            found |= {"begin of the backward": step.backward_begins(), "end of the backward": step.backward_ends()}
            found |= {"embeddings' gradient": step.embeddings_gradient(), "optimizer's step": step.optimizer_step()}
        return [Moment(name, dict.fromkeys(PARTS, 0) | step.always | parts) for name, parts in found.items()]

    @property
    def peak(self) -> Moment:
        """The moment at which most is in memory."""
        return max(self.moments, key=lambda moment: moment.total)


class _Step:
    """What is in memory at each moment of a step, beside what always is."""

    def __init__(self, run: MemoryEstimate) -> None:
        self.run, is_cached, has_student = run, run.teacher_role == "cached", run.teacher_role != "fill"
        self.student, teacher = run.sizes
        if is_cached:
            teacher = teacher._replace(whole=teacher.head, root=teacher.head, block=0)
        self.width, self.teacher_width = width, teacher_width = run.student_dtype.itemsize, run.teacher_dtype.itemsize
        shape, mixed = (run.samples, run.sequence_length), run.precision == "bf16-mixed"
        self.tokens = math.prod(shape)
        self.hidden = self.tokens * run.student.n_embd * width
        self.teacher_hidden = self.tokens * run.teacher.n_embd * teacher_width
        self.blocks = measure_blocks(run.student, *shape, run.student_dtype, mixed)
        # autocast's copies of weights, which each product keeps for its backward
        self.copies, self.copies_of_block = self.student.products * 2 * mixed, self.student.block * 2 * mixed
        self.kept = self.hidden + sum(block.kept for block in self.blocks) - self.copies
        if run.activation_checkpointing:
            self.kept = self.hidden * (1 + len(self.blocks))
            self.blocks = [block._replace(kept=0) for block in self.blocks]
        self.kept_by_norm = measure_block(run.student, None, *shape, run.student_dtype, False).kept
        self.gradients = self.student.trained * width / run.shards
        # from the second micro-batch on they are there before a backward
        self.accumulates = math.ceil(run.global_batch_size / run.samples) > run.processes
        # what is whole while it is gathered, and gradients while those of another block are shared out, in float32
        self.sharded = run.shards > 1
        self.root, self.block = self.student.root * width * self.sharded, self.student.block * width * self.sharded
        gathered_width = teacher_width * self.sharded
        self.teacher_root, self.teacher_block = teacher.root * gathered_width, teacher.block * gathered_width
        self.shared_out = self.student.trained_block * (width + FLOAT32) * self.sharded
        self.inference = max(b.no_grad for b in measure_blocks(run.teacher, *shape, run.teacher_dtype, False))
        self.inference += 2 * self.teacher_hidden
        # memory of a stream of the teacher's own serves nothing else when it is free
        runs_ahead = run.device == "cuda" and run.processes == 1 and self.accumulates and run.teacher_role == "live"
        stream, self.inference = (self.inference + self.teacher_hidden, 0) if runs_ahead else (0, self.inference)
        is_elsewhere = run.shares_base or (run.cpu_offload and not is_cached)
        teacher_blocks = (teacher.whole - teacher.root) * QUANTIZED.get(run.quantize, teacher_width)
        self.always = {
            STUDENT: has_student * self.student.whole * width / run.shards,
            OPTIMIZER: has_student * run.optimizer_states * self.gradients,
            TEACHER: (not is_elsewhere) * (teacher.root * teacher_width + teacher_blocks) / run.shards,
            TABLES: has_student * _position_tables(run.student) + (not is_cached) * _position_tables(run.teacher),
            GRADIENTS: has_student * self.gradients * self.accumulates,
            STREAM: stream,
        }

    def on_policy_samples(self) -> dict[str, float]:
        """The last block reads the prompts, which may be nearly as long as samples; no gradients are there yet."""
        run, config, prompts = self.run, self.run.student, self.run.on_policy_prompts
        tokens, keys_and_values = prompts * run.sequence_length, 2 * config.n_query_groups * config.head_size
        held = tokens * (keys_and_values * config.n_layer + config.n_embd) * self.width
        blocks = measure_blocks(config, prompts, run.sequence_length, run.student_dtype, False)
        return {
            GRADIENTS: 0,
            GATHERED: _gathered(self.root, self.block),
            ACTIVATIONS: held + max(block.no_grad for block in blocks),
            # logits, probabilities, and what is drawn from them
            LOSS: 4 * prompts * run.vocab_size * FLOAT32,
        }

    def teacher_forward(self) -> dict[str, float]:
        gathered = _gathered(self.teacher_root, self.teacher_block)
        if self.run.cpu_offload:
            # the device's own shards, until they are gathered
            gathered += max(self.teacher_root, self.teacher_block) / self.run.shards
        return {GATHERED: gathered, ACTIVATIONS: self.inference}

    def student_forward(self) -> dict[str, float]:
        """The last block, when the others have left what their backwards need."""
        return {
            GATHERED: self.teacher_root + _gathered(self.root, self.block),
            COPIES: self.copies,
            ACTIVATIONS: self.kept + self.teacher_hidden + max(block.forward - block.kept for block in self.blocks),
        }

    def student_loss(self) -> dict[str, float]:
        run, width, teacher_width = self.run, self.width, self.teacher_width
        hidden, teacher_hidden = self.tokens * run.student.n_embd, self.tokens * run.teacher.n_embd
        blocks = math.ceil(self.tokens / run.loss.tokens_per_block(run.vocab_size, run.device))
        buffers = 2 if run.loss.temperature == 1.0 else 4
        if run.device == "cuda":
            # the gradient, before it takes the place of the logits; where nothing is fused, four of the comparison
            buffers += 1 + max((run.loss.compile is False) * 4, run.loss.working_blocks)
        # both models' final hidden states, and the gradient of the student's
        at_head = hidden * (width + FLOAT32) + self._copied(hidden, width)
        at_head += teacher_hidden * teacher_width + self._copied(teacher_hidden, teacher_width)
        teacher_head = self._copied(run.vocab_size * run.teacher.n_embd, teacher_width)
        return {
            GRADIENTS: self.always[GRADIENTS] + self.student.trained_head * FLOAT32,
            GATHERED: self.teacher_root + self.root + self.block,
            COPIES: self.copies + self._copied(self.student.head, width) + teacher_head,
            ACTIVATIONS: self.kept + self.kept_by_norm + at_head,
            LOSS: buffers * math.ceil(self.tokens / blocks) * run.vocab_size * FLOAT32,
        }

    def _copied(self, numbers: int, width: int) -> int:
        """Bytes of the copy that the loss needs if it multiplies in another type: float32 but for half on CUDA."""
        wanted = 2 if self.run.device == "cuda" and self.run.precision != "32-true" else FLOAT32
        return numbers * wanted if width != wanted else 0

    def backward_begins(self) -> dict[str, float]:
        """All activations are there, and the gradient of the head is handed back in the student's type."""
        head, width = self.student.trained_head, self.width
        running = max(block.backward - block.kept for block in self.blocks)
        handed_back = head * FLOAT32 + (head * 2 if width == 2 or self._copied(1, width) else 0)
        return {
            GRADIENTS: self.always[GRADIENTS] + max(head * width + self.shared_out, handed_back),
            # the next block is gathered as well
            GATHERED: self.root + 2 * self.block,
            COPIES: self._copied(self.student.head, width) + self.copies * (not self.run.activation_checkpointing),
            ACTIVATIONS: self.kept + self.kept_by_norm + 2 * self.hidden + running,
        }

    def backward_ends(self) -> dict[str, float]:
        """The first block's backward, when all other gradients are there."""
        # of a tied matrix the head's gradient waits for that of the embeddings
        waits = self.sharded or (self.accumulates and self.run.student_tied)
        return {
            GRADIENTS: self.gradients + waits * self.student.trained_head * self.width + self.shared_out,
            GATHERED: self.root + self.block,
            COPIES: self.copies_of_block,
            ACTIVATIONS: 2 * self.hidden + max(block.backward for block in self.blocks),
        }

    def embeddings_gradient(self) -> dict[str, float]:
        """The gradient of the embeddings is as large as they are, and comes last."""
        head, embeddings = self.student.trained_head * self.width, self.student.trained_embeddings * self.width
        # without earlier gradients these two are the gradients, of one matrix if they are tied
        whole, gathered = embeddings * self.accumulates + head * self.run.student_tied, 0
        if self.sharded:
            # the parameters are let go before the gradients are copied to be shared out, in float32
            whole, gathered = head + embeddings, max(self.root, (embeddings > 0) * self.student.root * FLOAT32)
        return {GRADIENTS: self.gradients + whole, GATHERED: gathered, ACTIVATIONS: 2 * self.hidden}

    def optimizer_step(self) -> dict[str, float]:
        working = self.gradients
        if self.run.device == "cpu":
            # there AdamW takes one parameter after the other, with two copies of it and one of the one before
            working = self.student.two_largest * self.width / self.run.shards
        states = self.always[OPTIMIZER] + working * (not self.run.optimizer_is_fused)
        return {GRADIENTS: self.gradients, OPTIMIZER: states}


def _gathered(root: float, block: float) -> float:
    """At most in a forward: parameters, beside what they were copied from for the length of another gathering."""
    return max(2 * root + 2 * block, root + 3 * block)


def _position_tables(config: Config) -> int:
    """Sines and cosines for the whole context, which no sharding divides."""
    return (2 if config.rope_local_base_freq is None else 4) * config.block_size * config.rope_n_elem * FLOAT32


def make_estimate(
    models: Models,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    distill: DistillArgs,
    train: TrainArgs,
    data: Any,
    lora: LoRAArgs,
    teacher: TeacherArgs,
    *,
    precision: str,
    cuda: bool,
    **options: Any,
) -> MemoryEstimate:
    """The estimate of a run whose samples are as long as they may be, from the options of the command.

    Args:
        models: what is known of them.
        make_optimizer: from a module to its optimizer.
        distill: of the command, as ``train``, ``data``, ``lora`` and ``teacher``.
        precision: of the student.
        cuda: whether the devices are GPUs.
        options: other fields of :class:`MemoryEstimate`.

    Raises:
        UserError: samples may be longer than the models read, or a teacher that is the student's base is to lie
            elsewhere.
    """
    context, shorter = min((models.student.block_size, "student"), (models.teacher.block_size, "teacher"))
    length = train.max_seq_length or context
    if length > context:
        raise UserError(
            f"--train.max_seq_length {length} is more than the {context} tokens that the {shorter} reads. Set it to"
            f" {context} or less."
        )
    shares_base = lora.r is not None and models.is_one and teacher.quantize is None
    shares_base = shares_base and teacher.precision in (None, precision)
    if shares_base and teacher.cpu_offload:
        raise UserError(
            "--teacher.cpu_offload true, but the teacher is the LoRA student's base, held in memory once, with it."
            " Leave it out."
        )
    states, fused = try_optimizer(make_optimizer, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    # no cache has what a student is about to write
    reads = "cached" if teacher.cache_mode == "read" and distill.on_policy == 0 else "live"
    prompts = min(BATCH, math.ceil(train.global_batch_size / (options["devices"] * options["num_nodes"])))
    return MemoryEstimate(
        student=models.student if lora.r is None else lora_config(models.student, lora),
        teacher=models.teacher,
        student_tied=models.student_tied if train.tie_embeddings is None else train.tie_embeddings,
        teacher_tied=models.teacher_tied,
        vocab_size=models.vocab_size,
        loss=distill.loss(),
        device="cuda" if cuda else "cpu",
        precision=precision,
        teacher_dtype=teacher.dtype("cuda" if cuda else "cpu"),
        optimizer_states=states,
        optimizer_is_fused=fused,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        micro_batch_tokens=getattr(data, "micro_batch_tokens", None),
        sequence_length=length,
        shares_base=shares_base,
        quantize=teacher.quantize,
        cpu_offload=teacher.cpu_offload,
        teacher_role="fill" if teacher.cache_mode == "fill" else reads,
        on_policy_prompts=prompts * (distill.on_policy > 0),
        **options,
    )


def try_optimizer(make: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype) -> tuple[float, bool]:
    """How many numbers an optimizer keeps for a parameter, such as 2 for AdamW, and whether it is fused: by a step."""
    matrix = nn.Linear(256, 256, bias=False, dtype=dtype)
    optimizer = make(matrix)
    matrix.weight.grad = torch.ones_like(matrix.weight)
    optimizer.step()
    kept = [value.nbytes for value in optimizer.state[matrix.weight].values() if isinstance(value, Tensor)]
    return sum(kept) / matrix.weight.nbytes, bool(optimizer.defaults.get("fused"))


def device_bytes(device_memory: float | None, cuda: bool, processes: int) -> float | None:
    """Bytes that a device has for this run: as told in GB, else a GPU's own, or None if that is not here.

    On a CPU the ``processes`` of a node share what is free, of a container's limit if there is one.
    """
    if device_memory is not None:
        return device_memory * GB
    if not cuda:
        return available_memory() / processes
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def report_memory(run: MemoryEstimate, device_memory: float | None, options: Collection[str]) -> None:
    """Print a run's table, and see that the run fits.

    Args:
        run: what its memory depends on.
        device_memory: GB of a device, if told.
        options: names of the options that the command has, those of groups without the groups' members.

    Raises:
        UserError: it does not; says what is needed, what there is, and which options would make it fit.
    """
    limit = device_bytes(device_memory, run.device == "cuda", run.devices)
    print(describe_memory(run, limit), flush=True)
    if limit is not None:
        check_fit(run, limit, options)


def describe_memory(run: MemoryEstimate, limit: float | None) -> str:
    """A table of a device's memory at its peak, in GB; ``limit`` are the bytes of a device, if known."""
    peak, name, plural = run.peak, *(("GPU", "GPUs") if run.device == "cuda" else ("process", "processes"))
    device = f"the {name}" if run.processes == 1 else f"each of {run.processes} {plural}"
    sizes = {part: size for part, size in peak.parts.items() if size > 0} | {"together": peak.total}
    cells = {part: _in_gb(size, peak.total) for part, size in sizes.items()}
    width, digits = max(map(len, cells)), max(map(len, cells.values()))
    rows = "\n".join(f"  {part:<{width}}  {cell:>{digits}}" for part, cell in cells.items())
    most = sorted(peak.parts, key=peak.parts.get, reverse=True)[:2]
    others = [f"{moment.name} {_in_gb(moment.total, peak.total)}" for moment in run.moments if moment is not peak]
    teacher = f"{run.teacher.name} in {'bf16' if run.teacher_dtype == torch.bfloat16 else 'float32'}"
    if run.teacher_role == "cached":
        teacher += ", cached: its LM head only"
    elif run.cpu_offload:
        teacher += ", from CPU memory"
    student = "" if run.teacher_role == "fill" else f"{run.student.name} in {run.precision}, taught by "
    together = "" if limit is None else f" of {_in_gb(limit)}"
    others = f" At other moments: {', '.join(others)}." if others else ""
    sharded = f", sharded over {run.shards}" if run.shards > 1 else ""
    return (
        f"Predicted memory of {device} in GB, at its peak, the {peak.name}:\n{rows}{together}\n"
        f"Most of it: {' and '.join(most)}.{others}\n"
        f"For {student}{teacher}; micro-batches of {run.samples} x {run.sequence_length:,} tokens{sharded}."
    )


def _in_gb(size: float, beside: float | None = None) -> str:
    """Bytes as GB, with more digits where ``size``, or what it stands beside, is below one."""
    return f"{size / GB:.{1 if (beside or size) >= GB else 3}f}"


def check_fit(run: MemoryEstimate, limit: float, options: Collection[str]) -> None:
    """See that a run fits into ``limit`` bytes of each device; options and error are those of :func:`report_memory`."""
    peak, device = run.peak, "GPU" if run.device == "cuda" else "process"
    if peak.total <= limit:
        return
    advice = "No option of this command makes it fit: choose a smaller teacher or student."
    if single := [f"{option} ({_in_gb(need)} GB)" for option, need in ways_out(run, limit, options)]:
        advice = f"It would fit with {' or '.join(filter(None, [', '.join(single[:-1]), single[-1]]))}."
    elif together := ways_out_together(run, limit, options):
        advice = f"It would fit with {' '.join(together[0])} together ({_in_gb(together[1])} GB)."
    needed = f"This run needs {_in_gb(peak.total)} GB on each {device} ({peak.name})"
    raise UserError(f"{needed}, and there are {_in_gb(limit)} GB.\n{advice}")


def ways_out(run: MemoryEstimate, limit: float, options: Collection[str]) -> list[tuple[str, float]]:
    """Up to three changes of which each alone would make a run fit, as options and the bytes that it needs then."""
    found = filter(None, (_first_fitting(kind, limit) for kind in _changes(run, options)))
    return [(option, changed.peak.total) for option, changed in islice(found, 3)]


def ways_out_together(run: MemoryEstimate, limit: float, options: Collection[str]) -> tuple[list[str], float] | None:
    """Changes that would make a run fit together, as few as are found one after the other, and what is needed then."""
    chosen: dict[str, str] = {}
    while run.peak.total > limit:
        kinds = [kind for kind in _changes(run, options) if kind and kind[-1][0].split()[0] not in chosen]
        if not kinds:
            return None
        # the last of a kind is the one that saves most
        best = min(kinds, key=lambda kind: kind[-1][1].peak.total)
        option, run = _first_fitting(best, limit) or best[-1]
        chosen[option.split()[0]] = option
    return [*chosen.values()], run.peak.total


def _first_fitting(kind: list[tuple[str, MemoryEstimate]], limit: float) -> tuple[str, MemoryEstimate] | None:
    return next((change for change in kind if change[1].peak.total <= limit), None)


def _changes(run: MemoryEstimate, options: Collection[str]) -> list[list[tuple[str, MemoryEstimate]]]:
    """Kinds of changes that save memory, those first that cost least; each kind from little to much."""

    def change(possible: bool, option: str, *fields: dict[str, Any]) -> list[tuple[str, MemoryEstimate]]:
        return [(option.format(*values.values()), replace(run, **values)) for values in fields if possible]

    cuda = run.device == "cuda"
    can_checkpoint = "activation_checkpointing" in options and not run.activation_checkpointing
    can_offload = cuda and run.processes > 1 and run.teacher_role == "live" and not (run.cpu_offload or run.shares_base)
    # on a CPU more processes share the same memory
    devices = [n for k in range(1, 4) if (n := run.devices << k) <= 8]
    most = max(devices, default=run.devices)
    nodes = [n for k in range(1, 7) if (n := run.num_nodes << k) * most < 2 * MOST_DEVICES]
    samples, lengths = ([n >> k for k in range(1, n.bit_length())] for n in (run.samples, run.sequence_length))
    by_number, more_nodes = run.micro_batch_tokens is None, cuda and not run.hybrid_sharding
    return [
        change(by_number, "--train.micro_batch_size {}", *({"micro_batch_size": n} for n in samples)),
        change(can_checkpoint, "--activation_checkpointing true", {"activation_checkpointing": True}),
        change(run.hybrid_sharding, "--hybrid_sharding false", {"hybrid_sharding": False}),
        change(run.teacher_dtype == torch.float32, "--teacher.precision bf16-true", {"teacher_dtype": torch.bfloat16}),
        change(run.precision != "bf16-true", "--precision bf16-true", {"precision": "bf16-true"}),
        change(can_offload, "--teacher.cpu_offload true", {"cpu_offload": True}),
        change(cuda, "--devices {}", *({"devices": n} for n in devices))
        + change(more_nodes, "--devices {} --num_nodes {}", *({"devices": most, "num_nodes": n} for n in nodes)),
        change(True, "--train.max_seq_length {}", *({"sequence_length": n} for n in lengths if n >= 128)),
    ]
