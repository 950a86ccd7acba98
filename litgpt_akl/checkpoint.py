"""Checkpoint directories, written whole or not at all: the trained student, and what training goes on from."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from litgpt.prompts import PromptStyle, save_prompt_style
from torch import Tensor

from litgpt_akl.errors import UserError
from litgpt_akl.model_files import copy_model_files, describe_to_hugging_face

POSITION = ("step_count", "epoch", "epoch_step", "tokens", "start_cross_entropy")
"""Entries of the training state that say how far a run has come; plain numbers."""


@contextmanager
def write_directory(out_dir: Path) -> Iterator[Path]:
    """Yields an empty directory that takes the place of ``out_dir`` when the block ends without an error.

    Until then an existing ``out_dir`` stays as it is; after an error (or an interrupt) it is still as it was and the
    temporary directory is gone. What a killed process left behind is cleared by the next call for the same path.
    One process at a time may write to a path.

    Args:
        out_dir: Where the directory is to appear. The yielded directory lies on the same disk and has the same name,
            because LitGPT reads rules from a folder's name.

    Raises:
        UserError: The directory cannot be created or replaced.
    """
    out_dir = out_dir.resolve()
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    previous = out_dir.with_name(f".{out_dir.name}.previous")
    try:
        _clear_leftovers(out_dir, partial, previous)
        (partial / out_dir.name).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written ({error.strerror}). Give another directory.") from error
    try:
        yield partial / out_dir.name
        _flush_tree(partial / out_dir.name)
        _swap_in(partial / out_dir.name, out_dir, previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear_leftovers(out_dir: Path, partial: Path, previous: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if previous.exists() and not out_dir.exists():
        # killed between the two renames of _swap_in
        previous.rename(out_dir)
    shutil.rmtree(previous, ignore_errors=True)


def _swap_in(new_dir: Path, out_dir: Path, previous: Path) -> None:
    try:
        if out_dir.exists():
            out_dir.rename(previous)
        new_dir.rename(out_dir)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be replaced ({error.strerror}). Give another directory.") from error
    finally:
        if previous.exists() and not out_dir.exists():
            previous.rename(out_dir)
    _flush(out_dir.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _flush(path)
    _flush(directory)


def _flush(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # not every network file system can flush a directory
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_student(
    directory: Path,
    weights: dict[str, Tensor],
    source_dir: Path,
    *,
    tied: bool,
    prompt_style: PromptStyle | None,
    recipe: str,
) -> None:
    """Write a LitGPT checkpoint that every consumer takes as it is: flat weights and what is read beside them.

    Args:
        directory: From :func:`write_directory`.
        weights: Parameters by LitGPT's names; tied matrices may share their storage.
        source_dir: The student's original checkpoint directory.
        tied: Whether embeddings and LM head are one matrix; written into config.json, since Hugging Face models throw
            away the LM head of a model that is said to be tied.
        prompt_style: What the prompts were made with, if the data module tells.
        recipe: The run's configuration, as YAML.
    """
    copy_model_files(source_dir, directory)
    if (directory / "config.json").is_file():
        describe_to_hugging_face(directory / "config.json", tied, weights["lm_head.weight"].dtype)
    if prompt_style is not None:
        save_prompt_style(prompt_style, directory)
    (directory / "hyperparameters.yaml").write_text(recipe, encoding="utf-8")
    torch.save(weights, directory / "lit_model.pth")


def save_training_state(directory: Path, state: dict, *, source_dir: Path, **options) -> None:
    """Write a ``step-...`` directory: the student, and what training goes on from.

    Raises:
        UserError: ``directory`` cannot be written.
    """
    with write_directory(directory) as partial:
        write_student(partial, state["student"].state_dict(), source_dir, **options)
        training_state = {name: state[name] for name in POSITION if name in state}
        training_state["random"] = torch.get_rng_state()
        for name in ("optimizer", "scheduler"):
            training_state[name] = state[name].state_dict()
        torch.save(training_state, partial / "training_state.pth")


def find_training_state(resume: bool | str | Path, out_dir: Path) -> Path | None:
    """The ``step-...`` directory that ``--resume`` means; None for a run from the start.

    Raises:
        UserError: there is no such directory, or it holds no training state.
    """
    if not resume:
        return None
    if isinstance(resume, Path):
        directory = resume if resume.is_dir() else resume.parent
        if not (directory / "training_state.pth").is_file():
            raise UserError(f"--resume {resume}: there is no training_state.pth. Give a step-... directory of a run.")
        return directory
    steps = sorted(out_dir.glob("step-*/training_state.pth"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not steps and resume is True:
        raise UserError(f"--resume true, but {out_dir} has no step-... directory. Leave --resume out, or use auto.")
    return steps[-1].parent if steps else None


def load_training_state(directory: Path, state: dict) -> None:
    """Set student, optimizer, scheduler, position and random numbers to what :func:`save_training_state` saved."""
    state["student"].load_state_dict(torch.load(directory / "lit_model.pth", mmap=True, weights_only=True))
    saved = torch.load(directory / "training_state.pth", map_location="cpu", weights_only=True)
    for name in ("optimizer", "scheduler"):
        state[name].load_state_dict(saved[name])
    state.update({name: saved[name] for name in POSITION if name in saved})
    torch.set_rng_state(saved["random"])
