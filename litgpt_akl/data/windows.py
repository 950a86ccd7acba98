"""Windows: the micro-batches of one optimizer step, and the loader that fetches them ahead."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from litgpt_akl.data.plan import Plan
from litgpt_akl.data.stores import Store
from litgpt_akl.data.workers import available_cores, fetch
from litgpt_akl.head_loss import IGNORE_INDEX


@dataclass
class MicroBatch:
    """Samples that go through the models together, padded on the right."""

    input_ids: Tensor
    """``[batch, time]``."""
    positions: Tensor
    """``[n]``: flat positions in ``input_ids`` whose next token counts."""
    labels: Tensor
    """``[n]``: those next tokens."""
    tokens: int
    """Tokens that are not padding."""

    def to(self, device: torch.device) -> "MicroBatch":
        move = {"device": device, "non_blocking": True}
        return MicroBatch(self.input_ids.to(**move), self.positions.to(**move), self.labels.to(**move), self.tokens)


@dataclass
class Window:
    """One optimizer step's data, as one rank sees it."""

    epoch: int
    step: int
    """Within the epoch."""
    numbers: np.ndarray
    """The samples of all ranks."""
    response_tokens: int
    """Of all ranks: what the sums of this step are divided by."""
    micro_batches: list[MicroBatch]
    """Of this rank."""


@dataclass
class Windows(Dataset):
    """Windows by their number, counted from the start of the run: a pure function, so that nothing is ever replayed."""

    store: Store
    plan: Plan
    micro_batch_size: int
    micro_batch_tokens: int | None = None
    """If given, how many tokens a micro-batch may have, padding counted, in place of ``micro_batch_size``."""
    rank: int = 0
    world_size: int = 1

    def __getitem__(self, number: int) -> Window:
        epoch, step = divmod(number, self.plan.steps_per_epoch)
        numbers = self.plan.step(epoch, step)
        groups = group(numbers, self.store.lengths(numbers), self.micro_batch_size, self.micro_batch_tokens)
        micro_batches = [collate(self.store.read(numbers)) for numbers in groups[self.rank :: self.world_size]]
        return Window(epoch, step, numbers, int(self.store.response_tokens(numbers).sum()), micro_batches)


def group(
    numbers: np.ndarray, lengths: np.ndarray, micro_batch_size: int, micro_batch_tokens: int | None = None
) -> list[np.ndarray]:
    """Cuts samples, ordered by length, into micro-batches."""
    if micro_batch_tokens is None:
        return np.split(numbers, range(micro_batch_size, len(numbers), micro_batch_size))
    cuts, start = [], 0
    for end, longest in enumerate(lengths.tolist(), start=1):
        if (end - start) * longest > micro_batch_tokens:
            start = end - 1
            cuts.append(start)
    return np.split(numbers, cuts)


def collate(samples: list[dict[str, Tensor]]) -> MicroBatch:
    """Pads samples of a store to the longest and finds the positions that count."""

    def pad(name: str, value: int) -> Tensor:
        columns = [sample[name] for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    input_ids = pad("input_ids", 0)
    # the hidden state at a position belongs to the label that follows it
    next_labels = torch.nn.functional.pad(pad("labels", IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (next_labels != IGNORE_INDEX).nonzero()[:, 0]
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    return MicroBatch(input_ids, positions, next_labels[positions], tokens)


def in_order(store: Store, numbers: Sequence[int], micro_batch_size: int) -> Iterator[MicroBatch]:
    """Micro-batches of given samples, those of like length together; for validation."""
    numbers = np.asarray(numbers)
    lengths = store.lengths(numbers)
    order = np.argsort(lengths, kind="stable")
    for group_numbers in group(numbers[order], lengths[order], micro_batch_size):
        yield collate(store.read(group_numbers))


def load(windows: Windows, first: int, last: int, num_workers: int) -> Iterator[Window]:
    """The windows ``first`` to ``last - 1`` of a run, fetched ahead by ``num_workers`` processes."""
    return fetch(windows, range(first, last), min(num_workers, available_cores(), last - first))
