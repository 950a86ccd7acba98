"""Lets objectives, temperatures and kd_ratios compete: all for a few steps, the better for more, the best with seeds.

    python scripts/experiments/race_objectives.py --quick     # a tiny English model into random 2-layer students
    python scripts/experiments/race_objectives.py             # SmolLM2-135M into 80 % of its parameters, on PIQA

Every run is `litgpt finetune_akl` with one cache of the teacher. Who goes on is decided by the mean of forward and
reverse KL, at temperature 1, on validation records. AKL as the paper has it is in the finals in any case, and AKL and
its static mix (with AKL's own mean h) at each temperature. The finals are tested by `litgpt evaluate_akl` on other
records. What is finished is kept in --out: the same command goes on where it was interrupted. It ends with `race.md`
and `race.json` there.
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
from comparison.material import SHARES, prepare
from comparison.methods import FULL, METHODS, QUICK, REFERENCE
from comparison.race import Plan, Race, Task
from comparison.race_report import as_data, report
from comparison.runs import Place
from comparison.workers import say, work

REPOSITORY = Path(__file__).resolve().parents[2]
RACING = tuple(
    name
    for name in METHODS
    if name in (REFERENCE, "akl_mean_mix", "mix", "scheduled_mix", "fkl", "rkl", "todi", "tad", "csd", "drkl")
)
"""Of the methods, by default."""


def compete(race: Race, out: Path, demo: Path, workers: int) -> Plan:
    """Do what is not yet done.

    Args:
        race: what competes.
        out: where all of it is kept.
        demo: the demo's material.
        workers: processes that runs are shared out among, as the cores among them.
    """
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(race, out / "runs")
    material = prepare(race.settings, out / "material", demo)
    places = {steps: Place(store.settings, material, out / "cache", store) for steps, store in plan.stores.items()}
    final = places[race.settings.steps]

    def due() -> list[Task]:
        found = plan.progress()
        plan.tidy(found)
        if found.tasks and not final.filled.is_file():
            return [Task("fill", race.settings.steps, None)]
        stage = "the finals" if len(found.scores) == len(race.rungs) else f"rung {1 + len(found.scores)}"
        if found.tasks:
            say(f"{stage}: {len(found.tasks)} runs or tests are known to be left")
        return found.tasks

    def call_of(task: Task) -> tuple[Callable, tuple]:
        say(f"{task.kind} {task.run or ''}, {task.steps} steps")
        return runs.call_of(task.kind, places[task.steps], task.run)

    work(due, call_of, workers=workers, log=out / "worker.log")
    return plan


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny pair, in minutes (default: SmolLM2, in hours)")
    parser.add_argument("--pair", choices=[name for name in SHARES], default="smollm2-80", help="without --quick")
    parser.add_argument("--out", type=Path, help="where all of it is kept (default: .race/PAIR)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=RACING, help="beside AKL")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="(default: 1 2 4)")
    parser.add_argument("--kd_ratios", type=float, nargs="+", default=[1.0, 0.5], help="(default: 1 0.5)")
    parser.add_argument("--rates", type=float, nargs="+", help="the grid of learning rates")
    parser.add_argument("--rungs", type=int, nargs="+", help="steps before the finals (default: 15 30, or 20 50)")
    parser.add_argument("--steps", type=int, help="of the finals (default: 80, with --quick 150)")
    parser.add_argument("--keep", type=float, default=0.3, help="share that goes on after a rung (default: 0.3)")
    parser.add_argument("--finalists", type=int, default=4, help="beside those that always are (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="of the finals (default: 3)")
    for name in ("batch", "train_records", "validation_records", "test_records", "prompts", "new_tokens"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help="processes (default: one a core, at most 2)")
    parser.add_argument("--demo", type=Path, default=REPOSITORY / ".demo", help="the demo's material (default: .demo)")
    return parser.parse_args(words)


def race_of(given: argparse.Namespace) -> Race:
    """As asked for; AKL is always in it.

    Raises:
        SystemExit: the options make no race.
    """
    base = QUICK if given.quick else replace(FULL, pair=given.pair, batch=8, rates=(3e-4, 1e-3), validation_records=96)
    names = ("steps", "batch", "train_records", "validation_records", "test_records", "prompts", "new_tokens")
    changes = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.rates:
        changes["rates"] = tuple(sorted(set(given.rates)))
    methods = tuple(name for name in METHODS if name in (REFERENCE, *given.methods))
    settings = replace(base, methods=methods, seeds=tuple(range(1, given.seeds + 1)), **changes)
    rungs = tuple(given.rungs or ((20, 50) if given.quick else (15, 30)))
    if given.seeds < 2:
        raise SystemExit("--seeds must be at least 2: there is no spread of one.")
    if "cross_entropy" in methods:
        raise SystemExit("--methods cross_entropy has no divergence: neither temperature nor kd_ratio is for it.")
    if list(rungs) != sorted({*rungs}) or rungs[-1] >= settings.steps:
        raise SystemExit(f"--rungs {' '.join(map(str, rungs))} must rise, and stay below --steps {settings.steps}.")
    if not 0 < given.keep < 1:
        raise SystemExit(f"--keep must be between 0 and 1, got {given.keep}.")
    return Race(settings, tuple(given.temperatures), tuple(given.kd_ratios), rungs, given.keep, given.finalists)


def main(words: list[str] | None = None) -> None:
    given = parse(words)
    if find_spec("scipy") is None:
        raise SystemExit("scipy is not installed: pip install -e '.[experiments]'")
    race = race_of(given)
    out = given.out or REPOSITORY / ".race" / race.settings.pair
    workers = given.workers or min(2, len(os.sched_getaffinity(0)))
    began = time.monotonic()
    try:
        plan = compete(race, out, given.demo, workers)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the same command goes on from here.") from None
    found = plan.progress()
    text = report(plan, found)
    (out / "race.md").write_text(text + "\n", encoding="utf-8")
    (out / "race.json").write_text(json.dumps(as_data(plan, found), indent=1), encoding="utf-8")
    print(text)
    say(f"{time.monotonic() - began:.0f} s; {out / 'race.md'} and race.json")


if __name__ == "__main__":
    main()
