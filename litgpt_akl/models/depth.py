"""Which layers of a teacher to keep: evenly spread, by block influence, or one at a time by measured forward KL."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litgpt_akl.loss.divergences import forward_kl
from litgpt_akl.models.layerwise import LayerwiseModel, Sample

BLOCK_BYTES = 2**27
"""Of the logits that are compared with the teacher's together."""
STATES_BYTES = 2**32
"""Of the hidden states of models that go through the blocks together; the weights are read again for the others."""
TOGETHER = 2048
"""Tokens of several models that a block reads together."""


def even_layers(count: int, n_layer: int) -> list[int]:
    """So many layers, spread evenly from the first to the last; one is the last."""
    last = n_layer - 1
    return [round(index * last / (count - 1)) for index in range(count)] if count > 1 else [last]


def removable_layers(kept: Sequence[int], n_layer: int, keep_ends: bool) -> list[int]:
    """Those of the kept layers that may be removed: with ``keep_ends`` not the teacher's first and last."""
    return [layer for layer in kept if not keep_ends or 0 < layer < n_layer - 1]


def influential_layers(influence: Tensor, count: int, keep_ends: bool) -> list[int]:
    """So many layers of the highest block influence ``[n_layer]``; of equal ones the first."""
    kept = [*range(len(influence))]
    removable = sorted(
        removable_layers(kept, len(kept), keep_ends), key=lambda layer: (influence[layer].item(), -layer)
    )
    return sorted({*kept} - {*removable[: len(kept) - count]})


class Removal(NamedTuple):
    """A layer that was removed, and what the model without it and those before it is like."""

    layer: int
    forward_kl: float
    """To the teacher, in nats per response token."""


class DepthSearch:
    """Removes layers of a teacher one at a time: each time the one without which its forward KL is lowest.

    The hidden states that the teacher has for the samples are computed once. All models that lack one layer more go
    through the blocks together, and have what comes before that layer in common. What comes before the layer that is
    removed at last stays as it is: from there the next search goes on, as far as memory allows to keep it.
    """

    def __init__(self, model: LayerwiseModel, samples: Sequence[Sample], vocab_size: int) -> None:
        self._model, self._samples, self._vocab_size = model, samples, vocab_size
        self._response_tokens = sum(len(sample.positions) for sample in samples)
        self._teacher_hidden: list[Tensor] = []
        self._before: dict[int, list[Tensor]] = {}
        """Hidden states of each sample before a kept layer, by its place, of the models that lack one before it."""

    def work(self, layers: int, keep_ends: bool = True, removed: int = 0) -> int:
        """How many times a block is run, for a sample and a model each, until so many layers are left."""
        n_layer = self._model.config.n_layer
        left = ([*range(kept)] for kept in range(n_layer - removed, layers, -1))
        runs = n_layer
        for kept in left:
            groups = self._groups(removable_layers(kept, len(kept), keep_ends))
            runs += sum(sum(_paths(kept, group)) for group in groups)
        return runs * len(self._samples)

    @torch.no_grad()
    def remove(
        self,
        layers: int,
        keep_ends: bool = True,
        advance: Callable[[int], object] = lambda runs: None,
        removed: Sequence[Removal] = (),
        keep: Callable[[list[Removal]], object] = lambda removed: None,
    ) -> list[Removal]:
        """Removals until so many layers are left, in order; ``advance`` is told how many of :meth:`work` were done.

        Those that were ``removed`` before, in this order, come first. ``keep`` is given all of them after each.
        """
        n_layer, found = self._model.config.n_layer, [*removed]
        if not self._teacher_hidden:
            whole = self.final_hidden([*range(n_layer)], advance=advance)
            self._teacher_hidden = [states[0] for states in whole]
        kept = sorted({*range(n_layer)} - {removal.layer for removal in found})
        self._before = {}
        while len(kept) > layers:
            removable = removable_layers(kept, n_layer, keep_ends)
            losses = self._losses(kept, removable, advance)
            best = int(losses.argmin())
            found.append(Removal(removable[best], losses[best].item()))
            keep(found)
            place = kept.index(removable[best])
            del kept[place]
            self._before = {other: states for other, states in self._before.items() if other <= place}
        return found

    def _losses(self, kept: Sequence[int], removable: Sequence[int], advance: Callable[[int], object]) -> Tensor:
        """Forward KL of the models that lack one more of the layers, ``[len(removable)]``, a response token."""
        groups = self._groups(removable)
        hidden = (self.final_hidden(kept, group, advance, goes_on=len(groups) == 1) for group in groups)
        return torch.cat([*map(self._forward_kl, hidden)])

    def _groups(self, removable: Sequence[int]) -> list[Sequence[int]]:
        """Layers to be removed whose models go through the blocks together: as many as their hidden states allow."""
        size = max(1, self._most_states())
        return [removable[start : start + size] for start in range(0, len(removable), size)]

    def _most_states(self) -> int:
        """How many models' hidden states of all samples may be in memory."""
        tokens = sum(len(sample.input_ids) for sample in self._samples)
        return STATES_BYTES // (tokens * self._model.config.n_embd * self._model.dtype.itemsize)

    def _forward_kl(self, hidden: list[Tensor]) -> Tensor:
        """Of final hidden states ``[models, n, n_embd]`` of each sample, ``[models]``."""
        models = len(hidden[0])
        sums = torch.zeros(models, dtype=torch.float64)
        tokens = max(1, BLOCK_BYTES // (4 * self._vocab_size * models))
        for student, teacher in zip(hidden, self._teacher_hidden, strict=True):
            for rows in range(0, len(teacher), tokens):
                logits = self._logits(student[:, rows : rows + tokens])
                wanted = self._logits(teacher[rows : rows + tokens])
                # one at a time, so that what is worked on stays in the cache
                sums += torch.tensor([forward_kl(wanted, found).sum().item() for found in logits])
        return sums / self._response_tokens

    @torch.no_grad()
    def final_hidden(
        self,
        kept: Sequence[int],
        removable: Sequence[int] = (),
        advance: Callable[[int], object] = lambda runs: None,
        goes_on: bool = False,
    ) -> list[Tensor]:
        """Final hidden states at the samples' positions, ``[models, n, n_embd]``: of the models that lack a layer more.

        Without removable layers it is the model of those that are kept. ``goes_on`` begins with what is known, and
        keeps what it can for the next time.
        """
        paths = _paths(kept, removable)
        begin = max(self._before, default=0) if goes_on else 0
        states = [*self._before[begin]] if begin else self._embeddings()
        if begin and removable[-1] not in kept[begin:]:
            states = [each[1:] for each in states]
        advance(sum(paths[:begin]) * len(states))
        for place, layer in enumerate(kept[begin:], start=begin):
            if goes_on and layer in removable:
                self._keep_states(place, states, len(removable))
            with self._model.block(layer) as block:
                for number, before in enumerate(states):
                    # the first path lacks no layer yet
                    after = self._run(block, before)
                    if layer in removable:
                        after = torch.cat((after, before[:1]))
                    states[number] = after[1:] if removable and layer == removable[-1] else after
                    advance(paths[place])
        return [
            self._model.ln_f(hidden[:, sample.positions]) for hidden, sample in zip(states, self._samples, strict=True)
        ]

    def _embeddings(self) -> list[Tensor]:
        return [self._model.embed(sample.input_ids[None]) for sample in self._samples]

    def _keep_states(self, place: int, states: list[Tensor], models: int) -> None:
        """Keep what models have before a layer, unless too little memory would be left for as many ``models``."""
        known = sum(len(each[0]) for each in self._before.values())
        if place and place not in self._before and known + len(states[0]) + models < self._most_states():
            self._before[place] = [*states]

    def _run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block makes of ``[models, time, n_embd]``, of a few together: its MLP takes several times that."""
        parts = hidden.split(max(1, TOGETHER // hidden.size(1)))
        return torch.cat([self._model.run(block, part) for part in parts])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._model.lm_head.logits(hidden)[..., : self._vocab_size]


def _paths(kept: Sequence[int], removable: Sequence[int]) -> list[int]:
    """How many models run through each of the kept layers."""
    found = []
    for layer in kept:
        before = sum(other < layer for other in removable)
        found.append(before + (before < len(removable) or not removable))
    return found
