"""A student's weights cut out of its teacher's: layers, channels of the hidden states, of the MLPs, heads, experts."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from litgpt.config import Config
from torch import Tensor

from litgpt_akl.models.importance import Importance
from litgpt_akl.models.tensor_file import tensor_file

LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
EXPERT = re.compile(r"(mlp)\.experts\.(\d+)\.(.+)")


@dataclass
class Kept:
    """What a student has of its teacher: numbers of parts, rising; what is None or not named is kept whole."""

    layers: list[int]
    width: Tensor | None = None
    """``[n_embd]``: channels of the hidden states."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """``[n_head]`` by attention, as ``transformer.h.3.attn``."""
    mlp: dict[str, Tensor] = field(default_factory=dict)
    """``[intermediate]`` by MLP, as ``transformer.h.3.mlp`` or ``transformer.h.3.mlp.experts.2``."""
    experts: dict[str, Tensor] = field(default_factory=dict)
    """``[n_expert]`` by mixture of experts."""
    energy: dict[str, Tensor] = field(default_factory=dict)
    """Of the teacher's norms, as in :class:`~litgpt_akl.models.importance.Importance`."""


def choose_parts(importance: Importance, config: Config, layers: list[int], sizes: dict[str, int]) -> Kept:
    """The most important parts: as many as ``sizes`` says of ``width``, ``mlp``, ``heads`` and ``experts``."""
    kept = Kept(layers, energy=importance.energy)
    if sizes["width"] < config.n_embd:
        kept.width = _best(importance.width, sizes["width"])
    for name, scores in importance.mlp.items():
        # experts that are shared are as wide as several
        times = config.n_shared_expert if name.endswith("shared_experts") else 1
        if sizes["mlp"] * times < len(scores):
            kept.mlp[name] = _best(scores, sizes["mlp"] * times)
    if sizes["heads"] < config.n_head:
        kept.heads = {name: _best_heads(scores, sizes["heads"], config) for name, scores in importance.heads.items()}
    if sizes["experts"] < config.n_expert:
        kept.experts = {name: _best(scores, sizes["experts"]) for name, scores in importance.experts.items()}
    return kept


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _best_heads(scores: Tensor, count: int, config: Config) -> Tensor:
    """As many of each group of queries; where each head has keys and values of its own, of all heads."""
    if config.n_query_groups == config.n_head:
        return _best(scores, count)
    size = config.n_head // config.n_query_groups
    groups = enumerate(scores.split(size))
    return torch.cat([number * size + _best(group, count // config.n_query_groups) for number, group in groups])


def slice_weights(weights: dict[str, Tensor], config: Config, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """A student's tensors by name, one at a time; those that are whole are the teacher's own.

    A norm divides by the root mean square of its channels. That of the channels that are kept is another one, and the
    norm's weight makes up for it, as far as it is known from the energy of the channels. Gemma multiplies embeddings by
    the root of the width: they make up for it, and so does the LM head, to stay tied, and the last norm for that.
    """
    number_of, outside = {layer: number for number, layer in enumerate(kept.layers)}, {}
    for name, tensor in weights.items():
        found = LAYER.fullmatch(name)
        if found is None:
            # embeddings and LM head that are one in memory stay one
            place = _place_of(tensor)
            if place not in outside:
                outside[place] = _slice_outside(name, tensor, config, kept)
            yield name, outside[place]
        elif int(found[1]) in number_of:
            new_name, new = _slice_in_layer(found[2], tensor, config, kept, f"transformer.h.{found[1]}.")
            if new_name is not None:
                yield f"transformer.h.{number_of[int(found[1])]}.{new_name}", new


class SlicedWeights:
    """A student's tensors by name, cut when they are asked for: in memory are those of one layer, and of no layer."""

    def __init__(self, weights: dict[str, Tensor], config: Config, kept: Kept) -> None:
        self._config, self._kept = config, kept
        self._whole: dict[int | None, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in weights.items():
            found = LAYER.fullmatch(name)
            self._whole[found and int(found[1])][name] = tensor
        self._outside = dict(slice_weights(self._whole[None], config, kept))
        self._layer, self._within = None, {}

    def __getitem__(self, name: str) -> Tensor:
        found = LAYER.fullmatch(name)
        if found is None:
            return self._outside[name]
        if int(found[1]) != self._layer:
            self._layer = int(found[1])
            # before the next one is cut, this one is gone
            self._within = {}
            whole = self._whole[self._kept.layers[self._layer]]
            self._within = dict(slice_weights(whole, self._config, self._kept))
        return self._within[name]


def write_weights(path: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors to a file for ``torch.load`` as they come; those that are one in memory are written once.

    Raises:
        OSError: the file cannot be written.
    """
    with tensor_file(path) as file:
        written, content = {}, {}
        for name, tensor in weights:
            place = _place_of(tensor)
            if place in written:
                content[name] = written[place][1]
                continue
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            # torch.save writes a view's whole storage: a part must become a tensor of its own
            content[name] = file.write(tensor if whole else tensor.clone(memory_format=torch.contiguous_format))
            if LAYER.fullmatch(name) is None:
                # the tensor is kept, for its place in memory to stay its own
                written[place] = tensor, content[name]
        file.save(content)


def _place_of(tensor: Tensor) -> tuple:
    """Equal for tensors that are one in memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _slice_outside(name: str, tensor: Tensor, config: Config, kept: Kept) -> Tensor:
    if kept.width is None or name == "lm_head.bias":
        return tensor
    if name.startswith("transformer.ln_f"):
        return _slice_norm(name, tensor, config, kept.width, kept.energy, 1 / _embeddings_scale(config, kept))
    scale = _embeddings_scale(config, kept)
    sliced = tensor[:, kept.width]
    return sliced if scale == 1 else (sliced.float() * scale).to(tensor.dtype)


def _embeddings_scale(config: Config, kept: Kept) -> float:
    return (config.n_embd / len(kept.width)) ** 0.5 if config.scale_embeddings else 1.0


def _slice_in_layer(
    name: str, tensor: Tensor, config: Config, kept: Kept, layer: str
) -> tuple[str | None, Tensor | None]:
    """A layer's tensor and its new name within a layer; None if it is of an expert that is not kept."""
    module, _, kind = name.rpartition(".")
    if "norm" in module.rpartition(".")[2]:
        return name, _slice_layer_norm(module, kind, tensor, config, kept, layer)
    if module.startswith("attn"):
        return name, _slice_attention(module, kind, tensor, config, kept, layer)
    experts = kept.experts.get(f"{layer}mlp")
    if module == "mlp.gate":
        tensor = tensor if experts is None else tensor[experts]
        return name, tensor if kept.width is None or kind != "weight" else tensor[:, kept.width]
    new_name, mlp = name, module.rpartition(".")[0]
    if (found := EXPERT.fullmatch(name)) and experts is not None:
        if int(found[2]) not in experts:
            return None, None
        new_name = f"mlp.experts.{experts.tolist().index(int(found[2]))}.{found[3]}"
    channels = kept.mlp.get(layer + mlp)
    is_down = module.endswith("proj")
    rows, columns = (kept.width, channels) if is_down else (channels, kept.width)
    return new_name, _cut(tensor, rows, columns)


def _cut(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Rows of a weight or a bias, and columns of a weight."""
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None or tensor.ndim == 1 else tensor[:, columns]


def _slice_layer_norm(module: str, kind: str, tensor: Tensor, config: Config, kept: Kept, layer: str) -> Tensor:
    name = f"{layer}{module}.{kind}"
    if not module.startswith("attn"):
        return tensor if kept.width is None else _slice_norm(name, tensor, config, kept.width, kept.energy)
    heads = kept.heads.get(f"{layer}attn")
    if heads is None or config.norm_qk_type != "olmo2":
        return tensor
    if module == "attn.norm_k" and config.n_query_groups != config.n_head:
        return tensor
    return _slice_norm(name, tensor, config, _channels_of(heads, config.head_size), kept.energy)


def _slice_norm(
    name: str, tensor: Tensor, config: Config, channels: Tensor, energy: dict[str, Tensor], scale: float = 1.0
) -> Tensor:
    """Some of a norm's channels; its weight is multiplied by what the root mean square gains by them, and ``scale``."""
    module, _, kind = name.rpartition(".")
    sliced = tensor[channels].float()
    if kind == "weight":
        gain = (energy[module][channels].sum().item() * len(tensor) / len(channels)) ** 0.5 * scale
        # Gemma's weights are what is more than 1
        offset = 1.0 if "Gemma" in config.name else 0.0
        sliced = (sliced + offset) * gain - offset
    return sliced.to(tensor.dtype)


def _slice_attention(module: str, kind: str, tensor: Tensor, config: Config, kept: Kept, layer: str) -> Tensor:
    heads, rows, columns = kept.heads.get(f"{layer}attn"), None, kept.width
    if module == "attn.proj":
        return _cut(tensor, kept.width, None if heads is None else _channels_of(heads, config.head_size))
    if heads is not None:
        size, groups = config.head_size, torch.arange(config.n_query_groups)
        groups = heads if config.n_query_groups == config.n_head else groups
        keys = config.n_head + groups
        rows = torch.cat([_channels_of(part, size) for part in (heads, keys, keys + config.n_query_groups)])
    return _cut(tensor, rows, columns)


def _channels_of(heads: Tensor, size: int) -> Tensor:
    return (heads[:, None] * size + torch.arange(size)).flatten()
