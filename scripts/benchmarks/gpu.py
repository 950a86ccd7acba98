"""All that a GPU must show of this package, in six minutes and without a network: made-up weights of real shapes.

Whole steps against the two models' bare passes, the loss over both LM heads against its four products, memory as it is
predicted and as it is taken, teachers in int8 and nf4, where the host waits, compiled against eager, and runs against
each other. Rows are in the order of their value, and each is independent: one that fails is written with its error, and
what there was no time for is named. Results are written as they come, to gpu.jsonl, and as tables to gpu.md.

    python scripts/benchmarks/gpu.py --output out/gpu
    python scripts/benchmarks/gpu.py --tiny --device cpu      # a rehearsal, of which no figure says anything
    python scripts/benchmarks/gpu.py --requirements           # packages that must be there beside torch
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parents[1]
sys.path[:0] = [str(BENCHMARKS), str(REPOSITORY)]

REQUIREMENTS = (
    *("litgpt", "lightning", "lightning-utilities", "torchmetrics", "jsonargparse", "docstring-parser"),
    *("typeshed-client", "huggingface-hub", "httpx", "idna", "click", "safetensors", "tokenizers", "filelock"),
    *("fsspec", "packaging", "psutil", "pyyaml", "tqdm", "xxhash", "zstandard", "numpy", "jinja2"),
)
"""What is imported beside torch and what torch needs itself."""
OPTIONAL = ("bitsandbytes", "liger-kernel", "trl")
"""For rows that are left out without."""
ENDING = 5
"""Seconds at the end for the tables."""


class Worker:
    """A process that measures rows, and what it has said so far."""

    def __init__(self, arguments: argparse.Namespace, titles: list[str], until: float, scratch: str, log: Any) -> None:
        options = ["--device", arguments.device, "--devices", arguments.devices, "--scratch", scratch]
        options += ["--until", until, "--worker", json.dumps(titles), *(["--tiny"] if arguments.tiny else [])]
        # what a process that is killed was compiling must not be taken for whole by another one
        compiled = tempfile.mkdtemp(prefix="compiled-", dir=scratch)
        paths = [str(BENCHMARKS), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment["TORCHINDUCTOR_CACHE_DIR"] = compiled
        command = [sys.executable, __file__, *map(str, options)]
        # in a session of its own, so that processes that a row starts end with it
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def next_line(self, seconds: float) -> dict[str, Any] | None:
        """What it says next, None if it has ended; raises queue.Empty if it says nothing for so long."""
        line = self.lines.get(timeout=max(0.1, seconds))
        return None if line is None else json.loads(line)

    def end(self) -> int:
        """End it, if it has not ended; its exit status."""
        try:
            return self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            return self.process.wait()


def measure(arguments: argparse.Namespace, rows: dict[str, Any], out: Path, until: float) -> list[dict[str, Any]]:
    """Results of the rows, of those that failed or were not reached their errors; each is written when it is there."""
    results, waiting = [], list(rows)
    with (out / "gpu.jsonl").open("w") as file, (out / "gpu.log").open("w") as log:

        def keep(title: str, **found: Any) -> None:
            results.append({"title": title, "group": rows[title].group, "name": rows[title].name, **found})
            file.write(json.dumps(results[-1]) + "\n")
            file.flush()
            waiting.remove(title)
            told = found.get("error") or {name: value for name, value in [*found["figures"].items()][:3]}
            print(f"{time.strftime('%H:%M:%S')} {title}: {told}", file=sys.stderr, flush=True)

        for title in [title for title in waiting if rows[title].alone and arguments.devices == 1]:
            keep(title, error="there is one device", not_here=True, seconds=0.0)
        with tempfile.TemporaryDirectory() as scratch:
            while waiting and time.time() < until:
                together = next((n for n, title in enumerate(waiting) if rows[title].alone), len(waiting))
                portion = waiting[: together or 1]
                follow(Worker(arguments, portion, until, scratch, log), arguments.row_limit, until, portion, keep)
        for title in list(waiting):
            keep(title, error=f"not reached in the {arguments.limit:g} s of --limit", seconds=0.0)
    return results


def follow(worker: Worker, row_limit: float, until: float, portion: list[str], keep: Any) -> None:
    """Keep what a worker finds until it ends, or a row takes too long; what it has not begun is left."""
    current, begun = None, time.time()
    while True:
        # before its first row it imports
        left = min(begun + row_limit, until + ENDING / 2) - time.time()
        try:
            line = worker.next_line(left)
        except queue.Empty:
            by = "--limit" if time.time() >= until else "--row_limit"
            told = f"ended by {by} after {time.time() - begun:.0f} s"
            break
        if line is None:
            told = None
            break
        if "begun" in line:
            current, begun = line["begun"], time.time()
            continue
        found = {name: value for name, value in line.items() if name not in ("title", "group", "name")}
        keep(line["title"], **found)
        current, begun = None, time.time()
    status = worker.end()
    if told is None and status not in (0, 3):
        told = f"the process ended with status {status}; see gpu.log"
    stuck = current or (portion[0] if told else None)
    if told and stuck in portion:
        keep(stuck, error=told, seconds=time.time() - begun)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="directory to write to (default: out/gpu)")
    parser.add_argument("--limit", type=float, help="seconds for everything (default: 350; 115 with --tiny)")
    parser.add_argument("--row_limit", type=float, default=90.0, help="seconds for a row at most (default: 90)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument("--devices", type=int, default=0, help="for what is sharded (default: all GPUs; 1 on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="models of a thousandth of the size: a rehearsal")
    parser.add_argument("--quick", action="store_true", help="one row of each kind")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose title has one of the texts in it")
    parser.add_argument("--list", action="store_true", help="print the rows' titles in order; measure nothing")
    parser.add_argument("--requirements", action="store_true", help="print the packages needed beside torch")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.limit is None:
        arguments.limit = 115.0 if arguments.tiny else 350.0
    if arguments.limit <= ENDING or arguments.row_limit <= 0:
        parser.error(f"--limit must be above {ENDING} and --row_limit above 0")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for a rehearsal, with --tiny")
    return arguments


def chosen_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows that are asked for, by their titles."""
    from gpu_benchmark.worker import QUICK, ROWS

    quick = {row.title for row in QUICK}
    rows = {title: row for title, row in ROWS.items() if title in quick or not arguments.quick}
    if arguments.tiny:
        # on a CPU they take the most time by far
        rows = dict(sorted(rows.items(), key=lambda row: "compiled" in row[0]))
    if arguments.rows:
        rows = {title: row for title, row in rows.items() if any(text in title for text in arguments.rows)}
    if not rows:
        raise SystemExit("No row has such a title; --list prints all.")
    return rows


def main() -> None:
    arguments = parse_arguments()
    if arguments.requirements:
        print("\n".join(REQUIREMENTS))
        print(f"for some rows: {', '.join(OPTIONAL)}", file=sys.stderr)
        return
    if arguments.worker:
        from gpu_benchmark.worker import main as work

        raise SystemExit(work(arguments))
    start = time.time()
    import torch

    if arguments.device == "cuda" and not arguments.list and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: nothing was measured. --tiny --device cpu rehearses.")
    rows = chosen_rows(arguments)
    if arguments.list:
        print("\n".join(rows))
        return
    from gpu_benchmark.table import tables

    arguments.devices = arguments.devices or (torch.cuda.device_count() if arguments.device == "cuda" else 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = measure(arguments, rows, arguments.output, start + arguments.limit - ENDING)
    measured = sum("figures" in result for result in results)
    heading = [f"{time.strftime('%Y-%m-%d')}: {measured} of {len(results)} rows in {time.time() - start:.0f} s."]
    if arguments.tiny:
        heading += ["A rehearsal with tiny models: no figure here says anything about this package's speed or memory."]
    text = "\n\n".join([*heading, tables(results)])
    (arguments.output / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
