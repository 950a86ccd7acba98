"""Own answers: the student answers some of a step's prompts, and the teacher judges what it wrote.

Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649.
"""

import math
import time
from dataclasses import replace

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from litgpt_akl.args import DistillArgs
from litgpt_akl.data.windows import Window, Windows, collate, cut, padded, turns
from litgpt_akl.generation import generate, longest_prompt
from litgpt_akl.head_loss import IGNORE_INDEX
from litgpt_akl.sharding import from_each

BATCH = 32
"""Prompts that a process answers together: their keys and values take less than training does, whose gradients and
activations are not there at that time."""


class OwnAnswers:
    """Lets a student answer the prompts of windows.

    Args:
        fabric: of the run.
        student: as Fabric set it up.
        distill: of the command.
        stop: what ends an answer, from :func:`~litgpt_akl.generation.stop_sequences`.
        vocab_size: ids that the tokenizer has.
        longest: tokens of prompt and answer together, at most.
        seed: of the run.
    """

    def __init__(
        self,
        fabric: L.Fabric,
        student: nn.Module,
        distill: DistillArgs,
        *,
        stop: list[list[int]],
        vocab_size: int,
        longest: int,
        seed: int,
    ) -> None:
        self.fabric, self.student, self.distill, self.seed = fabric, student, distill, seed
        self._options = {"stop": stop, "vocab_size": vocab_size, "max_length": longest}
        self.seconds = 0.0
        """That answering has taken; whoever reads it sets it back."""

    def share_of(self, windows: Windows) -> Windows:
        """The same windows, but for the prompts that the student is to answer."""
        longest = min(longest_prompt(self.student.config), self._options["max_length"] - 1)
        return replace(windows, on_policy=self.distill.on_policy, longest_prompt=longest)

    def complete(self, window: Window, windows: Windows) -> Window:
        """A window with its prompts answered: micro-batches of this rank's share, and the tokens of all.

        All processes must ask together, with the same prompts.

        Args:
            window: from ``windows``.
            windows: how it was cut.
        """
        if not window.prompts:
            return window
        began = time.perf_counter()
        samples = self._answer(window)
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        cuts = cut(lengths, windows.micro_batch_size, windows.micro_batch_tokens)
        shares = turns(cuts, windows.rank, windows.world_size)
        own = [replace(collate(samples[part]), is_own=True) for part in shares]
        answered = int(lengths.sum()) - sum(map(len, window.prompts.values()))
        self.seconds += time.perf_counter() - began
        return replace(
            window,
            response_tokens=window.response_tokens + answered,
            tokens=window.tokens + int(lengths.sum()),
            padded_tokens=window.padded_tokens + padded(lengths, cuts),
            micro_batches=window.micro_batches + own,
            prompts={},
        )

    def _answer(self, window: Window) -> list[dict[str, Tensor]]:
        """Samples of prompts and answers, the shortest first, in every process."""
        prompts, place = window.prompts, (self.seed, window.epoch, window.step)
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        order = sorted(prompts, key=lambda number: (len(prompts[number]), number))
        own, found = order[rank::world_size], {}
        for turn in range(math.ceil(math.ceil(len(order) / world_size) / BATCH)):
            batch = own[turn * BATCH : (turn + 1) * BATCH]
            temperature = self.distill.on_policy_temperature
            answers = generate(
                self.fabric,
                self.student,
                [prompts[number] for number in batch],
                max_new_tokens=self.distill.on_policy_tokens,
                seeds=[(*place, number) for number in batch] if temperature > 0 else None,
                temperature=temperature or 1.0,
                **self._options,
            )
            found.update(zip(batch, answers, strict=True))
        answers = {number: answer for part in from_each(found) for number, answer in part.items()}
        samples = [_sample(prompts[number], answers[number]) for number in order]
        return sorted(samples, key=lambda sample: len(sample["input_ids"]))


def _sample(prompt: Tensor, answer: list[int]) -> dict[str, Tensor]:
    """As a store has it: the prompt does not count."""
    written = torch.tensor(answer)
    return {
        "input_ids": torch.cat([prompt, written]),
        "labels": torch.cat([torch.full_like(prompt, IGNORE_INDEX), written]),
    }
