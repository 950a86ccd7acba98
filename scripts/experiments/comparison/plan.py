"""What is to be done next, given what there is: learning rates are chosen, AKL's mean h is measured, seeds follow."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from comparison.methods import METHODS, REFERENCE, STATIC_MIX, Settings
from comparison.store import Run, Store


class Task(NamedTuple):
    """A piece of work, after which there is one more result."""

    kind: Literal["fill", "train", "test"]
    run: Run | None


@dataclass
class Standing:
    """How far a method is."""

    method: str
    scores: dict[float, float] = field(default_factory=dict)
    """What the first seed's validation was worth, by learning rate; see :func:`score`."""
    widened: bool = False
    """Whether the best of the grid lay at its edge, so that one more rate was tried there."""
    rate: float | None = None
    """The chosen one."""
    runs: list[Run] = field(default_factory=list)
    """Of that rate, one a seed."""
    tasks: list[Task] = field(default_factory=list)
    """What can be done now."""
    done: dict[str, int] = field(default_factory=lambda: {"train": 0, "test": 0})
    total: dict[str, int] = field(default_factory=dict)
    """How many there will be, as far as it is known."""
    losers: list[Run] = field(default_factory=list)
    """Runs of other rates."""

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie beyond those that were tried."""
        return self.rate in (min(self.scores, default=None), max(self.scores, default=None))


def standings(settings: Settings, store: Store) -> dict[str, Standing]:
    """All methods, in their order."""
    found: dict[str, Standing] = {}
    # the static mix follows from the runs of AKL
    for method in sorted(settings.methods, key=lambda name: name == STATIC_MIX):
        options = METHODS[method].options
        if method == STATIC_MIX:
            weight = mean_weight(found[REFERENCE], store, len(settings.seeds))
            if weight is None:
                found[method] = Standing(method, total=_total(settings, settings.rates))
                continue
            options = options | {"mix_ratio": weight}
        if method != "cross_entropy":
            options = {"kd_ratio": settings.kd_ratio} | options
        found[method] = stand(method, tuple(sorted(options.items())), settings, store)
    return {method: found[method] for method in settings.methods}


def mean_weight(reference: Standing, store: Store, seeds: int) -> float | None:
    """The mean of h over all training tokens of AKL's runs at its chosen rate; None before they are done."""
    results = [store.training(run) for run in reference.runs]
    if len(results) < seeds or None in results:
        return None
    results = [result for result in results if "h" in result]
    tokens = sum(result["tokens"] for result in results)
    return round(sum(result["h"] * result["tokens"] for result in results) / tokens, 4)


def stand(method: str, options: tuple, settings: Settings, store: Store) -> Standing:
    """A method's standing: first the grid, then one more rate if the best lies at its edge, then the other seeds."""
    standing = Standing(method)
    rates = list(settings.rates)
    results = {rate: store.training(Run(method, options, rate, settings.seeds[0])) for rate in rates}
    if None not in results.values():
        beyond = wider(score(results), rates)
        if beyond is not None:
            standing.widened = True
            rates.append(beyond)
            results[beyond] = store.training(Run(method, options, beyond, settings.seeds[0]))
    standing.total = _total(settings, rates)
    first = [Run(method, options, rate, settings.seeds[0]) for rate in rates]
    standing.scores = dict(sorted(score(results).items()))
    _add(standing, store, first)
    if None in results.values() or max(standing.scores.values()) == -math.inf:
        return standing
    standing.rate = max(standing.scores, key=standing.scores.get)
    standing.runs = [Run(method, options, standing.rate, seed) for seed in settings.seeds]
    standing.losers = [run for run in first if run not in standing.runs]
    _add(standing, store, standing.runs[1:])
    for run in standing.runs:
        training = store.training(run)
        if store.test(run) is not None or (training or {}).get("failed"):
            standing.done["test"] += 1
        elif training is not None and store.student(run).is_dir():
            standing.tasks.append(Task("test", run))
        elif training is not None:
            # tested by other settings before, and deleted
            standing.done["train"] -= 1
            standing.tasks.append(Task("train", run))
    return standing


def _add(standing: Standing, store: Store, runs: Iterable[Run]) -> None:
    for run in runs:
        if store.training(run) is None:
            standing.tasks.append(Task("train", run))
        else:
            standing.done["train"] += 1


def _total(settings: Settings, rates: Iterable[float]) -> dict[str, int]:
    return {"train": len(list(rates)) + len(settings.seeds) - 1, "test": len(settings.seeds)}


def score(results: dict[float, dict | None]) -> dict[float, float]:
    """Of those that are done, what learning rates are chosen by: minus the mean of forward and reverse KL, in nats.

    It favours neither direction, and tells rates apart better than shares of equal ids do; -inf where training failed.
    """

    def worth(validation: dict[str, float]) -> float:
        return -(validation["forward_kl"] + validation["reverse_kl"]) / 2

    return {
        rate: worth(result["validation"]) if "validation" in result else -math.inf
        for rate, result in results.items()
        if result is not None
    }


def wider(scores: dict[float, float], rates: list[float]) -> float | None:
    """One step beyond the grid, as far as the last one in it, if the best lies at its edge."""
    best = max(scores, key=scores.get)
    if len(rates) < 2 or scores[best] == -math.inf:
        return None
    if best == rates[-1]:
        return float(f"{best * best / rates[-2]:.1e}")
    if best == rates[0]:
        return float(f"{best * best / rates[1]:.1e}")
    return None


def tidy(standing: Standing, store: Store) -> None:
    """Delete the students that nothing is to be learnt from any more."""
    for run in standing.losers:
        store.remove_student(run)
    for run in standing.runs:
        if store.test(run) is not None:
            store.remove_student(run)
