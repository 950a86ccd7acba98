"""LM heads that give logits, or for the length of a call what the loss needs in their place.

GPT's forward ends in ``lm_head``, so what the head returns is what the model returns. The head is asked from outside,
for one call at a time; its parameters keep their names, and they are read inside the model's own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from litgpt.lora import LoRALinear
from litgpt.model import do_softcapping
from torch import Tensor, nn


class Head(nn.Module):
    """Put before a linear layer among a class's bases: its logits, softcap included, or in a `giving` block others."""

    softcap: float | None = None
    _give: Callable[["Head", Tensor], Any] | None = None

    def forward(self, hidden: Tensor) -> Any:
        if self._give is not None:
            return self._give(self, hidden)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., vocab]`` of hidden states ``[..., n_embd]``."""
        logits = super().forward(hidden)
        return logits if self.softcap is None else do_softcapping(logits, self.softcap)

    @contextmanager
    def giving(self, give: Callable[["Head", Tensor], Any]) -> Iterator[None]:
        """The model returns ``give(head, hidden)`` with the final hidden states ``[batch, time, n_embd]``."""
        self._give = give
        try:
            yield
        finally:
            self._give = None


class DistillationHead(Head, nn.Linear):
    """The head of a model without adapters on it."""

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, k]`` and ``[vocab, k]``, whose product is the logits of ``hidden`` ``[n, n_embd]`` but for the bias."""
        return hidden, self.weight


class LoRAHead(Head, LoRALinear):
    """A head with LitGPT's adapter; as of any other head, ``weight`` and ``bias`` are those of the base."""

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As of any other head, with k = n_embd + r: the adapter's product stands beside the base's."""
        if self.merged:
            return hidden, self.weight
        reduced = self.lora_dropout(hidden) @ self.lora_A.T * self.scaling
        return torch.cat((hidden, reduced), dim=1), torch.cat((self.weight, self.lora_B), dim=1)
