"""What this package does on GPUs, compared with itself: one table, of which nothing is claimed that was not measured.

Each row is a run of `litgpt finetune_akl` of a few steps on the same pair and data. Needs a GPU, and for rows with more
devices more of them; what could not be measured is said.

    python scripts/benchmarks/check_gpu.py                      # SmolLM2-135M-Instruct into half of its layers, on PIQA
    python scripts/benchmarks/check_gpu.py --student DIR --teacher DIR --data my.json -- --train.max_seq_length 1024
"""

import argparse
import csv
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST_STEPS = 5
"""Not counted in tokens per second: compilers and allocators warm up."""

FLOAT32 = ["--precision", "32-true", "--teacher.precision", "32-true", "--distill.compile", "false"]
CASES = {
    "float32": FLOAT32,
    "filling a teacher cache": [*FLOAT32, "--teacher.cache_dir", "{directory}/cache"],
    "reading it": [*FLOAT32, "--teacher.cache_dir", "{directory}/cache", "--teacher.cache_mode", "read"],
    "loss compiled": ["--precision", "32-true", "--teacher.precision", "32-true", "--distill.compile", "true"],
    "blocks compiled": ["--precision", "32-true", "--teacher.precision", "32-true", "--compile", "true"],
    "activations checkpointed": [*FLOAT32, "--activation_checkpointing", "true"],
    "bf16-mixed": ["--precision", "bf16-mixed"],
    "bf16-true": ["--precision", "bf16-true"],
    "bf16-mixed, teacher in int8": ["--precision", "bf16-mixed", "--teacher.quantize", "int8"],
    "bf16-mixed, teacher in nf4": ["--precision", "bf16-mixed", "--teacher.quantize", "nf4"],
}
"""On one device. The first is what all are compared with."""
SHARDED = ("float32", "bf16-mixed", "bf16-true")
"""Also on all devices."""
OFFLOADED = "bf16-mixed, teacher in CPU memory"
"""On all devices only."""


def run(options: list[str], arguments: argparse.Namespace, out_dir: Path) -> tuple[dict, list[dict], str]:
    """The student's weights, the metrics of each step, and the GB of a device that the run predicted."""
    command = [
        *(sys.executable, "-m", "litgpt", "finetune_akl", arguments.student),
        *("--teacher_checkpoint_dir", arguments.teacher, "--out_dir", out_dir, "--seed", "1"),
        *("--data", "JSON", "--data.json_path", arguments.data, "--data.mask_prompt", "true"),
        *("--data.num_workers", "0", "--data.val_split_fraction", "0.02", "--train.max_seq_length", "512"),
        *("--train.max_steps", arguments.steps, "--train.epochs", "1000", "--train.lr_warmup_steps", "2"),
        *("--train.global_batch_size", "16", "--train.micro_batch_size", "4", "--train.save_interval", "null"),
        *("--eval.initial_validation", "false", "--eval.final_validation", "false", "--eval.interval", "100000"),
        *("--optimizer.lr", "2e-4", *(option.format(directory=out_dir.parent) for option in options)),
        *arguments.options,
    ]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=3600)
    if finished.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with status {finished.returncode}:\n{finished.stderr}")
    with next((out_dir / "logs" / "csv").glob("version_*/metrics.csv")).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    weights = torch.load(out_dir / "final" / "lit_model.pth", mmap=True, weights_only=True)
    return weights, rows, re.search(r"together +([\d.]+)", finished.stdout)[1]


def describe(name: str, found: tuple, expected: tuple) -> str:
    """A row: how far the weights and the losses are from the first run's, speed and memory."""
    weights, rows, predicted = found
    pairs = [(weights[key].float(), weight.float()) for key, weight in expected[0].items()]
    moved = max((one - other).abs().max().item() for one, other in pairs)
    losses = [(float(row["loss"]), float(other["loss"])) for row, other in zip(rows, expected[1], strict=True)]
    loss = max(abs(one - other) / other for one, other in losses)
    speeds = [float(row["tokens_per_second"]) for row in rows[FIRST_STEPS:]]
    memory = max(float(row["memory_gb"]) for row in rows)
    speed = sorted(speeds)[len(speeds) // 2] if speeds else math.nan
    return f"| {name} | {moved:.1e} | {loss:.2%} | {speed:,.0f} | {predicted} | {memory:.3f} |"


def main() -> None:
    demo = REPOSITORY / ".demo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, default=demo / "student")
    parser.add_argument("--teacher", type=Path, default=demo / "SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=demo / "piqa" / "train.json", help="for litgpt.data.JSON")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the first is always run")
    parser.add_argument("--on_cpu", type=int, metavar="DEVICES", help="to see that this script works; says so")
    parser.add_argument("options", nargs="*", help="after --: more options of finetune_akl, for every run")
    arguments = parser.parse_args()
    devices = torch.cuda.device_count() if arguments.on_cpu is None else arguments.on_cpu
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "litgpt", "lightning"))
    print(f"{packages}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    if devices == 0:
        print("There is no GPU here: nothing was measured. Not measured: " + ", ".join(CASES) + ", several devices.")
        return
    name = f"{torch.cuda.get_device_name()} x {devices}" if arguments.on_cpu is None else f"a CPU, {devices} processes"
    print(f"On {name}; {arguments.steps} steps; the differences are those to the first row.\n")
    if arguments.on_cpu is not None:
        print("Memory there is that of the whole process, its libraries included; nothing was measured on a GPU.\n")
    print("| | weights, at most | loss, at most | tokens/s, median | GB a device, predicted | measured |")
    print("|---|---|---|---|---|---|")
    first = next(iter(CASES))
    with tempfile.TemporaryDirectory() as directory:
        expected = None
        for case in dict.fromkeys([first, *arguments.cases]):
            found = run(CASES[case], arguments, Path(directory) / case)
            expected = expected or found
            print(describe(f"{case}, 1 device", found, expected), flush=True)
            if case in SHARDED and devices > 1:
                options = [*CASES[case], "--devices", str(devices)]
                found = run(options, arguments, Path(directory) / f"{case}-sharded")
                print(describe(f"{case}, {devices} devices", found, expected), flush=True)
        if devices > 1 and arguments.on_cpu is None:
            options = [*CASES["bf16-mixed"], "--teacher.cpu_offload", "true", "--devices", str(devices)]
            found = run(options, arguments, Path(directory) / "offloaded")
            print(describe(f"{OFFLOADED}, {devices} devices", found, expected), flush=True)
    if devices == 1:
        print("\nNot measured, since there is one device: several devices.")


if __name__ == "__main__":
    main()
