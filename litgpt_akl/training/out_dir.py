"""A run's ``--out_dir``: what may be written there, what is there already, and whether that is all that was wanted."""

import json
import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import yaml

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.files.directories import explain_failure, remove_directory, restore_previous, set_aside
from litgpt_akl.files.manifest import (
    EXAMPLES,
    FINAL,
    FINAL_HF,
    MANIFEST,
    PAGE,
    RECIPE,
    STEPS,
    Damaged,
    damage,
    newest_first,
    read_manifest,
    step_of,
)
from litgpt_akl.messages import UserError, not_permitted
from litgpt_akl.models.pair import Pair
from litgpt_akl.training.checkpoint import find_training_state

PAGE_MARK = "distillation report</title>"
"""What the report pages have in their head."""


def check_places(out_dir: Path, teacher: TeacherArgs, pair: Pair) -> None:
    """See that a run writes into neither of the checkpoints that it reads, and keeps no cache where it will be removed.

    Raises:
        UserError: names the option and the way out.
    """
    replaced = (FINAL, FINAL_HF, STEPS)
    if teacher.cache_mode != "fill":
        check_apart("--out_dir", out_dir, pair.directories, replaced)
    if teacher.cache_dir is None or teacher.cache_mode == "read":
        return
    cache_dir = Path(teacher.cache_dir)
    check_apart("--teacher.cache_dir", cache_dir, pair.directories)
    if teacher.cache_mode != "fill" and cache_dir.resolve().is_relative_to(out_dir.resolve()):
        for name in cache_dir.resolve().relative_to(out_dir.resolve()).parts[:1]:
            if any(fnmatch(name, pattern) for pattern in replaced):
                raise UserError(
                    f"--teacher.cache_dir {cache_dir} lies in {out_dir / name}, which the run replaces.\n"
                    "Give another directory."
                )


def check_apart(option: str, target: Path, read: dict[str, Path], replaced: tuple[str, ...] = ()) -> None:
    """See that nothing is written into a checkpoint that is read.

    Args:
        option: What names the target on the command line.
        target: A directory that is written to; it need not be there yet.
        read: Checkpoint directories, by what a message calls them.
        replaced: Patterns of the names in ``target`` that are replaced as a whole, or removed.

    Raises:
        UserError: the target, or what it leads to, is one of them or lies in one; or one lies in what is replaced.
    """
    places = [path for pattern in replaced for path in target.glob(pattern)]
    for role, directory in read.items():
        if is_within(target, directory):
            where = "is the {}'s own directory" if is_within(directory, target) else "lies in the {}'s directory {}"
            raise UserError(
                f"{option} {target} {where.format(role, directory)}, which is read.\nGive a directory outside of it."
            )
        for path in places:
            if is_within(directory, path) or is_within(path, directory):
                raise UserError(
                    f"{option} {target}: the run replaces {path}, and the {role} is read from {directory}.\n"
                    "Give another directory."
                )


def is_within(path: Path, directory: Path) -> bool:
    """Whether a path, which need not be there, is a directory or lies in it, whatever links or mounts lead there.

    Raises:
        UserError: one of them lies where this user may not look.
    """
    path = path.resolve()
    try:
        if not directory.exists():
            return False
        return any(above.exists() and above.samefile(directory) for above in (path, *path.parents))
    except PermissionError as error:
        raise not_permitted(error, path) from error


def check_content(out_dir: Path, exports: bool, resumes: bool, tell: Callable[[str], None]) -> None:
    """See that what a run is about to replace was written by one.

    Args:
        out_dir: The run's.
        exports: Whether ``final-hf/`` will be written.
        resumes: Whether it goes on there: its page, examples and recipe are then worth no refusal, but set aside.
        tell: Is told what is set aside.

    Raises:
        UserError: something else has the name of what a run writes.
    """
    with explain_failure(out_dir):
        for name in (FINAL, FINAL_HF):
            restore_previous(out_dir, name)
    kinds: dict[str, Callable[[Path], bool]] = {
        FINAL: _is_student,
        RECIPE: is_recipe,
        PAGE: is_page,
        EXAMPLES: _is_examples,
        "logs": Path.is_dir,
    }
    if exports:
        kinds[FINAL_HF] = lambda path: (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    for name, is_ours in kinds.items():
        path = out_dir / name
        if not os.path.lexists(path) or is_ours(path):
            continue
        if resumes and name in (RECIPE, PAGE, EXAMPLES):
            with explain_failure(out_dir):
                tell(f"{path} is not what this run has written: it is renamed to {set_aside(path).name}.")
        else:
            raise UserError(
                f"--out_dir {out_dir}: {path} is not what a run of finetune_akl writes under that name, and would be"
                f" lost.\nMove it, or give another --out_dir."
            )


def is_page(path: Path) -> bool:
    """Whether a file is a report page."""
    try:
        with path.open("rb") as file:
            return PAGE_MARK.encode() in file.read(2**16)
    except OSError:
        return False


def is_recipe(path: Path) -> bool:
    """Whether a file is the recipe of a run of ``finetune_akl``."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(recipe, dict) and "distill" in recipe


def _is_student(path: Path) -> bool:
    return not path.is_symlink() and is_recipe(path / RECIPE)


def _is_examples(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).keys() >= {"first", "latest"}
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def _check_replaceable(final: Path) -> None:
    """See that nothing but what a run wrote is lost with ``final/``; raises UserError."""
    try:
        written = {*read_manifest(final)["files"], MANIFEST}
    except Damaged:
        # runs write no directories there
        written = {path.name for path in final.glob("*") if path.is_file()}
    others = sorted(path.name for path in final.glob("*") if path.name not in written)
    if others:
        raise UserError(
            f"--out_dir {final.parent}: {final} also holds what no run has written ({', '.join(others)}), which would"
            " be lost with it.\nMove that, or give another --out_dir."
        )


def open_out_dir(
    out_dir: Path, resume: bool | Literal["auto"] | Path, overwrite: bool, exports: bool, tell: Callable[[str], None]
) -> Path | None:
    """What a run goes on from; before it begins, what it replaces is asked for, and what would mislead is removed.

    Args:
        out_dir: The run's, which is locked.
        resume: As in :func:`~litgpt_akl.training.checkpoint.find_training_state`.
        overwrite: Whether a student and checkpoints of another run may be replaced.
        exports: Whether ``final-hf/`` will be written.
        tell: Is told what is skipped, or removed.

    Raises:
        UserError: there is something that the run must not replace; or nothing to go on from.
    """
    check_content(out_dir, exports, bool(resume) and any(out_dir.glob(STEPS)), tell)
    if resume is True or resume == "auto":
        return find_training_state(resume, out_dir, warn=tell)
    goes_on_here = bool(resume) and is_within(Path(resume), out_dir)
    if (out_dir / FINAL).exists() and not overwrite and not goes_on_here:
        raise UserError(
            f"--out_dir {out_dir} holds a trained student already: {out_dir / FINAL}.\n"
            "Give --overwrite true to replace it, or another --out_dir."
        )
    if not overwrite:
        return find_training_state(resume, out_dir, warn=tell)
    _check_replaceable(out_dir / FINAL)
    # not in out_dir, so that nothing there counts as another run's before it is known what to go on from
    directory = find_training_state(resume, out_dir / FINAL, warn=tell) if resume else None
    _remove_later(out_dir, -1 if directory is None else step_of(directory), tell)
    return directory


def _remove_later(out_dir: Path, step: float, tell: Callable[[str], None]) -> None:
    """Delete the checkpoints of later steps, which a next ``--resume auto`` would go on from."""
    later = {path.name: path for path in newest_first(out_dir) if (path / MANIFEST).is_file() and step_of(path) > step}
    others = sorted(name for name in later if not re.fullmatch(r"step-\d{6,}", name))
    if others:
        raise UserError(
            f"--out_dir {out_dir} has {', '.join(others)}, which --resume auto would go on from, and which no run names"
            " so.\nMove that, or give another --out_dir."
        )
    with explain_failure(out_dir):
        for path in later.values():
            remove_directory(path)
    if later:
        tell(f"--overwrite true: removed {', '.join(sorted(later))} in {out_dir}.")
    if (out_dir / FINAL).exists():
        tell(f"--overwrite true: {out_dir / FINAL} stays until the new student replaces it.")


def is_finished(
    out_dir: Path,
    resume: bool | Literal["auto"] | Path,
    found: Path | None,
    steps: int,
    changes_since: Callable[[str, dict[str, Any]], list[str]],
) -> bool:
    """Whether ``final/`` is what a run that goes on would end with.

    Args:
        out_dir: The run's.
        resume: What was asked for.
        found: The checkpoint to go on from, if there is one.
        steps: Of the whole run.
        changes_since: Gives what differs between this run and one with a recipe and a manifest.

    Raises:
        UserError: it would be replaced by something else, or has changed.
    """
    final = out_dir / FINAL
    anew = "Give --overwrite true in place of --resume to train anew, or another --out_dir."
    if not final.exists():
        return False
    try:
        manifest = read_manifest(final)
        if "steps" not in manifest:
            raise Damaged(f"its {MANIFEST} is of a checkpoint")
    except Damaged as damaged:
        if found is None:
            raise UserError(f"{final}: it is not known how far it was trained ({damaged}).\n{anew}") from None
        _check_replaceable(final)
        return False
    changes = changes_since((final / RECIPE).read_text(encoding="utf-8"), manifest)
    step = manifest["step"]
    if not changes and step >= steps:
        what = damage(final)
        if what:
            raise UserError(f"{final} is finished, but not as the run has written it: {what}.\n{anew}")
        if resume is not True and resume != "auto":
            raise UserError(f"--resume {resume}: {final} is the student after all {step} steps already.\n{anew}")
        return True
    if found is None:
        reason = "; ".join(changes) or f"it was trained for {step} steps, this run has {steps}"
        raise UserError(f"{final} is of another run ({reason}), and there is no step-... to go on from.\n{anew}")
    _check_replaceable(final)
    return False
