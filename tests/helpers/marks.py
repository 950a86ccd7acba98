"""Which cases of a test are in the default set."""

import os
from collections.abc import Collection, Iterable

import pytest


def with_all_slow_but(few: Collection, cases: Iterable) -> list:
    """The cases of a test, of which all but a few are for ``scripts/test.sh --all``."""
    values = {case: case if isinstance(case, tuple) else (case,) for case in cases}
    return [pytest.param(*values[case], marks=[] if case in few else pytest.mark.slow) for case in values]


def few_or_many(variable: str, few: int, many: int) -> list:
    """How many random cases a test tries: as the variable says, or a few by default and many with ``--all``."""
    number = os.environ.get(variable)
    return [int(number)] if number else [few, pytest.param(many, marks=pytest.mark.slow)]
