"""A model that is run one block at a time, so that a teacher which does not fit into memory can be looked at.

Its weights stay where they are, such as memory-mapped in a file, until a block is run: in memory are one block and the
hidden states of the samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from litgpt.config import Config
from litgpt.model import GPT, Block
from torch import Tensor, nn

from litgpt_akl.models.gpt import make_head


class Sample(NamedTuple):
    """Ids that a model reads, and which of them count."""

    input_ids: Tensor
    """``[time]``"""
    positions: Tensor
    """``[n]``, where the next token is a response token."""
    labels: Tensor
    """``[n]``, those next tokens."""


class LayerwiseModel:
    """LitGPT's GPT in parts: embeddings, blocks, last norm and LM head, each computed as GPT's own forward does.

    ``weights`` are a checkpoint's by LitGPT's names. Everything is computed in ``dtype`` on ``device``; samples have at
    most ``longest`` tokens.
    """

    def __init__(
        self, config: Config, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype, longest: int
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._weights = weights
        with torch.device("meta"):
            self._gpt = GPT(config).requires_grad_(False).eval()
            self._gpt.max_seq_length = longest
        self._cos, self._sin = self._gpt.rope_cache(device=device)
        self.ln_f = self._with_weights(self._gpt.transformer.ln_f, "transformer.ln_f.")
        with torch.device("meta"):
            head = make_head(config).eval()
        self.lm_head = self._with_weights(head, "lm_head.")

    def embed(self, input_ids: Tensor) -> Tensor:
        """What the first block reads, ``[batch, time, n_embd]``, of ids ``[batch, time]``."""
        hidden = self._moved(self._weights["transformer.wte.weight"][input_ids])
        if self.config.scale_embeddings:
            hidden = hidden * torch.tensor(self.config.n_embd**0.5, dtype=hidden.dtype)
        return hidden

    @contextmanager
    def block(self, layer: int) -> Iterator[Block]:
        """A block with its weights, which it has while this is entered."""
        block = self._with_weights(self._gpt.transformer.h[layer], f"transformer.h.{layer}.")
        try:
            yield block
        finally:
            block.to("meta")

    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """What a block makes of hidden states ``[batch, time, n_embd]`` that begin at a text's first token."""
        cos, sin = (table[: hidden.size(1)].unsqueeze(0) for table in (self._cos, self._sin))
        if self.config.rope_indices is not None:
            kind = self.config.rope_indices[block.attn.block_idx]
            cos, sin = cos[..., kind], sin[..., kind]
        return block(hidden, cos, sin)

    def _with_weights(self, module: nn.Module, prefix: str) -> nn.Module:
        own = {name: self._moved(self._weights[prefix + name]) for name in module.state_dict()}
        module.load_state_dict(own, assign=True)
        return module.requires_grad_(False)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)
