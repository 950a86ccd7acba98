"""Compares what a student may be trained by: every divergence, a static mix with AKL's own mean h, cross-entropy only.

    python scripts/experiments/compare_divergences.py --quick   # a tiny English model into random 2-layer students
    python scripts/experiments/compare_divergences.py           # SmolLM2-135M into 15 of its layers, on PIQA

Every method takes the same steps on the same records, in an order that depends on the training seed alone. Each
chooses its learning rate from the same grid, by validation records, and is tested on others. Every run is
`litgpt finetune_akl` with a cache of the teacher, every test `litgpt evaluate_akl`.
What is finished is kept in --out: the same command goes on where it was interrupted. It ends with `comparison.md`,
`comparison.json` and `comparison.png` there.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts' material is

from comparison import runs
from comparison.figure import draw
from comparison.material import prepare
from comparison.methods import FULL, METHODS, QUICK, REFERENCE, Settings
from comparison.plan import Standing, Task, standings, tidy
from comparison.results import Results, as_json, collect
from comparison.runs import Place
from comparison.store import Store
from comparison.tables import tables
from comparison.workers import say, work

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("matplotlib", "scipy")
"""Of the extra ``experiments``, beside those that the demo's material takes."""


def compare(settings: Settings, out: Path, demo: Path, workers: int) -> Store:
    """Do what is not yet done.

    Args:
        settings: the comparison.
        out: where all of it is kept.
        demo: the demo's material.
        workers: processes that runs are shared out among, as the cores among them.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / "runs", settings)
    place = Place(settings, prepare(settings, out / "material", demo), out / "cache", store)

    def due() -> list[Task]:
        found = standings(settings, store).values()
        for standing in found:
            tidy(standing, store)
        tasks = [task for standing in found for task in standing.tasks]
        if tasks and not place.filled.is_file():
            return [Task("fill", None)]
        say(progress(list(found), store, workers))
        return tasks

    def call_of(task: Task) -> tuple[Callable, tuple]:
        say(f"{task.kind} {task.run or ''}")
        return runs.call_of(task.kind, place, task.run)

    work(due, call_of, workers=workers, log=out / "worker.log")
    return store


def progress(found: list[Standing], store: Store, workers: int) -> str:
    """How much of the work is done, and how long the rest takes at the pace so far."""
    parts, seconds, known = [], 0.0, True
    for kind, read, name in (("train", store.training, "trainings"), ("test", store.test, "tests")):
        done, total = sum(s.done[kind] for s in found), sum(s.total[kind] for s in found)
        parts.append(f"{done} of {total} {name}")
        results = [read(run) for standing in found for run in (*standing.runs, *standing.losers)]
        times = [result["seconds"] for result in results if result and "seconds" in result]
        if times:
            seconds += (total - done) * sum(times) / len(times) / workers
        known &= bool(times) or done == total
    to_go = f"; {'about' if known else 'at least'} {seconds / 60:.1f} min to go" if seconds else ""
    return f"{', '.join(parts)} are done{to_go}"


def write(results: Results, out: Path) -> str:
    """The report's files; returns the Markdown."""
    text = tables(results)
    (out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    (out / "comparison.json").write_text(json.dumps(as_json(results), indent=1), encoding="utf-8")
    if len(results.standings) > 1:
        draw(out / "comparison.png", results)
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny pair, in minutes (default: SmolLM2, in hours)")
    parser.add_argument("--out", type=Path, help="where all of it is kept (default: .comparison/PAIR)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="which methods beside AKL (default: all)")
    parser.add_argument("--seeds", type=int, help="how many training seeds, at least 2 (default: 3)")
    parser.add_argument("--rates", type=float, nargs="+", help="the grid of learning rates")
    parser.add_argument("--kd_ratio", type=float, help="share of the divergence in the loss (default: 1)")
    numbers = {
        "steps": "optimizer steps of a run",
        "batch": "records in a step",
        "train_records": "records for training",
        "validation_records": "records that choose the learning rates",
        "test_records": "held-out records",
        "prompts": "how many of these are answered for ROUGE-L",
        "new_tokens": "length of an answer",
    }
    for name, text in numbers.items():
        quick, full = getattr(QUICK, name), getattr(FULL, name)
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: {full}, with --quick {quick})")
    parser.add_argument("--workers", type=int, help="processes (default: one a core, at most 2)")
    parser.add_argument("--demo", type=Path, default=REPOSITORY / ".demo", help="the demo's material (default: .demo)")
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> Settings:
    """As asked for; AKL is always among the methods.

    Raises:
        SystemExit: the options make no comparison.
    """
    given = {name: value for name, value in vars(arguments).items() if hasattr(FULL, name) and value is not None}
    if "seeds" in given:
        given["seeds"] = tuple(range(1, given["seeds"] + 1))
    if "rates" in given:
        given["rates"] = tuple(sorted(set(given["rates"])))
    if "methods" in given:
        given["methods"] = tuple(name for name in METHODS if name in (REFERENCE, *given["methods"]))
    settings = replace(QUICK if arguments.quick else FULL, **given)
    if len(settings.seeds) < 2:
        raise SystemExit("--seeds must be at least 2: there is no spread of one.")
    return settings


def main() -> None:
    arguments = parse_arguments()
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not installed: pip install -e '.[experiments]'")
    settings = settings_of(arguments)
    out = arguments.out or REPOSITORY / ".comparison" / settings.pair
    workers = arguments.workers or min(2, len(os.sched_getaffinity(0)))
    began = time.monotonic()
    try:
        store = compare(settings, out, arguments.demo, workers)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the same command goes on from here.") from None
    print(write(collect(settings, standings(settings, store), store), out))
    say(f"{time.monotonic() - began:.0f} s; {out / 'comparison.md'}, .json and .png")


if __name__ == "__main__":
    main()
