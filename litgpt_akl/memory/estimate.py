"""How much memory a run will take on each device, from its options alone.

A step has moments at which most is in memory: the student's own answers, the teacher's forward, the loss, the begin and
the end of the backward, the optimizer's step. Each is the sum of what is held then, in bytes of one device; the highest
of them is what a run needs. Not counted are what the libraries take for themselves and what an allocator cannot use
between its blocks.
"""

import math
from functools import cached_property

from litgpt.config import Config

from litgpt_akl.memory.block_memory import RunningMemory, block_kinds, measure_block, measure_norm
from litgpt_akl.memory.memory_plan import (
    ACTIVATIONS,
    COPIES,
    GATHERED,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    PARTS,
    STREAM,
    STUDENT,
    TABLES,
    TEACHER,
    MemoryPlan,
    Moment,
)
from litgpt_akl.models.model_size import HashableConfig, measure_size

_FLOAT32 = 4
_QUANTIZED = {"int8": 1, "nf4": 0.5 + 4 / 64}
"""Bytes of a weight; for nf4 with a float32 scale for every 64."""


def predict(plan: MemoryPlan) -> list[Moment]:
    """What each device holds at the moments of a step, in their order."""
    step = _Step(plan)
    if plan.teacher_role == "alone":
        return [step.teacher_forward()]
    answers = [step.on_policy_samples()] if plan.own_prompts else []
    moments = answers if plan.teacher_role == "remembered" else [*answers, step.teacher_forward()]
    moments += [
        step.student_forward(),
        step.loss(),
        step.backward_begins(),
        step.backward_ends(),
    ]
    return [*moments, step.embeddings_gradient(), step.optimizer_step()]


def peak(moments: list[Moment]) -> Moment:
    """The moment at which most is in memory."""
    return max(moments, key=lambda moment: moment.total)


class _Step:
    """The moments of a step, in bytes of one device."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.student, self.teacher = (
            measure_size(HashableConfig.of(config), tied)
            for config, tied in ((plan.student, plan.student_tied), (plan.teacher, plan.teacher_tied))
        )
        if plan.teacher_role == "remembered":
            self.teacher = self.teacher._replace(whole=self.teacher.head, root=self.teacher.head, block=0)
        self.width, self.teacher_width = plan.student_dtype.itemsize, plan.teacher_dtype.itemsize
        self.sharded = plan.shards > 1
        shape = plan.samples, plan.sequence_length
        self.tokens = plan.samples * plan.sequence_length
        self.hidden = self.tokens * plan.student.n_embd * self.width
        self.teacher_hidden = self.tokens * plan.teacher.n_embd * self.teacher_width
        self.blocks = _measure_blocks(plan.student, *shape, plan.student_dtype, plan.mixed)
        self.teacher_blocks = _measure_blocks(plan.teacher, *shape, plan.teacher_dtype, False)
        self.norm = measure_norm(HashableConfig.of(plan.student), *shape, plan.student_dtype)
        self.gradients = self.student.trained * self.width / plan.shards
        self.before_backward = self.gradients * plan.accumulates
        # CUDA multiplies in half precision and sums in float32; a CPU multiplies in float32
        half = plan.device == "cuda" and plan.precision != "32-true"
        self.product_width = 2 if half else _FLOAT32
        with_student, with_body = plan.teacher_role != "alone", plan.teacher_role != "remembered"
        self.always = {
            STUDENT: with_student * self.student.whole * self.width / plan.shards,
            OPTIMIZER: with_student * plan.optimizer_states * self.gradients,
            TEACHER: self.teacher_weights / plan.shards,
            TABLES: with_student * _position_tables(plan.student) + with_body * _position_tables(plan.teacher),
        }

    @property
    def teacher_weights(self) -> float:
        """At rest, on all devices that share it."""
        offloaded = self.plan.cpu_offload and self.plan.teacher_role != "remembered"
        if self.plan.shares_base or offloaded:
            return 0
        width = _QUANTIZED.get(self.plan.quantize, self.teacher_width)
        return self.teacher.root * self.teacher_width + (self.teacher.whole - self.teacher.root) * width

    @property
    def teacher_working_set(self) -> float:
        return 2 * self.teacher_hidden + max(memory.alone for memory, _ in self.teacher_blocks)

    def _moment(self, name: str, parts: dict[str, float]) -> Moment:
        # what the student let go does not serve the teacher's stream, nor the other way round
        stream = self.teacher_working_set + self.teacher_hidden if self.plan.teacher_runs_ahead else 0
        held = self.always | {STREAM: stream} | parts
        return Moment(name, {part: held.get(part, 0.0) for part in PARTS})

    def on_policy_samples(self) -> Moment:
        """The last block reads the prompts, which may be nearly as long as samples; no gradients are there yet."""
        plan, config = self.plan, self.plan.student
        shape = plan.own_prompts, plan.sequence_length
        tokens = plan.own_prompts * plan.sequence_length
        keys_and_values = 2 * tokens * config.n_query_groups * config.head_size * config.n_layer
        running = max(memory.alone for memory, _ in _measure_blocks(config, *shape, plan.student_dtype, False))
        root, block = self.student.root * self.width, self.student.block * self.width
        return self._moment(
            "student's own answers",
            {
                GATHERED: _gathered(root, block) if self.sharded else 0,
                ACTIVATIONS: (keys_and_values + tokens * config.n_embd) * self.width + running,
                # logits, probabilities, and what is drawn from them
                LOSS: 4 * plan.own_prompts * plan.vocab_size * _FLOAT32,
            },
        )

    def teacher_forward(self) -> Moment:
        root, block = (size * self.teacher_width for size in (self.teacher.root, self.teacher.block))
        gathered = _gathered(root, block) if self.sharded else 0
        if self.plan.cpu_offload:
            # the device's own shards, until they are gathered
            gathered += max(root, block) / self.plan.shards
        activations = 0 if self.plan.teacher_runs_ahead else self.teacher_working_set
        gradients = 0 if self.plan.teacher_role == "alone" else self.before_backward
        return self._moment("teacher's forward", {GRADIENTS: gradients, GATHERED: gathered, ACTIVATIONS: activations})

    @cached_property
    def kept(self) -> float:
        """What the student's forward leaves for its backward, without copies of weights."""
        if self.plan.activation_checkpointing:
            blocks = self.plan.student.n_layer * self.hidden
        else:
            blocks = sum(memory.kept * count for memory, count in self.blocks) - self.copies_of_blocks
        return self.hidden + blocks + self.norm.kept

    @property
    def copies_of_blocks(self) -> float:
        """Autocast's, which each product keeps for its backward."""
        return self.student.products * 2 if self.plan.mixed else 0

    @property
    def copy_of_head(self) -> float:
        """If the loss multiplies in another type than the student's."""
        return self.student.head * self.product_width if self.width != self.product_width else 0

    @property
    def at_head(self) -> float:
        """Both models' final hidden states, and the gradient of the student's, which is float32."""
        student = self.hidden + self.tokens * self.plan.student.n_embd * _FLOAT32
        if self.width != self.product_width:
            student += self.tokens * self.plan.student.n_embd * self.product_width
        teacher = self.teacher_hidden
        if self.teacher_width != self.product_width:
            teacher += self.tokens * self.plan.teacher.n_embd * self.product_width
        return student + teacher

    def student_forward(self) -> Moment:
        """The last block, when the others have left what their backwards need."""
        root, block = self.student.root * self.width, self.student.block * self.width
        running = max(memory.forward - memory.kept for memory, _ in self.blocks)
        if self.plan.activation_checkpointing:
            running = max(memory.forward for memory, _ in self.blocks)
        return self._moment(
            "student's forward",
            {
                GRADIENTS: self.before_backward,
                GATHERED: self.teacher.root * self.teacher_width + _gathered(root, block) if self.sharded else 0,
                COPIES: self.copies_of_blocks,
                ACTIVATIONS: self.kept - self.norm.kept + running + self.teacher_hidden,
            },
        )

    def loss(self) -> Moment:
        plan, student = self.plan, self.student
        blocks = math.ceil(self.tokens / plan.loss.tokens_per_block(plan.vocab_size, plan.device))
        block = math.ceil(self.tokens / blocks) * plan.vocab_size * _FLOAT32
        buffers = 2.0
        if plan.loss.temperature != 1.0:
            buffers += 2
        if plan.device == "cuda":
            # the gradient, before it takes the place of the logits; where nothing is fused, four of the comparison
            buffers += 1 + max((plan.loss.compile is False) * 4, plan.loss.working_blocks)
        teacher_head = plan.vocab_size * plan.teacher.n_embd * self.product_width
        gathered = self.teacher.root * self.teacher_width + (student.root + student.block) * self.width
        return self._moment(
            "student's loss",
            {
                GRADIENTS: self.before_backward + student.trains_head * student.head * _FLOAT32,
                GATHERED: gathered if self.sharded else 0,
                COPIES: self.copies_of_blocks
                + self.copy_of_head
                + (teacher_head if self.teacher_width != self.product_width else 0),
                ACTIVATIONS: self.kept + self.at_head,
                LOSS: buffers * block,
            },
        )

    def backward_begins(self) -> Moment:
        """All activations are there, and the gradient of the head is handed back in the student's type."""
        student, block = self.student, self.student.block * self.width
        head = student.trains_head * student.head
        other_type = head * (2 if self.width != self.product_width or self.width == 2 else 0)
        running = max(memory.backward - memory.kept for memory, _ in self.blocks)
        if self.plan.activation_checkpointing:
            running = max(memory.backward for memory, _ in self.blocks)
        gradients = head * self.width
        if self.sharded:
            # whole, while those of the block before are shared out, in float32; and the next block is gathered
            gradients += student.trained_block * (self.width + _FLOAT32)
        return self._moment(
            "begin of the backward",
            {
                GRADIENTS: self.before_backward + max(gradients, head * _FLOAT32 + other_type),
                GATHERED: student.root * self.width + 2 * block if self.sharded else 0,
                COPIES: (0 if self.plan.activation_checkpointing else self.copies_of_blocks) + self.copy_of_head,
                ACTIVATIONS: self.kept + 2 * self.hidden + running,
            },
        )

    def backward_ends(self) -> Moment:
        """The first block's backward, when all other gradients are there."""
        student, block = self.student, self.student.block * self.width
        head = student.trains_head * student.head * self.width
        # of a tied matrix the head's gradient waits for that of the embeddings
        waiting = head if self.sharded or (self.plan.accumulates and self.plan.student_tied) else 0
        shared_out = student.trained_block * (self.width + _FLOAT32) if self.sharded else 0
        return self._moment(
            "end of the backward",
            {
                GRADIENTS: self.gradients + waiting + shared_out,
                GATHERED: student.root * self.width + block if self.sharded else 0,
                COPIES: self.student.block * 2 if self.plan.mixed else 0,
                ACTIVATIONS: 2 * self.hidden + max(memory.backward for memory, _ in self.blocks),
            },
        )

    def embeddings_gradient(self) -> Moment:
        """The gradient of the embeddings is as large as they are, and comes last."""
        plan, student = self.plan, self.student
        head, embeddings = (
            trains * student.head * self.width for trains in (student.trains_head, student.trains_embeddings)
        )
        if self.sharded:
            whole = head + embeddings
            # the parameters are let go before the gradients are copied to be shared out, in float32
            shared_out = (student.root if student.trains_embeddings else 0) * _FLOAT32
            gathered = max(student.root * self.width, shared_out)
        else:
            # without earlier gradients these two are the gradients, of one matrix if they are tied
            whole = (embeddings if plan.accumulates else 0) + (head if plan.student_tied else 0)
            gathered = 0
        return self._moment(
            "embeddings' gradient",
            {GRADIENTS: self.gradients + whole, GATHERED: gathered, ACTIVATIONS: 2 * self.hidden},
        )

    def optimizer_step(self) -> Moment:
        working = 0 if self.plan.optimizer_is_fused else self.gradients
        if self.plan.device == "cpu" and not self.plan.optimizer_is_fused:
            # there AdamW takes one parameter after the other, with two copies of it and one of the one before
            largest, second = self.student.largest
            working = (2 * largest + second) * self.width / self.plan.shards
        return self._moment(
            "optimizer's step", {GRADIENTS: self.gradients, OPTIMIZER: self.always[OPTIMIZER] + working}
        )


def _measure_blocks(config: Config, *options) -> list[tuple[RunningMemory, int]]:
    """Memory of the blocks of each kind, and how many there are."""
    hashable = HashableConfig.of(config)
    return [(measure_block(hashable, index, *options), count) for index, count in block_kinds(config).items()]


def _gathered(root: float, block: float) -> float:
    """At most in a forward: parameters, beside what they were copied from for the length of another gathering."""
    return max(2 * root + 2 * block, root + 3 * block)


def _position_tables(config: Config) -> int:
    """Sines and cosines for the whole context, which no sharding divides."""
    kinds = 1 if config.rope_local_base_freq is None else 2
    return 2 * kinds * config.block_size * config.rope_n_elem * _FLOAT32
