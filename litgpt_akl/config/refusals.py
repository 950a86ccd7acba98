"""Refusals of options that are out of range or have no effect."""

import dataclasses
from dataclasses import fields
from typing import Any

from litgpt_akl.messages import UserError


def changed(args: Any) -> dict[str, Any]:
    """The arguments of a group that are not as they are by default, with their values."""
    return {
        field.name: getattr(args, field.name)
        for field in fields(args)
        if field.default is not dataclasses.MISSING and getattr(args, field.name) != field.default
    }


def check_at_least_one(group: str = "", /, **values: float | None) -> None:
    """Refuse numbers below 1, which are named by their options; None is no number. Raises UserError."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{group}{name} must be at least 1, got {value}.")


def refuse_changed(group: str, args: Any, prefix: str, why: str, way_out: str) -> None:
    """Refuse arguments whose names begin so, unless they are as by default; raises UserError."""
    for name, value in changed(args).items():
        if name.startswith(prefix):
            raise UserError(f"--{group}.{name} {value} has no effect {why}. {way_out}, or leave {name} out.")
