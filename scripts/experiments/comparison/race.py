"""A race of objectives by successive halving: all run a few steps, the better ones more, the best ones with all seeds.

Source: successive halving, arXiv 1502.07943. Here each length is a training of its own, since a learning rate's
schedule knows its end. What comes next follows from what there is, so an interrupted race goes on where it was.
"""

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from comparison.methods import METHODS, REFERENCE, STATIC_MIX, Settings
from comparison.plan import score
from comparison.store import Run, Store


class Contestant(NamedTuple):
    """An objective."""

    method: str
    """One of :data:`~comparison.methods.METHODS`."""
    temperature: float
    kd_ratio: float

    def __str__(self) -> str:
        return f"{METHODS[self.method].label}, T {self.temperature:g}, kd_ratio {self.kd_ratio:g}"

    def options(self, weight: float | None) -> tuple[tuple[str, str | float], ...]:
        """What a run is told; ``weight`` is AKL's own mean h, for the static mix that has it."""
        own = {"mix_ratio": weight} if self.method == STATIC_MIX else {}
        common = {"temperature": self.temperature, "kd_ratio": self.kd_ratio}
        return tuple(sorted((METHODS[self.method].options | common | own).items()))


class Task(NamedTuple):
    """A piece of work, after which there is one more result."""

    kind: Literal["fill", "train", "test"]
    steps: int
    run: Run | None


@dataclass(frozen=True)
class Race:
    """What competes, and how it is shortened."""

    settings: Settings
    """Of the finals."""
    temperatures: tuple[float, ...]
    kd_ratios: tuple[float, ...]
    rungs: tuple[int, ...]
    """Steps of the runs before the finals, rising."""
    keep: float
    """The share that goes on after each rung."""
    finalists: int
    """Of the last rung, beside AKL and its static mix at each temperature, which are always there."""

    @property
    def contestants(self) -> list[Contestant]:
        """All of them."""
        return [Contestant(*each) for each in product(self.settings.methods, self.temperatures, self.kd_ratios)]

    @property
    def always(self) -> list[Contestant]:
        """AKL as the paper has it, and AKL and its static mix at each temperature, without cross-entropy if that is."""
        pair = [name for name in (REFERENCE, STATIC_MIX) if name in self.settings.methods]
        return [Contestant(name, t, self.kd_ratios[0]) for t, name in product(self.temperatures, pair)]


@dataclass
class Progress:
    """How far a race is."""

    rates: dict[str, float] = field(default_factory=dict)
    """The learning rate of each method."""
    scores: list[dict[Contestant, float]] = field(default_factory=list)
    """By rung: minus the mean of forward and reverse KL on the validation records, in nats; -inf if it failed."""
    runs: dict[Contestant, list[Run]] = field(default_factory=dict)
    """Of the finals, one a seed."""
    tasks: list[Task] = field(default_factory=list)
    """What can be done now."""


class Plan:
    """Finds what is to be done next.

    Args:
        race: what competes.
        folder: where the results are.
    """

    def __init__(self, race: Race, folder: Path) -> None:
        self.race = race
        lengths = {*race.rungs, race.settings.steps}
        self.stores = {steps: Store(folder, replace(race.settings, steps=steps)) for steps in lengths}

    def progress(self) -> Progress:
        """What is known, and the next tasks: none are left when the race is over."""
        found = Progress()
        contestants = self._choose_rates(found)
        for steps in self.race.rungs if not found.tasks else ():
            scores = self._scores(found, contestants, steps)
            if found.tasks:
                return found
            found.scores.append(scores)
            left = max(self.race.finalists, math.ceil(self.race.keep * len(contestants)))
            contestants = sorted(contestants, key=scores.get, reverse=True)[:left]
        if not found.tasks:
            finalists = contestants[: self.race.finalists]
            self._finals(found, [*finalists, *(each for each in self.race.always if each not in finalists)])
        return found

    def _choose_rates(self, found: Progress) -> list[Contestant]:
        """Each method's learning rate, at the first temperature and kd_ratio and by the first rung's steps."""
        race, first = self.race, self.race.rungs[0]
        # the static mix follows from AKL
        for method in sorted(race.settings.methods, key=lambda name: name == STATIC_MIX):
            base = Contestant(method, race.temperatures[0], race.kd_ratios[0])
            runs = {rate: self._run(found, base, first, rate) for rate in race.settings.rates}
            results = {rate: self._trained(found, run, first) for rate, run in runs.items()}
            if None not in results.values():
                worth = score(results)
                found.rates[method] = max(worth, key=worth.get)
        return race.contestants

    def _run(self, found: Progress, of: Contestant, steps: int, rate: float | None = None, seed: int | None = None):
        """The run of a contestant; None before AKL has said what it depends on."""
        seed, weight = self.race.settings.seeds[0] if seed is None else seed, None
        if of.method == STATIC_MIX:
            if REFERENCE not in found.rates:
                return None
            reference = self._run(found, of._replace(method=REFERENCE), steps, seed=seed)
            result = self._trained(found, reference, steps)
            if result is None or "h" not in result:
                return None
            weight = round(result["h"], 4)
        rate = found.rates[of.method] if rate is None else rate
        return Run(of.method, of.options(weight), rate, seed)

    def _trained(self, found: Progress, run: Run | None, steps: int) -> dict | None:
        """A run's result; if there is none, to train it becomes a task."""
        if run is None:
            return None
        result = self.stores[steps].training(run)
        if result is None:
            self._add(found, Task("train", steps, run))
        return result

    def _add(self, found: Progress, task: Task) -> None:
        if task not in found.tasks:
            found.tasks.append(task)

    def _scores(self, found: Progress, contestants: Iterable[Contestant], steps: int) -> dict[Contestant, float]:
        results = {each: self._trained(found, self._run(found, each, steps), steps) for each in contestants}
        # one whose AKL has failed cannot run
        return {each: -math.inf for each in results} | score(results)

    def _finals(self, found: Progress, contestants: list[Contestant]) -> None:
        steps, store = self.race.settings.steps, self.stores[self.race.settings.steps]
        for each, seed in product(contestants, self.race.settings.seeds):
            run = self._run(found, each, steps, seed=seed)
            result = self._trained(found, run, steps)
            if result is None:
                continue
            found.runs.setdefault(each, []).append(run)
            if "failed" in result or store.test(run) is not None:
                continue
            # a student that was tested by other settings before is deleted
            self._add(found, Task("test" if store.student(run).is_dir() else "train", steps, run))

    def tidy(self, found: Progress) -> None:
        """Delete students that no test waits for."""
        store = self.stores[self.race.settings.steps]
        waiting = {store.student(run) for runs in found.runs.values() for run in runs if store.test(run) is None}
        for student in store.folder.glob("*/student"):
            if student not in waiting and (student.parent / "training.json").is_file():
                shutil.rmtree(student)
