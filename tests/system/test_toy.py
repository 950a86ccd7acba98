"""scripts/experiments/reproduce_toy.py: what it shows in thirty seeds, and verdicts that follow from numbers."""

import pytest
import torch
import toy.claims
import toy.setups
import toy.training

SEEDS = 30


@pytest.fixture(scope="module")
def results() -> toy.claims.Results:
    return {name: toy.training.train_all(setup, SEEDS) for name, setup in toy.setups.SETUPS.items()}


def replaced(results, setup, name, **measures):
    """The same results with other measures for one run."""
    run = results[setup][name]
    run = run._replace(measures={**run.measures, **measures})
    return {**results, setup: {**results[setup], name: run}}


def verdicts(results) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in toy.claims.claims(results)}


def test_forward_kl_is_ahead_on_the_head_reverse_kl_on_the_far_tail_and_both_converge(results):
    forward, reverse = (results["long_tail"][name].measures for name in ("fkl", "rkl"))
    early = slice(3, 16)
    assert (forward["head"][early] < reverse["head"][early]).all()
    assert ((reverse["far_tail"][early] < forward["far_tail"][early]).all(dim=0)).sum() >= SEEDS - 1
    assert (reverse["far_tail"][5:51] < forward["far_tail"][5:51]).all()
    # by the split that adaptive KL has at mu 0.5, the tail too is forward KL's
    assert (forward["tail"][early] < reverse["tail"][early]).all()
    for setup in toy.setups.PAPER_SETUPS:
        for name in ("fkl", "rkl"):
            assert results[setup][name].measures["error"][-1].max() < 2e-3
            assert results[setup][name].measures["forward_kl"][-1].max() < 2e-3


def test_the_claims_are_judged_as_they_were_measured(results):
    assert list(verdicts(results).values()) == [
        "holds",
        "holds",
        "holds in part",
        "holds in part",
        "holds in part",
        "holds in part",
        "holds in part",
        "holds",
    ]
    printed = toy.claims.table(toy.claims.claims(results))
    assert "forward KL ahead on the head at every step 3-15: long tail 30/30" in printed
    assert "reverse KL ahead on the tail at every step 3-15: long tail 0/30" in printed


def test_other_numbers_get_other_verdicts(results):
    head = results["long_tail"]["fkl"].measures["head"]
    assert verdicts(replaced(results, "long_tail", "fkl", head=head + 1))["Forward KL fits the head first"] == (
        "does not hold"
    )
    best = {part: torch.zeros_like(head) for part in ("head", "tail")}
    assert verdicts(replaced(results, "long_tail", "akl", **best))[
        "Adaptive KL is at least as good on head and tail"
    ] == ("holds")
    apart = {
        (setup, name): run.measures["error"] + 1
        for setup in toy.setups.PAPER_SETUPS
        for name, run in results[setup].items()
    }
    for (setup, name), error in apart.items():
        results = replaced(results, setup, name, error=error)
    assert next(iter(verdicts(results).values())) == "does not hold"


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ([30, 27], "holds"),
        ([30, 26], "holds in part"),
        ([26, 0], "does not hold"),
        ([0], "does not hold"),
    ],
)
def test_a_verdict_follows_from_counts(seen, verdict):
    claim = toy.claims.Claim("", [toy.claims.Finding("", "", count, SEEDS) for count in seen])
    assert claim.verdict == verdict


def test_the_set_ups_are_the_papers():
    teachers = {name: setup.teacher(3) for name, setup in toy.setups.SETUPS.items()}
    assert {name: list(teacher.shape) for name, teacher in teachers.items()} == {
        "bimodal": [3, 50],
        "unimodal": [3, 50],
        "long_tail": [3, 80],
        "one_token": [3, 50],
    }
    for teacher in teachers.values():
        torch.testing.assert_close(teacher.sum(dim=-1), torch.ones(3, dtype=torch.float64))
    first, second, valley = (teachers["bimodal"][0, index] for index in (12, 38, 25))
    assert second > first > 4 * valley
    assert (teachers["long_tail"][0] != teachers["long_tail"][1]).any()
    assert teachers["long_tail"][:, 37:].sum(dim=-1) == pytest.approx([0.0042] * 3, rel=0.05)


def test_a_head_is_the_smallest_set_that_reaches_half_of_the_mass():
    teacher = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.6, 0.1, 0.2, 0.1]], dtype=torch.float64)
    assert toy.training.head_of(teacher).tolist() == [[False, True, False, True], [True, False, False, False]]


def test_a_seed_is_trained_as_if_it_were_alone(results):
    few = toy.training.train(toy.setups.SETUPS["long_tail"], toy.training.DIVERGENCES["akl"], 2).measures
    for name, values in few.items():
        torch.testing.assert_close(values, results["long_tail"]["akl"].measures[name][:, :2], rtol=1e-6, atol=1e-9)


def test_steps_to_converge_counts_from_where_the_error_stays_small():
    error = torch.tensor([[1.0, 1.0, 0.0], [0.001, 1.0, 0.0], [0.5, 1.0, 0.0], [0.001, 1.0, 0.0]])
    run = toy.training.Run(error, {}, {"error": error})
    assert toy.claims.steps_to_converge(run).tolist() == [3, 4, 0]
