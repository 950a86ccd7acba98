"""The process that measures: rows one after the other, each with a try of its own, results as they come."""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from gpu_benchmark import comparison_rows, loss_rows, machine_rows, step_rows, wait_rows
from gpu_benchmark.rows import NotHere, Place, Row
from gpu_benchmark.timing import free

ROWS: dict[str, Row] = {
    row.title: row
    for row in (
        *machine_rows.FIRST,
        *step_rows.FIRST,
        *loss_rows.FIRST,
        *wait_rows.FIRST,
        *step_rows.SECOND,
        *loss_rows.OTHERS,
        *step_rows.QUANTIZED,
        *loss_rows.NUMERICS,
        *comparison_rows.ONE_DEVICE,
        *loss_rows.PEERS,
        *step_rows.OTHERS,
        *wait_rows.OTHERS,
        *comparison_rows.ALL_DEVICES,
        *comparison_rows.SLOW,
    )
}
"""By their titles, the most valuable first."""
QUICK = (
    *machine_rows.FIRST,
    *step_rows.FIRST,
    *loss_rows.FIRST,
    *wait_rows.FIRST[:1],
    *comparison_rows.ONE_DEVICE[:3],
)
"""One of each kind, for a rehearsal of seconds."""
DEVICE_IS_LOST = 3
"""Exit status of a process whose device answers no more after a row."""


def run_rows(place: Place, titles: list[str], until: float, out: Any) -> int:
    """Measure rows until ``time.time()`` is ``until``; writes a line of JSON when one begins and one when it ends."""

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    for title in titles:
        if time.time() >= until:
            break
        row, start = ROWS[title], time.perf_counter()
        tell(begun=title)
        line: dict[str, Any] = {"title": title, "group": row.group, "name": row.name}
        try:
            line["figures"] = row.measure(place)
        except Exception as error:
            line |= explain(error)
        line["seconds"] = time.perf_counter() - start
        tell(**line)
        try:
            free(place.device)
        except RuntimeError:
            return DEVICE_IS_LOST
    return 0


def explain(error: Exception) -> dict[str, Any]:
    """What is told of a row that failed: its error, and where it was raised."""
    if isinstance(error, NotHere):
        return {"error": str(error), "not_here": True}
    lines = str(error).strip().splitlines() or [""]
    frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    traceback.print_exception(error, file=sys.stderr)
    return {"error": f"{type(error).__name__}: {lines[0][:300]}", "at": frames[-6:]}


def main(arguments: Any) -> int:
    """Of a process that :mod:`gpu` has started; standard output is for results alone."""
    # of a sharded run's processes, the first reports
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    out, sys.stdout = sys.stdout if is_first else open(os.devnull, "w"), sys.stderr
    if arguments.device == "cpu":
        torch.set_num_threads(1 if arguments.tiny else torch.get_num_threads())
    place = Place(torch.device(arguments.device), arguments.tiny, arguments.devices, arguments.scratch)
    return run_rows(place, json.loads(arguments.worker), arguments.until, out)
