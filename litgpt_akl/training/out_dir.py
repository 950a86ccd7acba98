"""A run's ``--out_dir``: what may be written there, what is there already, and whether that is all that was wanted."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.config.recipe import differences
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.files.directories import explain_failure, make_writable, remove_directory, restore_previous, set_aside
from litgpt_akl.files.lock import locked
from litgpt_akl.files.manifest import (
    EVALUATION,
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
from litgpt_akl.messages import UserError, not_permitted, say
from litgpt_akl.models.pair import Pair
from litgpt_akl.models.weights import fingerprint, is_of, weights_files
from litgpt_akl.training.checkpoint import find_training_state
from litgpt_akl.training.run import Run, total_steps

PAGE_MARK = "distillation report</title>"
"""What the report pages have in their head."""


@contextmanager
def out_dir_locked(fabric: L.Fabric, out_dir: Path) -> Iterator[None]:
    """While entered, a command's directory is its alone, which process 0 sees to; raises UserError if it cannot be."""
    if not fabric.is_global_zero:
        yield
        return
    path = out_dir.absolute()
    made = [place for place in (path, *path.parents) if not place.exists()]
    make_writable(out_dir)
    try:
        with locked(out_dir):
            yield
    finally:
        # what is refused leaves no empty directories behind
        for place in made:
            with suppress(OSError):
                place.rmdir()


def default_out_dir(student_dir: Path, *teacher_dirs: Path | None) -> Path:
    """Where a run writes that is told nothing: a place of these models, so that runs of others do not meet."""

    def name(directory: Path) -> str:
        path = Path(directory).resolve()
        # of a run's own checkpoints the run tells more
        return path.parent.name if re.fullmatch(r"final|step-\d+", path.name) else path.name

    # a missing teacher is refused later
    student, *teachers = (name(directory or student_dir) for directory in (student_dir, *(teacher_dirs or (None,))))
    teachers = ["itself" if teacher == student else teacher for teacher in teachers]
    return Path("out/akl", f"{student}-from-{'-and-'.join(teachers)}")


def check_places(out_dir: Path, teacher: TeacherArgs, pair: Pair) -> None:
    """See that a run writes into no checkpoint it reads, and keeps no cache in what it replaces; raises UserError."""
    replaced = (FINAL, FINAL_HF, STEPS)
    if teacher.cache_mode != "fill":
        check_apart("--out_dir", out_dir, pair.directories, replaced)
    if teacher.cache_dir is None or teacher.cache_mode == "read":
        return
    cache_dir = Path(teacher.cache_dir)
    if cache_dir.exists() and not cache_dir.is_dir():
        raise UserError(f"--teacher.cache_dir {cache_dir} is a file. Give a folder, which need not exist.")
    check_apart("--teacher.cache_dir", cache_dir, pair.directories)
    if teacher.cache_mode != "fill" and cache_dir.resolve().is_relative_to(out_dir.resolve()):
        for name in cache_dir.resolve().relative_to(out_dir.resolve()).parts[:1]:
            if any(fnmatch(name, pattern) for pattern in replaced):
                raise UserError(
                    f"--teacher.cache_dir {cache_dir} lies in {out_dir / name}, which the run replaces.\n"
                    "Give another directory."
                )


def check_apart(option: str, target: Path, read: dict[str, Path], replaced: tuple[str, ...] = ()) -> None:
    """See that nothing is written into a checkpoint that is ``read``, by its role in a message.

    The ``target``, named by its ``option``, need not be there yet; ``replaced`` are patterns of names in it that are
    replaced as a whole, or removed. Raises UserError if the target, or what it leads to, is such a checkpoint or lies
    in one; or if one lies in what is replaced.
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

    Raises UserError if one of them lies where this user may not look.
    """
    path = path.resolve()
    try:
        if not directory.exists():
            return False
        return any(above.exists() and above.samefile(directory) for above in (path, *path.parents))
    except PermissionError as error:
        raise not_permitted(error, path) from error


def _check_content(out_dir: Path, exports: bool, resumes: bool) -> None:
    """See that what a run is about to replace was written by one; raises UserError if it was not.

    In one that ``resumes``, page, examples and recipe are worth no refusal, but set aside. ``exports`` says whether
    ``final-hf/`` will be written.
    """
    with explain_failure(out_dir):
        for name in (FINAL, FINAL_HF):
            restore_previous(out_dir, name)
    kinds: dict[str, Callable[[Path], bool]] = {
        FINAL: is_final,
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
                say(f"{path} is not what this run has written: it is renamed to {set_aside(path).name}.")
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


def is_final(path: Path) -> bool:
    """Whether a directory, and no link to one, is the student that a run has ended with."""
    return path.absolute().name == FINAL and not path.is_symlink() and is_recipe(path / RECIPE)


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


def open_out_dir(out_dir: Path, resume: bool | Literal["auto"] | Path, overwrite: bool, exports: bool) -> Path | None:
    """What a run goes on from; before it begins, what it replaces is asked for, and what would mislead is removed.

    What is skipped, or removed, is said. The directory is the run's, which is locked; ``resume`` is as in
    :func:`~litgpt_akl.training.checkpoint.find_training_state`. Raises UserError if there is something that the run
    must not replace, or nothing to go on from.
    """
    _check_content(out_dir, exports, bool(resume) and any(out_dir.glob(STEPS)))
    if resume is True or resume == "auto":
        found = find_training_state(resume, out_dir, warn=say)
        if found is None and not (out_dir / FINAL).exists():
            say(f"--resume auto: there is no checkpoint in {out_dir} to go on from; the run begins at its first step.")
        return found
    goes_on_here = bool(resume) and is_within(Path(resume), out_dir)
    if (out_dir / FINAL).exists() and not overwrite and not goes_on_here:
        raise UserError(
            f"--out_dir {out_dir} holds a trained student already: {out_dir / FINAL}.\n"
            "Give --overwrite true to replace it, or another --out_dir."
        )
    if not overwrite:
        return find_training_state(resume, out_dir, warn=say)
    _check_replaceable(out_dir / FINAL)
    # not in out_dir, so that nothing there counts as another run's before it is known what to go on from
    directory = find_training_state(resume, out_dir / FINAL, warn=say) if resume else None
    _remove_later(out_dir, -1 if directory is None else step_of(directory))
    return directory


def _remove_later(out_dir: Path, step: float) -> None:
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
        say(f"--overwrite true: removed {', '.join(sorted(later))} in {out_dir}.")
    if (out_dir / FINAL).exists():
        say(f"--overwrite true: {out_dir / FINAL} stays until the new student replaces it.")


def set_evaluation_aside(out_dir: Path) -> None:
    """Rename what was found of a student that is about to be replaced, and say so; raises UserError if that fails."""
    path = out_dir / EVALUATION
    if os.path.lexists(path):
        with explain_failure(out_dir):
            say(f"{path} is of the student before: it is renamed to {set_aside(path).name}.")


def identity(run: Run, dataset: TokenizedDataset, teacher_weights: Sequence[str | None] = ()) -> dict[str, Any]:
    """What is trained on what, as a checkpoint keeps it; ``teacher_weights`` are told where they need not be there."""
    directories = run.pair.all_directories
    models = {"student": fingerprint(directories.pop("student"))}
    for (role, teacher), weights in zip_longest(directories.items(), teacher_weights):
        if weights or weights_files(teacher):
            models[role] = weights or fingerprint(teacher)
    data = {"samples": len(dataset), "fingerprint": dataset.fingerprint}
    if date := getattr(run.data, "date", None):
        data["date"] = date
    return {"data": data, "models": models}


def changes_since(run: Run, recipe: str, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What changes a run's result: from a saved one's recipe, as YAML, and its :func:`identity`, to this one's."""
    changes = differences(recipe, run.recipe)
    for role, weights in current["models"].items():
        recorded = saved["models"].get(role, weights)
        if recorded != weights and not is_of(recorded, run.pair.all_directories[role]):
            changes.append(f"the {role} has other weights")
    if saved["data"] != current["data"]:
        before, now = (data["samples"] for data in (saved["data"], current["data"]))
        samples = f"{before:,} -> {now:,}" if before != now else f"{now:,} as before, but other ids or in another order"
        dates = [data.get("date") for data in (saved["data"], current["data"])]
        written = f", prompts of {dates[0] or 'an unknown day'} -> {dates[1]}" if dates[0] != dates[1] else ""
        changes.append(f"other training samples ({samples}{written})")
    return changes


def is_finished(run: Run, resume: bool | Literal["auto"] | Path, dataset: TokenizedDataset) -> bool:
    """Whether ``final/`` is what a run would end with that was asked to ``resume``, and goes on from ``run.resume``.

    Raises UserError if it would be replaced by something else, or has changed.
    """
    final, steps = run.out_dir / FINAL, total_steps(run.train, len(dataset))
    anew = "Give --overwrite true in place of --resume to train anew, or another --out_dir."
    if not final.exists():
        return False
    try:
        manifest = read_manifest(final)
        if "steps" not in manifest:
            raise Damaged(f"its {MANIFEST} is of a checkpoint")
    except Damaged as damaged:
        if run.resume is None:
            raise UserError(f"{final}: it is not known how far it was trained ({damaged}).\n{anew}") from None
        _check_replaceable(final)
        return False
    recipe, step = (final / RECIPE).read_text(encoding="utf-8"), manifest["step"]
    changes = [] if run.accept_changes else changes_since(run, recipe, manifest, identity(run, dataset))
    if not changes and step >= steps:
        what = damage(final)
        if what:
            raise UserError(f"{final} is finished, but not as the run has written it: {what}.\n{anew}")
        if resume is not True and resume != "auto":
            raise UserError(f"--resume {resume}: {final} is the student after all {step} steps already.\n{anew}")
        return True
    if run.resume is None:
        reason = "; ".join(changes) or f"it was trained for {step} steps, this run has {steps}"
        raise UserError(f"{final} is of another run ({reason}), and there is no step-... to go on from.\n{anew}")
    _check_replaceable(final)
    return False
