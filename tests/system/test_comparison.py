"""scripts/experiments/compare_divergences.py: what it chooses, what it computes, and that it goes on where it was."""

import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import compare_divergences
import pytest
import torch
from comparison.methods import METHODS, QUICK, REFERENCE, STATIC_MIX, Settings
from comparison.plan import Standing, standings
from comparison.results import collect
from comparison.statistics import interval, paired, spread
from comparison.store import Store
from comparison.tables import tables

RATES = QUICK.rates


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (10, 2.22814), (30, 2.04227)]
)
def test_intervals_are_as_wide_as_printed_tables_of_t_say(freedom, expected):
    values = [float(n % 7) for n in range(freedom + 1)]
    found = interval(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert (found.high - found.mean) / error == pytest.approx(expected, rel=1e-5)


def test_intervals_hold_the_true_mean_in_95_of_100_samples():
    samples = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covered = statistics.fmean(not interval(sample).excludes_zero for sample in samples.tolist())
    assert covered == pytest.approx(0.95, abs=0.01)


def test_differences_are_paired_by_seed():
    values, reference = {1: 3.0, 2: 5.5, 3: 4.0, 9: 100.0}, {3: 3.5, 1: 2.0, 2: 5.0, 8: -100.0}
    found = paired(values, reference)
    differences = [1.0, 0.5, 0.5]
    half = 4.30265 * math.sqrt(sum((d - 2 / 3) ** 2 for d in differences) / 2) / math.sqrt(3)
    assert found == pytest.approx((2 / 3, 2 / 3 - half, 2 / 3 + half), rel=1e-5)
    assert paired({1: 1.0}, {1: 2.0}) is None
    assert math.isnan(spread([1.0])[1])


def settle(settings: Settings, store: Store, worth, failing: tuple = ()) -> dict[str, Standing]:
    """Do all that the plan asks for, with made results: ``worth(method, rate)``, and h as the seed's tenth."""
    for _ in range(100):
        found = standings(settings, store)
        tasks = [task for standing in found.values() for task in standing.tasks]
        if not tasks:
            return found
        for kind, run in tasks:
            if kind == "test":
                store.write_test(run, {"forward_kl": 1 + run.seed + len(run.method), "seconds": 1.0})
            elif (run.method, run.rate) in failing:
                store.write_training(run, {"failed": "not finite"})
            else:
                store.student(run).mkdir(parents=True)
                validation = {"forward_kl": -2 * worth(run.method, run.rate), "reverse_kl": 0.0}
                store.write_training(run, {"validation": validation, "h": run.seed / 10, "tokens": run.seed})
    raise AssertionError("it never ends")


def test_each_method_chooses_its_rate_and_all_seeds_follow(tmp_path):
    best = {"fkl": RATES[0], "akl": RATES[1], "rkl": RATES[2]}
    settings = replace(QUICK, methods=("akl", "akl_mean_mix", "fkl", "rkl"))
    store = Store(tmp_path, settings)
    found = settle(settings, store, lambda method, rate: -abs(math.log(rate / best.get(method, RATES[1]))))
    assert {name: standing.rate for name, standing in found.items()} == {**best, STATIC_MIX: RATES[1]}
    assert found["akl"].widened is found[STATIC_MIX].widened is False
    assert max(found["rkl"].scores) == pytest.approx(RATES[2] ** 2 / RATES[1], rel=0.05)
    assert min(found["fkl"].scores) == pytest.approx(RATES[0] ** 2 / RATES[1], rel=0.05)
    assert not any(standing.at_edge for standing in found.values())
    for standing in found.values():
        assert [run.seed for run in standing.runs] == [1, 2, 3]
        assert standing.done == standing.total
    # tokens weigh h: (1 * .1 + 2 * .2 + 3 * .3) / 6
    assert dict(found[STATIC_MIX].runs[0].options) == {"divergence": "mix", "kd_ratio": 1.0, "mix_ratio": 0.2333}


def test_a_rate_that_fails_is_never_chosen_and_a_best_rate_beyond_the_edge_is_named(tmp_path):
    settings = replace(QUICK, methods=("akl", "rkl"))
    store = Store(tmp_path, settings)
    failing = tuple(("rkl", rate) for rate in RATES)
    results = collect(settings, settle(settings, store, lambda _, rate: rate, failing), store)
    assert results.standings["akl"].rate > RATES[-1]
    assert results.standings["rkl"].rate is None
    text = tables(results)
    assert "(edge)" in text
    assert re.search(r"reverse KL \(3 seeds missing\) \| - \|", text)


def test_a_table_names_no_difference_whose_interval_includes_zero(tmp_path):
    settings = replace(QUICK, methods=("akl", "fkl", "rkl"))
    store = Store(tmp_path, settings)
    settle(settings, store, lambda _, rate: -abs(math.log(rate / RATES[1])))
    for run in standings(settings, store)["rkl"].runs:
        store.write_test(run, {"forward_kl": 5 + run.seed + (0.1 if run.seed == 2 else -0.1)})
    for run in standings(settings, store)["fkl"].runs:
        store.write_test(run, {"forward_kl": 2 + run.seed + run.seed / 100})
    results = collect(settings, standings(settings, store), store)
    text = tables(results)
    assert "forward KL: below AKL: forward KL; above AKL: reverse KL." in text
    for run in standings(settings, store)["rkl"].runs:
        store.write_test(run, {"forward_kl": 5.0 + (run.seed == 2) * 3})
    text = tables(collect(settings, standings(settings, store), store))
    assert "below AKL: forward KL; not told apart from AKL: reverse KL." in text


def test_methods_of_the_comparison_are_every_divergence():
    from typing import get_args

    from litgpt_akl.loss.objective import DivergenceName

    assert {method.options["divergence"] for method in METHODS.values()} == set(get_args(DivergenceName))
    assert next(iter(METHODS)) == REFERENCE


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, out: Path) -> list[str]:
    """The command on three methods, as small as it gets; returns which runs it made."""
    sizes = {"steps": 3, "batch": 8, "train_records": 24, "validation_records": 8, "test_records": 8}
    sizes |= {"prompts": 2, "new_tokens": 4, "seeds": 2, "rates": 3e-3, "workers": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    methods = ["--methods", STATIC_MIX, "cross_entropy"]
    monkeypatch.setattr(sys, "argv", ["compare_divergences.py", "--quick", *methods, "--out", str(out), *options])
    compare_divergences.main()
    return re.findall(r"^[\d:]+ ((?:train|test|fill) .*)$", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.mark.slow
def test_a_comparison_runs_and_a_second_call_makes_no_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "comparison"
    made = call(monkeypatch, capsys, out)
    names = ("akl", STATIC_MIX, "cross_entropy")
    expected = {
        f"{kind} {name}, lr 0.003, seed {seed}" for kind in ("train", "test") for name in names for seed in (1, 2)
    }
    assert set(made) == expected | {"fill "}
    assert len(made) == len(expected) + 1
    report = {path.name: path.read_bytes() for path in out.glob("comparison.*")}
    assert sorted(report) == ["comparison.json", "comparison.md", "comparison.png"]
    methods = json.loads(report["comparison.json"])["methods"]
    h = [methods["akl"]["trainings"][seed]["h"] for seed in ("1", "2")]
    assert min(h) - 1e-4 <= methods[STATIC_MIX]["options"]["mix_ratio"] <= max(h) + 1e-4
    for method in methods.values():
        for test in method["tests"].values():
            assert {"forward_kl", "reverse_kl", "agreement", "rouge_l"} <= set(test)
    assert not list(out.glob("runs/*/student"))

    assert call(monkeypatch, capsys, out) == []
    for name in ("comparison.json", "comparison.md"):
        assert (out / name).read_bytes() == report[name]

    # what an interruption has lost is done again, with the same result
    lost = next(out.glob("runs/akl-*-seed2-*"))
    (lost / "test.json").unlink()
    assert call(monkeypatch, capsys, out) == ["train akl, lr 0.003, seed 2", "test akl, lr 0.003, seed 2"]
    assert (out / "comparison.md").read_bytes() == report["comparison.md"]
