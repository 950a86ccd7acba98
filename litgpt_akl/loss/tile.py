"""Rows of both models' logits, as every divergence takes them, and what it gives back."""

from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.comparison import NO_SCRATCH, Comparison, Scratch, without_nan

Number = Tensor | float
"""A number that an option gives: torch.compile must get it as a tensor of shape ``[]``, whose value it cannot keep. No
code may depend on it; what does is a bool of its own."""
ValueAndGradient = tuple[Tensor, Tensor | None]
"""Of each row ``[n]``, in nats where the divergence has a unit, and ``[n, vocab]``; None where none is wanted."""

# where p and q differ by more than e**80, the smaller one of them has no part in any sum
_LARGEST_LOG_RATIO = 80.0


class Tile(NamedTuple):
    """Rows of both models' logits, what is known of them, and what gradient is wanted."""

    teacher: Tensor
    """Logits divided by ``T``, ``[n, vocab]``."""
    student: Tensor
    """Logits divided by ``T``, ``[n, vocab]``."""
    comparison: Comparison
    """Of the two."""
    h: Tensor | None = None
    """Weight of forward KL in adaptive KL, ``[n]``; None for other divergences."""
    finite: bool = False
    """Promises that no logit is -inf."""
    scratch: Scratch = NO_SCRATCH
    """Five ``[n, vocab]`` tensors to write into, one of which may be the gradient."""
    scale: Number | None = 1.0
    """Factor of the gradient; None if none is wanted."""
    student_scale: Number = 0.0
    """``student_scale * q`` is added to it: the part of a cross-entropy's gradient that does not depend on a label."""
    tails: Tensor | None = None
    """Weights of what is beyond the teacher's top ids, ``[n]``, whose mean over a sequence is 1; None for 1 always."""
    labels: Tensor | None = None
    """The ids that follow, ``[n, 1]``; None for divergences that do not ask for them."""
    is_ranked: bool = False
    """Promises that the columns are in the order of the teacher's ids, the last one of many ids together."""

    @property
    def broken(self) -> Tensor:
        """0, or NaN for a row with a NaN or +inf among its logits, which must show in every value; ``[n]``."""
        return (self.comparison.teacher_log_sum + self.comparison.student_log_sum) * 0

    def top_ids(self, count: int) -> Tensor:
        """Of each row the columns of the teacher's most probable ids, ``[n, count]``; all if there are fewer."""
        count = min(count, self.teacher.size(-1))
        if self.is_ranked:
            return torch.arange(count, device=self.teacher.device).expand(len(self.teacher), -1)
        return self.teacher.topk(count, dim=-1, sorted=False).indices

    def logarithms(self) -> tuple[Tensor, Tensor]:
        """``log p`` and ``log q``, in the first two of ``scratch``."""
        log_p = torch.sub(self.teacher, self.comparison.teacher_log_sum[:, None], out=self.scratch[0])
        return log_p, torch.sub(self.student, self.comparison.student_log_sum[:, None], out=self.scratch[1])

    def distributions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``log p``, ``log q``, ``p`` and ``q``, in the first four of ``scratch``."""
        log_p, log_q = self.logarithms()
        return log_p, log_q, torch.exp(log_p, out=self.scratch[2]), torch.exp(log_q, out=self.scratch[3])

    def log_ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """``log(p / q)`` in the place of ``log_p``; 0 for an id that is forbidden to both."""
        return without_nan(log_p.sub_(log_q), self.finite)

    def bounded_log_ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The same, so that its exponential is finite."""
        return self.log_ratio(log_p, log_q).clamp_(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)

    def gradient(self, u: Tensor, total: Tensor, q: Tensor) -> Tensor | None:
        """``scale * (u - q * total) + student_scale * q`` in the place of ``u``, where ``total`` is ``sum(u)``."""
        if self.scale is None:
            return None
        constant = self.student_scale - self.scale * total
        return u.mul_(self.scale).add_(q.mul_(constant[:, None]))
