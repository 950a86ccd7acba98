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
    mean, deviation = spread(values)
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired(values: dict[int, float], reference: dict[int, float]) -> Interval | None:
    """Of the differences to ``reference`` with the same training seed; None if they share less than two."""
    shared = [seed for seed in values if seed in reference]
    return interval([values[seed] - reference[seed] for seed in shared]) if len(shared) > 1 else None


def t_probability(t: float, freedom: int) -> float:
    """That ``|T| <= t``, by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's t distribution, for a probability above one half."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high
