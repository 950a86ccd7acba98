"""Several runs beside each other: what differs, which is best, and whether that is more than chance."""

import math
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np

from litgpt_akl.config.recipe import options_of
from litgpt_akl.report.history import History
from litgpt_akl.report.summary import CROSS_ENTROPY, MEASURES, last_step, value, write

NOT_COMPARED = ("out_dir", "resume", "overwrite", "accept_changes", "log.", "logger_name", "save_minutes", "keep_last")
"""Options that say nothing of what is trained."""
OTHER_DATA = 1e-3
"""Relative difference of the teacher's cross-entropies from which two validations were of other data."""


def comparison(histories: Sequence[History]) -> dict[str, Any]:
    """Several runs beside each other: a sentence, what differs, the best of each measure, warnings, and repeats."""
    options = [_options(history) for history in histories]
    names = [name for name in dict.fromkeys(chain(*options)) if len({of.get(name) for of in options}) > 1]
    of_all = {measure: [value(of, measure.column) for of in histories] for measure in (*MEASURES, CROSS_ENTROPY)}
    of_all = {measure: values for measure, values in of_all.items() if np.isfinite(values).any()}
    rows = []
    for number, (history, own) in enumerate(zip(histories, options, strict=True)):
        cells = [(own.get(name, "-"), False) for name in names]
        for measure, values in of_all.items():
            best = np.nanmin(values) if measure.lower_is_better else np.nanmax(values)
            cells.append((write(measure, values[number]), values[number] == best and len({*values}) > 1))
        rows.append({"name": history.name, "step": f"{last_step(history):,}", "cells": cells})
    heads = [(name, "") for name in names]
    heads += [(measure.title, "\u2193" if measure.lower_is_better else "\u2191") for measure in of_all]
    found = [(value(of, "forward_kl"), of.name) for of in histories if math.isfinite(value(of, "forward_kl"))]
    text = "No run has validated its student."
    if found:
        ranks = [f"{name} with {kl:.3f}" for kl, name in sorted(found)[:3]]
        text = f"Closest to the teacher by forward KL, in nats per token, is {', then '.join(ranks)}."
    shown = {"verdict": text, "heads": heads, "rows": rows, "warnings": _warnings(histories)}
    return {**shown, "repeats": _repeats(histories, options)}


def _options(history: History) -> dict[str, str]:
    return {
        name.replace(".init_args", ""): str(given)
        for name, given in options_of(history.recipe).items()
        if not name.startswith(NOT_COMPARED)
    }


def _warnings(histories: Sequence[History]) -> list[str]:
    """What makes numbers of these runs no measure of each other."""
    found = []
    first, *others = histories
    for other in others:
        teachers = [of.recipe.get("teacher_checkpoint_dir") for of in (first, other)]
        entropies = [value(of, "teacher_cross_entropy") for of in (first, other)]
        steps = [last_step(of) for of in (first, other)]
        both = f"{first.name} and {other.name}"
        if teachers[0] != teachers[1]:
            found.append(f"{both} have other teachers: each KL is to a run's own teacher.")
        elif abs(entropies[0] - entropies[1]) > OTHER_DATA * entropies[0]:
            found.append(
                f"{both} were validated on other data: the teacher's cross-entropy is {entropies[0]:.3f} in one and"
                f" {entropies[1]:.3f} in the other. Their numbers cannot be compared."
            )
        kept = [f"{of.kept_ids:,} ids and all others as one" if of.kept_ids else "all ids" for of in (first, other)]
        if kept[0] != kept[1]:
            found.append(
                f"{both}: KL is on {kept[0]} in one and on {kept[1]} in the other. Their KLs cannot be compared."
            )
        if steps[0] != steps[1]:
            found.append(f"{both} are at different steps: {steps[0]:,} and {steps[1]:,}.")
    return found


def _repeats(histories: Sequence[History], options: list[dict[str, str]]) -> list[list[str]]:
    """Differences between runs that were repeated with other seeds, with the interval that holds them in 95 of 100."""
    groups: dict[tuple, dict[str, History]] = {}
    for history, own in zip(histories, options, strict=True):
        key = tuple((name, given) for name, given in own.items() if not name.endswith("seed"))
        groups.setdefault(key, {})[own.get("seed", history.name)] = history
    repeated = [(key, group) for key, group in groups.items() if len(group) > 1]
    same = set.intersection(*(set(key) for key, _ in repeated)) if repeated else set()
    titled = []
    for key, group in repeated:
        own = [f"{name.rpartition('.')[2]} {given}" for name, given in key if (name, given) not in same]
        titled.append((", ".join(own), group))
    rows = []
    for (title, one), (other_title, other) in combinations(titled, 2):
        for measure in MEASURES:
            samples = [{seed: value(of, measure.column) for seed, of in group.items()} for group in (one, other)]
            low, middle, high = difference(*samples)
            if not math.isfinite(middle):
                continue
            means = [measure.written.format(np.mean([*of.values()])) for of in samples]
            written, *ends = (measure.written.format(each) for each in (middle, low, high))
            runs = f"{title} ({len(one)}), {other_title} ({len(other)})"
            clear = "" if low > 0 or high < 0 else "not told apart"
            rows.append([measure.title, runs, ", ".join(means), written, " to ".join(ends), clear])
    return rows


def difference(one: dict[str, float], other: dict[str, float]) -> tuple[float, float, float]:
    """Lower end, middle and upper end of the 95 % interval of a difference of means.

    Student's t of the differences where both have the same seeds, else Welch's.
    """
    if one.keys() == other.keys():
        values = np.array([one[seed] - other[seed] for seed in one])
        middle, error, freedom = values.mean(), values.std(ddof=1) / math.sqrt(len(values)), len(values) - 1.0
    else:
        samples = [np.array([*of.values()]) for of in (one, other)]
        middle = samples[0].mean() - samples[1].mean()
        parts = [of.var(ddof=1) / len(of) for of in samples]
        error = math.sqrt(sum(parts))
        spread = sum(part**2 / (len(of) - 1) for part, of in zip(parts, samples, strict=True))
        freedom = sum(parts) ** 2 / spread if spread > 0 else 1.0
    reach = error * quantile_of_t(freedom)
    return float(middle - reach), float(middle), float(middle + reach)


def quantile_of_t(freedom: float) -> float:
    """What |t| stays below in 95 of 100 cases.

    With t = sqrt(freedom) tan(a) the angle a has a density that is proportional to cos(a)^(freedom - 1).
    """
    angles = (np.arange(100_000) + 0.5) * (math.pi / 2 / 100_000)
    masses = (np.cos(angles) ** (freedom - 1)).cumsum()
    return math.sqrt(freedom) * math.tan(angles[np.searchsorted(masses, 0.95 * masses[-1])])
