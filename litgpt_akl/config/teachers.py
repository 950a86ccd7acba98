"""Several teachers: which they are, how much each counts, and what each has cached."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litgpt_akl.messages import UserError


@dataclass
class ListedTeacher:
    """One of several teachers"""

    directory: Path
    """Its checkpoint directory, or a model id"""
    weight: float = 1.0
    """How much it counts, relative to the others"""
    cache_dir: str | None = None
    """Its own teacher cache, as --teacher.cache_dir is that of one"""


def check_listed(teachers: Sequence[ListedTeacher], cache_mode: str) -> None:
    """See that each teacher is there once, counts, and has a cache if it is to fill one; raises UserError."""
    if not teachers:
        raise UserError("--teachers [] names no teacher.\nGive '[{directory: A}, {directory: B}]', or leave it out.")
    for teacher in teachers:
        if not (teacher.weight > 0 and math.isfinite(teacher.weight)):
            raise UserError(
                f"--teachers: the weight of {teacher.directory} must be above 0, got {teacher.weight}.\n"
                "Weights count relative to each other. Raise it, or leave this teacher out."
            )
        if cache_mode == "fill" and teacher.cache_dir is None:
            raise UserError(
                f"--teacher.cache_mode fill, but {teacher.directory} has no cache_dir in --teachers.\n"
                "Give each teacher a cache_dir of its own, or leave it out of the list."
            )
    for name in ("directory", "cache_dir"):
        # a link to a directory is that directory
        places = [str(given).rstrip("/") for teacher in teachers if (given := getattr(teacher, name)) is not None]
        places = [place if "://" in place else str(Path(place).resolve()) for place in places]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice is not None:
            raise UserError(
                f"--teachers has the {name} {twice} more than once.\n"
                "Give each teacher once, with a cache of its own; its weight says how much it counts."
            )


def shares(teachers: Sequence[ListedTeacher]) -> list[float]:
    """The weights, so that their sum is 1."""
    total = math.fsum(teacher.weight for teacher in teachers)
    return [teacher.weight / total for teacher in teachers]
