"""Which cases of a test are in the default set."""

from collections.abc import Collection, Iterable

import pytest


def with_all_slow_but(few: Collection, cases: Iterable) -> list:
    """The cases of a test, of which all but a few are for ``scripts/test.sh --all``."""
    values = {case: case if isinstance(case, tuple) else (case,) for case in cases}
    return [pytest.param(*values[case], marks=[] if case in few else pytest.mark.slow) for case in values]
