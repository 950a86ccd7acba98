"""What the tests gave, method by method, and the differences between methods."""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from comparison.methods import METHODS, REFERENCE, Settings
from comparison.plan import Standing
from comparison.statistics import Interval, paired, spread
from comparison.store import Store


class Metric(NamedTuple):
    """A column."""

    label: str
    unit: float = 1.0
    """What a value is multiplied by."""
    digits: int = 3


METRICS = {
    "forward_kl": Metric("forward KL"),
    "reverse_kl": Metric("reverse KL"),
    "adaptive_kl": Metric("adaptive KL"),
    "agreement": Metric("agreement, %", 100.0, 1),
    "cross_entropy": Metric("cross-entropy"),
    "rouge_l": Metric("ROUGE-L", 1.0, 1),
}


@dataclass
class Results:
    """Of a comparison, as far as it has come."""

    settings: Settings
    versions: dict[str, str]
    standings: dict[str, Standing]
    trainings: dict[str, dict[int, dict]]
    """At the chosen learning rate, by method and training seed, as are ``tests``."""
    tests: dict[str, dict[int, dict[str, float]]]

    @property
    def metrics(self) -> list[str]:
        """Those that were measured."""
        return [
            name for name in METRICS if any(name in test for tests in self.tests.values() for test in tests.values())
        ]

    def values(self, method: str, metric: str) -> dict[int, float]:
        """By training seed, in the unit of the column."""
        tests = self.tests[method].items()
        return {seed: test[metric] * METRICS[metric].unit for seed, test in tests if metric in test}

    def spread(self, method: str, metric: str) -> tuple[float, float] | None:
        """Mean and standard deviation over the seeds, in the unit of the column."""
        values = self.values(method, metric)
        return spread(list(values.values())) if values else None

    def difference(self, method: str, metric: str) -> Interval | None:
        """To AKL, paired by seed."""
        return paired(self.values(method, metric), self.values(REFERENCE, metric))


def collect(settings: Settings, standings: dict[str, Standing], store: Store) -> Results:
    def found(read) -> dict[str, dict[int, dict]]:
        return {
            method: {run.seed: result for run in standing.runs if (result := read(run)) is not None}
            for method, standing in standings.items()
        }

    return Results(settings, store.versions, standings, found(store.training), found(store.test))


def as_json(results: Results) -> dict:
    """Everything, for machines."""

    def describe(method: str, standing: Standing) -> dict:
        scores = {rate: None if value == -math.inf else -value for rate, value in standing.scores.items()}
        intervals = {metric: results.difference(method, metric) for metric in results.metrics}
        return {
            "label": METHODS[method].label,
            "options": dict(standing.runs[0].options) if standing.runs else None,
            "validation_mean_kl_by_rate": scores,
            "rate": standing.rate,
            "trainings": results.trainings[method],
            "tests": results.tests[method],
            "difference_to_akl": {metric: found and found._asdict() for metric, found in intervals.items()},
        }

    return {
        "settings": asdict(results.settings),
        "versions": results.versions,
        "methods": {method: describe(method, standing) for method, standing in results.standings.items()},
    }
