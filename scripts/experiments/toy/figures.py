"""Teacher and student as they were at some steps, and their errors at all steps."""

from pathlib import Path

import torch
from matplotlib import pyplot

from toy.setups import Setup
from toy.training import LABELS, Run

_COLOURS = {"fkl": "tab:blue", "rkl": "tab:red", "mix": "tab:green", "akl": "tab:orange", "static": "tab:grey"}
_BAND = torch.tensor([0.05, 0.95], dtype=torch.float64)
_PARTS = {"head": "head", "tail": "tail", "far_tail": "far tail"}
_LEAST_PROBABILITY = 1e-7


def draw_distributions(path: Path, setup: Setup, runs: dict[str, Run], scale: str) -> None:
    """The first seed's teacher and students, a row for each divergence and a column for each step."""
    size = (2.6 * len(setup.looked_at), 1.7 * len(runs) + 0.6)
    options = {"squeeze": False, "sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(runs), len(setup.looked_at), figsize=size, **options)
    for row, (name, run) in zip(axes, runs.items(), strict=True):
        teacher = run.teacher[0]
        for axis, step in zip(row, setup.looked_at, strict=True):
            axis.fill_between(range(len(teacher)), teacher, color="lightgrey", label="teacher")
            axis.plot(run.students[step][0], color=_COLOURS[name], linewidth=1.2, label="student")
            axis.set_yscale(scale)
            if scale == "log":
                axis.set_ylim(bottom=_LEAST_PROBABILITY)
        row[0].set_ylabel(LABELS[name].replace(" at ", "\nat "), fontsize=8)
    for axis, step in zip(axes[0], setup.looked_at, strict=True):
        axis.set_title(f"step {step}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("id", fontsize=8)
    axes[0, -1].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{setup.title}: probability of each id, first seed", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_errors(path: Path, setup: Setup, runs: dict[str, Run]) -> None:
    """Errors by step, means over seeds within bands that hold nine tenths of them."""
    parts = {part: title for part, title in _PARTS.items() if part in next(iter(runs.values())).measures}
    options = {"squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(1, len(parts), figsize=(3.9 * len(parts), 3.6), **options)
    for axis, (part, title) in zip(axes[0], parts.items(), strict=True):
        for name, run in runs.items():
            errors = run.measures[part][1:]
            steps = range(1, len(errors) + 1)
            style = "--" if name == "static" else "-"
            axis.plot(steps, errors.mean(dim=1), style, color=_COLOURS[name], linewidth=1.3, label=LABELS[name])
            low, high = errors.quantile(_BAND, dim=1)
            axis.fill_between(steps, low, high, color=_COLOURS[name], alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel="step", title=title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("sum of |p - q|")
    axes[0, 0].legend(fontsize=7, frameon=False, loc="lower left")
    seeds = len(next(iter(runs.values())).teacher)
    figure.suptitle(f"{setup.title}: error by step, mean and 5 % to 95 % of {seeds} seeds", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
