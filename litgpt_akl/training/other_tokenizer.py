"""A run whose teacher has another tokenizer: what the two models share, what is said of it, and the loss of a batch."""

import math
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import distributed

from litgpt_akl.data.aligned_dataset import SEEN, AlignedDataset, OtherTokenizer
from litgpt_akl.data.steps import MicroBatch, in_order
from litgpt_akl.loss.aligned_loss import ALIGNED, OF_TOKENS, TEACHER_MASS, AlignedLoss, LossOfBatch, SharedIds
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.messages import UserError, entry
from litgpt_akl.models.gpt import distillation_loss
from litgpt_akl.models.parallel import all_reduce, reshard
from litgpt_akl.models.shared_vocabulary import partners
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.run import Run, Splits

SAMPLES = 16
"""By which it is seen how much of the teacher's mass is of shared ids."""


def teacher_of_data(run: Run) -> OtherTokenizer | None:
    """The teacher as the data has to know it, if it has another tokenizer."""
    pair = run.pair
    if pair.teacher_tokenizer is None:
        return None
    known = pair.teacher_dir, pair.teacher_tokenizer, pair.teacher_vocab_size
    return OtherTokenizer(*known, pair.teacher_config.block_size)


def share_vocabulary(run: Run, splits: Splits) -> tuple[SharedIds | None, list[str]]:
    """The ids that both models have, told to the datasets, and a line for people; None if they have one tokenizer.

    Raises UserError if fewer of the first training samples' tokens are aligned than ``teacher.min_aligned``.
    """
    pair = run.pair
    if pair.teacher_tokenizer is None:
        return None, []
    tokenizers = pair.tokenizer, pair.teacher_tokenizer
    special = tuple(of.special_ids | {of.eos_id} for of in tokenizers)
    found = partners(*tokenizers, splits[0].ends(special))
    for dataset in splits:
        dataset.partners = found
    shared = SharedIds.make(torch.from_numpy(found), pair.vocab_size, pair.teacher_vocab_size)
    told = _describe(shared, splits[0])
    if splits[0].shares()["aligned"] < run.teacher.min_aligned:
        raise UserError(
            f"{told} That is less than --teacher.min_aligned {run.teacher.min_aligned}: too little to compare whole"
            " distributions.\nChoose a teacher whose tokenizer is more like the student's, or lower"
            " --teacher.min_aligned."
        )
    return shared, [told]


def _describe(shared: SharedIds, dataset: AlignedDataset) -> str:
    shares = dataset.shares()
    text = (
        f"The teacher has another tokenizer: {len(shared.student):,} ids are shared, of the student's"
        f" {shared.student_size:,} and the teacher's {shared.teacher_size:,}. Of the response tokens of the first"
        f" {min(SEEN, len(dataset)):,} records {shares['aligned']:.1%} are the same token for both"
        f" and {shares['chunks']:.1%} lie in chunks of several"
    )
    return f"{text}, {shares['alone']:.1%} have no counterpart." if shares["alone"] else f"{text}."


def make_aligned(run: Run, shared: SharedIds | None, device: torch.device) -> partial | None:
    """What makes an aligned loss of a loss; None for models of one tokenizer."""
    if shared is None:
        return None
    return partial(AlignedLoss, shared=shared.to(device), chunk_temperature=run.teacher.chunk_temperature)


def loss_of_batch(state: dict[str, Any], loss: DistillationLoss, batch: MicroBatch) -> DistillationLoss | LossOfBatch:
    """The loss, told how the tokens of a micro-batch belong together if the teacher has its own."""
    if state["aligned"] is None:
        return loss
    return state["aligned"](loss).of_batch(batch.for_teacher.labels, batch.alignment)


def per_position(means: dict[str, float]) -> dict[str, float]:
    """Means over response tokens, in which those that only aligned tokens have become means over these."""
    share = means.get(ALIGNED)
    if share is None:
        return means
    kept = {*OF_TOKENS, "loss"}
    return {name: x if name in kept else x / share if share else math.nan for name, x in means.items()}


@torch.no_grad()
def report_mass(fabric: L.Fabric, run: Run, state: dict[str, Any]) -> None:
    """Print the teacher's mass of shared ids where tokens are aligned; nothing for models of one tokenizer.

    All processes must ask together. Raises UserError if it is less than ``teacher.min_aligned``.
    """
    if state["aligned"] is None:
        return
    student, teacher, dataset = state["student"], state["teacher"], state["dataset"]
    total = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    # read in other micro-batches than in training, they would be rounded otherwise: none goes into a cache
    cache = state["caches"].training if isinstance(teacher.model, HeadOnly) else None
    share = fabric.global_rank, fabric.world_size
    student.eval()
    for batch in in_order(dataset, range(min(SAMPLES, len(dataset))), *run.micro_batch, *share, cache):
        for moved, hidden in teacher.hidden_states([batch], cache):
            targets = moved.input_ids, moved.positions, moved.labels, hidden, state["vocab_size"]
            loss = loss_of_batch(state, run.distill.loss(), moved)
            values = distillation_loss(student, teacher.model, loss, *targets).stats
            total += torch.stack([values[ALIGNED], values[TEACHER_MASS]])
    student.train()
    reshard(student.module)
    positions, mass = all_reduce(total, distributed.ReduceOp.SUM).tolist()
    mass /= max(1, positions)
    told = f"Where tokens are the same the teacher gives {mass:.1%} of its mass to ids that the student has"
    if mass < run.teacher.min_aligned:
        raise UserError(
            f"{told}, less than --teacher.min_aligned {run.teacher.min_aligned}.\nChoose a teacher whose tokenizer is"
            " more like the student's, or lower --teacher.min_aligned."
        )
    if fabric.is_global_zero:
        entry("Note", f"{told}; the rest is left out, and what remains is taken for all.")
