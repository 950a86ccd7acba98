"""On-policy samples: the student responds to some of a step's prompts, and the teacher judges what it wrote.

Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649.
"""

import time
from dataclasses import replace

import lightning as L
import numpy as np
import torch
from litgpt.config import Config
from torch import Tensor, nn

from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import PART, StepBatch, StepBatches, collate, cut, padded, together, turns
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.messages import UserError
from litgpt_akl.models.generation import BATCH, generate, longest_prompt
from litgpt_akl.models.parallel import all_gather_object


def limits_of_prompts(config: Config, longest: int) -> dict[str, int]:
    """Tokens of the longest prompt that a student can respond to in ``longest`` tokens together, by what limits it."""
    limits = {f"the {longest:,} tokens of prompt and answer allow": min(longest, config.block_size) - 1}
    if config.sliding_window_size is not None:
        # LitGPT's cache cannot take a longer one
        limits[f"the student's sliding window of {config.sliding_window_size:,} tokens"] = longest_prompt(config)
    return limits


def count_skipped(dataset: TokenizedDataset, limits: dict[str, int]) -> tuple[int, int, str]:
    """How many prompts of a dataset are too long for the student, how many samples have none, and both in words.

    Raises:
        UserError: a prompt is too long and has no recorded response either.
    """
    reason, limit = min(limits.items(), key=lambda item: item[1])
    too_long = missing = 0
    for start in range(0, len(dataset), PART):
        numbers = np.arange(start, min(start + PART, len(dataset)))
        lengths = dataset.prompt_lengths(numbers)
        if count := int(((lengths > limit) & (dataset.response_tokens(numbers) == 0)).sum()):
            raise UserError(
                f"{count:,} prompts have no response and are longer than {reason}: nothing could be learnt of them.\n"
                "Leave them out of the data, or raise --train.max_seq_length if both models can read more."
            )
        too_long, missing = too_long + int((lengths > limit).sum()), missing + int((lengths == 0).sum())
    words = [f"{too_long:,} prompts are longer than {reason}"] if too_long else []
    words += [f"{missing:,} samples have no prompt"] if missing else []
    return too_long, missing, " and ".join(words)


def check_prompts(
    dataset: TokenizedDataset, config: Config, distill: DistillArgs, *, longest: int, steps: int, steps_per_epoch: int
) -> str:
    """What to say of the prompts that a student is to respond to, in at most ``longest`` tokens with its response.

    Raises UserError if it can answer none, or its share is so small that ``steps`` would draw none.
    """
    too_long, missing, skipped = count_skipped(dataset, limits_of_prompts(config, longest))
    answerable = len(dataset) - too_long - missing
    given = f"--distill.on_policy {distill.on_policy}"
    if answerable == 0:
        raise UserError(
            f"{given}, but the student can answer none of {len(dataset):,} prompts: {skipped}.\n"
            "Give other data or another student, or leave on_policy out."
        )
    of_epoch = distill.on_policy * answerable
    of_run = of_epoch * steps / steps_per_epoch
    if of_run < 1:
        raise UserError(
            f"{given} of {answerable:,} prompts that the student can answer, in {steps:,} of {steps_per_epoch:,} steps"
            f" an epoch: it would be asked {of_run:.2g} of them.\nRaise on_policy, or leave it out."
        )
    text = (
        f"On-policy: the student answers {distill.on_policy:.3g} of the prompts itself, drawn anew in each epoch, in at"
        f" most {distill.on_policy_tokens:,} tokens; it can answer {answerable:,} of {len(dataset):,}"
    )
    if skipped:
        text += f": {skipped}, and are taken as recorded"
    return text + (f". An epoch draws {of_epoch:.2g} on average: some epochs draw none" if of_epoch < 3 else "")


class OnPolicySamples:
    """Lets a student, as Fabric set it up, write the responses of some of a step's samples.

    ``stop`` is what ends a response, from :func:`~litgpt_akl.models.generation.stop_sequences`; ``vocab_size`` are the
    tokenizer's ids, and ``longest`` the tokens of prompt and response together, at most.
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
        """That writing them has taken; whoever reads it sets it back."""
        self.count = 0
        """Samples so far, of all processes."""

    def share_of(self, step_batches: StepBatches) -> StepBatches:
        """The same step batches, but for the prompts that the student is to respond to."""
        longest = min(limits_of_prompts(self.student.config, self._options["max_length"]).values())
        return replace(step_batches, on_policy=self.distill.on_policy, longest_prompt=longest)

    def complete(self, step_batch: StepBatch, step_batches: StepBatches) -> StepBatch:
        """A step batch with the student's responses: this rank's share of the micro-batches, cut as ``step_batches``.

        All processes must ask together, with the same prompts.
        """
        if not step_batch.prompts:
            return step_batch
        began = time.perf_counter()
        samples = self._write(step_batch, step_batches.micro_batch_tokens)
        self.count += len(samples)
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        cuts = cut(lengths, step_batches.micro_batch_size, step_batches.micro_batch_tokens)
        shares = turns(cuts, step_batches.rank, step_batches.world_size)
        own = [replace(collate(samples[part]), is_on_policy=True) for part in shares]
        written = int(lengths.sum()) - sum(map(len, step_batch.prompts.values()))
        self.seconds += time.perf_counter() - began
        return replace(
            step_batch,
            response_tokens=step_batch.response_tokens + written,
            tokens=step_batch.tokens + int(lengths.sum()),
            padded_tokens=step_batch.padded_tokens + padded(lengths, cuts),
            micro_batches=step_batch.micro_batches + own,
            prompts={},
        )

    def _write(self, step_batch: StepBatch, most_tokens: int | None) -> list[dict[str, Tensor]]:
        """Samples of prompts and the student's responses, the shortest first, in every process."""
        prompts, place = step_batch.prompts, (self.seed, step_batch.epoch, step_batch.step)
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        order = sorted(prompts, key=lambda number: (len(prompts[number]), number))
        shares = [order[start::world_size] for start in range(world_size)]
        batches = [together([prompts[number] for number in share], BATCH, most_tokens) for share in shares]
        found = {}
        # a process that has no prompts left takes part in the turns of the others
        for turn in range(max(map(len, batches))):
            batch = [shares[rank][index] for index in batches[rank][turn]] if turn < len(batches[rank]) else []
            temperature = self.distill.on_policy_temperature
            responses = generate(
                self.fabric,
                self.student,
                [prompts[number] for number in batch],
                max_new_tokens=self.distill.on_policy_tokens,
                seeds=[(*place, number) for number in batch] if temperature > 0 else None,
                temperature=temperature or 1.0,
                **self._options,
            )
            found.update(zip(batch, responses, strict=True))
        responses = {number: ids for part in all_gather_object(found) for number, ids in part.items()}
        samples = [_sample(prompts[number], responses[number]) for number in order]
        return sorted(samples, key=lambda sample: len(sample["input_ids"]))


def _sample(prompt: Tensor, response: list[int]) -> dict[str, Tensor]:
    """As a dataset has it: the prompt does not count."""
    written = torch.tensor(response)
    return {
        "input_ids": torch.cat([prompt, written]),
        "labels": torch.cat([torch.full_like(prompt, IGNORE_INDEX), written]),
    }
