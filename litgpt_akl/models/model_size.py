"""What a model takes, from its configuration: how many parameters it has, and the memory of its blocks as they run.

LitGPT's own blocks are called with PyTorch's fake tensors, which have a shape and a type but no memory, and what would
have been allocated is added up. So every kind of attention, norm and MLP that LitGPT has is counted as it is.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from heapq import nlargest
from typing import Any, NamedTuple

import torch
from litgpt import lora, model
from litgpt.config import Config
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt_akl.models.gpt import build_model


def _once_a_config(function: Callable) -> Callable:
    """Keep what a function returns; its first argument, a configuration that cannot be hashed, is known by its text."""
    results: dict[tuple, Any] = {}

    def look_up(config: Config, *options: Any) -> Any:
        key = (repr(config), *options)
        if key not in results:
            results[key] = function(config, *options)
        return results[key]

    return look_up


class ModelSize(NamedTuple):
    """Numbers of parameters of a model, of its largest block, and of its root: all that is not in a block."""

    whole: int
    block: int
    root: int
    head: int
    products: int
    """In the weights of the blocks' linear layers."""
    of_experts: int
    """Of these, in experts among which each token is sent to a few."""
    trained: int
    trained_block: int
    trained_head: int
    trained_embeddings: int
    two_largest: int
    """Twice the largest matrix that is trained, and once the second."""


@_once_a_config
def measure_size(config: Config, tied: bool) -> ModelSize:
    """Count a model's parameters; tied, embeddings and head are one matrix. With LoRA only adapters are trained."""
    with torch.device("meta"):
        gpt = build_model(config, tied)
    head, blocks = config.padded_vocab_size * config.n_embd, gpt.transformer.h
    most, second = nlargest(2, (p.numel() for p in gpt.parameters() if p.requires_grad))
    return ModelSize(
        whole=_count(gpt),
        block=max(map(_count, blocks)),
        root=_count(gpt) - _count(blocks),
        head=head,
        products=_in_products(blocks),
        of_experts=sum(_in_products(block.mlp.experts) for block in blocks if hasattr(block.mlp, "experts")),
        trained=_count(gpt, trained=True),
        trained_block=max(_count(block, trained=True) for block in blocks),
        trained_head=head * any(p.requires_grad for p in gpt.lm_head.parameters()),
        trained_embeddings=head * gpt.transformer.wte.weight.requires_grad,
        two_largest=2 * most + second,
    )


def _in_products(modules: nn.Module) -> int:
    return sum(module.weight.numel() for module in modules.modules() if isinstance(module, nn.Linear))


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


class RunningMemory(NamedTuple):
    """Bytes that a module needs beside its input and its parameters."""

    kept: int
    """What a forward leaves for its backward, with its output."""
    forward: int
    """The most at one time of a forward that is to be followed by a backward."""
    backward: int
    """The most at one time of a backward, ``kept`` and one parameter's gradient at a time included."""
    no_grad: int
    """The most at one time of a forward without a backward."""


class _Ledger(TorchDispatchMode):
    """Adds up the memory that is allocated inside, and takes it off again when it is freed."""

    def __init__(self, known: list[Tensor], experts: int) -> None:
        super().__init__()
        self.now = self.most = 0
        self.experts, self.seen = experts, weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.nonzero.default:
            # the tokens of an expert, which depend on weights: as many as any other has
            result = args[0].new_empty(math.ceil(args[0].numel() / self.experts), args[0].ndim, dtype=torch.int64)
        else:
            result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes()).atexit = False
        return result

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@_once_a_config
def measure_block(
    config: Config, index: int | None, batch: int, time: int, dtype: torch.dtype, mixed: bool
) -> RunningMemory:
    """Memory of the block ``index``, or if that is None of the last norm, for hidden states ``[batch, time, n_embd]``.

    Weights and hidden states have ``dtype``; ``mixed``, products run under autocast in bfloat16.
    """
    with FakeTensorMode():
        hidden = torch.empty(batch, time, config.n_embd, dtype=dtype)
        if index is None:
            return _measure(config.norm_class(config.n_embd, eps=config.norm_eps), [hidden], mixed, experts=1)
        inputs, mask_bytes = [hidden, *torch.empty(2, 1, time, config.rope_n_elem)], 0
        has_lora = isinstance(config, lora.Config)
        block = (lora if has_lora else model).Block(config, index)
        if has_lora:
            lora.mark_only_lora_as_trainable(block)
        if getattr(block.attn, "apply_sliding_window_attention", False):
            # LitGPT fills the mask row by row, which takes its time
            block.attn.apply_sliding_window_attention = False
            inputs.append(torch.empty(1, 1, time, time, dtype=dtype))
            mask_bytes = inputs[-1].nbytes
        return RunningMemory(*(size + mask_bytes for size in _measure(block, inputs, mixed, config.n_expert)))


def _measure(module: nn.Module, inputs: list[Tensor], mixed: bool, experts: int) -> RunningMemory:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(inputs[0].dtype)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    known = [*inputs, *module.parameters(), *module.buffers()]
    with _Ledger(known, experts) as ledger, torch.no_grad():
        module(*inputs)
    no_grad = ledger.most
    inputs[0].requires_grad_()
    with _Ledger(known, experts) as ledger:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            output = module(*inputs)
        kept, forward, ledger.most = ledger.now, ledger.most, ledger.now
        output.backward(torch.empty_like(output))
    return RunningMemory(kept, forward, ledger.most, no_grad)


def block_kinds(config: Config) -> dict[int, int]:
    """How many blocks there are of each kind, by the number of the first of them."""
    dense, sliding = config.first_k_dense_replace or 0, None
    if config.sliding_window_size is not None:
        sliding = config.sliding_window_indices
    kinds = [(index < dense, bool(sliding and sliding[index])) for index in range(config.n_layer)]
    return {kinds.index(kind): count for kind, count in Counter(kinds).items()}


def measure_blocks(config: Config, *options: Any) -> list[RunningMemory]:
    """Memory of each block; options are those of :func:`measure_block`."""
    return [measure_block(config, index, *options) for index, n in block_kinds(config).items() for _ in range(n)]
