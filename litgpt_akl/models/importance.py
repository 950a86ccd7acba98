"""How much each layer, channel, head and expert of a model does on some texts, from one pass over them.

Sources: block influence of ShortGPT, arXiv 2403.03853; activations of Minitron, arXiv 2407.14679. Experts count by
what they give, times the router's weight. Sums are in float32.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from litgpt.model import Block, GroupedTopkRouter, LLaMAMoE
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from litgpt_akl.models.layerwise import LayerwiseModel, Sample


@dataclass
class Importance:
    """Scores of a model's parts; the higher, the more a part does. Names are those of modules in LitGPT's GPT."""

    blocks: Tensor
    """``[n_layer]``: 1 - cosine of a block's input and output, the mean over all tokens."""
    width: Tensor
    """``[n_embd]``: the absolute outputs of all norms of that width, summed over the norms."""
    mlp: dict[str, Tensor]
    """``[intermediate]`` by MLP: the absolute inputs of the down projection."""
    heads: dict[str, Tensor]
    """``[n_head]`` by attention: the lengths of each head's output, which the output projection reads."""
    experts: dict[str, Tensor]
    """``[n_expert]`` by mixture of experts: the lengths of each expert's output times the router's weight."""
    energy: dict[str, Tensor]
    """``[size]`` by norm: each channel's share of the squares that the norm divides by, the mean over all tokens."""


class _Scores:
    """Running sums of one pass. Of a sample the mean over its tokens counts, and of the samples the L2 norm."""

    def __init__(self) -> None:
        self.squares: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.influence: dict[int, float] = defaultdict(float)
        self.energy: dict[str, Tensor] = {}
        self.tokens = 0

    def add(self, kind: str, name: str, mean: Tensor) -> None:
        """Count the mean over a sample's tokens."""
        found = self.squares[kind]
        found[name] = found.get(name, 0.0) + mean.float().square().cpu()

    def add_energy(self, name: str, values: Tensor) -> None:
        """Count ``[time, size]``, which a norm reads."""
        squares = values.float().square()
        shares = squares / squares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        self.energy[name] = self.energy.get(name, 0.0) + shares.sum(dim=0).cpu()

    def roots(self, kind: str) -> dict[str, Tensor]:
        return {name: squares.sqrt() for name, squares in self.squares[kind].items()}


@torch.no_grad()
def measure_importance(
    model: LayerwiseModel, samples: Sequence[Sample], advance: Callable[[], object] = lambda: None
) -> Importance:
    """Score all parts of a model, one block at a time, by all tokens of the samples, prompts and responses.

    ``advance`` is called for each sample that a block has read.
    """
    scores, n_layer = _Scores(), model.config.n_layer
    hidden = [model.embed(sample.input_ids[None]) for sample in samples]
    scores.tokens = sum(states.size(1) for states in hidden)
    for layer in range(n_layer):
        with model.block(layer) as block, _watched(scores, block, f"transformer.h.{layer}"):
            for number, before in enumerate(hidden):
                after = hidden[number] = model.run(block, before)
                cosines = cosine_similarity(before.float(), after.float(), dim=-1)
                scores.influence[layer] += (1 - cosines).sum().item()
                advance()
    with ExitStack() as stack:
        _watch_norm(stack, scores, model.ln_f, "transformer.ln_f")
        for states in hidden:
            model.ln_f(states)
    return Importance(
        blocks=torch.tensor([scores.influence[layer] for layer in range(n_layer)]) / scores.tokens,
        width=torch.stack([*scores.roots("norm").values()]).sum(dim=0),
        mlp=scores.roots("mlp"),
        heads=scores.roots("heads"),
        experts=scores.roots("experts"),
        energy={name: shares / scores.tokens for name, shares in scores.energy.items()},
    )


def _watched(scores: _Scores, block: Block, prefix: str) -> ExitStack:
    """While entered, what happens in a block is counted."""
    stack, attention = ExitStack(), block.attn
    for name, module in block.named_children():
        if name.startswith(("norm", "post")) and not isinstance(module, nn.Identity):
            _watch_norm(stack, scores, module, f"{prefix}.{name}")

    def count_heads(module: nn.Module, arguments: tuple[Tensor]) -> None:
        outputs = arguments[0].flatten(0, 1).unflatten(-1, (attention.config.n_head, -1))
        scores.add("heads", f"{prefix}.attn", outputs.float().norm(dim=-1).mean(dim=0))

    stack.callback(attention.proj.register_forward_pre_hook(count_heads).remove)
    for name in ("norm_q", "norm_k"):
        # one of a head's own width is the same for all heads
        if attention.config.norm_qk_type == "olmo2" and getattr(attention, name, None) is not None:
            _watch_energy(stack, scores, getattr(attention, name), f"{prefix}.attn.{name}")
    if isinstance(block.mlp, LLaMAMoE):
        _watch_experts(stack, scores, block, f"{prefix}.mlp")
    else:
        _watch_mlp(stack, scores, block, block.mlp, f"{prefix}.mlp")
    return stack


def _watch_norm(stack: ExitStack, scores: _Scores, norm: nn.Module, name: str) -> None:
    def count(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        scores.add("norm", name, output[0].float().abs().mean(dim=0))

    stack.callback(norm.register_forward_hook(count).remove)
    _watch_energy(stack, scores, norm, name)


def _watch_energy(stack: ExitStack, scores: _Scores, norm: nn.Module, name: str) -> None:
    def count(module: nn.Module, arguments: tuple[Tensor]) -> None:
        values = arguments[0][0].float()
        if isinstance(module, nn.LayerNorm):
            values = values - values.mean(dim=-1, keepdim=True)
        scores.add_energy(name, values)

    stack.callback(norm.register_forward_pre_hook(count).remove)


def _watch_mlp(stack: ExitStack, scores: _Scores, block: Block, mlp: nn.Module, name: str) -> None:
    time = _length_of_sample(stack, block)

    def count(module: nn.Module, arguments: tuple[Tensor]) -> None:
        # an expert reads some of the tokens, and the mean is over all of them
        scores.add("mlp", name, arguments[0].flatten(0, -2).float().abs().sum(dim=0) / time[0])

    stack.callback(mlp.proj.register_forward_pre_hook(count).remove)


def _length_of_sample(stack: ExitStack, block: Block) -> list[int]:
    time = [0]

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        time[0] = arguments[0].size(1)

    stack.callback(block.register_forward_pre_hook(note).remove)
    return time


def _watch_experts(stack: ExitStack, scores: _Scores, block: Block, name: str) -> None:
    moe, time, routed, found = block.mlp, _length_of_sample(stack, block), {}, {}

    def note_routes(module: nn.Module, arguments: tuple[Tensor], output: Tensor | tuple[Tensor, Tensor]) -> None:
        weights, experts = output if isinstance(module, GroupedTopkRouter) else _chosen(output, moe)
        routed.update(weights=weights.float(), experts=experts)
        found.clear()

    def count_expert(number: int) -> Callable:
        def count(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            # in the order in which the mixture hands tokens over
            weights = routed["weights"][routed["experts"] == number]
            found[number] = (output.float().norm(dim=-1) * weights).sum() / time[0]
            if len(found) == len(moe.experts):
                scores.add("experts", name, torch.stack([found[each] for each in range(len(found))]))

        return count

    stack.callback(moe.gate.register_forward_hook(note_routes).remove)
    for number, expert in enumerate(moe.experts):
        stack.callback(expert.register_forward_hook(count_expert(number)).remove)
        _watch_mlp(stack, scores, block, expert, f"{name}.experts.{number}")
    if moe.config.n_shared_expert:
        _watch_mlp(stack, scores, block, moe.shared_experts, f"{name}.shared_experts")


def _chosen(router: Tensor, moe: LLaMAMoE) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts, ``[tokens, n_expert_per_token]``, as the mixture takes them."""
    logits, experts = torch.topk(router, moe.config.n_expert_per_token)
    return logits.softmax(dim=1, dtype=torch.float), experts
