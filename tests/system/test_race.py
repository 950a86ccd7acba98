"""scripts/experiments/race_objectives.py: who goes on, by results that are made up, and a small race that is run."""

import json
import math
import re
from dataclasses import replace

import pytest
import race_objectives
from comparison.methods import METHODS, QUICK, REFERENCE, STATIC_MIX
from comparison.race import Contestant, Plan, Progress, Race
from comparison.race_report import as_data, report
from comparison.statistics import holm, p_value

from litgpt_akl.config.distillation import DistillArgs

METHODS_HERE = (REFERENCE, STATIC_MIX, "fkl", "rkl", "scheduled_mix")


def race_of(**changes) -> Race:
    options = {
        "settings": replace(QUICK, methods=METHODS_HERE, steps=90, rates=(1e-3, 3e-3)),
        "temperatures": (1.0, 4.0),
        "kd_ratios": (1.0, 0.5),
        "rungs": (10, 30),
        "keep": 0.3,
        "finalists": 2,
    }
    return Race(**{**options, **changes})


def settle(plan: Plan, worth, failing=()) -> tuple[Progress, dict[int, int]]:
    """Do all that is asked for, with made results, ``worth(run, steps)``; how many trainings each length took."""
    trained: dict[int, int] = {}
    for _ in range(100):
        found = plan.progress()
        if not found.tasks:
            return found, trained
        for kind, steps, run in found.tasks:
            store, options = plan.stores[steps], dict(run.options)
            if kind == "test":
                store.write_test(run, {"forward_kl": 2.0 + worth(run, steps) + run.seed / 10, "agreement": 0.5})
                continue
            trained[steps] = trained.get(steps, 0) + 1
            if run.method in failing:
                store.write_training(run, {"failed": "not finite"})
                continue
            store.student(run).mkdir(parents=True)
            validation = {"forward_kl": worth(run, steps), "reverse_kl": 0.0}
            h = 0.3 if options["temperature"] == 1 else 0.4
            store.write_training(run, {"validation": validation, "h": h, "tokens": 10})
        plan.tidy(plan.progress())
    raise AssertionError("it never ends")


def worth(run, steps: int) -> float:
    """Lower is better: by method, by temperature, and farther from the best learning rate it is worse."""
    options = dict(run.options)
    by_method = {REFERENCE: 0.5, STATIC_MIX: 0.6, "fkl": 0.2, "rkl": 0.9, "scheduled_mix": 0.3}[run.method]
    best = 3e-3 if run.method == "rkl" else 1e-3
    return by_method + options["temperature"] / 100 + (1 - options["kd_ratio"]) + abs(math.log(run.rate / best)) / 10


def test_the_better_ones_go_on_and_akl_is_always_in_the_finals(tmp_path):
    plan = Plan(race_of(), tmp_path)
    found, trained = settle(plan, worth)
    assert found.rates == dict.fromkeys(METHODS_HERE, 1e-3) | {"rkl": 3e-3}
    assert [len(rung) for rung in found.scores] == [20, 6]
    order = sorted(found.scores[0], key=found.scores[0].get, reverse=True)
    assert set(found.scores[1]) == set(order[:6])
    assert order[:2] == [Contestant("fkl", 1.0, 1.0), Contestant("fkl", 4.0, 1.0)]
    always = [Contestant(name, t, 1.0) for t in (1.0, 4.0) for name in (REFERENCE, STATIC_MIX)]
    assert list(found.runs) == [*order[:2], *always]
    assert all([run.seed for run in runs] == [1, 2, 3] for runs in found.runs.values())
    # 20 objectives, and five more learning rates of the plain ones
    assert trained[10] == 25 and trained[90] == 6 * 3
    # the static mix has the h that AKL had at the same temperature and with the same seed
    for t, h in ((1.0, 0.3), (4.0, 0.4)):
        assert {dict(run.options)["mix_ratio"] for run in found.runs[Contestant(STATIC_MIX, t, 1.0)]} == {h}
    assert not list(tmp_path.glob("*/student"))
    # what is kept is found again, and nothing is left to do
    assert Plan(race_of(), tmp_path).progress().runs == found.runs


def test_one_that_fails_goes_no_further(tmp_path):
    found, _ = settle(Plan(race_of(), tmp_path), worth, failing=("fkl",))
    assert (
        all(each.method != "fkl" for each in found.runs) and found.scores[0][Contestant("fkl", 1.0, 1.0)] == -math.inf
    )


def test_each_objective_is_one_that_the_command_takes():
    for each in race_of(settings=replace(QUICK, methods=race_objectives.RACING)).contestants:
        arguments = race_objectives.runs.objective(dict(each.options(0.25)))
        assert isinstance(arguments, DistillArgs)
        assert (arguments.temperature, arguments.kd_ratio) == (each.temperature, each.kd_ratio)
        assert arguments.divergence == METHODS[each.method].options["divergence"]
    scheduled = race_objectives.runs.objective(dict(Contestant("scheduled_mix", 1.0, 1.0).options(None)))
    assert [scheduled.loss(done).mix_ratio for done in (0.0, 1.0)] == [1.0, 0.5]


def test_p_values_are_corrected_for_their_number():
    # the example of Holm's paper's table in every textbook: 0.01, 0.02, 0.03, 0.04, 0.05
    assert holm([0.04, 0.01, 0.03, 0.05, 0.02]) == pytest.approx([0.09, 0.05, 0.09, 0.09, 0.08])
    assert holm([0.9, math.nan, 0.6])[::2] == [1.0, 1.0] and math.isnan(holm([math.nan])[0])
    # t = 5.2915 with 2 degrees of freedom
    assert p_value({1: 1.0, 2: 2.0, 3: 2.0}, {1: 0.0, 2: 0.0, 3: 0.0}) == pytest.approx(0.0377, abs=1e-4)
    assert p_value({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0}) == 1.0 and math.isnan(p_value({1: 1.0}, {2: 1.0}))


def test_a_report_marks_what_holds_after_correction(tmp_path):
    plan = Plan(race_of(), tmp_path)
    found, _ = settle(plan, lambda run, steps: worth(run, steps) + run.seed * ord(run.method[0]) % 7 / 1000)
    text = report(plan, found)
    assert "20 objectives, 3 training seeds" in text and "| forward KL, T 1, kd_ratio 1 | 0.10" in text
    row = next(line for line in text.splitlines() if line.startswith("| forward KL, T 1") and "[" in line)
    mean, low, high, p = map(float, re.search(r"\*\*(\S+) \[(\S+), (\S+)\], p (\S+)\*\*", row).groups())
    assert low < mean < high < 0 and p < 0.05
    assert "T 1: +0.1" in text and "T 4: +0.1" in text
    assert len(as_data(plan, found)["finals"]) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--rungs", "30", "10"], "--rungs 30 10 must rise"),
        (["--rungs", "10", "900"], "stay below --steps 150"),
        (["--keep", "1.5"], "--keep must be between 0 and 1, got 1.5"),
        (["--methods", "cross_entropy"], "cross_entropy has no divergence"),
    ],
)
def test_what_is_no_race_is_refused(words, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        race_objectives.main(["--quick", *words])


@pytest.mark.slow
def test_a_small_race_is_run_and_a_second_call_makes_no_run(tmp_path, capsys):
    sizes = {"steps": 6, "batch": 4, "train_records": 24, "validation_records": 8, "test_records": 8, "prompts": 2}
    sizes |= {"new_tokens": 4, "seeds": 2, "rates": 3e-3, "workers": 1, "finalists": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    words = ["--quick", *options, "--rungs", "2", "4", "--temperatures", "1", "2", "--kd_ratios", "1", "--out"]
    words += [str(tmp_path / "race"), "--methods", STATIC_MIX, "scheduled_mix"]
    race_objectives.main(words)
    made = re.findall(r"^[\d:]+ ((?:train|test|fill) .*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert made[0].startswith("fill") and sum(line.startswith("test") for line in made) >= 8
    data = json.loads((tmp_path / "race" / "race.json").read_text())
    assert [len(rung) for rung in data["rungs"]] == [6, 2] and len(data["finals"]) >= 4
    text = (tmp_path / "race" / "race.md").read_text()
    race_objectives.main(words)
    assert "train" not in re.sub("for training|training seeds", "", capsys.readouterr().out.partition("##")[0])
    assert (tmp_path / "race" / "race.md").read_text() == text
