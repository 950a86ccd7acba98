"""Kills `litgpt finetune_akl` again and again, and sees that it ends as if nothing had happened.

The real command is started with `--resume auto`, killed by SIGKILL at a random moment, every third time in the middle
of a save, and started again, until it has been killed often enough and may finish. Its weights must equal those of an
undisturbed run bit for bit, and its metrics must have each step once.

    python scripts/torture.py                       # a tiny pair, 30 kills
    python scripts/torture.py --kills 100 -- STUDENT --teacher_checkpoint_dir TEACHER --data ... --train.max_steps 500
"""

import argparse
import csv
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import materials
import torch

POLL = 0.002
"""Seconds between two looks at the run."""


class NoisyAdamW(torch.optim.AdamW):
    """AdamW with random numbers in every step, as dropout would draw them."""

    def step(self, closure=None):
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3 * group["lr"])
        return result


def tiny_recipe(directory: Path, steps: int) -> list[str]:
    """Arguments for a run of a few seconds on tiny material."""
    if not directory.exists():
        materials.write_teacher(directory / "teacher")
        materials.write_student(directory / "student", tied=True)
        materials.write_alice_json(directory / "data")
    return [
        *(str(directory / "student"), "--teacher_checkpoint_dir", str(directory / "teacher")),
        *("--data", "StreamingSFT", "--data.path", str(directory / "data" / "train.json")),
        *("--data.val_path", str(directory / "data" / "val.json"), "--data.cache_dir", str(directory / "cache")),
        *("--data.mask_prompt", "true", "--train.max_seq_length", "128", "--distill.compile", "false"),
        *("--train.max_steps", str(steps), "--train.epochs", str(steps)),
        *("--train.save_interval", "3", "--keep_last", "2"),
        *("--eval.interval", "20", "--eval.max_iters", "2", "--eval.max_new_tokens", "4"),
    ]


def command(recipe: list[str], out_dir: Path) -> list[str]:
    return [sys.executable, "-m", "litgpt", "finetune_akl", *recipe, "--out_dir", str(out_dir), "--resume", "auto"]


def start(recipe: list[str], out_dir: Path, log: Path) -> subprocess.Popen:
    # this file is where NoisyAdamW is found
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("a") as file:
        return subprocess.Popen(command(recipe, out_dir), stdout=file, stderr=file, env=environment)


def saving(out_dir: Path) -> bool:
    return any(out_dir.glob(".step-*"))


def kill_somewhere(process: subprocess.Popen, out_dir: Path, in_a_save: bool, patience: float) -> str | None:
    """Kill the run at a random moment; says in which one, or None if the run had come to its end."""
    seen = set(out_dir.glob("step-*"))
    # from the first new checkpoint on the run is past its start
    while set(out_dir.glob("step-*")) <= seen and process.poll() is None and random.random() > POLL / patience / 4:
        time.sleep(POLL)
    until = time.monotonic() + random.uniform(0, patience)
    while time.monotonic() < until and process.poll() is None:
        time.sleep(POLL)
    while in_a_save and not saving(out_dir) and process.poll() is None:
        time.sleep(POLL / 10)
    if in_a_save:
        time.sleep(random.uniform(0, 0.01))
    was_saving = saving(out_dir)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    return "in a save" if was_saving else "between saves"


def torture(recipe: list[str], out_dir: Path, kills: int, patience: float) -> dict[str, int]:
    """Kill and restart a run until it was killed ``kills`` times, then let it finish; counts kills by their moment."""
    counts = {"in a save": 0, "between saves": 0}
    log = out_dir.with_suffix(".log")
    while sum(counts.values()) < kills:
        process = start(recipe, out_dir, log)
        moment = kill_somewhere(process, out_dir, in_a_save=random.random() < 1 / 3, patience=patience)
        if moment is None:
            if process.returncode == 0:
                raise SystemExit(f"The run ended after {sum(counts.values())} kills: give it more --steps")
            raise SystemExit(f"The run failed by itself with status {process.returncode}; see {log}")
        counts[moment] += 1
        print(f"\rkilled {sum(counts.values())} times, {counts['in a save']} of them in a save", end="", flush=True)
    print()
    process = start(recipe, out_dir, log)
    if process.wait() != 0:
        raise SystemExit(f"The run failed by itself with status {process.returncode}; see {log}")
    return counts


def steps_in_metrics(out_dir: Path) -> list[int]:
    logs = list((out_dir / "logs" / "csv").glob("version_*/metrics.csv"))
    with max(logs, key=lambda path: int(path.parent.name.split("_")[1])).open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]


def compare(undisturbed: Path, disturbed: Path) -> None:
    """Exits with a message if the two runs differ in their weights or in the steps of their metrics."""
    weights = [torch.load(path / "final" / "lit_model.pth", weights_only=True) for path in (undisturbed, disturbed)]
    different = [name for name, weight in weights[0].items() if not torch.equal(weight, weights[1][name])]
    if different:
        raise SystemExit(f"{len(different)} of {len(weights[0])} tensors differ, the first is {different[0]}")
    steps = [steps_in_metrics(path) for path in (undisturbed, disturbed)]
    if steps[0] != steps[1]:
        raise SystemExit(f"The metrics have {len(steps[1])} steps instead of {len(steps[0])}, or in another order")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how often to kill each run")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader workers, a run for each")
    parser.add_argument("--devices", type=int, default=1, help="processes of the run")
    parser.add_argument("--noise", choices=("with", "without", "both"), default="both", help="random numbers in steps")
    parser.add_argument("--steps", type=int, default=800, help="of the tiny pair's run")
    parser.add_argument("--patience", type=float, default=1.0, help="seconds of training before a kill, at most")
    parser.add_argument("--work_dir", type=Path, default=Path(".torture"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("recipe", nargs="*", help="after --: the arguments of finetune_akl (default: a tiny pair)")
    args = parser.parse_args()
    random.seed(args.seed)
    recipe = args.recipe or tiny_recipe(args.work_dir / "material", args.steps)
    for noise in ("without", "with"):
        if args.noise not in (noise, "both"):
            continue
        optimizer = ["--optimizer.class_path", "torture.NoisyAdamW" if noise == "with" else "AdamW"]
        for workers in args.workers:
            directory = args.work_dir / f"{noise}-noise-{workers}-workers-{args.devices}-devices"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            options = [*recipe, *optimizer, "--optimizer.lr", "3e-3", "--data.num_workers", str(workers)]
            options += ["--devices", str(args.devices)]
            began = time.monotonic()
            if start(options, directory / "undisturbed", directory / "undisturbed.log").wait() != 0:
                raise SystemExit(f"The undisturbed run failed; see {directory / 'undisturbed.log'}")
            counts = torture(options, directory / "disturbed", args.kills, args.patience)
            compare(directory / "undisturbed", directory / "disturbed")
            print(
                f"{noise} noise, {workers} workers, {args.devices} processes: {sum(counts.values())} kills,"
                f" {counts['in a save']} in a save: the same weights, every step once in the metrics"
                f" ({time.monotonic() - began:.0f} s)"
            )


if __name__ == "__main__":
    main()
