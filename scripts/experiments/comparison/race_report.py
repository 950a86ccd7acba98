"""A race's results as Markdown and as data for machines."""

import math
from dataclasses import asdict

from comparison.methods import METHODS, REFERENCE, STATIC_MIX
from comparison.race import Contestant, Plan, Progress
from comparison.results import METRICS
from comparison.statistics import Interval, holm, p_value, paired, spread


class Finals:
    """What the tests of the finals gave, by contestant, metric and training seed."""

    def __init__(self, plan: Plan, found: Progress) -> None:
        store = plan.stores[plan.race.settings.steps]
        self.race, self.runs = plan.race, found.runs
        self.tests = {
            each: {run.seed: test for run in runs if (test := store.test(run)) is not None}
            for each, runs in found.runs.items()
        }
        self.reference = Contestant(REFERENCE, plan.race.temperatures[0], plan.race.kd_ratios[0])

    def values(self, each: Contestant, metric: str) -> dict[int, float]:
        """By training seed, in the unit of the column."""
        tests = self.tests.get(each, {}).items()
        return {seed: test[metric] * METRICS[metric].unit for seed, test in tests if metric in test}

    @property
    def metrics(self) -> list[str]:
        """Those that were measured."""
        return [name for name in METRICS if any(self.values(each, name) for each in self.tests)]

    def differences(self, metric: str) -> dict[Contestant, tuple[Interval, float]]:
        """To AKL as the paper has it: the interval of each, and its p value corrected for their number."""
        reference = self.values(self.reference, metric)
        others = {each: self.values(each, metric) for each in self.tests if each != self.reference}
        found = {each: interval for each, values in others.items() if (interval := paired(values, reference))}
        corrected = holm([p_value(others[each], reference) for each in found])
        return {each: (interval, p) for (each, interval), p in zip(found.items(), corrected, strict=True)}

    def claim(self, metric: str) -> dict[float, Interval]:
        """By temperature, AKL's static mix with its mean h, less AKL."""
        found = {}
        for t in self.race.temperatures:
            pair = (Contestant(name, t, self.race.kd_ratios[0]) for name in (STATIC_MIX, REFERENCE))
            interval = paired(*(self.values(each, metric) for each in pair))
            if interval is not None:
                found[t] = interval
        return found


def report(plan: Plan, found: Progress) -> str:
    """All tables, each with what a reader must know to judge it."""
    race, settings, finals = plan.race, plan.race.settings, Finals(plan, found)
    versions = ", ".join(f"{name} {number}" for name, number in plan.stores[settings.steps].versions.items())
    lines = [
        f"## {settings.pair}: {len(race.contestants)} objectives, {len(settings.seeds)} training seeds in the finals",
        "",
        f"{versions}. {settings.batch} records a step, {settings.train_records} for training;"
        f" {settings.validation_records} decide who goes on, {settings.test_records} others are the finals' test."
        " KL and cross-entropy are in nats a response token, at temperature 1.",
        *_rates(found),
        *_rungs(plan, found),
    ]
    if finals.metrics:
        lines += [*_means(finals), *_differences(finals), *_claims(finals)]
    return "\n".join(lines)


def _rates(found: Progress) -> list[str]:
    text = ", ".join(f"{METHODS[name].label} {rate:g}" for name, rate in found.rates.items())
    return ["", f"Learning rates, each method's best at temperature 1 by the first rung's steps: {text}."]


def _rungs(plan: Plan, found: Progress) -> list[str]:
    """The mean of both KL on the validation records, by rung, the best first; a dash after one was left out."""
    heads = [f"{steps} steps" for steps in plan.race.rungs[: len(found.scores)]]
    if not heads:
        return []
    order = sorted(found.scores[0], key=lambda each: [-rung.get(each, -math.inf) for rung in reversed(found.scores)])
    lines = [
        "",
        "The mean of forward and reverse KL on the validation records, with the first seed; a dash where one was out:",
        "",
        f"| objective | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for each in order:
        cells = [_written(-rung[each]) if each in rung else "-" for rung in found.scores]
        lines.append(f"| {each} | {' | '.join(cells)} |")
    return lines


def _written(value: float) -> str:
    return "failed" if math.isinf(value) else f"{value:.3f}"


def _means(finals: Finals) -> list[str]:
    names = finals.metrics
    lines = [
        "",
        f"The finals, {finals.race.settings.steps} steps: mean ± standard deviation over the seeds:",
        "",
        f"| objective | {' | '.join(METRICS[name].label for name in names)} |",
        "|---" * (1 + len(names)) + "|",
    ]
    for each in finals.tests:
        cells = [_spread_text(finals.values(each, name), METRICS[name].digits) for name in names]
        lines.append(f"| {each} | {' | '.join(cells)} |")
    return lines


def _spread_text(values: dict[int, float], digits: int) -> str:
    if not values:
        return "-"
    mean, deviation = spread(list(values.values()))
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def _differences(finals: Finals) -> list[str]:
    names, found = finals.metrics, {name: finals.differences(name) for name in finals.metrics}
    lines = [
        "",
        f"Less {finals.reference} with the same seed: mean [95 % interval by Student's t], p corrected by Holm for the"
        " number of objectives; bold where that is below 0.05:",
        "",
        f"| objective | {' | '.join(METRICS[name].label for name in names)} |",
        "|---" * (1 + len(names)) + "|",
    ]
    for each in finals.tests:
        if each != finals.reference:
            cells = [_difference_text(found[name].get(each), METRICS[name].digits) for name in names]
            lines.append(f"| {each} | {' | '.join(cells)} |")
    return lines


def _difference_text(found: tuple[Interval, float] | None, digits: int) -> str:
    if found is None:
        return "-"
    (mean, low, high), p = found
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], p {p:.2g}"
    return f"**{text}**" if p < 0.05 else text


def _claims(finals: Finals) -> list[str]:
    lines = ["", "The static mix at AKL's own mean h less AKL, by temperature [95 % interval]:", ""]
    for name in ("forward_kl", "reverse_kl", "agreement"):
        parts = [
            f"T {t:g}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for t, (mean, low, high) in finals.claim(name).items()
        ]
        if parts:
            lines.append(f"- {METRICS[name].label}: {'; '.join(parts)}.")
    return lines if len(lines) > 3 else []


def as_data(plan: Plan, found: Progress) -> dict:
    """Everything, for machines."""
    finals = Finals(plan, found)
    return {
        "race": asdict(plan.race),
        "rates": found.rates,
        "rungs": [{str(each): None if math.isinf(s) else -s for each, s in rung.items()} for rung in found.scores],
        "finals": {str(each): tests for each, tests in finals.tests.items()},
    }
