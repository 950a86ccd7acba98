"""The page of a run, kept while it goes on."""

from collections.abc import Callable

import lightning as L

from litgpt_akl.errors import reason
from litgpt_akl.loggers import flushed_metrics
from litgpt_akl.out_dir import PAGE
from litgpt_akl.run import Run


def refresh_page(fabric: L.Fabric, run: Run, tell: Callable[[str], None]) -> None:
    """Write ``out_dir/report.html`` anew in process 0, if anything was logged; if it cannot be, the run goes on."""
    metrics = flushed_metrics(fabric) if fabric.is_global_zero else None
    if metrics is None or not metrics.is_file():
        return
    # Bokeh takes half a second to import, which a start is not to wait for
    from litgpt_akl.report.examples_file import read_examples
    from litgpt_akl.report.history import read_history
    from litgpt_akl.report.page import Shown, write_page

    try:
        write_page(run.out_dir / PAGE, [Shown(read_history(run.out_dir), read_examples(run.out_dir))])
    except Exception as error:
        # whatever it is, a page is not worth a run
        tell(f"{run.out_dir / PAGE} was not refreshed ({type(error).__name__}: {reason(error)})")
