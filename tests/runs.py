"""Short runs of `finetune_akl.setup` in process, on the test material."""

import csv
from pathlib import Path

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.prompts import Default

from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import DistillArgs


def alice(path: Path) -> JSON:
    return JSON(json_path=path, mask_prompt=True, prompt_style=Default(), num_workers=0)


def train_args(**changes) -> TrainArgs:
    defaults = dict(global_batch_size=8, micro_batch_size=4, epochs=None, max_steps=3, max_norm=1.0, min_lr=0.0)
    return TrainArgs(**{"lr_warmup_steps": None, "save_interval": None, **defaults, **changes})


def eval_args(**changes) -> EvalArgs:
    return EvalArgs(**{"interval": 1000, "max_iters": 4, "max_new_tokens": None, "initial_validation": True, **changes})


def distil(
    student: Path, teacher_dir: Path | None, data: JSON | Path, out_dir: Path, **changes
) -> dict[str, torch.Tensor]:
    """Run and return the weights in ``final``; ``train``, ``eval`` and ``distill`` are given as dicts of changes."""
    setup(
        student,
        teacher_checkpoint_dir=teacher_dir,
        data=alice(data) if isinstance(data, Path) else data,
        out_dir=out_dir,
        train=train_args(**changes.pop("train", {})),
        eval=eval_args(**changes.pop("eval", {})),
        distill=DistillArgs(**{"compile": False, **changes.pop("distill", {})}),
        optimizer=changes.pop("optimizer", {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}}),
        **changes,
    )
    return torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)


def metrics(out_dir: Path) -> list[dict[str, float]]:
    """Rows of the newest CSV log, each without its empty cells."""
    log = max((out_dir / "logs" / "csv").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with log.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
