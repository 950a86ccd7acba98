"""The page of a run, kept while it goes on."""

from collections.abc import Callable

import lightning as L

from litgpt_akl.files.names import PAGE
from litgpt_akl.messages import reason
from litgpt_akl.training.loggers import flushed_metrics
from litgpt_akl.training.run import Run


def refresh_page(
    fabric: L.Fabric, run: Run, state: dict, tell: Callable[[str], None], complain: Callable[[str], None]
) -> None:
    """Write ``out_dir/report.html`` anew in process 0, if anything was logged; if it cannot be, the run goes on.

    ``tell`` is told once of each file that cannot be shown, ``complain`` if there is no new page.
    """
    metrics = flushed_metrics(fabric) if fabric.is_global_zero else None
    if metrics is None or not metrics.is_file():
        return
    # Bokeh takes half a second to import, which a start is not to wait for
    from litgpt_akl.report.page import write_page
    from litgpt_akl.report.runs import read_run

    def tell_once(text: str) -> None:
        if text not in state["told_of_page"]:
            state["told_of_page"].add(text)
            tell(text)

    try:
        write_page(run.out_dir / PAGE, [read_run(run.out_dir, tell_once)])
    except Exception as error:
        # whatever it is, a page is not worth a run
        complain(f"{run.out_dir / PAGE} was not refreshed ({type(error).__name__}: {reason(error)})")
