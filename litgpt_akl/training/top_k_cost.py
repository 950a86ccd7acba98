"""What a cache of the teacher's most probable ids does not see, measured on the first records."""

from typing import NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import in_order
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.top_k import TopK
from litgpt_akl.messages import entry
from litgpt_akl.models.gpt import distillation_loss, hidden_states, top_k_rows
from litgpt_akl.models.parallel import reshard
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.run import Run
from litgpt_akl.training.validation import Sums

SAMPLES = 8
"""Records that are measured."""


class Cost(NamedTuple):
    """Means over response tokens."""

    top_k: TopK
    bytes_of_hidden_state: int
    tokens: int
    mass: float
    """Of the teacher's distribution on the ids that are kept."""
    forward_kl: float | None = None
    """In nats from the teacher to the student, over all ids; None if there is no student."""
    lost: float | None = None
    """How much of it is among the ids that are put together."""

    def __str__(self) -> str:
        text = (
            f"{self.top_k.bytes_of_token:,} bytes a response token, where a hidden state takes"
            f" {self.bytes_of_hidden_state:,}; the {self.top_k.k:,} ids have {self.mass:.2%} of the teacher's mass"
        )
        if self.lost is not None:
            text += (
                f", and of the forward KL to the student as it is now, {self.forward_kl:.4f} nats a token,"
                f" {self.lost:.4f} are lost"
            )
        return f"{text} ({self.tokens:,} response tokens)"


def report_cost(
    fabric: L.Fabric, run: Run, teacher: nn.Module, dataset: TokenizedDataset, student: nn.Module | None = None
) -> Cost | None:
    """Print what the run's cache of the most probable ids costs; nothing without one, or if the teacher is not there.

    All processes must ask together, and all have what was found.
    """
    if run.memory.top_k is None or isinstance(teacher, HeadOnly):
        return None
    found = measure_cost(fabric, run, teacher, dataset, student)
    if found is not None and fabric.is_global_zero:
        entry("Note", f"The teacher cache as topk:{found.top_k.k}: {found}.")
    return found


@torch.no_grad()
def measure_cost(
    fabric: L.Fabric, run: Run, teacher: nn.Module, dataset: TokenizedDataset, student: nn.Module | None
) -> Cost | None:
    """The same as numbers, for the first records; None if they have no response tokens."""
    top_k, sums = run.memory.top_k, Sums(fabric, torch.float64)
    share = fabric.global_rank, fabric.world_size
    if student is not None:
        student.eval()
    for batch in in_order(dataset, range(min(SAMPLES, len(dataset))), *run.micro_batch, *share):
        moved = move_data_to_device(batch, fabric.device)
        at = moved.input_ids, moved.positions
        whole = {} if student is None else _forward_kl(run, student, teacher, moved, hidden_states(teacher, *at))
        rows = top_k_rows(teacher, *at, moved.labels, top_k)
        part = {} if student is None else _forward_kl(run, student, teacher, moved, rows)
        kept = top_k.unpack(rows, torch.float64).log_p[:, :-1].exp().sum()
        kl = {name: of["forward_kl"] for name, of in (("whole", whole), ("part", part)) if of}
        sums.add(tokens=kept.new_tensor(len(moved.labels)), mass=kept, **kl)
        reshard(teacher)
    if student is not None:
        student.train()
        reshard(student.module)
    total = {name: value.item() for name, value in sums.of_all().items()}
    tokens = total.pop("tokens", 0)
    if tokens == 0:
        return None
    means = {name: value / tokens for name, value in total.items()}
    width = run.pair.teacher_config.n_embd * run.memory.teacher_dtype.itemsize
    lost = (means["whole"], means["whole"] - means["part"]) if student is not None else ()
    return Cost(top_k, width, round(tokens), means["mass"], *lost)


def _forward_kl(run: Run, student: nn.Module, teacher: nn.Module, batch, given: Tensor) -> dict[str, Tensor]:
    loss = DistillationLoss(divergence="fkl", block_tokens=run.distill.block_tokens, compile=False)
    targets = batch.input_ids, batch.positions, batch.labels, given
    return distillation_loss(student, teacher, loss, *targets, run.pair.vocab_size).stats
