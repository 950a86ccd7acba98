"""How much memory the parts of a model need while they run, found without running them.

LitGPT's own blocks are called with PyTorch's fake tensors, which have a shape and a type but no memory, and what would
have been allocated is added up. So every kind of attention, norm and MLP that LitGPT has is counted as it is.
"""

import math
import weakref
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from litgpt import lora, model
from litgpt.config import Config
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt_akl.models.model_size import HashableConfig


class RunningMemory(NamedTuple):
    """Bytes that a module needs beside its input and its parameters."""

    kept: int
    """What a forward leaves for its backward, with its output."""
    forward: int
    """The most at one time of a forward that is to be followed by a backward."""
    backward: int
    """The most at one time of a backward, ``kept`` and one parameter's gradient at a time included."""
    alone: int
    """The most at one time of a forward without a backward."""


class _Ledger(TorchDispatchMode):
    """Adds up the memory that is allocated inside, and takes it off again when it is freed."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._take_off, size).atexit = False

    def _take_off(self, size: int) -> None:
        self.now -= size


@lru_cache
def measure_block(
    config: HashableConfig, index: int, batch: int, time: int, dtype: torch.dtype, mixed: bool
) -> RunningMemory:
    """Memory of block ``index`` of a model for hidden states ``[batch, time, n_embd]``.

    Args:
        config: LitGPT's, or that of ``litgpt.lora``.
        index: from 0.
        batch: samples.
        time: tokens of each.
        dtype: of weights and hidden states.
        mixed: whether the products run under autocast in bfloat16.
    """
    config = config.config
    with FakeTensorMode():
        block = _block_class(config)(config, index)
        position = torch.empty(1, time, config.rope_n_elem)
        mask = None
        if getattr(block.attn, "apply_sliding_window_attention", False):
            # LitGPT fills it row by row, which takes its time
            block.attn.apply_sliding_window_attention = False
            mask = torch.empty(1, 1, time, time, dtype=dtype)
        if isinstance(block.mlp, model.LLaMAMoE):
            block.mlp = _EvenlyRouted(block.mlp)
        hidden = torch.empty(batch, time, config.n_embd, dtype=dtype)
        memory = _measure(block, hidden, (position, position, mask), dtype, mixed)
        if mask is None:
            return memory
        return RunningMemory(*(size + mask.nbytes for size in memory))


@lru_cache
def measure_norm(config: HashableConfig, batch: int, time: int, dtype: torch.dtype) -> RunningMemory:
    """Memory of a model's last norm for hidden states ``[batch, time, n_embd]``."""
    config = config.config
    with FakeTensorMode():
        norm = config.norm_class(config.n_embd, eps=config.norm_eps)
        return _measure(norm, torch.empty(batch, time, config.n_embd, dtype=dtype), (), dtype, mixed=False)


def block_kinds(config: Config) -> dict[int, int]:
    """How many blocks there are of each kind, by the number of the first of them."""
    dense = config.first_k_dense_replace or 0
    sliding = config.sliding_window_indices if config.sliding_window_size is not None else None
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for index in range(config.n_layer):
        kinds.setdefault((index < dense, bool(sliding and sliding[index])), []).append(index)
    return {indices[0]: len(indices) for indices in kinds.values()}


def _block_class(config: Config) -> type[model.Block]:
    return lora.Block if isinstance(config, lora.Config) else model.Block


def _measure(
    module: nn.Module, hidden: Tensor, rest: tuple[Tensor | None, ...], dtype: torch.dtype, mixed: bool
) -> RunningMemory:
    if any("lora_" in name for name, _ in module.named_parameters()):
        lora.mark_only_lora_as_trainable(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    known = [hidden, *module.parameters(), *module.buffers(), *(tensor for tensor in rest if tensor is not None)]
    with _Ledger(*known) as ledger, torch.no_grad():
        module(hidden, *rest)
    alone = ledger.most
    hidden.requires_grad_()
    with _Ledger(*known) as ledger:
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            output = module(hidden, *rest)
        kept, forward = ledger.now, ledger.most
        ledger.most = ledger.now
        output.backward(torch.empty_like(output))
    return RunningMemory(kept, forward, ledger.most, alone)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _EvenlyRouted(nn.Module):
    """A mixture of experts as if each had as many tokens as any other: how many it has depends on the weights.

    As in LitGPT's ``LLaMAMoE`` an expert's tokens are copied for it.
    """

    def __init__(self, mixture: model.LLaMAMoE) -> None:
        super().__init__()
        self.used = mixture.config.n_expert_per_token
        self.gate, self.experts = mixture.gate, mixture.experts
        self.shared_experts = getattr(mixture, "shared_experts", None)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores = self.gate(rows)
        # a grouped router gives its scores beside the experts' numbers
        scores = scores[0] if isinstance(scores, tuple) else scores[:, : self.used].softmax(dim=1)
        total, share = torch.zeros_like(rows), math.ceil(len(rows) * self.used / len(self.experts))
        for expert in self.experts:
            total[:share] += scores[:share, :1].to(x.dtype) * expert(rows[:share].clone())
        total = total.view_as(x)
        return total if self.shared_experts is None else total + self.shared_experts(x.clone())
