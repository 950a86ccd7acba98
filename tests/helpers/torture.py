"""Kills `litgpt finetune_akl` again and again, and sees that it ends as if nothing had happened.

Ten kinds of runs: LitGPT's JSON, StreamingSFT, LoRA, on-policy samples and a teacher cache, in one process and in two.
Each is started with `--resume auto`, killed by SIGKILL at random moments, every third time in the middle of a save, and
started again until it may finish; then another one begins, until there were enough kills. Weights, optimizer, random
numbers and the loss of every step must equal those of an undisturbed run bit for bit, and nothing may be left over.

    export PYTHONPATH=tests:scripts
    python -m helpers.torture --kills 200
    python -m helpers.torture --kinds lora cache --processes 2 --kills 40 --seed 7
    python -m helpers.torture --kills 100 -- STUDENT --teacher_checkpoint_dir TEACHER --data ... --train.max_steps 500
"""

import argparse
import atexit
import csv
import os
import random
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any

import materials
import torch

from helpers import commands

POLL = 0.001
"""Seconds between two looks at the run."""
PATIENCE = 240
"""Seconds after which a run counts as hanging."""
MOST_KILLS = 5
"""Of one run."""
DATA = ["--data", "JSON", "--data.json_path", "{material}/data", "--data.mask_prompt", "true", "--data.num_workers"]
KINDS = {
    "json": [*DATA, "0"],
    "streaming": [
        *("--data", "StreamingSFT", "--data.path", "{material}/data/train.json", "--data.mask_prompt", "true"),
        *("--data.val_path", "{material}/data/val.json", "--data.cache_dir", "{own}/prepared"),
        *("--data.num_workers", "2", "--data.num_proc", "1"),
    ],
    "lora": [*DATA, "2", "--lora.r", "4"],
    "on-policy": [*DATA, "0", "--distill.on_policy", "0.5", "--distill.on_policy_tokens", "6"],
    "cache": [*DATA, "0", "--teacher.cache_dir", "{own}/cache"],
}


class NoisyAdamW(torch.optim.AdamW):
    """AdamW with random numbers in every step, as dropout would draw them."""

    def step(self, closure=None):
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3 * group["lr"])
        return result


def write_material(directory: Path) -> None:
    """A tiny pair and the records that it is trained on."""
    if not directory.exists():
        materials.write_teacher(directory / "teacher")
        materials.write_student(directory / "student", tied=True)
        materials.write_alice_json(directory / "data")


def tiny_recipe(kind: str, processes: int, material: Path, own: Path, steps: int) -> list[str]:
    """Arguments for a run of seconds; what it keeps beside its ``--out_dir`` lies in ``own``."""
    # which of its random numbers would be whose, if the parameters are shared?
    optimizer = "helpers.torture.NoisyAdamW" if processes == 1 else "AdamW"
    return [
        *(str(material / "student"), "--teacher_checkpoint_dir", str(material / "teacher")),
        *(word.format(material=material, own=own) for word in KINDS[kind]),
        *("--train.max_seq_length", "96", "--distill.compile", "false", "--train.epochs", str(steps)),
        *("--train.max_steps", str(steps), "--train.save_interval", "2", "--keep_last", "2"),
        *("--train.global_batch_size", "8", "--train.micro_batch_size", "4"),
        *("--optimizer.class_path", optimizer, "--optimizer.lr", "3e-3"),
        *("--eval.interval", "5", "--eval.max_iters", "2", "--eval.max_new_tokens", "4"),
    ]


@dataclass
class Started:
    """A run, in processes that are copies of this one."""

    processes: list[commands.Command]
    log: Path
    said_before: int = 0
    """Bytes of the log that are of earlier runs."""

    def poll(self) -> bool:
        """Whether all have ended."""
        return None not in [process.poll() for process in self.processes]

    def wait(self) -> list[int]:
        """Their exit statuses, negative for signals, that of process 0 first."""
        deadline = time.monotonic() + PATIENCE
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                raise SystemExit(f"The run of {self.log} did not end within {PATIENCE} s")
            time.sleep(POLL)
        return [process.returncode for process in self.processes]

    def are_connected(self) -> bool:
        """Whether the processes know each other: before, only who has started them notices that one is lost."""
        with self.log.open("rb") as file:
            file.seek(self.said_before)
            return b"All distributed processes registered" in file.read()

    def kill(self, victims: int | None = None) -> None:
        """SIGKILL to all, or to some of them, and wait for the end of all."""
        alive = [process for process in self.processes if process.poll() is None]
        for process in random.sample(alive, min(len(alive), victims or len(alive))):
            process.kill()
        self.wait()


def start(recipe: list[str], out_dir: Path, log: Path, processes: int = 1, resume: str | None = "auto") -> Started:
    """The command in copies of this process, as Fabric would start it if there are several."""
    words = ["finetune_akl", *recipe, "--out_dir", str(out_dir), "--devices", str(processes)]
    words += ["--resume", resume] if resume else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    said_before = log.stat().st_size
    environment = {"HF_DATASETS_CACHE": str(log.parent / "datasets")}
    if processes > 1:
        environment |= {"NODE_RANK": "0", "WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    run = Started([commands.start(words, log, **environment, **rank) for rank in ranks], log, said_before)
    # Ctrl-C does not reach their sessions
    atexit.register(run.kill)
    return run


def saving(out_dir: Path) -> bool:
    return any(out_dir.glob(".*.partial"))


def kill_somewhere(run: Started, out_dir: Path, duration: float) -> str | None:
    """Kill the run at a random moment of its ``duration``; says in which one, or None if it had come to its end."""
    until, in_a_save = time.monotonic() + random.uniform(0, duration), random.random() < 1 / 3
    while (time.monotonic() < until or (in_a_save and not saving(out_dir))) and not run.poll():
        time.sleep(POLL)
    if in_a_save:
        time.sleep(random.uniform(0, 0.01))
    was_saving = saving(out_dir)
    if run.poll():
        return None
    # one of two is lost now and then, and the other is to end by itself
    run.kill(1 if random.random() < 1 / 4 and run.are_connected() else None)
    return "in a save" if was_saving else "between saves"


def age(cache: Path) -> None:
    """Let files that a killed process left in a cache be old: younger ones may be those of another process."""
    for path in cache.rglob(".*.partial"):
        os.utime(path, (0, 0))


def steps_in_metrics(out_dir: Path) -> list[tuple[int, str]]:
    """Step and loss of each row."""
    logs = list((out_dir / "logs" / "csv").glob("version_*/metrics.csv"))
    with max(logs, key=lambda path: int(path.parent.name.split("_")[1])).open(newline="") as file:
        return [(int(row["step"]), row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def same(first: Any, second: Any) -> bool:
    """Whether two training states are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and _bits(first) == _bits(second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def difference(undisturbed: Path, disturbed: Path) -> str | None:
    """What differs between the results of two runs, apart from times and places; None if nothing does."""
    names = [{str(path.relative_to(run)) for path in run.glob("final/*")} for run in (undisturbed, disturbed)]
    if names[0] != names[1]:
        return f"only one has {', '.join(sorted(names[0] ^ names[1]))}"
    # a run that is killed once its student is written does not save or delete checkpoints again
    steps = [{str(path.relative_to(run)) for path in run.glob("step-*/*")} for run in (undisturbed, disturbed)]
    if steps[0] and not steps[0] & steps[1]:
        return "there is no checkpoint of the same step"
    for directory in {name.partition("/")[0] for name in steps[0]} & {name.partition("/")[0] for name in steps[1]}:
        found = [{name for name in some if name.startswith(f"{directory}/")} for some in steps]
        if found[0] != found[1]:
            return f"only one has {', '.join(sorted(found[0] ^ found[1]))}"
        names[0] |= found[0]
    for name in sorted(names[0]):
        if name.endswith(".pth"):
            first, second = (torch.load(run / name, weights_only=True) for run in (undisturbed, disturbed))
            if not same(first, second):
                return f"{name} differs"
    hidden = sorted(path.name for path in disturbed.rglob(".*"))
    hidden += sorted(path.name for path in disturbed.parent.rglob("*") if path.suffix in (".partial", ".incomplete"))
    if hidden:
        return f"{', '.join(hidden)} is left over"
    if steps_in_metrics(undisturbed) != steps_in_metrics(disturbed):
        return "the metrics have other steps, or another loss"
    return None


@dataclass
class Result:
    """What came of the kills of one kind."""

    runs: int = 0
    identical: int = 0
    kills: int = 0
    in_a_save: int = 0
    differences: list[str] = field(default_factory=list)


def torture(recipes: Iterator[tuple[list[str], Path]], processes: int, kills: int) -> Result:
    """Run the first of the recipes undisturbed, then kill and restart others until there were ``kills``."""
    recipe, directory = next(recipes)
    undisturbed, began = directory / "run", time.monotonic()
    if any(start(recipe, undisturbed, directory / "log", processes).wait()):
        raise SystemExit(f"The undisturbed run failed; see {directory / 'log'}")
    duration, result = time.monotonic() - began, Result()
    while result.kills < kills:
        recipe, directory = next(recipes)
        planned = min(kills - result.kills, random.randint(1, MOST_KILLS))
        run = start(recipe, directory / "run", directory / "log", processes)
        while planned > 0 and (moment := kill_somewhere(run, directory / "run", duration)) is not None:
            planned, result.kills = planned - 1, result.kills + 1
            result.in_a_save += moment == "in a save"
            age(directory / "cache")
            run = start(recipe, directory / "run", directory / "log", processes)
        result.runs += 1
        statuses = run.wait()
        found = f"it failed with {statuses}" if any(statuses) else difference(undisturbed, directory / "run")
        if found is None:
            result.identical += 1
            shutil.rmtree(directory)
        else:
            result.differences.append(f"{found}; see {directory / 'log'}")
            print(result.differences[-1], flush=True)
    return result


def recipes_of(kind: str, args: argparse.Namespace, processes: int) -> Iterator[tuple[list[str], Path]]:
    """Recipes of the same run, each with a directory of its own."""
    for number in count():
        directory = args.work_dir / f"{kind}-{processes}" / str(number)
        material = args.work_dir / "material"
        yield args.recipe or tiny_recipe(kind, processes, material, directory, args.steps), directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all, shared out evenly")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of each kind")
    parser.add_argument("--steps", type=int, default=13, help="of the tiny pair's runs")
    parser.add_argument("--work_dir", type=Path, default=Path(".torture"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("recipe", nargs="*", help="after --: the arguments of finetune_akl (default: a tiny pair)")
    args = parser.parse_args()
    args.work_dir = args.work_dir.resolve()
    random.seed(args.seed)
    torch.set_num_threads(1)
    shutil.rmtree(args.work_dir, ignore_errors=True)
    write_material(args.work_dir / "material")
    commands.import_everything()
    cells = list(product(["given"] if args.recipe else args.kinds, args.processes))
    began, results = time.monotonic(), {}
    print(f"{'run':12}{'processes':>10}{'kills':>8}{'in a save':>11}{'runs':>6}{'identical':>11}")
    for number, (kind, processes) in enumerate(cells):
        share = args.kills * (number + 1) // len(cells) - args.kills * number // len(cells)
        found = results[kind, processes] = torture(recipes_of(kind, args, processes), processes, share)
        counts = f"{found.kills:8}{found.in_a_save:11}{found.runs:6}{found.identical:11}"
        print(f"{kind:12}{processes:10}{counts}", flush=True)
    kills, runs, identical = (
        sum(getattr(r, name) for r in results.values()) for name in ("kills", "runs", "identical")
    )
    print(f"{kills} kills, {identical} of {runs} runs identical to undisturbed ones ({time.monotonic() - began:.0f} s)")
    raise SystemExit(0 if identical == runs else 1)


if __name__ == "__main__":
    main()
