"""How much memory a run will take on each device, before anything is loaded.

A step has moments at which most is in memory. Each is the sum of what is held then, in bytes of one device; the highest
is what a run needs. Not counted are what the libraries take for themselves, and what a GPU's allocator cannot use
between its blocks. What a model's blocks take is measured on fake tensors; to follow whole steps on them takes 10 s for
70 billion parameters, where a search for ways out compares up to a hundred runs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from litgpt.config import Config
from torch import Tensor, nn

from litgpt_akl.config.args import Options
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.data.preview import Lengths
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.top_k import TopK, find_top_k
from litgpt_akl.memory.teachers import FLOAT32, TeacherMemory, TeacherModel, is_packed, position_tables
from litgpt_akl.messages import UserError
from litgpt_akl.models.generation import BATCH
from litgpt_akl.models.lora import lora_config
from litgpt_akl.models.model_size import ModelSize, measure_block, measure_blocks, measure_size
from litgpt_akl.models.pair import Models

PARTS = STUDENT, GRADIENTS, OPTIMIZER, TEACHER, GATHERED, COPIES, ACTIVATIONS, LOSS, TABLES, STREAM, GAPS = (
    *("student weights", "gradients", "optimizer", "teacher weights", "heads and blocks gathered"),
    *("weights in another type", "activations", "loss blocks", "position tables", "teacher's stream"),
    *("allocator's gaps",),
)
"""What memory is needed for; the rows of the table."""
GB = 1e9
GAPS_OF_ACTIVATIONS, GAPS_OF_OTHERS = 0.35, 0.1
"""What the allocator of a single process on a CPU holds and cannot use, as shares of what is in use: micro-batches have
many lengths, and so have the blocks that they leave. Measured were 12 to 36 % of all, the more of it is activations.
Several processes give freed blocks back, which takes their time."""


class Moment(NamedTuple):
    """A moment at which much is in memory, and the bytes of one device by :data:`PARTS`."""

    name: str
    parts: dict[str, float]

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
    """Ids that tokenizer and both heads have; of two tokenizers the larger one's."""
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
    top_k: TopK | None = None
    """How the cache keeps distributions, for which not even the head is there; None if it keeps hidden states."""
    on_policy_prompts: int = 0
    """From which the student writes together in a process."""
    prompt_length: int | None = None
    """Tokens of the longest of these; None for ``sequence_length``."""
    answered_length: int | None = None
    """Tokens of the longest with its response; None for ``sequence_length``."""
    validation_length: int = 0
    """Tokens of the longest sample that is validated; 0 without any."""
    shared_ids: int = 0
    """Rows of both LM heads that are copied to be compared, if the teacher has another tokenizer."""
    is_assumed: bool = True
    """Whether nothing is known of the samples: each is taken for as long as it may be."""
    others: tuple[TeacherModel, ...] = ()
    """The teachers after the first, if there are several; all are held at once, or fill their caches in turn."""

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    @property
    def shards(self) -> int:
        """Processes that a model is spread over."""
        return self.devices if self.hybrid_sharding else self.processes

    @property
    def longest_sample(self) -> int:
        """Tokens that a sample may have, before it is known how many the longest has."""
        return min(self.sequence_length, self.micro_batch_tokens or self.sequence_length)

    @property
    def shape(self) -> tuple[int, int]:
        """Samples of the largest micro-batch, and tokens of each with padding."""
        return self.shape_of(self.sequence_length)

    def shape_of(self, longest: int) -> tuple[int, int]:
        """The same of samples of which the longest has so many tokens."""
        most = self.micro_batch_tokens
        if most is None:
            return min(self.micro_batch_size, self.global_batch_size), longest
        samples = max(1, min(most // longest, self.global_batch_size))
        # of one more, which are shorter, there may be more tokens
        more = min(samples + 1, self.global_batch_size)
        return max((samples, longest), (more, min(longest, most // more)), key=math.prod)

    @property
    def samples(self) -> int:
        """In the largest micro-batch."""
        return self.shape[0]

    @property
    def teachers(self) -> tuple[TeacherModel, ...]:
        """All there are; mostly one."""
        return TeacherModel(self.teacher, self.teacher_tied, self.teacher_role), *self.others

    @property
    def of_each(self) -> list["MemoryEstimate"]:
        """The same run with each teacher alone."""
        changes = (dict(zip(("teacher", "teacher_tied", "teacher_role"), of, strict=True)) for of in self.teachers)
        return [replace(self, others=(), **of) for of in changes]

    def with_roles(self, roles: Sequence[Literal["live", "cached", "fill"]]) -> "MemoryEstimate":
        """The same run, with what is known now of each teacher."""
        others = tuple(of._replace(role=role) for of, role in zip(self.others, roles[1:], strict=True))
        return replace(self, teacher_role=roles[0], others=others)

    @property
    def sizes(self) -> tuple[ModelSize, ModelSize]:
        """Of student and teacher."""
        return measure_size(self.student, self.student_tied), measure_size(self.teacher, self.teacher_tied)

    @property
    def cached_head(self) -> int:
        """Bytes of the teacher's LM head in a cache; a LoRA student has its base's in memory anyway."""
        return 0 if self.shares_base or self.top_k is not None else self.sizes[1].head * self.teacher_dtype.itemsize

    @cached_property
    def moments(self) -> list[Moment]:
        """What a device holds at the moments of a step, in their order."""
        step, has_gaps = _Step(self), self.device == "cpu" and self.processes == 1
        found = [Moment(name, dict.fromkeys(PARTS, 0) | step.always | parts) for name, parts in step.moments()]
        for moment in found if has_gaps else ():
            activations = moment.parts[ACTIVATIONS]
            others = moment.total - activations
            moment.parts[GAPS] = GAPS_OF_ACTIVATIONS * activations + GAPS_OF_OTHERS * others
        return found

    @property
    def peak(self) -> Moment:
        """The moment at which most is in memory."""
        return max(self.moments, key=lambda moment: moment.total)


class _Step:
    """What is in memory at each moment of a step, beside what always is."""

    def __init__(self, estimate: MemoryEstimate) -> None:
        self.estimate, self.teachers = estimate, [TeacherMemory(estimate, teacher) for teacher in estimate.teachers]
        self.has_student = estimate.teacher_role != "fill"
        self.live = [teacher for teacher in self.teachers if teacher.is_live]
        # caches are filled by one teacher after the other
        together = sum if self.has_student else max
        self.student, self.teacher_widths = estimate.sizes[0], sum(of.config.n_embd for of in estimate.teachers)
        self.dtype = torch.bfloat16 if estimate.precision == "bf16-true" else torch.float32
        self.width, self.teacher_width = self.dtype.itemsize, estimate.teacher_dtype.itemsize
        shape, mixed = estimate.shape, estimate.precision == "bf16-mixed"
        self.tokens = math.prod(shape)
        self.hidden = self.tokens * estimate.student.n_embd * self.width
        self.teacher_hidden = together(teacher.hidden for teacher in self.teachers)
        self.blocks = measure_blocks(estimate.student, *shape, self.dtype, mixed)
        # autocast's copies of weights, which each product keeps for its backward
        self.copies, self.copies_of_block = self.student.products * 2 * mixed, self.student.block * 2 * mixed
        self.kept = self.hidden + sum(block.kept for block in self.blocks) - self.copies
        if estimate.activation_checkpointing:
            self.kept = self.hidden * (1 + len(self.blocks))
            self.blocks = [block._replace(kept=0) for block in self.blocks]
        self.kept_by_norm = measure_block(estimate.student, None, *shape, self.dtype, False).kept
        self.gradients = self.student.trained * self.width / estimate.shards
        # from the second micro-batch on they are there before a backward
        self.accumulates = math.ceil(estimate.global_batch_size / estimate.samples) > estimate.processes
        # what is whole while it is gathered, and gradients while those of another block are shared out, in float32
        self.sharded = estimate.shards > 1
        gathered = self.width * self.sharded
        self.root, self.block = self.student.root * gathered, self.student.block * gathered
        self.teacher_root = together(teacher.root for teacher in self.teachers)
        self.shared_out = self.student.trained_block * (self.width + FLOAT32) * self.sharded
        # memory of a stream of the teacher's own serves nothing else when it is free
        self.runs_ahead = (
            estimate.device == "cuda" and estimate.processes == 1 and self.accumulates and self.has_student
        )
        stream = sum(teacher.inference + teacher.hidden for teacher in self.live) * self.runs_ahead
        teacher_tables = together(teacher.tables for teacher in self.teachers)
        self.always = {
            STUDENT: self.has_student * self.student.whole * self.width / estimate.shards,
            OPTIMIZER: self.has_student * estimate.optimizer_states * self.gradients,
            TEACHER: together(teacher.weights for teacher in self.teachers),
            TABLES: self.has_student * position_tables(estimate.student) + teacher_tables,
            GRADIENTS: self.has_student * self.gradients * self.accumulates,
            STREAM: stream,
        }

    def moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Their names and parts, in the order of time."""
        if self.has_student and self.estimate.on_policy_prompts:
            yield "student's on-policy samples", self._on_policy_samples()
        if self.live:
            forwards = [self._forward(teacher) for teacher in self.live]
            yield "teacher's forward", max(forwards, key=lambda parts: sum(parts.values()))
        if self.has_student:
            # the last block, when the others have left what their backwards need
            last = max(block.forward - block.kept for block in self.blocks)
            gathered = self.teacher_root + _gathered(self.root, self.block)
            activations = self.kept + self.teacher_hidden + last
            yield "student's forward", {GATHERED: gathered, COPIES: self.copies, ACTIVATIONS: activations}
            yield "student's loss", self._loss()
            yield from self._backward()
            working = self.gradients
            if self.estimate.device == "cpu":
                # there AdamW takes one parameter after the other, with two copies of it and one of the one before
                working = self.student.two_largest * self.width / self.estimate.shards
            states = self.always[OPTIMIZER] + working * (not self.estimate.optimizer_is_fused)
            yield "optimizer's step", {GRADIENTS: self.gradients, OPTIMIZER: states}
            if self.estimate.validation_length > self.estimate.sequence_length:
                yield "validation", self._validation()

    def _forward(self, teacher: TeacherMemory) -> dict[str, float]:
        """A teacher's, when all the others have left their heads gathered and their hidden states."""
        head, hidden = self.teacher_root - teacher.root, self.teacher_hidden - teacher.hidden
        # offloaded, the device's own shards, until they are gathered
        shards = self.estimate.cpu_offload * max(teacher.root, teacher.block) / self.estimate.shards
        parts = {
            GATHERED: _gathered(teacher.root, teacher.block) + shards + head * self.has_student,
            ACTIVATIONS: (teacher.inference + hidden * self.has_student) * (not self.runs_ahead),
        }
        if self.estimate.top_k is not None:
            # the logits, and what finding the largest takes at most
            parts |= {LOSS: 2 * self._block_of_logits(), COPIES: self._copied_teacher_head()}
        return parts

    def _validation(self) -> dict[str, float]:
        """Either model's last block reads the longest recorded samples; no gradients are there."""
        estimate = self.estimate
        shape = estimate.shape_of(estimate.validation_length)
        teachers = [teacher.config for teacher in estimate.teachers]
        models = (estimate.student, self.dtype), *((config, estimate.teacher_dtype) for config in teachers)
        running = max(b.no_grad for model, dtype in models for b in measure_blocks(model, *shape, dtype, False))
        widths = estimate.student.n_embd * self.width, *(config.n_embd * self.teacher_width for config in teachers)
        gathered = self.teacher_root + _gathered(self.root, self.block)
        return {
            GRADIENTS: 0,
            GATHERED: gathered,
            COPIES: self.copies_of_block,
            ACTIVATIONS: running + 2 * math.prod(shape) * sum(widths),
        }

    def _on_policy_samples(self) -> dict[str, float]:
        """The last block reads the prompts; no gradients are there yet."""
        estimate, config = self.estimate, self.estimate.student
        prompts, longest = estimate.on_policy_prompts, estimate.sequence_length
        lengths = estimate.prompt_length, estimate.answered_length
        prompt, answered = (longest if length is None else min(length, longest) for length in lengths)
        if estimate.micro_batch_tokens is not None:
            prompts = max(1, min(prompts, estimate.micro_batch_tokens // prompt))
        keys_and_values = 2 * config.n_query_groups * config.head_size * config.n_layer
        held = prompts * (answered * keys_and_values + prompt * config.n_embd) * self.width
        return {
            GRADIENTS: 0,
            GATHERED: _gathered(self.root, self.block),
            ACTIVATIONS: held + max(b.no_grad for b in measure_blocks(config, prompts, prompt, self.dtype, False)),
            # logits, probabilities, and what is drawn from them
            LOSS: 4 * prompts * self.estimate.vocab_size * FLOAT32,
        }

    def _block_of_logits(self) -> int:
        """Bytes of the logits of one model that are in memory at a time."""
        vocab_size = self.estimate.vocab_size
        blocks = math.ceil(self.tokens / self.estimate.loss.tokens_per_block(vocab_size, self.estimate.device))
        return math.ceil(self.tokens / blocks) * vocab_size * FLOAT32

    def _copied_teacher_head(self) -> int:
        return self._copied(self.estimate.vocab_size * self.teacher_widths, self.teacher_width)

    def _loss(self) -> dict[str, float]:
        loss, device = self.estimate.loss, self.estimate.device
        # a mixture is summed up beside the block, and each distribution normalised
        buffers, of_teacher = (2 if loss.temperature == 1.0 else 4) + 2 * (len(self.teachers) > 1), 0
        if device == "cuda":
            # the gradient, before it takes the place of the logits; where nothing is fused, four of the comparison
            buffers += 1 + max((loss.compile is False) * 4, loss.working_blocks)
        # both models' final hidden states, and the gradient of the student's
        hidden = self.tokens * self.estimate.student.n_embd
        at_head = hidden * (self.width + FLOAT32) + self._copied(hidden, self.width) + self.teacher_hidden
        if is_packed(self.estimate):
            # the gradient takes the place of the logits, and a softcap's needs them
            buffers = 1 + (self.estimate.student.final_logit_softcapping is not None)
        else:
            at_head += self._copied(self.tokens * self.teacher_widths, self.teacher_width)
            of_teacher = self._copied_teacher_head()
        return {
            GRADIENTS: self.always[GRADIENTS] + self.student.trained_head * FLOAT32,
            GATHERED: self.teacher_root + self.root + self.block,
            COPIES: self.copies + self._copied(self.student.head, self.width) + of_teacher + self._rows_of_shared_ids(),
            ACTIVATIONS: self.kept + self.kept_by_norm + at_head,
            LOSS: buffers * self._block_of_logits(),
        }

    def _rows_of_shared_ids(self) -> int:
        """Both heads' rows, with the gradient of the student's; and a gradient of all of its ids beside that."""
        estimate, rows = self.estimate, self.estimate.shared_ids
        if rows == 0:
            return 0
        own, others = rows * estimate.student.n_embd, rows * estimate.teacher.n_embd
        copies = own * self.width + self._copied(own, self.width) + others * self.teacher_width
        return copies + self._copied(others, self.teacher_width) + (own + self.student.trained_head) * FLOAT32

    def _copied(self, numbers: int, width: int) -> int:
        """Bytes of the copy that the loss needs if it multiplies in another type: float32 but for half on CUDA."""
        wanted = 2 if self.estimate.device == "cuda" and self.estimate.precision != "32-true" else FLOAT32
        return numbers * wanted * (width != wanted)

    def _backward(self) -> Iterator[tuple[str, dict[str, float]]]:
        trained_head, tied, width = self.student.trained_head, self.estimate.student_tied, self.width
        head, embeddings = trained_head * width, self.student.trained_embeddings * width
        # all activations are there, the next block is gathered as well, and the head's gradient is given back
        running = max(block.backward - block.kept for block in self.blocks)
        given_back = trained_head * (FLOAT32 + 2 * (width == 2 or self._copied(1, width) > 0))
        copied = self._copied(self.student.head, width) + self.copies * (not self.estimate.activation_checkpointing)
        yield (
            "begin of the backward",
            {
                GRADIENTS: self.always[GRADIENTS] + max(head + self.shared_out, given_back),
                GATHERED: self.root + 2 * self.block,
                COPIES: copied,
                ACTIVATIONS: self.kept + self.kept_by_norm + 2 * self.hidden + running,
            },
        )
        # the first block's, when all other gradients are there; of a tied matrix the head's waits for the embeddings'
        waiting = head * (self.sharded or (self.accumulates and tied))
        yield (
            "end of the backward",
            {
                GRADIENTS: self.gradients + waiting + self.shared_out,
                GATHERED: self.root + self.block,
                COPIES: self.copies_of_block,
                ACTIVATIONS: 2 * self.hidden + max(block.backward for block in self.blocks),
            },
        )
        # without earlier gradients these two are the gradients, of one matrix if they are tied
        whole, gathered = embeddings * self.accumulates + head * tied, 0
        if self.sharded:
            # the parameters are let go before the gradients are copied to be shared out, in float32
            whole, gathered = head + embeddings, max(self.root, (embeddings > 0) * self.student.root * FLOAT32)
        parts = {GRADIENTS: self.gradients + whole, GATHERED: gathered, ACTIVATIONS: 2 * self.hidden}
        yield "embeddings' gradient", parts


def _gathered(root: float, block: float) -> float:
    """At most in a forward: parameters, beside what they were copied from for the length of another gathering."""
    return max(2 * root + 2 * block, root + 3 * block)


def largest_loss(distill: DistillArgs) -> DistillationLoss:
    """The loss of a run, of a schedule one within it: at its ends a divergence may be another one that needs less."""
    return max(map(distill.loss, (0.0, 0.4, 1.0)), key=lambda loss: loss.working_blocks + 2 * (loss.temperature != 1.0))


def make_estimate(
    options: Options, models: Models, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> MemoryEstimate:
    """The estimate of a run, with precision and devices chosen, whose samples are as long as they may be.

    Raises:
        UserError: samples may be longer than the models read, or the student's base is to lie elsewhere as its teacher.
    """
    distill, train, teacher, args_of_teachers = (
        options.distill,
        options.train,
        options.teacher,
        options.args_of_teachers,
    )
    context = models.context_length
    shorter = "student" if context == models.student.block_size else "teacher"
    length, device = train.max_seq_length or context, "cuda" if options.cuda else "cpu"
    if length > context:
        raise UserError(
            f"--train.max_seq_length {length} is more than the {context} tokens that the {shorter} reads. Set it to"
            f" {context} or less."
        )
    adapts, same_type = options.lora.r is not None, teacher.precision in (None, options.precision)
    shares_base = adapts and models.is_one and teacher.quantize is None and same_type and not models.others
    if shares_base and teacher.cpu_offload:
        raise UserError(
            "--teacher.cpu_offload true, but the teacher is the LoRA student's base, held in memory once, with it."
            " Leave it out."
        )
    states, fused = try_optimizer(make_optimizer, torch.bfloat16 if options.precision == "bf16-true" else torch.float32)
    # no cache has what a student is about to write
    read = ["cached" if args.cache_mode == "read" and distill.on_policy == 0 else "live" for args in args_of_teachers]
    roles = ["fill"] * len(read) if teacher.cache_mode == "fill" else read
    top_k = find_top_k(teacher.cache_dtype, models.vocab_size)
    prompts = min(BATCH, math.ceil(train.global_batch_size / (options.devices * options.num_nodes)))
    return MemoryEstimate(
        student=lora_config(models.student, options.lora) if adapts else models.student,
        teacher=models.teacher,
        student_tied=models.student_tied if train.tie_embeddings is None else train.tie_embeddings,
        teacher_tied=models.teacher_tied,
        vocab_size=models.vocab_size,
        loss=largest_loss(distill),
        device=device,
        devices=options.devices,
        num_nodes=options.num_nodes,
        hybrid_sharding=options.hybrid_sharding,
        precision=options.precision,
        teacher_dtype=teacher.dtype(device),
        optimizer_states=states,
        optimizer_is_fused=fused,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        micro_batch_tokens=getattr(options.data, "micro_batch_tokens", None),
        sequence_length=length,
        activation_checkpointing=options.activation_checkpointing,
        shares_base=shares_base,
        quantize=teacher.quantize,
        cpu_offload=teacher.cpu_offload,
        teacher_role=roles[0],
        others=tuple(
            TeacherModel(of.teacher, of.teacher_tied, role) for of, role in zip(models.others, roles[1:], strict=True)
        ),
        top_k=top_k,
        on_policy_prompts=prompts * (distill.on_policy > 0),
    )


def with_lengths(
    estimate: MemoryEstimate, training: Lengths, validation: Lengths, distill: DistillArgs
) -> MemoryEstimate:
    """The estimate, made with samples as long as they may be, of a run whose samples have these lengths."""
    longest, changes, most = training.longest, {}, min(training.samples, estimate.global_batch_size)
    if estimate.teacher_role == "fill":
        longest = max(longest, validation.longest)
    elif distill.on_policy > 0:
        answered = min(estimate.longest_sample, training.longest_prompt + distill.on_policy_tokens)
        longest = max(answered, training.longest_recorded if distill.on_policy == 1 else longest)
        prompts = min(estimate.on_policy_prompts, math.ceil(most / estimate.processes))
        changes = {"on_policy_prompts": prompts, "prompt_length": training.longest_prompt, "answered_length": answered}
    changes |= {"sequence_length": longest, "validation_length": validation.longest}
    return replace(estimate, global_batch_size=most, is_assumed=False, **changes)


def try_optimizer(make: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype) -> tuple[float, bool]:
    """How many numbers an optimizer keeps for a parameter, such as 2 for AdamW, and whether it is fused: by a step."""
    matrix = nn.Linear(256, 256, bias=False, dtype=dtype)
    optimizer = make(matrix)
    matrix.weight.grad = torch.ones_like(matrix.weight)
    optimizer.step()
    kept = [value.nbytes for value in optimizer.state[matrix.weight].values() if isinstance(value, Tensor)]
    return sum(kept) / matrix.weight.nbytes, bool(optimizer.defaults.get("fused"))
