"""The loss of a student whose teacher has another tokenizer, over one text in the tokens of both.

Where a token of each ends at the same two bytes and both mean the same, a *position*, any divergence compares the two
models over the ids S that both have:

    (1 - kd_ratio) * cross-entropy + kd_ratio * (D(p_S, q_S) - log q(S))

p_S and q_S are both distributions, renormalised to S. What the teacher gives to tokens that the student lacks says
nothing of any id of the student, and is left out. What the student gives to tokens that the teacher lacks, 1 - q(S), is
no teacher's to judge: that a shared id follows is learnt as the text has it, by -log q(S). For forward KL the sum is
the KL of p_S to the student's whole distribution. The cross-entropy is over all of the student's ids, and since
-log q(label) = -log q_S(label) - log q(S), the line is the ordinary loss over S with -log q(S) added to it.

All other tokens lie in *chunks*, the shortest pieces that begin and end between tokens of both. With P and Q the
teacher's and the student's probability of all of a chunk's own tokens, the loss of a chunk is

    (1 - kd_ratio) * cross-entropy + kd_ratio * t * KL(P^(1/t), Q^(1/t)),

where KL is that of two outcomes, this chunk or any other (approximate likelihood matching, arXiv 2503.20083). At t = 1
it is a lower bound of forward KL between all continuations; for long chunks, which are never probable, it hardly has a
gradient there, and with a large t it tends to x log(x / y) - x + y for surprisals x = -log P and y = -log Q.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.blockwise import HeadLoss, LMHead, blockwise_surprisal
from litgpt_akl.loss.distillation_loss import DistillationLoss

NONE = -1
"""The chunk of a token that lies in none, the place of an id that is not shared."""
CERTAIN = 1e-6
"""Nats that both surprisals of a chunk are raised by: a student that is certain, in float32, has a finite loss."""
ALIGNED, TEACHER_MASS = "aligned", "teacher_mass"
"""Statistics of each token: whether it is at a position; and there, the teacher's mass of shared ids."""
OF_TOKENS = ("divergence", "cross_entropy", "teacher_cross_entropy", ALIGNED)
"""Statistics that every token has; the means of all others are over positions."""


class SharedIds(NamedTuple):
    """The ids that stand for the same in two vocabularies."""

    student: Tensor
    """``[s]``, the student's, rising."""
    teacher: Tensor
    """``[s]``, the teacher's, in their order."""
    places: Tensor
    """``[student_size]``: where each id of the student stands among these, or :data:`NONE`."""
    student_size: int
    """Ids of the student; those from here on are padding."""
    teacher_size: int
    are_all: bool
    """Whether each id of both models is shared with the same id of the other."""

    @classmethod
    def make(cls, partners: Tensor, student_size: int, teacher_size: int) -> "SharedIds":
        """Of the teacher's id, or -1, for each id of the student ``[ids]``; ids that a head lacks are not shared."""
        partners = partners[:student_size]
        ids = ((partners >= 0) & (partners < teacher_size)).nonzero()[:, 0]
        places = torch.full((student_size,), NONE).index_copy(0, ids, torch.arange(len(ids)))
        are_all = student_size == teacher_size == len(ids) and torch.equal(partners, torch.arange(student_size))
        return cls(ids, partners[ids], places, student_size, teacher_size, are_all)

    def to(self, device: torch.device) -> "SharedIds":
        return SharedIds(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


class Alignment(NamedTuple):
    """How the response tokens of a micro-batch, n of the student and n' of the teacher, belong together."""

    student_positions: Tensor
    """``[m]``: which of the student's are at positions."""
    teacher_positions: Tensor
    """``[m]``: which of the teacher's stand there."""
    student_others: Tensor
    """``[n - m]``: those of the student that are not."""
    student_chunks: Tensor
    """``[n - m]``: the number of each one's chunk, or :data:`NONE` if the teacher has no token for it."""
    teacher_others: Tensor
    """``[k]``: those of the teacher that lie in chunks."""
    teacher_chunks: Tensor
    """``[k]``: the number of each one's chunk."""
    chunks: int

    def to(self, device: torch.device) -> "Alignment":
        return Alignment(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


class AlignedLoss(NamedTuple):
    """What is minimised over one text in the tokens of two models."""

    loss: DistillationLoss
    shared: SharedIds
    """On the device of the models."""
    chunk_temperature: float
    """The t of a chunk's loss."""

    def __call__(
        self,
        student: LMHead,
        teacher: LMHead,
        labels: Tensor,
        teacher_labels: Tensor,
        alignment: Alignment,
        sequences: Tensor | None = None,
    ) -> HeadLoss:
        """Sum the loss over the student's response tokens.

        Args:
            student: final hidden states ``[n, d]`` and LM head.
            teacher: final hidden states ``[n', D]`` and LM head; no gradient.
            labels: ``[n]``, the student's id that follows each of its hidden states.
            teacher_labels: ``[n']``, the teacher's.
            alignment: of the two.
            sequences: ``[n]``, the number of the sequence that each of the student's is of, for tad.
        """
        whole = self._at_positions(student, teacher, labels, alignment, sequences)
        loss, own, others = whole.loss, alignment.student_positions, alignment.student_others
        values = {name: found.new_zeros(len(labels)).index_copy(0, own, found) for name, found in whole.values.items()}
        if len(others):
            cross_entropy, of_chunks = self._of_others(student, teacher, labels, teacher_labels, alignment)
            loss = loss + (1 - self.loss.kd_ratio) * cross_entropy.sum()
            if self.loss.kd_ratio > 0:
                loss = loss + self.loss.kd_ratio * of_chunks["divergence"].sum()
            values["cross_entropy"][others] = cross_entropy.detach()
            is_in = alignment.student_chunks != NONE
            chunks = alignment.student_chunks[is_in]
            sizes = torch.bincount(chunks, minlength=alignment.chunks)
            for name, found in of_chunks.items():
                # shared out evenly among the student's tokens
                values[name][others[is_in]] = (found.detach() / sizes)[chunks]
        return HeadLoss(loss, len(labels), values)

    def of_batch(self, teacher_labels: Tensor, alignment: Alignment) -> "LossOfBatch":
        """The same of a micro-batch whose tokens belong together so, as a loss of two heads."""
        return LossOfBatch(self, teacher_labels, alignment)

    def _at_positions(
        self, student: LMHead, teacher: LMHead, labels: Tensor, alignment: Alignment, sequences: Tensor | None
    ) -> HeadLoss:
        """The loss at positions, and its statistics ``[m]``."""
        shared, own = self.shared, alignment.student_positions
        student = student._replace(hidden=student.hidden[own])
        teacher = teacher._replace(hidden=teacher.hidden[alignment.teacher_positions])
        heads = {"student": student, "teacher": teacher}
        rows = {role: _of_ids(head, getattr(shared, role), shared.are_all) for role, head in heads.items()}
        found = self.loss(
            student.hidden,
            rows["student"].weight,
            teacher.hidden,
            rows["teacher"].weight,
            shared.places[labels[own]],
            **{f"{role}_{name}": getattr(head, name) for role, head in rows.items() for name in ("bias", "softcap")},
            vocab_size=len(shared.student),
            sequences=None if sequences is None else sequences[own],
            all_count=True,
        )
        # -log of the mass of the shared ids
        outside, outside_of_teacher = (
            self._surprisal(head, getattr(shared, role), role) if self._has_others(role) else torch.zeros_like(own)
            for role, head in heads.items()
        )
        values = dict(found.values)
        for name, more in (("divergence", outside), ("cross_entropy", outside)):
            values[name] = values[name] + more.detach()
        values["teacher_cross_entropy"] = values["teacher_cross_entropy"] + outside_of_teacher.detach()
        values[ALIGNED] = torch.ones_like(values["divergence"])
        values[TEACHER_MASS] = torch.exp(-outside_of_teacher.detach()).to(values[ALIGNED].dtype)
        loss = found.loss + outside.sum() if self._has_others("student") else found.loss
        return HeadLoss(loss, found.tokens, values)

    def _of_others(
        self, student: LMHead, teacher: LMHead, labels: Tensor, teacher_labels: Tensor, alignment: Alignment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the student's tokens that are not at positions ``[n - m]``; and by name, of each chunk
        ``[chunks]``, the divergence and the teacher's cross-entropy."""
        heads = {"student": (student, labels), "teacher": (teacher, teacher_labels)}
        places = alignment.student_others, alignment.teacher_others
        surprisals = []
        for (role, (head, ids)), where in zip(heads.items(), places, strict=True):
            one = head._replace(hidden=head.hidden[where])
            surprisals.append(self._surprisal(one, ids[where], role, whole_set=False))
        cross_entropy, of_teacher = surprisals[0], surprisals[1].detach()
        is_in = alignment.student_chunks != NONE
        nothing = cross_entropy.new_zeros(alignment.chunks)
        own = nothing.index_add(0, alignment.student_chunks[is_in], cross_entropy[is_in])
        expected = nothing.index_add(0, alignment.teacher_chunks, of_teacher.to(nothing.dtype))
        divergence = chunk_divergence(expected, own, self.chunk_temperature)
        return cross_entropy, {"divergence": divergence, "teacher_cross_entropy": expected}

    def _has_others(self, role: str) -> bool:
        """Whether a model has ids that the other one lacks."""
        return len(self.shared.student) < getattr(self.shared, f"{role}_size")

    def _surprisal(self, head: LMHead, ids: Tensor, role: str, whole_set: bool = True) -> Tensor:
        size = getattr(self.shared, f"{role}_size")
        if role == "teacher":
            head = LMHead(head.hidden.detach(), head.weight.detach(), head.bias, head.softcap)
        block = self.loss.tokens_per_block(size, head.hidden.device.type)
        return blockwise_surprisal(head, ids, whole_set=whole_set, vocab_size=size, block_tokens=block)


class LossOfBatch(NamedTuple):
    """An aligned loss that takes the place of a :class:`DistillationLoss` for one micro-batch."""

    loss: AlignedLoss
    teacher_labels: Tensor
    alignment: Alignment

    def of_heads(self, student: LMHead, teacher: LMHead, labels: Tensor, *, sequences: Tensor, **_) -> HeadLoss:
        """That of a :class:`DistillationLoss`; the vocabularies have sizes of their own, and all labels count."""
        return self.loss(student, teacher, labels, self.teacher_labels, self.alignment, sequences)


def chunk_divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """``t * KL(P^(1/t), Q^(1/t))`` of two outcomes, for surprisals ``-log P`` and ``-log Q`` ``[chunks]`` in nats."""
    one, other = ((surprisal + CERTAIN) / temperature for surprisal in (teacher, student))
    happens = torch.exp(-one)
    otherwise = torch.log(-torch.expm1(-one)) - torch.log(-torch.expm1(-other))
    return temperature * (happens * (other - one) - torch.expm1(-one) * otherwise)


def _of_ids(head: LMHead, ids: Tensor, are_all: bool) -> LMHead:
    """A head with the rows of some ids; with all of them it stays as it is."""
    if are_all:
        return head
    return head._replace(weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids])
