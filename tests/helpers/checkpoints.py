"""Small training states, saved and found again, in this process or another."""

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from helpers.commands import complete_call
from litgpt_akl.models.model_files import ModelFiles, read_model_files
from litgpt_akl.models.prompt_format import PromptFormat
from litgpt_akl.training.checkpoint import find_training_state, save_training_state
from litgpt_akl.training.metrics import MetricsMarker

IDENTITY = {"data": {"samples": 9, "fingerprint": "c0ffee"}, "models": {"student": "beef", "teacher": "cafe"}}
EXPORT = {"tied": False, "prompt_format": PromptFormat(), "recipe": "seed: 0\n"}


def make_state(width: int = 32, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    student = torch.nn.Sequential()
    student.add_module("norm", torch.nn.LayerNorm(width))
    student.add_module("lm_head", torch.nn.Linear(width, width, bias=False))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return {"student": student, "optimizer": optimizer, "scheduler": scheduler, "step_count": 0, **IDENTITY}


def train(state: dict, steps: int) -> None:
    """Steps on random numbers of all three kinds."""
    for _ in range(steps):
        numbers = torch.randn(4, state["student"].norm.weight.numel())
        loss = state["student"](numbers * random.random() + np.random.rand()).square().mean()
        loss.backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["scheduler"].step()
        state["step_count"] += 1


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), np.random.rand()


def save(out_dir: Path, state: dict, source: Path | ModelFiles, keep_last: int | None = None) -> Path:
    directory = out_dir / f"step-{state['step_count']:06d}"
    options = {"metrics": MetricsMarker().mark(out_dir / "logs.csv", out_dir), "keep_last": keep_last}
    model_files = source if isinstance(source, ModelFiles) else read_model_files(source)
    save_training_state(directory, state, model_files=model_files, **options, **EXPORT)
    return directory


def save_steps(out_dir: Path, source: Path, steps: list[int], **options) -> list[Path]:
    return [save(out_dir, {**make_state(), "step_count": step}, source, **options) for step in steps]


def find(resume: bool | str | Path, out_dir: Path) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return find_training_state(resume, out_dir, warnings.append), warnings


def names(out_dir: Path) -> list[str]:
    return sorted(os.listdir(out_dir))


def in_a_copy(function: Callable, *arguments) -> str:
    """What ``function`` prints in a copy of this process, called with strings; what it changes ends with the copy."""
    finished = complete_call(partial(function, *map(str, arguments)), timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
