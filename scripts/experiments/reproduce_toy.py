"""The toy experiments of arXiv 2404.02657, run again over many seeds, and which of the paper's claims they bear out.

A student of free logits is trained by Adam on a known distribution: two Gaussians, or half of one with a long tail.
Prints a table of the claims, and writes it (claims.md), the means and spreads of every step (steps.csv) and figures.
Beside the paper's divergences there is a static mix with adaptive KL's own mean weight: what adaptive KL does not do
better than this, it does not owe to adapting. Takes about a minute.
"""

import argparse
import csv
from importlib.util import find_spec
from pathlib import Path

import torch
from toy.claims import Results, claims, table
from toy.setups import SETUPS
from toy.training import train_all


def write_steps(path: Path, results: Results) -> None:
    """A line for each set-up, divergence, step and measure, with mean, standard deviation, least and largest."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["setup", "divergence", "step", "measure", "mean", "deviation", "least", "largest"])
        for setup, runs in results.items():
            for divergence, run in runs.items():
                for measure, values in run.measures.items():
                    columns = (values.mean(1), values.std(1, correction=0), values.amin(1), values.amax(1))
                    for step, numbers in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
                        writer.writerow([setup, divergence, step, measure, *(f"{x:.6g}" for x in numbers)])


def draw(directory: Path, results: Results) -> None:
    from toy.figures import draw_distributions, draw_errors

    for name, runs in results.items():
        setup = SETUPS[name]
        for scale in ("linear",) if setup.far_from is None else ("linear", "log"):
            draw_distributions(directory / f"{name}-{scale}.png", setup, runs, scale)
        draw_errors(directory / f"{name}-errors.png", setup, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, help="students and noisy teachers (default: 30)")
    parser.add_argument(
        "--output", type=Path, default=Path(".toy"), help="a folder for what is written (default: .toy)"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    if find_spec("matplotlib") is None:
        parser.error("figures need matplotlib: pip install matplotlib")
    torch.set_num_threads(1)  # the tensors are so small that more threads cost time
    results = {name: train_all(setup, arguments.seeds) for name, setup in SETUPS.items()}
    text = table(claims(results))
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "claims.md").write_text(text + "\n", encoding="utf-8")
    write_steps(arguments.output / "steps.csv", results)
    draw(arguments.output, results)


if __name__ == "__main__":
    main()
