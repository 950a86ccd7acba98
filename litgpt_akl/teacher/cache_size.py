"""What a cache takes in space, and what it saves in time."""

from pathlib import Path

import numpy as np
import torch

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import PART
from litgpt_akl.files.directories import free_bytes
from litgpt_akl.messages import UserError
from litgpt_akl.models.model_size import ModelSize


def readable(size: float) -> str:
    """Bytes in a unit that leaves at least one digit before the point."""
    unit, name = next((unit for unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= unit[0]), (1e3, "KB"))
    return f"{size / unit:.1f} {name}"


def bytes_of_token(width: int, dtype: torch.dtype) -> int:
    """Of a hidden state of so many numbers on disk, with its scale if it is in float8."""
    return width * dtype.itemsize + (4 if dtype == torch.float8_e4m3fn else 0)


def response_tokens(dataset: TokenizedDataset, numbers: np.ndarray) -> int:
    """The teacher's, of some of a dataset's samples."""
    if len(numbers) == len(dataset):
        return dataset.teacher_response_count
    parts = (numbers[start : start + PART] for start in range(0, len(numbers), PART))
    return sum(int(dataset.teacher_response_tokens(part).sum()) for part in parts)


def check_space(directory: str, needed: int) -> None:
    """See that a disk takes ``needed`` bytes; raises UserError if it does not."""
    free = free_bytes(Path(directory))
    if needed > free:
        raise UserError(
            f"--teacher.cache_dir {directory} needs {readable(needed)}, and its disk has {readable(free)} free.\n"
            "Make room, give another directory, or use --teacher.cache_dtype bf16, fp8 or topk:64."
        )


def describe_space(directory: str, bytes_of_token: int, tokens: int, head: int, to_write: int) -> str:
    """A line for people, on the response ``tokens`` and the LM head, in bytes, that a run needs of a cache; and on the
    bytes that it lacks of both."""
    text = f"{directory}: {readable(bytes_of_token * tokens + head)}, {bytes_of_token:,} bytes a response token for"
    text += f" {tokens:,} of them{_and_head(head)}"
    if to_write == 0:
        return f"{text}, all there: the teacher's body is not needed."
    return f"{text}, {readable(to_write)} to be written ({readable(free_bytes(Path(directory)))} are free)."


def describe_whole(directory: str, bytes_of_token: int, tokens: int, head: int) -> str:
    """A line for people, on all that a cache will hold, with an LM head of so many bytes; what is there is unknown."""
    return (
        f"Teacher cache {directory}: {readable(bytes_of_token * tokens + head)} in all,"
        f" {bytes_of_token:,} bytes for each of {tokens:,} response tokens{_and_head(head)}."
    )


def _and_head(head: int) -> str:
    return f", and {readable(head)} for the teacher's LM head" if head else ""


def describe_saving(
    student: ModelSize, teacher: ModelSize, share: float, epochs: float | None, reads_head: bool = True
) -> str:
    """When a cache pays off, if a ``share`` of all tokens are response tokens; ``epochs`` are None if unknown."""
    cost = cached_cost(student, teacher, share, reads_head)
    saving = f"an epoch that reads it costs about {cost:.2f} of one with the teacher"
    if epochs is None:
        return f"By matrix products, {saving}."
    worth = "it pays off from the second on" if epochs > 1 else "it pays off when another run reads it"
    return f"By matrix products, {saving}; this run has {epochs:.3g}: {worth}."


def describe_without_data(
    directory: str,
    bytes_of_token: int,
    head: int,
    student: ModelSize,
    teacher: ModelSize,
    epochs: float | None,
    reads_head: bool = True,
) -> str:
    """What can be said of a cache before there are data; ``head`` are the bytes of the teacher's LM head."""
    return (
        f"Teacher cache {directory}: {bytes_of_token:,} bytes a response token,"
        f" {readable(bytes_of_token * 10**6)} for a million of them{_and_head(head)}.\n"
        f"{describe_saving(student, teacher, 1.0, epochs, reads_head)} All tokens are taken for response tokens here."
    )


def cached_cost(student: ModelSize, teacher: ModelSize, share: float, reads_head: bool = True) -> float:
    """Of a step with a cached teacher, relative to one whose teacher computes; one of distributions reads no head.

    A product costs two operations for each number of a matrix and each token forward, and four more backward; the LM
    heads see the response tokens alone, which are ``share`` of all.
    """
    trained, of_head = 6 * (student.products + share * student.head), 2 * share * teacher.head
    return (trained + of_head * reads_head) / (trained + of_head + 2 * teacher.products)
