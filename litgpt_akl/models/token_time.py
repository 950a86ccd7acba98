"""How long models take for the next token of one answer, measured on a device: with LitGPT's key-value cache.

Weights are made up, since time does not depend on them. A large model is timed by some of its blocks, which are more
than a processor's cache can hold: each block is read from memory, as in the whole model.
"""

import time
from dataclasses import replace
from typing import NamedTuple

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor, nn

from litgpt_akl.models.depth import even_layers
from litgpt_akl.models.generation import longest_prompt
from litgpt_akl.models.student_config import full_sizes, student_config

CONTEXT = 256
"""Tokens that were read before."""
BLOCKS_BYTES = 2**29
"""Of the weights of blocks that are run one after the other, at least, if the model has as many."""
WARM_UPS, ROUNDS = 2, 11


class Speed(NamedTuple):
    """Of a model, as a multiple of the tokens in a second that another one writes."""

    ratio: float
    spread: float
    """By which measurements vary: half the distance between their quartiles."""


class TokenTime(NamedTuple):
    """Seconds for a token in each round, ``[ROUNDS]``."""

    root: Tensor
    """Of all that is in no block."""
    block: Tensor
    """Of one block, the mean of all that were run."""
    reference: Tensor
    """Of the whole other model, right before."""

    def speed(self, layers: int) -> Speed:
        """Of a model of so many of these blocks, beside the reference."""
        fast, slow = quartiles(self.root + layers * self.block)
        reference, _ = quartiles(self.reference)
        return Speed(reference / fast, reference * (1 / fast - 1 / slow) / 2)


def quartiles(seconds: Tensor) -> tuple[float, float]:
    """Of the time in each round: the first one counts, since other work on a machine can only add to it."""
    first, third = seconds.quantile(torch.tensor([0.25, 0.75], dtype=seconds.dtype)).tolist()
    return first, third


def measure_token_time(config: Config, reference: Config, device: torch.device, dtype: torch.dtype) -> TokenTime:
    """Time a model of a configuration and another one in turns, so that other work on the machine slows both."""
    models = [_Decoder(each, device, dtype) for each in (reference, config)]
    for _ in range(WARM_UPS):
        for model in models:
            model.seconds()
    # [ROUNDS, 2, 2]
    rounds = torch.tensor([[model.seconds() for model in models] for _ in range(ROUNDS)], dtype=torch.float64)
    (other_root, other_block), (root, block) = rounds.permute(1, 2, 0)
    return TokenTime(root, block, other_root + reference.n_layer * other_block)


class _Decoder:
    """A model that has read a text and writes the next token: embeddings, LM head, and some or all blocks."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._gpt = device, _with_made_up_weights(_with_few_blocks(config, dtype), device, dtype)
        capacity = min(CONTEXT, longest_prompt(config) + 1)
        self._gpt.max_seq_length = capacity
        self._gpt.cos, self._gpt.sin = self._gpt.rope_cache(device)
        self._gpt.set_kv_cache(1, device=device, dtype=dtype)
        self._inputs = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.tensor([capacity - 1], device=device)
        self._capacity = capacity

    def seconds(self) -> tuple[float, float]:
        """Of all that is in no block, and of one block."""
        blocks = self._gpt.transformer["h"]
        whole = self._time()
        self._gpt.transformer["h"] = nn.ModuleList()
        root = self._time()
        self._gpt.transformer["h"] = blocks
        return root, max(whole - root, 1e-9) / len(blocks)

    @torch.no_grad()
    def _time(self) -> float:
        self._wait()
        began = time.perf_counter()
        self._gpt(*self._inputs, input_pos_maxp1=self._capacity)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _with_few_blocks(config: Config, dtype: torch.dtype) -> Config:
    """The configuration of a model with some of the blocks, of all kinds that there are."""
    with torch.device("meta"):
        one = GPT(replace(config, n_layer=1)).transformer.h[0]
    size = sum(parameter.numel() for parameter in one.parameters()) * dtype.itemsize
    count = min(config.n_layer, 1 + BLOCKS_BYTES // size)
    return student_config(config, even_layers(count, config.n_layer), full_sizes(config))


def _with_made_up_weights(config: Config, device: torch.device, dtype: torch.dtype) -> GPT:
    with torch.device("meta"):
        gpt = GPT(config).to(dtype).requires_grad_(False).eval()
    gpt.to_empty(device=device)
    # of the embeddings one row is read
    gpt.transformer.wte.weight = gpt.lm_head.weight
    for parameter in gpt.parameters():
        # numbers of usual size: the smallest ones take a processor longer
        parameter.fill_(0.01)
    return gpt
