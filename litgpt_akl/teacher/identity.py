"""What a folder of hidden states is of, written into it: another teacher or other data is never taken for it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec

from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.reading import with_checksum, without_checksum
from litgpt_akl.messages import UserError, reason

IDENTITY = "cache.json"
FORMAT = 1
NOT_THERE = object()


@dataclass(frozen=True)
class Identity:
    """All that the teacher's hidden states depend on, apart from each sample's own ids."""

    teacher: str
    """The name of its configuration."""
    teacher_weights: str | None
    """Their fingerprint; None if they are not there, and need not be."""
    teacher_precision: str
    """What it computes in."""
    teacher_quantize: str | None
    stored_as: str
    """The type of the hidden states on disk, by its name in safetensors."""
    width: int
    """Numbers in a hidden state."""
    tokenizer: str
    """A hash of its ids and tokens."""
    prompt_style: str
    """How records become prompts, chat template included."""
    mask_prompt: bool
    max_seq_length: int | None
    training_samples: int
    training_tokens: int
    validation_samples: int
    validation_tokens: int
    date: str | None = None
    """The day that the chat template writes, if it writes any; caches of before do not tell."""
    format: int = FORMAT


def check_identity(directory: str, identity: Identity, create: bool) -> str | None:
    """See that a cache is of ``identity``; one that is not there yet is begun, if it may be.

    Returns:
        The fingerprint of the teacher's weights that it was filled with.

    Raises:
        UserError: it is of something else, and of what; or it cannot be read or written, or is not there.
    """
    saved = read_identity(directory)
    if saved is None and create:
        _write(Path(directory), identity)
        # another job may have begun it at the same moment
        saved = read_identity(directory)
    if saved is None:
        raise UserError(
            f"--teacher.cache_dir {directory} has no {IDENTITY}: it is no cache, or it was not filled.\n"
            "Fill it with --teacher.cache_mode fill, or give another directory."
        )
    changes = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in asdict(identity).items()
        if saved.get(name, value if name == "date" else NOT_THERE) != value
        and not (name == "teacher_weights" and name in saved and value is None)
    ]
    if changes:
        raise UserError(
            f"--teacher.cache_dir {directory} was filled for something else: {'; '.join(changes)}.\n"
            "Give what it was filled with, or another directory."
        )
    return saved["teacher_weights"]


def read_identity(directory: str) -> dict[str, Any] | None:
    """What is written in a cache; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = f"{directory.rstrip('/')}/{IDENTITY}"
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            return without_checksum(json.load(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is garbled. Delete {directory}, and fill it again.") from error
    # every kind of remote storage has exceptions of its own
    except Exception as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def _write(directory: Path, identity: Identity) -> None:
    content = json.dumps(with_checksum(asdict(identity)), indent=2) + "\n"
    with explain_failure(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # that of another job, which may be of something else, stays
        write_file(directory / IDENTITY, content.encode(), replace=False)
