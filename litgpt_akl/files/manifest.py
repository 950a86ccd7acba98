"""What a checkpoint directory should hold, written into it: tells which are whole, newest, and no longer needed."""

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from litgpt_akl.files.changed_files import Stamp, stamp_of
from litgpt_akl.files.directories import remove_directory
from litgpt_akl.files.reading import file_checksum, plain_names, with_checksum, without_checksum
from litgpt_akl.messages import UserError, first_line

FINAL, FINAL_HF = "final", "final-hf"
"""The trained student, and the same for Hugging Face's libraries."""
EVALUATION = "evaluate_akl"
"""What was found of a student, beside a run's ``final/``."""
RECIPE, PAGE, EXAMPLES = "hyperparameters.yaml", "report.html", "examples.json"
METRICS_MARK = "metrics.json"
"""A checkpoint's file that says which rows are its own; the rows themselves stay in the run's log."""
METRICS_COPY = "metrics.csv"
"""In place of it, checkpoints of earlier versions hold the rows."""

MANIFEST = "manifest.json"
FORMAT = 1
STEPS = "step-*"
"""Names of the directories that a run saves; which step one holds is in its manifest."""
KNOWN = 4096
"""Files whose checksums are kept in mind; more if there are more to be looked at again."""


class Damaged(Exception):
    """The message says what is wrong with what was written, in a short phrase."""


def write_manifest(directory: Path, step: int, validation_loss: float | None, **more: Any) -> None:
    """Write ``manifest.json``: step, validation loss, and size and checksum of every file there is.

    The loss is that of this very step, if it was validated; one that is not finite counts as none. ``more`` is plain.
    """
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
        for path in paths
    }
    loss = validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None
    manifest = {"format": FORMAT, "step": step, "validation_loss": loss, **more, "files": files}
    text = json.dumps(with_checksum(manifest), indent=2)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """``format``, ``step``, ``validation_loss``, ``files`` and what else was written; raises Damaged if it changed."""
    if not directory.is_dir():
        raise Damaged("does not exist")
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
    except FileNotFoundError:
        raise Damaged(f"has no {MANIFEST}") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError):
        raise Damaged(f"{MANIFEST} is garbled") from None
    if found != FORMAT:
        raise Damaged(f"{MANIFEST} has format {found}, this version reads {FORMAT}")
    try:
        manifest = without_checksum(manifest, required=True)
    except ValueError:
        raise Damaged(f"{MANIFEST} has changed (checksum)") from None
    if not isinstance(manifest.get("files"), dict):
        raise Damaged(f"{MANIFEST} is garbled")
    try:
        plain_names(manifest["files"], MANIFEST)
    except UserError as error:
        raise Damaged(first_line(error).removesuffix(".")) from None
    return manifest


def damage(directory: Path, chosen: Callable[[str], bool] = bool) -> str | None:
    """None if the directory holds what was written into it, else what is wrong, in a short phrase.

    Only the ``chosen`` names are looked at, by default all.
    """
    try:
        files = {name: entry for name, entry in read_manifest(directory)["files"].items() if chosen(name)}
        for name, expected in files.items():
            if not (directory / name).is_file():
                return f"lacks {name}"
            if (found := (directory / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {found:,} bytes, {expected['bytes']:,} were written"
        for name, expected in files.items():
            if _checksum(directory / name) != expected["xxh3_128"]:
                return f"{name} has changed (checksum)"
    except Damaged as damaged:
        return str(damaged)
    except OSError as error:
        return f"{Path(error.filename or directory).name} cannot be read: {error.strerror}"
    return None


def step_of(directory: Path) -> float:
    """The step that a directory's manifest tells; infinity if it cannot be read, since that might be the newest."""
    return _entry(directory, "step", math.inf)


def newest_first(out_dir: Path) -> list[Path]:
    """The ``step-...`` directories, perhaps damaged, by the steps in their manifests; those without one come first."""
    directories = (path for path in out_dir.glob(STEPS) if path.is_dir())
    return sorted(directories, key=lambda path: (step_of(path), path.name), reverse=True)


def remove_old(out_dir: Path, keep_last: int, written: Path) -> None:
    """Deletes older ``step-...`` directories; damaged ones, and those that the clock asked for, count for nothing.

    Kept are so many of the newest, the one with the lowest validation loss, and that just written, whatever its step.
    """
    kept = [directory for directory in newest_first(out_dir) if not is_timed(directory)]
    # looking through them again and again reads each file once; as many again may be of directories that are gone
    _room[0] = max(KNOWN, 2 * sum(len(os.listdir(directory)) for directory in kept))
    whole = [directory for directory in kept if damage(directory) is None]
    losses = {directory: read_manifest(directory)["validation_loss"] for directory in whole}
    validated = [directory for directory in whole if losses[directory] is not None]
    best = min(validated, key=losses.get, default=None)
    _remove(directory for directory in whole[keep_last:] if directory not in (written, best))


def remove_timed(out_dir: Path, written: Path) -> None:
    """Deletes the ``step-...`` directories that the clock asked for, except the one just written."""
    _remove(directory for directory in newest_first(out_dir) if is_timed(directory) and directory != written)


def _remove(directories: Iterable[Path]) -> None:
    for directory in directories:
        # what cannot be deleted must not end the run; the next save tries again
        with suppress(OSError):
            remove_directory(directory)


def is_timed(directory: Path) -> bool:
    """Whether the clock, and nothing else, asked for this checkpoint."""
    return _entry(directory, "timed", False)


def _entry(directory: Path, name: str, default: Any) -> Any:
    """Of a directory's manifest; the default if it cannot be read, or has none of that name."""
    with suppress(Damaged):
        return read_manifest(directory).get(name, default)
    return default


# at every save the question which older directories are whole comes up anew, and each may hold many gigabytes
_known: dict[Stamp, str] = {}
"""Those asked for last come last."""
_room = [KNOWN]


def know_checksum(path: Path, checksum: str) -> None:
    """Keep in mind what was computed while a file was written; from then on nobody may write to it."""
    while len(_known) >= _room[0]:
        _known.pop(next(iter(_known)))
    _known[stamp_of(path)] = checksum


def _checksum(path: Path) -> str:
    stamp = stamp_of(path)
    if stamp not in _known:
        know_checksum(path, file_checksum(path))
    checksum = _known[stamp] = _known.pop(stamp)
    return checksum
