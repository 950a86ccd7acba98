"""Several teachers as one, for the loss: their distributions averaged, block by block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt_akl.loss.blockwise import LMHead


@dataclass(frozen=True)
class Mixture:
    """The average of several distributions, ``p = sum_i w_i softmax(z_i / T)``, at the temperature in use.

    Each teacher has hidden states, a head, a softcap and padding of its own. That a mixture at a temperature is another
    one than that at 1 divided by it, is why the loss asks for both.
    """

    heads: Sequence[LMHead]
    weights: Sequence[float]
    """Above 0, with the sum 1."""

    scales = False

    @property
    def allows_all(self) -> bool:
        """Whether no id is forbidden, by any of them."""
        return all(head.allows_all for head in self.heads)

    def frozen(self, rows: Tensor | None, vocab_size: int, like: Tensor) -> "Mixture":
        """As :class:`~litgpt_akl.loss.blockwise.TeacherLogits` has it."""
        return Mixture([head.frozen(rows, vocab_size, like) for head in self.heads], self.weights)

    def logits_into(self, out: Tensor, rows: slice, temperature: float = 1.0) -> None:
        """Write ``log p``, whose softmax is ``p``, to ``out`` ``[rows, vocab]``."""
        part = torch.empty_like(out)
        for number, (head, weight) in enumerate(zip(self.heads, self.weights, strict=True)):
            target = part if number else out
            head.logits_into(target, rows, temperature)
            target.sub_(target.logsumexp(dim=-1, keepdim=True)).add_(math.log(weight))
            if number:
                torch.logaddexp(out, part, out=out)
