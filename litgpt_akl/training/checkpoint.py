"""Checkpoint directories, written whole or not at all: the trained student, and what training goes on from."""

import json
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from litgpt_akl.files.directories import clear_leftovers, explain_failure, restore_previous, write_directory
from litgpt_akl.files.manifest import (
    MANIFEST,
    METRICS_MARK,
    STEPS,
    damage,
    newest_first,
    read_manifest,
    remove_old,
    remove_timed,
    step_of,
    write_manifest,
)
from litgpt_akl.messages import UserError
from litgpt_akl.models import parallel
from litgpt_akl.models.lora import ADAPTERS, adapters_of, read_trained, store_adapters, store_merged
from litgpt_akl.models.model_files import ModelFiles, copy_model_files, describe_to_hugging_face
from litgpt_akl.models.prompt_format import PromptFormat
from litgpt_akl.models.tensor_file import TensorFile, read_tensors, tensor_file
from litgpt_akl.models.vocabulary import write_config_without_padding

TRAINING_STATE = "training_state.pth"
"""What training goes on from, beside the student."""

POSITION = "step_count epoch tokens start_cross_entropy last_validation validation_loss nonfinite_in_a_row".split()
"""Entries of the training state that say how far a run has come; plain numbers."""

IDENTITY = ("data", "models")
"""Entries that say what is trained on what; plain data, saved for comparison and not loaded."""


def write_student(
    directory: Path | None,
    student: nn.Module,
    model_files: ModelFiles,
    *,
    tied: bool,
    prompt_format: PromptFormat,
    recipe: str,
    ids: int | None = None,
) -> None:
    """Write a LitGPT checkpoint that every consumer takes as it is: flat weights and what is read beside them.

    The adapters of a LoRA student are merged into the weights, and lie beside them in a file of their own.

    Args:
        directory: From :func:`~litgpt_akl.files.directories.write_directory`; None in other processes than 0, which
            take part in gathering the parameters.
        student: Its parameters may be sharded; they are whole one at a time.
        model_files: Those of the student's original checkpoint.
        tied: Whether embeddings and LM head are one matrix in the file; written into config.json, since Hugging Face
            models throw away the LM head of a model that is said to be tied.
        prompt_format: How the student was asked, as far as the data module tells.
        recipe: The run's configuration, as YAML.
        ids: Rows of the student's embeddings and LM head, if it lost those that were padding.
    """
    if directory is not None:
        with model_files.unpacked(directory.parent) as source_dir:
            copy_model_files(source_dir, directory, prompt_format.style)
            if ids is not None:
                write_config_without_padding(source_dir, directory, ids)
        if (directory / "config.json").is_file():
            describe_to_hugging_face(directory / "config.json", tied, student.lm_head.weight.dtype, ids)
        prompt_format.write(directory)
        (directory / "hyperparameters.yaml").write_text(recipe, encoding="utf-8")
    with tensor_file(directory and directory / "lit_model.pth") as file:
        file.save(store_merged(student, file))
    if adapters_of(student):
        with tensor_file(directory and directory / ADAPTERS) as file:
            file.save(store_adapters(student, file))


def save_student(directory: Path, state: dict, *, steps: int, **options) -> None:
    """Write the trained student of a run of ``steps`` steps, and a manifest; ``options`` are :func:`write_student`'s.

    All processes take part. Raises UserError if ``directory`` cannot be written; it is then as it was.
    """
    with _write_in_one_process(directory) as partial, explain_failure(directory):
        write_student(partial, state["student"], **options)
        if partial is not None:
            write_manifest(partial, state["step_count"], None, steps=steps, **{name: state[name] for name in IDENTITY})
    parallel.wait_for_all()


def save_training_state(
    directory: Path,
    state: dict,
    *,
    metrics: dict[str, Any] | None,
    keep_last: int | None,
    timed: bool = False,
    **options,
) -> None:
    """Write a ``step-...`` directory: the student, and what training goes on from; then delete older ones.

    All processes of a run take part. One run at a time may write ``step-...`` directories beside each other. Raises
    UserError if ``directory`` cannot be written; everything is then as it was.

    Args:
        directory: Where it is to appear.
        state: Student, optimizer, scheduler, and what there is of ``POSITION`` and ``IDENTITY``.
        metrics: Which rows of the run's log are behind it, from :class:`~litgpt_akl.training.metrics.MetricsMarker`.
        keep_last: As in :func:`remove_old`; None keeps all.
        timed: Whether only the clock asks for it: the next save then deletes it.
        options: Those of :func:`write_student`.
    """
    if parallel.rank() == 0:
        with explain_failure(directory):
            clear_leftovers(directory.parent, STEPS)
    with _write_in_one_process(directory) as partial, explain_failure(directory):
        write_student(partial, state["student"], **options)
        with tensor_file(partial and partial / TRAINING_STATE) as file:
            file.save(_training_state(state, file))
        if partial is not None:
            if metrics is not None:
                (partial / METRICS_MARK).write_text(json.dumps(metrics), encoding="utf-8")
            loss = state.get("validation_loss") if state.get("last_validation") == state["step_count"] else None
            data = {"data": state["data"]} if "data" in state else {}
            write_manifest(partial, state["step_count"], loss, timed=timed, **data)
    if parallel.rank() == 0:
        remove_timed(directory.parent, directory)
        if keep_last is not None:
            remove_old(directory.parent, keep_last, directory)
    parallel.wait_for_all()


def _write_in_one_process(directory: Path) -> AbstractContextManager[Path | None]:
    return write_directory(directory) if parallel.rank() == 0 else nullcontext()


def _training_state(state: dict, file: TensorFile) -> dict[str, Any]:
    plain = {name: state[name] for name in (*POSITION, *IDENTITY) if name in state}
    stateful = {name: state[name].state_dict() for name in ("optimizer", "scheduler")}
    stateful["optimizer"]["state"] = {
        number: {name: file.store(value) if isinstance(value, Tensor) else value for name, value in entries.items()}
        for number, entries in stateful["optimizer"]["state"].items()
    }
    parallel.wait_for_all()
    return {**plain, **stateful, "random": parallel.all_gather_object(random_state())}


def random_state() -> dict[str, Any]:
    """The random numbers this process is about to draw, as plain data and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
    }


def set_random_state(saved: dict[str, Any]) -> None:
    """Draw the random numbers that :func:`random_state` saw coming; devices that are not there are left out."""
    torch.set_rng_state(saved["torch"])
    for device, device_state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, device)
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])


def draw_own_numbers(step: int) -> None:
    """Give each process PyTorch's random numbers of its own from a step on, which no other one draws; for dropout.

    Python's and NumPy's stay those of all processes: what these choose, such as an example, is the same in each. One
    that comes later does not begin those of an earlier one again, since the step is part of the seed.
    """
    key = torch.initial_seed(), parallel.rank(), step
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def find_training_state(
    resume: bool | Literal["auto"] | Path, out_dir: Path, warn: Callable[[str], None]
) -> Path | None:
    """The ``step-...`` directory that ``--resume`` means, known to be whole; None for a run from the start.

    That is the given one, or for true the newest in ``out_dir``, by the manifests, that is whole, or for auto that one
    if there is any. ``warn`` is told of every damaged directory that is skipped. Raises UserError if there is no such
    directory, it is damaged, or all are; or if ``out_dir`` has later steps, which ``--resume auto`` would take up.
    """
    if not resume:
        _refuse_later_steps(out_dir, -1)
        return None
    if resume is not True and resume != "auto":
        directory = _whole_or_error(Path(resume))
        _refuse_later_steps(out_dir, step_of(directory))
        return directory
    with explain_failure(out_dir):
        restore_previous(out_dir, STEPS)
    damaged: dict[Path, str] = {}
    for directory in newest_first(out_dir):
        what = damage(directory)
        if what is None:
            for other, reason in damaged.items():
                warn(f"{other} is damaged ({reason}); going on from {directory.name} instead.")
            return directory
        damaged[directory] = what
    flag = f"--resume {str(resume).lower()}"
    if damaged:
        all_of_them = ", ".join(f"{directory.name} ({reason})" for directory, reason in damaged.items())
        way_out = "Leave --resume out for a run from the start."
        raise UserError(f"{flag}, but no checkpoint in {out_dir} is whole: {all_of_them}.\n{way_out}")
    if resume is True:
        raise UserError(f"{flag}, but {out_dir} has no step-... directory. Leave --resume out, or use auto.")
    return None


def _refuse_later_steps(out_dir: Path, step: int) -> None:
    later = [path.name for path in newest_first(out_dir) if step < step_of(path) < math.inf and damage(path) is None]
    if later:
        raise UserError(
            f"{out_dir} has checkpoints of an earlier run ({', '.join(later[:3])}), which --resume auto would"
            " take up.\nGo on with it by --resume auto, remove them, or give another --out_dir."
        )


def _whole_or_error(resume: Path) -> Path:
    """The directory that a path given to --resume means; UserError with a way out if it is damaged."""
    # a file that should be in a checkpoint but is missing means the checkpoint, too
    in_checkpoint = not resume.is_dir() and (resume.is_file() or (resume.parent / MANIFEST).is_file())
    directory = resume.parent if in_checkpoint else resume
    with explain_failure(directory):
        restore_previous(directory.parent, STEPS)
    what = damage(directory)
    if what is None and TRAINING_STATE not in read_manifest(directory)["files"]:
        what = "it is a student without the state of its training"
    if what is None:
        return directory
    near = (path for place in (directory.parent, directory) for path in newest_first(place))
    whole = next((path for path in near if damage(path) is None), None)
    raise UserError(
        f"--resume {resume}: {directory} is not a whole checkpoint ({what}).\n"
        + (f"{whole} is whole: give that one." if whole else "Give a step-... directory of a run.")
    )


def read_training_state(directory: Path) -> dict[str, Any]:
    """What :func:`save_training_state` wrote, all but the student; tensors are memory-mapped."""
    return read_tensors(directory / TRAINING_STATE, "the state of a training")


def load_training_state(directory: Path, state: dict) -> None:
    """Set student, optimizer, scheduler, position and random numbers to what :func:`save_training_state` saved.

    Process 0 reads, the others are told. ``IDENTITY`` is the caller's to compare. A LoRA student is given its adapters:
    its base, which no training changes, it must have. Raises UserError if other parameters were trained.
    """
    weights = optimizer = saved = None
    if parallel.rank() == 0:
        weights = read_trained(directory, state["student"])
        saved = read_training_state(directory)
        optimizer = saved.pop("optimizer")
    parallel.load_weights(state["student"], weights, trained_only=True)
    parallel.load_optimizer_state(state["optimizer"], optimizer)
    saved = parallel.broadcast_object(saved)
    state["scheduler"].load_state_dict(saved["scheduler"])
    state.update({name: saved[name] for name in POSITION if name in saved})
    is_new = parallel.rank() >= len(saved["random"])
    set_random_state(saved["random"][0 if is_new else parallel.rank()])
    if is_new:
        draw_own_numbers(saved["step_count"])
