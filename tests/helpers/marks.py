"""Which cases of a test are in the default set."""

from collections.abc import Collection, Iterable

import pytest


def with_all_slow_but(few: Collection, cases: Iterable) -> list:
    """The cases of a test, of which all but a few are for ``scripts/test.sh --all``."""
    return [case if case in few else pytest.param(case, marks=pytest.mark.slow) for case in cases]
