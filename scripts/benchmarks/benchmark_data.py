"""What StreamingSFT costs at size: preparation, memory of a long training run, and time to the first step.

By default 2,000,000 records, which take half an hour and 5 GB of disk. What was generated is used again, and what was
prepared too, but for the part that measures the preparation.
"""

import argparse
import csv
import inspect
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts' material is

import materials
import psutil
import torch
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer

from litgpt_akl.commands.make_student import make_student
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.files.manifest import MANIFEST, METRICS_MARK, write_manifest
from litgpt_akl.training.metrics import MetricsMarker

REPOSITORY = Path(__file__).resolve().parents[2]
SMOLLM2 = REPOSITORY / ".demo" / "SmolLM2-135M-Instruct"


def generate(path: Path, records: int, prompt_words: int, output_words: int) -> Path:
    """Instruction records made of pieces of Alice's Adventures in Wonderland, the same every time."""
    if path.exists():
        return path
    words, draw, unfinished = materials.alice_text().split(), random.Random(records), path.with_suffix(".part")
    with unfinished.open("w", encoding="utf-8") as file:
        for number in range(records):
            # half of the outputs have fewer words than `output_words`, one in a thousand has nine times as many
            sizes = draw.randint(2, prompt_words), int(1 + draw.lognormvariate(math.log(output_words), 0.7))
            pieces = ((draw.randrange(len(words) - size), size) for size in sizes)
            prompt, answer = (" ".join(words[start : start + size]) for start, size in pieces)
            file.write(json.dumps({"instruction": prompt, "output": answer}, ensure_ascii=False) + "\n")
            if number % 100_000 == 0:
                print(f"{path.name}: generating record {number:,} of {records:,}", file=sys.stderr)
    return unfinished.rename(path)


def open_stores(path: Path, checkpoint_dir: Path, **options) -> tuple:
    data = StreamingSFT(str(path), mask_prompt=True, cache_dir=path.with_suffix(".cache"), **options)
    data.connect(Tokenizer(checkpoint_dir))
    return data.prepare(checkpoint_dir, Config.from_file(checkpoint_dir / "model_config.yaml").block_size)


def memory(pid: int, file: str, *fields: str) -> list[float]:
    """MB of a process and of each of its descendants: the sum of some fields of /proc/PID/FILE."""
    megabytes = []
    for process in (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))):
        with suppress(FileNotFoundError, ProcessLookupError):  # it may have just ended
            lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
            megabytes.append(sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in fields) * 1.024e-3)
    return megabytes


def part_prepare(work_dir: Path, arguments: argparse.Namespace) -> None:
    """Preparation with SmolLM2's tokenizer. Memory is anonymous and shared (Pss_Anon + Pss_Shmem), of the main
    process and its workers, ten samples a second; idle is the same process after its imports."""
    print("| records | MB | seconds | records/s | idle, MB | peak beyond idle, MB |\n|---|---|---|---|---|---|")
    for records in (arguments.records // 10, arguments.records):
        path = generate(work_dir / f"records-{records}.jsonl", records, 50, 50)
        shutil.rmtree(path.with_suffix(".cache"), ignore_errors=True)
        command = [sys.executable, __file__, "--child", path, work_dir / "pair" / "student"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        child.stdout.readline()
        idle = peak = sum(memory(child.pid, "smaps_rollup", "Pss_Anon", "Pss_Shmem"))
        while child.poll() is None:
            peak = max(peak, sum(memory(child.pid, "smaps_rollup", "Pss_Anon", "Pss_Shmem")))
            time.sleep(0.1)
        seconds = float(child.stdout.read())  # nothing if it failed; its message is above then
        columns = f"{seconds:.1f} | {records / seconds:,.0f} | {idle:.0f} | {peak - idle:.0f}"
        print(f"| {records:,} | {path.stat().st_size / 1e6:,.0f} | {columns} |", flush=True)


def run_until(done: Callable[[int], bool], options: list, pair: Path, path: Path, out_dir: Path) -> float:
    """Start the real command, kill it when ``done``, which is given its process id; the seconds that it took."""
    shutil.rmtree(out_dir, ignore_errors=True)
    recipe = [
        *(pair / "student", "--teacher_checkpoint_dir", pair / "teacher", "--out_dir", out_dir, "--train.epochs", "1"),
        *("--data", "StreamingSFT", "--data.path", path, "--data.cache_dir", path.with_suffix(".cache")),
        *("--data.mask_prompt", "true", "--distill.compile", "false", "--eval.initial_validation", "false", *options),
    ]
    began, log = time.perf_counter(), out_dir.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "litgpt", "finetune_akl", *recipe], stdout=file, stderr=file)
    while not done(process.pid):
        if process.poll() is not None:
            raise SystemExit(f"The run ended with status {process.returncode}; see {log}")
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def last_step(out_dir: Path) -> int:
    """The last step in a run's metrics, 0 if there is none."""
    for path in out_dir.glob("logs/csv/version_*/metrics.csv"):
        with path.open("rb") as file:
            header = file.readline().split(b",")
            file.seek(max(file.tell(), path.stat().st_size - 4096))
            row = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].split(b",")
        return int(row[header.index(b"step")]) if len(row) == len(header) else 0
    return 0


def part_train(work_dir: Path, arguments: argparse.Namespace) -> None:
    """Training with the tests' pair and two loader workers, records of at most 32 tokens, 500 a step. Memory is
    RssAnon, the highest of about eight samples a second while the next 10,000 records pass."""
    pair, out_dir, records = work_dir / "tests-pair", work_dir / "runs" / "train", arguments.train_records
    if not pair.exists():
        materials.write_teacher(pair / "teacher")
        materials.write_student(pair / "student", tied=True)
    path, samples = generate(work_dir / f"short-{records}.jsonl", records + 15_000, 4, 20), []

    def sample(pid: int) -> bool:
        main, *workers = memory(pid, "status", "RssAnon")
        samples.append((last_step(out_dir) * 500, main, sum(workers), main + sum(workers)))
        time.sleep(0.1)
        return samples[-1][0] >= records + 10_000

    options = ["--train.max_seq_length", "32", "--data.val_split_fraction", "0", "--data.num_workers", "2"]
    options += ["--train.global_batch_size", "500", "--train.micro_batch_size", "500"]
    run_until(sample, options, pair, path, out_dir)
    print("| records | main, MB | workers, MB | together, MB |\n|---|---|---|---|")
    for number in (1000, records // 10, records):
        columns = zip(*(values for done, *values in samples if number <= done < number + 10_000), strict=True)
        print(f"| {number:,} |", " | ".join(f"{max(column):.1f}" for column in columns), "|")


def part_start(work_dir: Path, arguments: argparse.Namespace) -> None:
    """Start on prepared data: from the start of `litgpt finetune_akl` until its first step stands in metrics.csv.
    One layer of SmolLM2-135M learns from two, 4 records a step, no initial validation, no torch.compile, files in the
    page cache; three runs each, in turn."""
    pair, runs = work_dir / "pair", work_dir / "runs"
    path = generate(work_dir / f"records-{arguments.records}.jsonl", arguments.records, 50, 50)
    options = ["--train.global_batch_size", "4", "--train.micro_batch_size", "4", "--train.save_interval", "10"]
    early = runs / "early" / "step-000010"
    run_until(lambda pid: (early / MANIFEST).exists(), options, pair, path, early.parent)
    samples = torch.load(early / "training_state.pth", weights_only=True)["data"]["samples"]
    last = math.ceil(samples / 4)
    write_late_checkpoint(early, runs / "late", last - 5)
    cases = {"fresh": ("false", 0), "resumed at step 10": (early, 10)}
    cases |= {f"resumed at step {last - 5:,} of {last:,}": (runs / "late", last - 5)}
    seconds = {name: [] for name in cases}
    for name, (resume, step) in [*cases.items()] * 3:
        started = partial(lambda step, pid: last_step(runs / "start") > step, step)
        seconds[name].append(run_until(started, [*options, "--resume", resume], pair, path, runs / "start"))
    print(f"| {samples:,} training records | median, s | lowest, s | highest, s |\n|---|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} |", " | ".join(f"{pick(values):.1f}" for pick in (statistics.median, min, max)), "|")


def write_late_checkpoint(early: Path, late: Path, step: int) -> None:
    """A copy of a checkpoint that says it is of a later step of the first epoch, with that many rows of metrics."""
    shutil.rmtree(late, ignore_errors=True)
    shutil.copytree(early, late, ignore=shutil.ignore_patterns(MANIFEST))
    state = torch.load(late / "training_state.pth", weights_only=True)
    state["step_count"] = step
    state["scheduler"] |= {"last_epoch": step, "_step_count": step + 1}
    torch.save(state, late / "training_state.pth")
    log = next((early.parent / "logs" / "csv").glob("version_*/metrics.csv"))
    header, *_, row = csv.reader(log.read_text().splitlines())
    place, many = header.index("step"), late.parent / "late.csv"
    with many.open("w", newline="") as file:
        rows = ([*row[:place], number, *row[place + 1 :]] for number in range(1, step + 1))
        csv.writer(file).writerows([header, *rows])
    (late / METRICS_MARK).write_text(json.dumps(MetricsMarker().mark(many, late.parent)))
    write_manifest(late, step, None)


PARTS = {"prepare": part_prepare, "train": part_train, "start": part_start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--records", type=int, default=2_000_000, help="to prepare and to start on")
    parser.add_argument("--train_records", type=int, default=500_000)
    parser.add_argument("--work_dir", type=Path, default=REPOSITORY / ".benchmark_data")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("idle", flush=True)
        time.sleep(3)
        began = time.perf_counter()
        open_stores(*arguments.child)
        return print(time.perf_counter() - began)
    if not SMOLLM2.exists():
        subprocess.run([sys.executable, "scripts/prepare_demo.py", "--out", ".demo"], cwd=REPOSITORY, check=True)
    work_dir = arguments.work_dir.resolve()
    (work_dir / "runs").mkdir(parents=True, exist_ok=True)
    for role, layers in (("teacher", 2), ("student", 1)):
        if not (work_dir / "pair" / role).exists():
            make_student(SMOLLM2, work_dir / "pair" / role, layers=layers)
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    print(*(f"{name} {version(name)}," for name in ("torch", "litgpt", "datasets", "pyarrow", "tokenizers")))
    print(f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}, Linux {platform.release()},", end=" ")
    print(f"{len(os.sched_getaffinity(0))} cores of {processor.partition(': ')[2]}")
    for part in arguments.parts:
        print(f"\n{inspect.cleandoc(PARTS[part].__doc__)}\n", flush=True)
        PARTS[part](work_dir, arguments)


if __name__ == "__main__":
    main()
