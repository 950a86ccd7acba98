"""Time and peak memory of the loss over two LM heads, forward and backward, as ratios measured in one run.

Each case runs in a fresh process; the cases of a round follow each other, and ratios are medians over rounds. The floor
is the four matrix products that no implementation can avoid: both models' logits, and the gradients of the student's
hidden states and head. `direct` is the formula as published: whole logits, a full sort, autograd.
`--peers` adds the chunked losses of liger-kernel and torchtune, installed into a virtual environment of their own.
`--divergences` times the divergences of this package against its adaptive KL instead, with the same rounds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from loss_benchmark.cases import CASES, make_inputs

SHAPES = {
    "small": {"tokens": 1024, "vocab": 49_152, "student_width": 576, "teacher_width": 576},
    "wide": {"tokens": 256, "vocab": 151_936, "student_width": 896, "teacher_width": 3584},
}
PEERS_ENVIRONMENT = Path(__file__).parents[2] / ".venv-peers"
OWN_FUNCTION = "loss_benchmark.cases.own_forward_kl"


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run_case(case: str, divergence: str | None, shape: dict, repetitions: int) -> None:
    """Print, as JSON, the median seconds of a call and the peak MiB beyond inputs and their gradients."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options = {} if divergence is None else {"divergence": divergence}
    small = CASES[case](make_inputs(**{**shape, "tokens": 2, "vocab": 512}), **options)
    small()
    inputs = make_inputs(**shape)
    run = CASES[case](inputs, **options)
    leaves = [x for x in inputs.values() if x.requires_grad]
    before, seconds = memory_mib("VmRSS"), []
    gradients = sum(x.numel() * x.element_size() for x in leaves) / 2**20
    for repetition in range(repetitions + 1):
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        run()
        if repetition > 0:
            seconds.append(time.perf_counter() - start)
    peak = memory_mib("VmHWM") - before - gradients
    print(json.dumps({"seconds": statistics.median(seconds), "peak": max(peak, 0.0)}))


class Case(NamedTuple):
    """What one process times."""

    name: str
    """A key of ``CASES``."""
    divergence: str | None = None
    """None where the case has but one."""

    @property
    def label(self) -> str:
        return self.divergence or self.name


def measure(case: Case, shape: dict, repetitions: int) -> dict:
    python = PEERS_ENVIRONMENT / "bin/python" if case.name in ("liger", "torchtune") else sys.executable
    command = [python, __file__, "--case", case.name, "--shape", json.dumps(shape), "--repetitions", str(repetitions)]
    if case.divergence is not None:
        command += ["--divergence", case.divergence]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if result.returncode:
        raise SystemExit(f"{case.label} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_rounds(name: str, shape: dict, cases: list[Case], rounds: int, repetitions: int) -> dict[str, list[dict]]:
    """What each case, by its label, gave in each round."""
    results: dict[str, list[dict]] = {case.label: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            print(f"\r{name}: round {number + 1} of {rounds}, {case.label:40}", end="", file=sys.stderr, flush=True)
            results[case.label].append(measure(case, shape, repetitions))
    print("\r" + " " * 80 + "\r", end="", file=sys.stderr)
    print(f"\n{name}: " + ", ".join(f"{key} {value:,}" for key, value in shape.items()))
    return results


def ratios(field: str, above: list[dict], below: list[dict]) -> list[float]:
    """Of each round."""
    return [a[field] / b[field] for a, b in zip(above, below, strict=True)]


def print_cases(results: dict[str, list[dict]]) -> None:
    print(f"{'case':12}{'seconds':>9}{'/ products':>12}{'direct / it':>13}{'peak MiB':>10}{'/ direct':>10}")
    for case, measured in results.items():
        seconds, peak = (statistics.median(r[field] for r in measured) for field in ("seconds", "peak"))
        to_products = statistics.median(ratios("seconds", measured, results["products"]))
        direct_to_it = statistics.median(ratios("seconds", results["direct"], measured))
        memory = statistics.median(ratios("peak", measured, results["direct"]))
        print(f"{case:12}{seconds:9.3f}{to_products:12.2f}{direct_to_it:13.2f}{peak:10.0f}{memory:10.2f}")


def print_divergences(results: dict[str, list[dict]]) -> None:
    width = max(map(len, results)) + 1
    print(f"{'divergence':{width}}{'seconds':>9}{'/ akl':>7}{'of rounds':>13}{'peak MiB':>10}")
    for name, measured in results.items():
        seconds, peak = (statistics.median(r[field] for r in measured) for field in ("seconds", "peak"))
        to_akl = ratios("seconds", measured, results["akl"])
        spread = f"{min(to_akl):.2f}-{max(to_akl):.2f}"
        print(f"{name:{width}}{seconds:9.3f}{statistics.median(to_akl):7.2f}{spread:>13}{peak:10.0f}")


def memory_by_tokens(shape: dict) -> None:
    peaks = {n: measure(Case("ours"), {**shape, "tokens": n}, 1)["peak"] for n in (256, 1024, 4096)}
    print("\npeak MiB of ours beyond inputs and gradients by tokens: " + str({n: round(p) for n, p in peaks.items()}))


def divergence_cases(names: list[str], compiled: bool) -> list[Case]:
    from litgpt_akl.loss.objective import DivergenceName

    if names == ["all"]:
        names = [*get_args(DivergenceName), OWN_FUNCTION]
    return [Case("ours" if compiled else "eager", name) for name in dict.fromkeys(("akl", *names))]


def install_peers() -> None:
    """Make the peers' virtual environment once, with the torch that is installed here."""
    if PEERS_ENVIRONMENT.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", PEERS_ENVIRONMENT], check=True)
    version = torch.__version__.split("+")[0]
    for packages in ([f"torch=={version}"], ["liger-kernel", "torchtune", "torchao==0.9.0", f"torch=={version}"]):
        subprocess.run([PEERS_ENVIRONMENT / "bin/pip", "install", "-q", *packages], check=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all cases (default: 3)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls in each process (default: 5)")
    parser.add_argument("--only", choices=SHAPES, help="measure this shape only")
    parser.add_argument("--peers", action="store_true", help="add liger-kernel and torchtune")
    parser.add_argument(
        "--divergences",
        nargs="+",
        metavar="NAME",
        help="names or import paths; or all, which are the names and an own function",
    )
    parser.add_argument("--compiled", action="store_true", help="time --divergences with torch.compile")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--divergence", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peers and arguments.divergences:
        parser.error("--peers are not measured with --divergences")
    if arguments.compiled and not arguments.divergences:
        parser.error("--compiled is for --divergences; the usual cases have both")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.case:
        return run_case(arguments.case, arguments.divergence, arguments.shape, arguments.repetitions)
    if arguments.divergences:
        cases, print_results = divergence_cases(arguments.divergences, arguments.compiled), print_divergences
    else:
        cases, print_results = [Case(name) for name in ("products", "ours", "eager", "direct")], print_cases
    if arguments.peers:
        install_peers()
        cases += [Case("liger"), Case("torchtune")]
    cores = len(os.sched_getaffinity(0))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {cores} cores, {time.strftime('%Y-%m-%d')}")
    for name, shape in SHAPES.items():
        if arguments.only in (None, name):
            print_results(measure_rounds(name, shape, cases, arguments.rounds, arguments.repetitions))
    if not arguments.divergences:
        memory_by_tokens(SHAPES["small"])


if __name__ == "__main__":
    main()
