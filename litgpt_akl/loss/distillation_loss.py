"""The distillation loss over two LM heads, block by block: a ``[tokens, vocab]`` tensor for a whole batch never exists.

Each block of tokens goes through both heads, its loss and the gradient of its logits are formed at once in two buffers
that are allocated once. On a CPU, a block's rows are worked on in tiles that stay in the cache from the first pass to
the last, in memory that is allocated once; torch.compile, where it works, fuses the passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from litgpt_akl.loss.blockwise import Blocks, HeadLoss, LMHead, Score, TeacherLogits, blockwise_loss, usual_block_tokens
from litgpt_akl.loss.comparison import (
    NO_SCRATCH,
    Comparison,
    Head,
    Scratch,
    compare,
    find_head,
    relative_to_mean,
    tail_mass,
)
from litgpt_akl.loss.compilation import as_tensor, can_compile, compiled, eager
from litgpt_akl.loss.divergences import find_divergence
from litgpt_akl.loss.objective import Objective
from litgpt_akl.loss.tile import Number, Tile

IGNORE_INDEX = -100

# less than 1 MB in float32, so that what a tile needs fits into a core's cache
_TILE_ELEMENTS = 200_000


@dataclass(frozen=True)
class DistillationLoss(Objective):
    """Cross-entropy and a divergence to the teacher over two LM heads, exact, in memory that does not grow with tokens.

    Sources: arXiv 2404.02657 for the adaptive divergence, and those that :mod:`litgpt_akl.loss.divergences` names; all
    sums are in float32 (float64 when given float64).
    """

    block_tokens: int | None = None
    """Tokens that go through the heads at a time; None chooses from a budget for both models' logits, 100 MiB on a CPU
    and 1 GiB elsewhere."""
    compile: bool | None = None
    """Whether torch.compile fuses the element-wise part; None: on a GPU, if there is a compiler for it. On a CPU it is
    as fast without, in tiles that stay in the cache, and needs no compilation for every kind of tile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_tokens is not None and self.block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {self.block_tokens}")

    def __call__(
        self,
        student_hidden: Tensor,
        student_head_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_head_weight: Tensor,
        labels: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        sequences: Tensor | None = None,
        all_count: bool = False,
    ) -> HeadLoss:
        """Sum the loss over the tokens whose label is not -100.

        Args:
            student_hidden: final hidden states of the student, ``[n, d]``.
            student_head_weight: the student's LM head, ``[v, d]``.
            teacher_hidden: final hidden states of the teacher, ``[n, D]``; no gradient.
            teacher_head_weight: the teacher's LM head, ``[v', D]``; no gradient.
            labels: ``[n]``, the id that follows each position, or -100.
            student_bias: ``[v]``.
            teacher_bias: ``[v']``.
            student_softcap: the student's ``final_logit_softcapping``.
            teacher_softcap: the teacher's ``final_logit_softcapping``.
            vocab_size: ids from here on are padding and get no mass; default: the narrower of the two heads.
            sequences: ``[n]``, the number of the sequence that each position is of, for tad; default: all are of one.
            all_count: promises that no label is -100; to look would let the host wait for a GPU.

        Raises:
            ValueError: shapes that do not fit, or a label at or above ``vocab_size``.
        """
        student = LMHead(student_hidden, student_head_weight, student_bias, student_softcap)
        teacher = LMHead(teacher_hidden, teacher_head_weight, teacher_bias, teacher_softcap)
        options = {"vocab_size": vocab_size, "sequences": sequences, "all_count": all_count}
        return self.of_heads(student, teacher, labels, **options)

    def of_heads(
        self,
        student: LMHead,
        teacher: TeacherLogits,
        labels: Tensor,
        *,
        vocab_size: int | None = None,
        sequences: Tensor | None = None,
        all_count: bool = False,
    ) -> HeadLoss:
        """The same of any teacher, such as a :class:`~litgpt_akl.loss.mixture.Mixture`, with the same options."""
        if vocab_size is None:
            vocab_size = min(len(head.weight) for head in (student, *teacher.heads))
        _check(student, teacher, labels, vocab_size)
        rows = None if all_count else (labels != IGNORE_INDEX).nonzero()[:, 0]
        if rows is not None and len(rows) < len(labels):
            student, labels = student._replace(hidden=student.hidden[rows]), labels[rows]
            sequences = None if sequences is None else sequences[rows]
        else:
            rows = None
        teacher = teacher.frozen(rows, vocab_size, like=student.hidden)
        block_tokens = self.tokens_per_block(vocab_size, student.hidden.device.type)
        blocks = Blocks(block_tokens, vocab_size, self.kd_ratio, partial(self._make_score, teacher, labels, sequences))
        return blockwise_loss(*student, labels, blocks)

    def _make_score(
        self,
        teacher: TeacherLogits,
        labels: Tensor,
        sequences: Tensor | None,
        student: LMHead,
        block: Tensor,
        parts: list[slice],
        want_gradient: bool,
    ) -> Score:
        """What scores blocks of the student's logits against a teacher's."""
        # a tensor of its own: torch.compile mistakes what is written to a part of a tensor that is also read
        buffer = torch.empty_like(block)
        # of a teacher whose logits at a temperature are not just divided by it
        tempered = torch.empty_like(block) if self.temperature != 1.0 and not teacher.scales else None
        finite = student.allows_all and teacher.allows_all
        scorer = Scorer(self, block, softcap=student.softcap, finite=finite, want_gradient=want_gradient)
        tails = _relative_tails(self, teacher, buffer, parts, sequences) if self.weighs_tails else None

        def score(rows: slice, logits: Tensor, out: dict[str, Tensor]) -> None:
            teacher_logits = buffer[: len(logits)]
            teacher.logits_into(teacher_logits, rows)
            beside = {} if tails is None else {"tails": tails[rows]}
            if tempered is not None:
                beside["tempered"] = tempered[: len(logits)]
                teacher.logits_into(beside["tempered"], rows, self.temperature)
            scorer(teacher_logits, logits, labels[rows], out, **beside)

        return score

    def tokens_per_block(self, vocab_size: int, device_type: str) -> int:
        """How many tokens go through the heads at a time."""
        if self.block_tokens is not None:
            return self.block_tokens
        return usual_block_tokens(vocab_size, device_type)

    def compiles_on(self, device_type: str) -> bool:
        """Whether torch.compile fuses the element-wise part there."""
        wanted = device_type != "cpu" if self.compile is None else self.compile
        return wanted and can_compile(device_type)

    @property
    def working_blocks(self) -> int:
        """How many tensors as large as a block of logits a divergence needs where all rows are worked on at once.

        What a user's function needs depends on it: ten are enough for a few log-softmaxes and products under autograd.
        """
        # a gradient that waits for its sum over the vocabulary, the student's distribution, and one to work in
        return {"with the loss": 0, "alone": 3, "never": 10}[find_divergence(self).compiled]


def _relative_tails(
    loss: DistillationLoss, teacher: TeacherLogits, buffer: Tensor, parts: list[slice], sequences: Tensor | None
) -> Tensor:
    """The teacher's mass beyond its top ids, ``[n]``, divided by its mean over the tokens of each sequence.

    A token needs the others of its sequence: the teacher's head is read once more before, a block at a time.
    """
    masses = buffer.new_empty(len(teacher.heads[0].hidden))
    for rows in parts:
        logits = buffer[: rows.stop - rows.start]
        teacher.logits_into(logits, rows, loss.temperature)
        masses[rows] = tail_mass(logits, loss.top_k)
    return relative_to_mean(masses, sequences)


class Scorer:
    """Scores blocks of logits and turns the student's logits into the gradient of the objective, in place.

    Args:
        loss: what is minimised.
        block: a block such as will be scored, ``[block, vocab]``.
        softcap: of the student's logits.
        finite: promises that no logit is -inf.
        want_gradient: whether the student's logits are to become the gradient.
    """

    def __init__(
        self, loss: DistillationLoss, block: Tensor, *, softcap: float | None, finite: bool, want_gradient: bool
    ) -> None:
        self.loss, self.finite, self.want_gradient = loss, finite, want_gradient
        self.tile, self.scratch, compiles = len(block), NO_SCRATCH, loss.compiles_on(block.device.type)
        if block.device.type == "cpu":
            self.tile = max(1, _TILE_ELEMENTS // block.size(1))
            if not compiles:
                self.scratch = tuple(block.new_empty(len(NO_SCRATCH), self.tile, block.size(1)))
        make = compiled if compiles else eager
        number = partial(as_tensor, like=block) if compiles else float
        kd_ratio, temperature = loss.kd_ratio, loss.temperature
        # an infinite divergence without a share has no part in the gradient
        counts = want_gradient and kd_ratio > 0
        cross_entropy = None if kd_ratio == 1 else number(1 - kd_ratio)
        # at temperature 1 the student's distribution is the same in the divergence and in the cross-entropy
        shared = counts and temperature == 1 and cross_entropy is not None
        self.scale = number(kd_ratio * temperature) if counts else None
        self.student_scale = cross_entropy if shared else number(0.0)
        divergence = find_divergence(loss)
        options = {name: number(x) if isinstance(x, float) else x for name, x in loss.options.items()}
        switches = {name: options.pop(name) for name, x in loss.options.items() if isinstance(x, bool)}
        self.fused = divergence.function if counts and divergence.compiled == "with the loss" else None
        self.takes_labels = divergence.takes_labels
        self.compare = make(compare, finite=finite)
        make_divergence = make if divergence.compiled == "alone" else eager
        self.divergence = partial(make_divergence(divergence.function, finite, counts, **switches), **options)
        softcap = None if softcap is None else number(softcap)
        variant = finite, cross_entropy is None, softcap is None, temperature == 1
        replace = make(_replace_by_gradient, *variant, fused=self.fused, shared=shared)
        self.replace = partial(replace, options=options, cross_entropy=cross_entropy, softcap=softcap)

    def __call__(
        self,
        teacher_logits: Tensor,
        student_logits: Tensor,
        labels: Tensor,
        out: dict[str, Tensor],
        *,
        tails: Tensor | None = None,
        tempered: Tensor | None = None,
    ) -> None:
        """Fill the :data:`STATISTICS` ``[block]``, by their names, for blocks of logits ``[block, vocab]``.

        ``tempered`` are the teacher's at the temperature, if they are not just divided by it.
        """
        temperature = self.loss.temperature
        teacher, student = teacher_logits, student_logits
        if temperature != 1.0:
            teacher, student = teacher / temperature if tempered is None else tempered, student / temperature
        tiles = self._tiles(len(labels))
        comparison = plain = self._compared(teacher, student, tiles)
        if temperature != 1.0:
            # two runs of different temperatures are told apart by what their students are at 1
            plain = self._compared(teacher_logits, student_logits, tiles)
        head = find_head(teacher, student, comparison, mu=self.loss.mu, head_rule=self.loss.head_rule)
        # at another temperature another id may be the most probable one
        top_id = head.top_id if tempered is None else teacher_logits.argmax(dim=-1)
        logits = teacher_logits, student_logits
        statistics = self._statistics(logits, labels, plain, comparison.gap, head._replace(top_id=top_id))
        for name, value in statistics.items():
            out[name].copy_(value)
        for rows, scratch in tiles:
            known = teacher[rows], student[rows], comparison.of_rows(rows), head.weight[rows], self.finite, scratch
            tile = Tile(*known, self.scale, self.student_scale)
            label = labels[rows, None]
            own = {"labels": label} if self.takes_labels else {} if tails is None else {"tails": tails[rows]}
            asked = tile._replace(**own)
            value, gradient = self.divergence(asked if self.fused is None else Tile(*known, None))
            out["divergence"][rows] = value * temperature**2
            if self.want_gradient:
                logits = None if temperature == 1.0 else student_logits[rows]
                self.replace(tile, logits, plain.student_log_sum[rows], label, gradient)

    def _compared(self, teacher: Tensor, student: Tensor, tiles: list[tuple[slice, Scratch]]) -> Comparison:
        """What one sweep over two blocks tells, tile by tile."""
        parts = [self.compare(teacher[rows], student[rows], scratch=scratch) for rows, scratch in tiles]
        return parts[0] if len(parts) == 1 else Comparison(*map(torch.cat, zip(*parts, strict=True)))

    def _statistics(
        self, logits: Sequence[Tensor], labels: Tensor, plain: Comparison, gap: Tensor, head: Head
    ) -> dict[str, Tensor]:
        """All :data:`STATISTICS` of a block but the divergence, ``[block]`` each.

        ``plain`` compares the ``logits``, at temperature 1; ``gap`` and ``head`` are at the loss's own.
        """
        teacher_log_sum, log_sum = plain.teacher_log_sum, plain.student_log_sum
        teacher_label, label = (one.gather(-1, labels[:, None])[:, 0] for one in logits)
        teacher_top, top = (one.gather(-1, head.top_id[:, None])[:, 0] for one in logits)
        return {
            "forward_kl": plain.forward_kl,
            "reverse_kl": plain.reverse_kl,
            "cross_entropy": log_sum - label,
            "teacher_cross_entropy": teacher_log_sum - teacher_label,
            "h": head.weight,
            "h_squared": head.weight.square(),
            "head_gap": head.gap,
            "tail_gap": gap - head.gap,
            "agreement": top >= plain.student_max,
            "accuracy": label >= plain.student_max,
            "confidence": torch.exp(plain.student_max - log_sum),
            "teacher_accuracy": teacher_label >= teacher_top,
            "teacher_confidence": torch.exp(teacher_top - teacher_log_sum),
        }

    def _tiles(self, rows: int) -> list[tuple[slice, Scratch]]:
        """Slices of a block's rows, and memory to work on each in."""
        slices = [slice(start, min(start + self.tile, rows)) for start in range(0, rows, self.tile)]
        return [(s, [x if x is None else x[: s.stop - s.start] for x in self.scratch]) for s in slices]


def _replace_by_gradient(
    tile: Tile,
    logits: Tensor | None,
    log_sum: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    *,
    options: dict[str, Number],
    cross_entropy: Number | None,
    softcap: Number | None,
    fused: Callable | None,
    shared: bool,
) -> None:
    """Overwrite the student's logits with the gradient of the loss in the logits as they were before the softcap.

    Args:
        tile: of the logits divided by the temperature.
        logits: the student's, to be overwritten; None at temperature 1, where they are the tile's: handed in beside
            it, they could be the same memory under another name.
        log_sum: of ``logits``, ``[n]``.
        labels: ``[n, 1]``.
        gradient: of the divergence, ``[n, vocab]``, if it is known and has a share.
        options: of the divergence.
        cross_entropy: its share; None for 0, which is other code.
        softcap: of the student's logits.
        fused: gives the gradient if it is not known.
        shared: whether the part of the cross-entropy that does not depend on the label is in the gradient.
    """
    logits = tile.student if logits is None else logits
    if fused is not None:
        _, gradient = fused(tile, **options)
    if cross_entropy is not None:
        if not shared:
            of_all = (logits - log_sum[:, None]).exp_().mul_(cross_entropy)
            gradient = of_all if gradient is None else gradient.add_(of_all)
        gradient.scatter_add_(-1, labels, (torch.zeros_like(log_sum) - cross_entropy)[:, None])
    if softcap is not None:
        gradient.mul_(1 - (logits / softcap).square_())
    logits.copy_(gradient)


def _check(student: LMHead, teacher: TeacherLogits, labels: Tensor, vocab_size: int) -> None:
    for name, (hidden, weight, *_) in (("student", student), *(("teacher", head) for head in teacher.heads)):
        if hidden.shape != (len(labels), weight.size(1)):
            raise ValueError(
                f"{name}_hidden must be [{len(labels)} labels, {weight.size(1)}], got {list(hidden.shape)}"
            )
        if vocab_size > len(weight):
            raise ValueError(f"vocab_size {vocab_size} is above the {len(weight)} ids of the {name}'s head")
    if not labels.is_cuda and len(labels) and int(labels.max()) >= vocab_size:
        raise ValueError(f"label {int(labels.max())} lies outside the {vocab_size} ids that both heads have")
