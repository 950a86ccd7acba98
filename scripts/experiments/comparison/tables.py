"""The results as Markdown."""

import math

from comparison.methods import METHODS, REFERENCE, STATIC_MIX
from comparison.plan import Standing
from comparison.results import METRICS, Results
from comparison.statistics import Interval


def tables(results: Results) -> str:
    """All tables, each with what a reader must know to judge it."""
    return "\n".join(
        [
            *heading(results),
            *means(results),
            *paired_differences(results),
            *conclusions(results),
            *learning_rates(results),
        ]
    )


def heading(results: Results) -> list[str]:
    settings = results.settings
    weight = dict(results.standings[STATIC_MIX].runs[0].options)["mix_ratio"] if _has(results, STATIC_MIX) else None
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    return [
        f"## {settings.pair}: {settings.steps} steps of {settings.batch} records, kd_ratio {settings.kd_ratio:g},"
        f" {len(settings.seeds)} training seeds",
        "",
        f"{versions}. {settings.train_records} records for training, in another order for each seed;"
        f" {settings.validation_records} choose the learning rate; the numbers are of {settings.test_records} others,"
        " per response token, KL and cross-entropy in nats, and ROUGE-L of"
        f" {settings.prompts} sampled answers."
        + (f" AKL's mean h over all training tokens is {weight:.3f}." if weight is not None else ""),
    ]


def _has(results: Results, method: str) -> bool:
    return method in results.standings and bool(results.standings[method].runs)


def means(results: Results) -> list[str]:
    """Means and standard deviations."""
    lines = [
        "",
        "Mean ± standard deviation over the seeds:",
        "",
        "| method | lr | " + " | ".join(METRICS[name].label for name in results.metrics) + " |",
        "|---" * (2 + len(results.metrics)) + "|",
    ]
    for method, standing in results.standings.items():
        rate = "-" if standing.rate is None else f"{standing.rate:g}{' (edge)' if standing.at_edge else ''}"
        cells = [_spread_text(results, method, metric) for metric in results.metrics]
        missing = len(results.settings.seeds) - len(results.tests[method])
        label = METHODS[method].label + (f" ({missing} seeds missing)" if missing else "")
        lines.append(f"| {label} | {rate} | " + " | ".join(cells) + " |")
    return lines


def _spread_text(results: Results, method: str, metric: str) -> str:
    found, digits = results.spread(method, metric), METRICS[metric].digits
    if found is None:
        return "-"
    return f"{found[0]:.{digits}f}" + ("" if math.isnan(found[1]) else f" ± {found[1]:.{digits}f}")


def paired_differences(results: Results) -> list[str]:
    """To AKL, with their intervals."""
    others = [method for method in results.standings if method != REFERENCE]
    lines = [
        "",
        "Difference to AKL with the same seed: mean [95 % interval by Student's t], bold where it excludes 0:",
        "",
        "| method - AKL | " + " | ".join(METRICS[name].label for name in results.metrics) + " |",
        "|---" * (1 + len(results.metrics)) + "|",
    ]
    for method in others:
        cells = [_interval_text(results.difference(method, name), METRICS[name].digits) for name in results.metrics]
        lines.append(f"| {METHODS[method].label} | " + " | ".join(cells) + " |")
    return lines


def _interval_text(found: Interval | None, digits: int) -> str:
    if found is None:
        return "-"
    text = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.excludes_zero else text


def conclusions(results: Results) -> list[str]:
    """What the intervals say, and no more."""
    others, lines = [method for method in results.standings if method != REFERENCE], [""]
    for metric in results.metrics:
        groups: dict[str, list[str]] = {"below AKL": [], "above AKL": [], "not told apart from AKL": []}
        for method in others:
            found = results.difference(method, metric)
            if found is not None:
                place = "not told apart from AKL"
                if found.excludes_zero:
                    place = "below AKL" if found.mean < 0 else "above AKL"
                groups[place].append(METHODS[method].label)
        parts = [f"{place}: {', '.join(labels)}" for place, labels in groups.items() if labels]
        lines.append(f"- {METRICS[metric].label}: {'; '.join(parts)}.")
    count = len(others) * len(results.metrics)
    return [
        *lines,
        "",
        f"Each interval is for itself: of {count}, about {count / 20:.0f} would exclude 0 if no method differed from"
        f" AKL. They are of the {len(results.settings.seeds)} training seeds, with one set of held-out records.",
    ]


def learning_rates(results: Results) -> list[str]:
    """The grid, and what was chosen."""
    rates = sorted({rate for standing in results.standings.values() for rate in standing.scores})
    lines = [
        "",
        "Learning rates, chosen for each method by the mean of forward and reverse KL on the validation records, with"
        " the first seed (nats per token). Where the best lay at the edge of the grid, one rate beyond it was tried;"
        " (edge): the best is still at one.",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (1 + len(rates)) + "|",
    ]
    for method, standing in results.standings.items():
        lines.append(f"| {METHODS[method].label} | " + " | ".join(_score_text(standing, r) for r in rates) + " |")
    return lines


def _score_text(standing: Standing, rate: float) -> str:
    if rate not in standing.scores:
        return ""
    value = standing.scores[rate]
    text = "not finite" if value == -math.inf else f"{-value:.3f}"
    return f"**{text}**" if rate == standing.rate else text
