"""Measures what a cache of the teacher's most probable ids costs: nats, bytes, and the direction of the gradient.

    python scripts/experiments/measure_top_k.py   # SmolLM2-135M-Instruct on PIQA, the demo's material

Of the first training records, for several k: the teacher's mass on the k ids, how much of the forward KL to the student
is lost by putting all others together, what rounding to float16 adds to that, and the cosine between the gradients of
a divergence on k + 1 outcomes and on all ids, in all of the student's parameters, of all records together.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from litgpt.args import TrainArgs
from litgpt.data import JSON
from torch import Tensor

from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.steps import MicroBatch, collate
from litgpt_akl.loss.blockwise import HeadLoss
from litgpt_akl.loss.comparison import compare
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.top_k import TopK, lump
from litgpt_akl.loss.top_k_loss import DEFINED
from litgpt_akl.messages import progress_bar, say
from litgpt_akl.models.gpt import distillation_loss, hidden_states, load_frozen, top_k_rows
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.models.weights import read_config
from litgpt_akl.training.calibration import ids_in_use


def read_batches(data: Path, teacher: Path, records: int) -> list[MicroBatch]:
    """The first training records, one in each micro-batch."""
    config, module = read_config(teacher), JSON(json_path=data, mask_prompt=True, prompt_style="smollm2", num_workers=0)
    known = {"teacher_dir": teacher, "vocab_size": ids_in_use(teacher, config)}
    train = TrainArgs(micro_batch_size=1)
    training, _ = prepare_datasets(module, read_tokenizer(teacher), train, config.block_size, teacher, **known)
    return [collate([sample]) for sample in training.read(range(records))]


class Sums:
    """Of one way to tell what the teacher has said: the student's gradient, and sums over tokens."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.forward_kl = self.mass = self.rounding = 0.0

    def add(self, student: torch.nn.Module, result: HeadLoss) -> None:
        found = torch.autograd.grad(result.loss, list(student.parameters()))
        if self.gradients:
            found = [total.add_(part) for total, part in zip(self.gradients, found, strict=True)]
        self.gradients = [*found]
        self.forward_kl += result.stats["forward_kl"].item()

    def cosine(self, other: "Sums") -> float:
        """In float64: of a hundred million numbers a sum in float32 is off by percents."""

        def product(one: Sums, two: Sums) -> float:
            pairs = zip(one.gradients, two.gradients, strict=True)
            return sum((a.double() * b.double()).sum().item() for a, b in pairs)

        return product(self, other) / (product(self, self) * product(other, other)) ** 0.5


@torch.no_grad()
def look_at_rows(sums: Sums, logits: Tensor, rows: Tensor, top_k: TopK) -> None:
    """Add the mass of the ids, and the KL from what was to be stored to what is read."""
    read = top_k.unpack(rows, torch.float64)
    exact = lump(logits.clone(), read.ids).logits
    sums.mass += read.log_p[:, :-1].exp().sum().item()
    sums.rounding += compare(exact, read.log_p).forward_kl.sum().item()


def measure(student: Path, teacher: Path, batches: list[MicroBatch], ks: list[int], loss: DistillationLoss) -> str:
    """A table for people."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    models = [load_frozen(fabric, path, read_config(path), torch.float32) for path in (student, teacher)]
    models[0].requires_grad_(True)
    vocab_size = ids_in_use(teacher, read_config(teacher))
    sums, tokens = {k: Sums() for k in (None, *ks)}, sum(len(batch.labels) for batch in batches)
    for batch in progress_bar(batches, desc="measuring", unit="record"):
        at = batch.input_ids, batch.positions
        hidden = hidden_states(models[1], *at)
        with torch.no_grad():
            logits = models[1].lm_head.logits(hidden)[:, :vocab_size].double()
        for k, own in sums.items():
            given = hidden
            if k is not None:
                given = top_k_rows(models[1], *at, batch.labels, TopK(k, vocab_size))
                look_at_rows(own, logits, given, TopK(k, vocab_size))
            own.add(models[0], distillation_loss(*models, loss, *at, batch.labels, given, vocab_size))
    whole, width = sums.pop(None), read_config(teacher).n_embd
    columns = ("k", "bytes a token", "teacher's mass", "forward KL lost", "by rounding", f"cosine of {loss.divergence}")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for k, own in sums.items():
        lost, rounding = (whole.forward_kl - own.forward_kl) / tokens, own.rounding / tokens
        lines.append(
            f"| {k} | {TopK(k, vocab_size).bytes_of_token:,} | {own.mass / tokens:.4f} | {lost:.5f} | {rounding:.1e}"
            f" | {own.cosine(whole):.6f} |"
        )
    told = (
        f"{len(batches)} records, {tokens:,} response tokens; forward KL {whole.forward_kl / tokens:.4f} nats a token"
    )
    return "\n".join([f"{told}; a hidden state takes {2 * width:,} bytes in bfloat16.", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path(".demo"), help="what scripts/demo.sh has made")
    parser.add_argument("--student", type=Path, help="another student than the demo's")
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--divergence", choices=DEFINED, default="akl", help="whose gradients are compared")
    args = parser.parse_args()
    loss = DistillationLoss(divergence=args.divergence, kd_ratio=1.0, compile=False)
    teacher = args.demo / "SmolLM2-135M-Instruct"
    batches = read_batches(args.demo / "piqa", teacher, args.records)
    say(measure(args.student or args.demo / "student", teacher, batches, args.ks, loss))


if __name__ == "__main__":
    main()
