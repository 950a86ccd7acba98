"""What was measured, as Markdown tables and as a chart."""

import statistics
from pathlib import Path

from step_benchmark.job import ROWS, Job

LABELS = {
    "finetune_full": "litgpt finetune_full, no teacher",
    "finetune_full_fused": "the same, with a fused AdamW",
    "live": "this package, live teacher",
    "cached": "this package, cached teacher",
    "floor": "floor: bare PyTorch, no distillation",
    "trl_gkd": "TRL GKDTrainer",
    "trl_distillation": "TRL DistillationTrainer",
    "torchtune": "torchtune KD recipe's step",
}
Rounds = list[dict]
"""What a variant reported in each round, or its ``error``."""


def ratio(results: dict[str, Rounds], name: str, other: str) -> float | None:
    """How many times as fast as another variant: the median over all steps, each against the same step and round."""
    rounds = [r for r in zip(results[name], results[other], strict=True) if all("seconds" in result for result in r)]
    quotients = [
        theirs / mine for own, others in rounds for mine, theirs in zip(own["seconds"], others["seconds"], strict=True)
    ]
    return statistics.median(quotients) if quotients else None


def seconds_of(rounds: Rounds) -> float:
    """Seconds of all steps together, each the median of its rounds."""
    return sum(
        statistics.median(times) for times in zip(*(r["seconds"] for r in rounds if "seconds" in r), strict=True)
    )


def median(rounds: Rounds, field: str) -> float:
    return statistics.median(result[field] for result in rounds if field in result)


def pair_lines(job: Job, results: dict[str, Rounds], not_measured: dict[str, str]) -> list[str]:
    """A pair's table, its ratios and the settings of each variant."""
    steps = len(job.steps) - job.warmup
    lines = [
        f"\n### {job.pair}\n",
        f"{steps} steps of {ROWS} rows ({job.measured_tokens / steps:.0f} tokens, of which"
        f" {job.measured_response_tokens / steps:.0f} are response tokens) after {job.warmup} of warm-up; medians of"
        f" {len(results['floor'])} round(s). Ratios are medians over steps, each against the same rows in the same"
        " round.\n",
        "| | tokens/s | response tokens/s | s a step | speed / finetune_full | speed / live | peak GB"
        " | GB before models |",
        "|---" * 8 + "|",
    ]
    failures = dict(not_measured)
    for name, measured in results.items():
        if not any("seconds" in result for result in measured):
            failures[LABELS[name]] = measured[0]["error"]
            continue
        seconds = seconds_of(measured)
        ratios = " | ".join(text_of(ratio(results, name, other)) for other in ("finetune_full", "live"))
        lines.append(
            f"| {LABELS[name]} | {job.measured_tokens / seconds:.0f} | {job.measured_response_tokens / seconds:.0f}"
            f" | {seconds / steps:.2f} | {ratios} | {median(measured, 'peak'):.2f} | {median(measured, 'empty'):.2f} |"
        )
    lines += [f"| {name} | not measured: {reason} | | | | | | |" for name, reason in failures.items()]
    lines += [
        f"\nTime of a live step / time of the floor: {text_of(ratio(results, 'floor', 'live'))}."
        f" Speed with the cached teacher / finetune_full: {text_of(ratio(results, 'cached', 'finetune_full'))}.\n"
    ]
    settings = {
        name: next((r["settings"] for r in rounds if "settings" in r), None) for name, rounds in results.items()
    }
    return [*lines, *(f"- {LABELS[name]}: {text}." for name, text in settings.items() if text)]


def text_of(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def profile_lines(job: Job, profiles: dict[str, dict]) -> list[str]:
    """Where the time of a step goes, in milliseconds and as shares."""
    kept = {name: profile for name, profile in profiles.items() if "error" not in profile}
    lines = [f"\n### {job.pair}: where a step's time goes\n"]
    lines += [f"{LABELS[name]}: {profile['error']}\n" for name, profile in profiles.items() if "error" in profile]
    if not kept:
        return lines
    lines += ["| ms a step | " + " | ".join(LABELS[name] for name in kept) + " |", "|---" * (len(kept) + 1) + "|"]
    for category in next(iter(kept.values())):
        cells = [f"{p[category]:.0f} ({p[category] / sum(p.values()):.0%})" for p in kept.values()]
        lines.append(f"| {category} | " + " | ".join(cells) + " |")
    return lines


def draw(path: Path, title: str, pairs: dict[str, dict[str, Rounds]]) -> None:
    """Bars of tokens/s as a multiple of finetune_full's, for each pair."""
    from matplotlib import pyplot

    heights = [0.45 * len(results) + 0.9 for results in pairs.values()]
    options = {"squeeze": False, "height_ratios": heights, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(pairs), figsize=(9, sum(heights) + 0.8), **options)
    for axis, (pair, results) in zip(axes[:, 0], pairs.items(), strict=True):
        ratios = {name: ratio(results, name, "finetune_full") for name in results}
        shown = {name: value for name, value in ratios.items() if value is not None}
        colours = ["tab:blue" if name in ("live", "cached") else "lightgrey" for name in shown]
        bars = axis.barh([LABELS[name] for name in shown], list(shown.values()), color=colours)
        axis.bar_label(bars, [f"{value:.2f}" for value in shown.values()], padding=4)
        axis.invert_yaxis()
        axis.set_title(pair, loc="left", fontweight="bold")
        axis.set_xlim(0, 1.12 * max(shown.values(), default=1))
        axis.set_xlabel("tokens per second, as a multiple of litgpt finetune_full's on the same rows")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Speed of a training step, 6 records a step, float32\n{title}", fontsize=10)
    figure.savefig(path, dpi=150)
