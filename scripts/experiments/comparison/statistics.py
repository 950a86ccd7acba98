"""Means over training seeds, and what they leave open."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN of a single number)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean, with n - 1 degrees of freedom, of two numbers or more."""
    from scipy.stats import t as students_t

    mean, deviation = spread(values)
    quantile = float(students_t.ppf((1 + confidence) / 2, df=len(values) - 1))
    half = quantile * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired(values: dict[int, float], reference: dict[int, float]) -> Interval | None:
    """Of the differences to ``reference`` with the same training seed; None if they share less than two."""
    shared = [seed for seed in values if seed in reference]
    return interval([values[seed] - reference[seed] for seed in shared]) if len(shared) > 1 else None


def p_value(values: dict[int, float], reference: dict[int, float]) -> float:
    """Of Student's paired t test that two methods do not differ; NaN if they share less than two seeds."""
    from scipy.stats import ttest_1samp

    shared = [seed for seed in values if seed in reference]
    differences = [values[seed] - reference[seed] for seed in shared]
    if len(differences) < 2:
        return math.nan
    if len(set(differences)) == 1:
        return 0.0 if differences[0] else 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, so that with 0.05 one comparison in all errs in 5 of 100 cases.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979. NaN stays, and is not counted.
    """
    order = sorted((number for number, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__)
    corrected, highest = list(p_values), 0.0
    for place, number in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[number]))
        corrected[number] = highest
    return corrected
