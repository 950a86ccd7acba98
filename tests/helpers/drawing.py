"""Which runs draw their page, a third of a short run: with ``--all`` each, else those whose page is looked at."""

from collections.abc import Iterator
from contextlib import contextmanager

from litgpt_akl.training import main, reporting

DRAW = reporting.refresh_page
each = False
"""Whether all runs do."""


def draw_pages(drawn: bool) -> None:
    """From now on runs in this process, and in its copies, draw their pages, or do not."""
    for module in (main, reporting):
        module.refresh_page = DRAW if drawn or each else leave_undrawn


def leave_undrawn(*_: object, goes_on: bool = False, stopped: str | None = None) -> None:
    """Stands for the drawing of a run's page in the default set, where a test does not look at the page."""


@contextmanager
def pages(drawn: bool) -> Iterator[None]:
    """The runs inside draw their pages, or do not; runs that draw none outside draw none inside either."""
    before = main.refresh_page is DRAW
    draw_pages(drawn and before)
    try:
        yield
    finally:
        draw_pages(before)
