"""The teacher as training meets it: live or cached, which is all the same to the loss."""

from collections.abc import Callable, Iterator
from functools import partial

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection, move_data_to_device
from litgpt.config import Config
from torch import Tensor, nn

from litgpt_akl.data.steps import MicroBatch
from litgpt_akl.loss.top_k import TopK, is_packed
from litgpt_akl.models.gpt import hidden_states, make_head, top_k_rows
from litgpt_akl.models.parallel import all_reduce_max_each, unshard
from litgpt_akl.teacher.cache import TeacherCache
from litgpt_akl.teacher.chunk_file import Record


class HeadOnly(nn.Module):
    """What is needed of a teacher whose hidden states are cached: its head; of cached distributions not even that."""

    def __init__(self, config: Config, has_head: bool = True) -> None:
        super().__init__()
        self.config = config
        self.lm_head = make_head(config) if has_head else None


class Teacher:
    """Gives hidden states for micro-batches, by computing them or from a cache; of a cache of distributions, those.

    The model is a frozen GPT, or a :class:`HeadOnly` with what loads the whole if something turns out not to be cached.
    """

    def __init__(self, fabric: L.Fabric, model: nn.Module, load: Callable[[], nn.Module] | None = None) -> None:
        self.fabric, self.model, self._load = fabric, model, load
        self._stream: torch.cuda.Stream | None = None

    def hidden_states(
        self, batches: list[MicroBatch], cache: TeacherCache | None = None
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Micro-batches on the device, each with the teacher's final hidden states ``[n, D]`` at its positions.

        If the cache keeps the most probable ids, recorded ones come with their distributions packed, ``[n, bytes]``,
        also where they are computed now: what is trained on does not depend on who has filled the cache.

        When all are done, what the cache lacked is added to it. All processes must ask together, each for as many.
        """
        read = [batch.for_teacher for batch in batches]
        live = self._to_compute(read, cache)
        if any(live) and self._load is not None:
            # random numbers of training must not depend on what a cache holds
            with torch.random.fork_rng():
                self.model, self._load = self._load(), None
        # a sharded teacher's own gathering overlaps with the student's work, and its stream is not ours to choose; one
        # micro-batch has nothing to overlap with, and memory of another stream would serve the teacher only
        ahead = self.fabric.device.type == "cuda" and self.fabric.world_size == 1 and len(batches) > 1
        computed, answer = [], partial(self._answer, None if cache is None else cache.top_k)
        answers = self._ahead(batches, live, answer) if ahead else map(answer, batches, live)
        for batch, found in zip(read, answers, strict=True):
            if cache is not None and batch.teacher_hidden is None and not batch.is_on_policy:
                computed.append((batch, found[1]))
            yield found
        for batch, hidden in computed:
            parts = hidden.cpu().split(batch.counts)
            cache.add([Record(*map(int, key), part) for key, part in zip(batch.keys, parts, strict=True)])

    def _to_compute(self, batches: list[MicroBatch], cache: TeacherCache | None) -> list[bool]:
        """Which of the micro-batches not every process has cached: a sharded teacher only runs in all together."""
        if cache is None:
            return [True] * len(batches)
        for batch in batches:
            if batch.teacher_hidden is None and not batch.is_on_policy:
                # fetched ahead, it may have been too early
                batch.teacher_hidden = cache.read(batch.keys)
        lacking = [batch.teacher_hidden is None for batch in batches]
        return [flag > 0 for flag in all_reduce_max_each(self.fabric, lacking)]

    def _ahead(
        self,
        batches: list[MicroBatch],
        live: list[bool],
        answer: Callable[[MicroBatch, bool], tuple[MicroBatch, Tensor]],
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        """The same on a stream of its own, so that it goes on while the student works on the micro-batch before."""
        # one for all steps: what is freed on a stream is used again on that stream only
        self._stream = stream = self._stream or torch.cuda.Stream()
        main = torch.cuda.current_stream()
        # weights are loaded, or trained, on the main one
        stream.wait_stream(main)
        waiting = []
        for pair in zip(batches, live, strict=True):
            with torch.cuda.stream(stream):
                found = answer(*pair)
                waiting.append((found, stream.record_event()))
            if len(waiting) > 1:
                yield _handed_over(*waiting.pop(0), main)
        for last in waiting:
            yield _handed_over(*last, main)

    def _answer(self, top_k: TopK | None, batch: MicroBatch, live: bool) -> tuple[MicroBatch, Tensor]:
        moved = move_data_to_device(batch, self.fabric.device)
        read = moved.for_teacher
        if live and top_k is not None and not batch.is_on_policy:
            computed = top_k_rows(self.model, read.input_ids, read.positions, read.labels, top_k)
        elif live:
            computed = hidden_states(self.model, read.input_ids, read.positions)
        else:
            unshard(self.model)
        if read.teacher_hidden is None:
            return moved, computed
        found = read.teacher_hidden
        return moved, found if is_packed(found) else found.to(self.model.lm_head.weight.dtype)


def _handed_over(
    found: tuple[MicroBatch, Tensor], done: torch.cuda.Event, stream: torch.cuda.Stream
) -> tuple[MicroBatch, Tensor]:
    """What may be read on ``stream``, and whose memory is not given away before that is done."""
    stream.wait_event(done)
    # also of the teacher's own tokens, if it has others
    apply_to_collection(found, Tensor, lambda tensor: tensor.record_stream(stream))
    return found
