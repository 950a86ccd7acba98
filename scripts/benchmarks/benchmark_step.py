"""Speed and memory of a whole training step, as ratios measured in one run.

Every variant takes the same rows in the same order: 6 records of PIQA a step, put together as a run of this package
does, prompts masked, in float32 with AdamW and 2 threads. Each runs in a fresh process, and the variants of a round
follow each other, so that a machine that slows down hits all of them. Rounds give medians.

`finetune_full` is LitGPT's own command on the same student, as it is and with the fused AdamW that all others have;
`live` and `cached` are `litgpt finetune_akl` with the teacher at work and with its cache; `floor` is bare PyTorch: the
teacher's forward, and the student's training by cross-entropy. The pair `smollm2` is that of the demo, `wide` has
random weights in the shapes of Qwen2.5-0.5B.
`--peers` adds TRL and torchtune, installed into virtual environments of their own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts' material is

from step_benchmark import peers
from step_benchmark.job import THREADS, Job
from step_benchmark.material import prepare_jobs
from step_benchmark.tables import draw, pair_lines, profile_lines

BENCHMARKS = Path(__file__).resolve().parent
SCRIPTS, REPOSITORY = BENCHMARKS.parents[:2]
PAIRS = ("smollm2", "wide")
OURS = ("finetune_full", "finetune_full_fused", "live", "cached", "floor")
TIME_LIMIT = 1800


def run(command: list[str], own: bool = True) -> dict:
    """What a runner printed last, or the ``error`` that it ended with."""
    paths = [str(BENCHMARKS), *([str(SCRIPTS), str(REPOSITORY)] if own else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(THREADS)}
    try:
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {TIME_LIMIT} s"}
    except OSError as error:
        return {"error": str(error)}
    if finished.returncode == 0:
        return json.loads(finished.stdout.splitlines()[-1])
    errors = [line for line in finished.stderr.splitlines() if line.strip()]
    return {"error": errors[-1].strip()[:160] if errors else f"ended with status {finished.returncode}"}


def measure(name: str, job: Path, cache: Path, module: str = "variants") -> dict:
    if name in peers.MODULES:
        return run(peers.command_of(name, job), own=False)
    options = ["--cache", str(cache)] if name == "cached" else []
    return run([sys.executable, "-m", f"step_benchmark.{module}", name, str(job), *options])


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def filled(pair: str, job: Path, cache: Path) -> dict:
    say(f"{pair}: filling the cache")
    return measure("cached", job, cache)


def measure_rounds(pair: str, job: Path, names: list[str], rounds: int, cache: Path) -> dict[str, list[dict]]:
    results: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            results[name].append(measure(name, job, cache))
            result = results[name][-1]
            outcome = result.get("error") or f"{sum(result['seconds']):.1f} s: {result['seconds']}"
            say(f"{pair}: round {number + 1} of {rounds}, {name}: {outcome}")
    return results


def measure_pairs(jobs: dict[str, Path], arguments: argparse.Namespace, directory: str) -> Iterator[tuple[str, dict]]:
    names = [*OURS, *(peers.MODULES if arguments.peers else ())]
    for pair, job in jobs.items():
        cache = Path(directory) / pair
        result = filled(pair, job, cache)
        if "seconds" in result:
            say(f"{pair}: steps that fill the cache take {sum(result['seconds']):.1f} s")
        yield pair, measure_rounds(pair, job, names, arguments.rounds, cache)


def profile_pairs(jobs: dict[str, Path], directory: str) -> Iterator[str]:
    for pair, path in jobs.items():
        cache = Path(directory) / pair
        filled(pair, path, cache)
        profiles = {}
        for name in ("live", "cached", "floor"):
            say(f"{pair}: profiling {name}")
            profiles[name] = measure(name, path, cache, module="profiling")
        yield from profile_lines(Job.read(path), profiles)


def machine() -> str:
    """Date, versions and machine in a line."""
    information = Path("/proc/cpuinfo").read_text()
    processor = next((line.split(":")[1].strip() for line in information.splitlines() if "model name" in line), "CPU")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "litgpt"))
    return (
        f"{time.strftime('%Y-%m-%d')}, {versions}, Python {platform.python_version()}, {processor},"
        f" {len(os.sched_getaffinity(0))} cores, {THREADS} threads"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=(*PAIRS, "both"), default="both", help="which models (default: both)")
    parser.add_argument("--steps", type=int, default=12, help="measured steps in each process (default: 12)")
    parser.add_argument(
        "--warmup", type=int, default=8, help="steps before them, some of which compile the loss (default: 8)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all variants (default: 3)")
    parser.add_argument("--peers", action="store_true", help="add TRL and torchtune")
    parser.add_argument("--profile", action="store_true", help="tell instead where the time of our steps goes")
    parser.add_argument("--output", type=Path, help="write the table and a chart into this directory")
    parser.add_argument("--demo", type=Path, default=REPOSITORY / ".demo", help="the demo's material (default: .demo)")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.warmup < 1 or arguments.rounds < 1:
        parser.error("--steps, --warmup and --rounds must be at least 1")
    if arguments.output and not arguments.profile and find_spec("matplotlib") is None:
        parser.error("--output draws a chart: pip install matplotlib")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.peers:
        peers.install_peers()
    pairs = PAIRS if arguments.pair == "both" else (arguments.pair,)
    jobs = prepare_jobs(pairs, arguments.demo, REPOSITORY / ".benchmark_step", arguments.warmup, arguments.steps)
    lines = [machine()]
    with tempfile.TemporaryDirectory() as directory:
        if arguments.profile:
            lines += profile_pairs(jobs, directory)
        else:
            results = dict(measure_pairs(jobs, arguments, directory))
            not_measured = peers.NOT_MEASURED if arguments.peers else {}
            for pair, measured in results.items():
                lines += pair_lines(Job.read(jobs[pair]), measured, not_measured)
    text = "\n".join(lines)
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = "profile" if arguments.profile else "step"
        (arguments.output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        if not arguments.profile:
            draw(arguments.output / "step.png", lines[0], results)


if __name__ == "__main__":
    main()
