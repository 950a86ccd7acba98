"""`litgpt report_akl`: the report page of a run, or of several over each other."""

from pathlib import Path

from litgpt_akl.files.directories import explain_failure
from litgpt_akl.messages import UserError, say


def report_akl(runs: list[Path], *, out: Path = Path("report.html"), overwrite: bool = False) -> None:
    """Lay runs over each other in one page: what they logged, their answers, their distributions.

    The page is one file that any browser opens without network access. A run by itself keeps such a page in its
    ``out_dir``.

    Example:
      litgpt report_akl out/akl out/fkl --out compared.html

    Args:
        runs: The ``out_dir`` of each run, one after the other.
        out: The page to write; one that is there is replaced.
        overwrite: Whether a file that is no such page may be replaced, too.
    """
    # Bokeh takes half a second to import, which litgpt's other commands are not to wait for
    from litgpt_akl.report.history import unique_names
    from litgpt_akl.report.page import write_page
    from litgpt_akl.report.runs import read_runs
    from litgpt_akl.training.out_dir import is_page, is_within

    runs = list(dict.fromkeys(Path(run).resolve() for run in runs))
    found = read_runs(runs, say)
    for name, run in zip(unique_names([*found]), found.values(), strict=True):
        run.history.name = name
    if out.is_dir():
        raise UserError(f"--out {out} is a directory. Give the name of a file, such as {out / 'report.html'}.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} does not exist.\nMake that folder, or give another --out.")
    if out.exists() and not is_page(out):
        for run in runs:
            if is_within(out, run):
                raise UserError(f"--out {out} is a file of the run {run}, and no page.\nGive another --out.")
        if not overwrite:
            raise UserError(
                f"--out {out} is there already, and no page of this command.\n"
                "Give --overwrite true to replace it, or another --out."
            )
    with explain_failure(out):
        write_page(out, [*found.values()])
    say(f"{out.resolve()}: {', '.join(run.history.name for run in found.values())}")
