"""One measured run in a process of its own: ``python -m step_benchmark.variants NAME JOB [--cache DIR]``."""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON, get_sft_collate_fn
from litgpt.finetune import full
from litgpt.model import GPT
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader

from litgpt_akl.commands import finetune_akl
from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.data.steps import MicroBatch, collate
from step_benchmark.job import LEARNING_RATE, ROWS, SEED, THREADS, Job, memory_gb, report

OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": LEARNING_RATE}}
NEVER = 10**9


class InOrder(JSON):
    """LitGPT's own data module, without its shuffling."""

    def train_dataloader(self) -> DataLoader:
        together = get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=self.ignore_index)
        return DataLoader(self.train_dataset, batch_size=self.batch_size, collate_fn=together)


def finetune_full(job: Job, out: Path, _: Path | None, **options) -> tuple[list[float], str]:
    """LitGPT's own command on the student, with the time that it logs for each iteration."""
    optimizer = {**OPTIMIZER, "init_args": OPTIMIZER["init_args"] | options}
    # it reads the command line once more when it saves
    sys.argv = ["litgpt", "finetune_full", job.student]
    data = InOrder(Path(job.ordered_records), mask_prompt=True, prompt_style="smollm2", num_workers=0)
    full.setup(
        Path(job.student),
        out_dir=out,
        precision="32-true",
        data=data,
        train=train_args(job, epochs=2, lr_warmup_steps=1),
        eval=EvalArgs(interval=NEVER, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer=optimizer,
        seed=SEED,
    )
    return column(out, "iter_time"), "cross-entropy; embeddings and head are two matrices; no gradient clipping"


def live(job: Job, out: Path, cache: Path | None) -> tuple[list[float], str]:
    """This package's command, with the time that it logs for each step."""
    finetune_akl.setup(
        Path(job.student),
        teacher_checkpoint_dir=Path(job.teacher),
        out_dir=out,
        precision="32-true",
        data=JSON(Path(job.records), mask_prompt=True, prompt_style="smollm2", num_workers=0),
        teacher=TeacherArgs() if cache is None else TeacherArgs(cache_dir=str(cache)),
        train=train_args(job, max_norm=1.0, min_lr=0.0),
        eval=EvalArgs(interval=NEVER, max_new_tokens=None, initial_validation=False, final_validation=False),
        optimizer=OPTIMIZER,
        seed=SEED,
    )
    return column(
        out, "seconds_per_step"
    ), "AKL and cross-entropy, half each; gradient clipping at norm 1; fused AdamW, its default"


def train_args(job: Job, **changes) -> TrainArgs:
    common = {"save_interval": None, "log_interval": 1, "global_batch_size": ROWS, "micro_batch_size": ROWS}
    return TrainArgs(**{"epochs": 1, "max_steps": len(job.steps), **common, **changes})


def column(out: Path, name: str) -> list[float]:
    """A column of the metrics that a command wrote."""
    path = next((out / "logs" / "csv").glob("version_*/metrics.csv"))
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def floor(job: Job, out: Path, _: Path | None) -> tuple[list[float], str]:
    """What no live distillation can do without: both forwards, the student's backward, and the optimizer."""
    teacher, student = load(job.teacher).requires_grad_(False), load(job.student)
    optimizer, seconds = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True), []
    for rows in job.steps:
        start = time.perf_counter()
        take_floor_step(teacher, student, optimizer, rows)
        seconds.append(time.perf_counter() - start)
    return seconds, "plain PyTorch: the teacher's logits are thrown away, cross-entropy alone is trained"


def take_floor_step(teacher: GPT, student: GPT, optimizer: torch.optim.Optimizer, rows: list[dict]) -> None:
    batch = collate([{name: torch.tensor(ids) for name, ids in row.items()} for row in rows])
    with torch.no_grad():
        logits(teacher, batch)
    cross_entropy(logits(student, batch), batch.labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def load(directory: str) -> GPT:
    """A model that gives hidden states in place of logits; its head is its embeddings, as in both pairs."""
    with torch.device("meta"):
        model = GPT(Config.from_file(Path(directory) / "model_config.yaml"))
    model.lm_head = torch.nn.Identity()
    weights = torch.load(Path(directory) / "lit_model.pth", weights_only=True)
    del weights["lm_head.weight"]
    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = model.rope_cache()
    return model


def logits(model: GPT, batch: MicroBatch) -> Tensor:
    """At response positions only."""
    return linear(model(batch.input_ids).flatten(0, 1)[batch.positions], model.transformer.wte.weight)


RUNNERS: dict[str, Callable[[Job, Path, Path | None], tuple[list[float], str]]] = {
    "finetune_full": finetune_full,
    "finetune_full_fused": partial(finetune_full, fused=True),
    "live": live,
    "cached": live,
    "floor": floor,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RUNNERS)
    parser.add_argument("job", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    job, empty = Job.read(arguments.job), memory_gb("VmRSS")
    with tempfile.TemporaryDirectory() as directory:
        seconds, settings = RUNNERS[arguments.name](job, Path(directory), arguments.cache)
    report(job, seconds, empty, settings)


if __name__ == "__main__":
    main()
