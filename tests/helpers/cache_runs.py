"""Runs with a cache of the teacher, on a few records of the test material."""

from pathlib import Path

import pytest
import torch

from helpers.runs import distil
from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.teacher.chunk_file import ENDING

TRAIN = {"global_batch_size": 6, "micro_batch_size": 2, "max_steps": None, "epochs": 2}
RATE = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-4}}


def run(student: Path, teacher: Path, data, out_dir: Path, cache: Path | str | None = None, **changes) -> dict:
    """Weights of a run of two epochs, with a cache if one is given; ``mode`` and other options of the teacher, too."""
    torch.set_num_threads(1)
    options = {f"cache_{name}": changes.pop(name) for name in ("mode", "dtype", "part") if name in changes}
    teacher_args = TeacherArgs(
        precision=changes.pop("teacher_precision", None), cache_dir=None if cache is None else str(cache), **options
    )
    train = TRAIN | changes.pop("train", {})
    changes = {"optimizer": RATE, "eval": {"initial_validation": False}} | changes
    return distil(student, teacher, data, out_dir, train=train, teacher=teacher_args, **changes)


def fill(student: Path, teacher: Path, data, out_dir: Path, cache: Path, **changes) -> None:
    """Without a student at the end, which :func:`run` looks for."""
    with pytest.raises(FileNotFoundError, match="final"):
        run(student, teacher, data, out_dir, cache, mode="fill", **changes)


def chunks(cache: Path) -> list[Path]:
    return sorted((cache / "training").glob(f"*{ENDING}"))


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], within: float = 0.0) -> None:
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) <= within
