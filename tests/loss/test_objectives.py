"""Values, gradients and limits of the divergences beyond the two KLs against a float64 loop and autograd."""

import math

import pytest
import torch
from helpers.formulas import formula
from helpers.reference import log_softmax, tail_masses
from helpers.reference import other_divergence as reference
from test_divergences import logits_of

import litgpt_akl
from litgpt_akl.loss.objective import Objective


def labels_of(logits: torch.Tensor) -> torch.Tensor:
    """The label of each row: its own number, or what is left of it beyond the vocabulary."""
    return torch.arange(len(logits)) % logits.size(-1)


def diversity_aware_reverse_kl(teacher: torch.Tensor, student: torch.Tensor, **options) -> torch.Tensor:
    return litgpt_akl.diversity_aware_reverse_kl(teacher, student, labels_of(teacher), **options)


FUNCTIONS = {
    "jsd": litgpt_akl.generalised_jsd,
    "skewed_fkl": litgpt_akl.skewed_forward_kl,
    "skewed_rkl": litgpt_akl.skewed_reverse_kl,
    "tv": litgpt_akl.total_variation,
    "todi": litgpt_akl.token_wise_kl,
    "alpha_beta": litgpt_akl.alpha_beta_divergence,
    "tad": litgpt_akl.tail_aware_kl,
    "csd": litgpt_akl.concrete_score_divergence,
    "drkl": diversity_aware_reverse_kl,
}
DEFAULTS = {
    "jsd": {"beta": 0.5},
    "skewed_fkl": {"skew": 0.1},
    "skewed_rkl": {"skew": 0.1},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "tad": {"top_k": 10, "tail_weight": 1.0, "tail_weighting": "sequence"},
    "csd": {"weight": "mean"},
    "drkl": {"gamma": 0.5},
}
CASES = [(name, DEFAULTS.get(name, {})) for name in FUNCTIONS] + [
    ("jsd", {"beta": 0.01}),
    ("jsd", {"beta": 0.9}),
    ("skewed_fkl", {"skew": 0.8}),
    ("skewed_rkl", {"skew": 0.8}),
    ("alpha_beta", {"alpha": 1.3, "beta": 0.4}),
    ("tad", {"top_k": 1, "tail_weight": 0.0}),
    ("tad", {"top_k": 3, "tail_weight": 0.25}),
    ("tad", {"top_k": 3, "tail_weight": 2.0, "tail_weighting": "constant"}),
    *(("csd", {"weight": weight}) for weight in ("teacher_student", "student", "teacher")),
    ("drkl", {"gamma": 0.0}),
    ("drkl", {"gamma": 3.0}),
]
DETACHED = ("todi", "csd")
"""Weights within are constants: the gradient is not that of the value."""
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
KINDS = ["normal", "peaked", "flat", "tied"]


def check_values(name, teacher, student, atol=1e-12, **options):
    values = FUNCTIONS[name](teacher, student, **options)
    options, expected = {**DEFAULTS.get(name, {}), **options}, []
    each = [{"label": label} if name == "drkl" else {} for label in labels_of(teacher).tolist()]
    if name == "tad" and options.pop("tail_weighting") == "sequence":
        rows = [log_softmax(row, options.get("temperature", 1.0)) for row in teacher.tolist()]
        each = [{"tail_weight": options["tail_weight"] * mass} for mass in tail_masses(rows, options["top_k"])]
    for t, s, own in zip(teacher.tolist(), student.tolist(), each, strict=True):
        expected.append(reference(name, t, s, **{**options, **own}))
    torch.testing.assert_close(values, torch.tensor(expected, dtype=values.dtype), rtol=1e-5, atol=atol)


def value_and_gradient(function, teacher, student, **options):
    leaf = student.clone().requires_grad_()
    values = function(teacher, leaf, **options)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


@each_case
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [2, 3, 65, 1500])
def test_values_equal_the_loop(name, options, kind, vocab):
    teacher, student = logits_of(kind, vocab)
    if name == "tad" and kind == "tied":
        teacher = teacher + 1e-3 * torch.linspace(0, 1, vocab, dtype=torch.float64)  # which of equals counts is open
    for temperature in (0.5, 1.0, 4.0):
        check_values(name, teacher, student, temperature=temperature, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_the_largest_vocabulary(name, kind):
    teacher, student = logits_of(kind, 152_064)
    check_values(name, teacher[:1], student[:1])


@each_case
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [2, 300, 152_064])
def test_gradients_equal_autograd(name, options, kind, vocab):
    teacher, student = logits_of(kind, vocab)
    rows = slice(1) if vocab > 300 else slice(3)
    teacher, student = teacher[rows].requires_grad_(), student[rows].requires_grad_()
    for temperature in (1.0,) if vocab > 300 else (0.5, 1.0, 3.0):
        objective = Objective(divergence=name, temperature=temperature, **options)
        found = FUNCTIONS[name](teacher, student, temperature=temperature, **options).sum()
        expected = formula(objective, teacher.detach(), student, labels=labels_of(teacher)).sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
        (found,), (expected,) = torch.autograd.grad(found, student), torch.autograd.grad(expected, student)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
    assert teacher.grad is None


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in DETACHED], ids=str)
def test_gradients_equal_finite_differences_of_the_value(name, options):
    # a temperature whose square reached only the value, or only the gradient, would show here
    teacher, student = logits_of("normal", 7)
    for temperature in (0.5, 1.0, 3.0):
        torch.autograd.gradcheck(
            lambda s, T=temperature: FUNCTIONS[name](teacher, s, temperature=T, **options),
            student.requires_grad_(),
            atol=1e-6,
        )


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_zero_when_the_models_agree(name, options, dtype):
    for kind in KINDS:
        teacher = logits_of(kind, 500)[0].to(dtype)
        teacher[:, 7] = -math.inf
        values, gradient = value_and_gradient(FUNCTIONS[name], teacher, teacher, temperature=2.0, **options)
        assert values.tolist() == [0.0] * 3 and gradient.abs().max() == 0


@each_case
def test_forbidden_ids(name, options):
    inf, options = math.inf, {**options, **({"top_k": 1} if name == "tad" else {})}
    teacher = torch.tensor([[1.0, 0.5, -inf, 0.2, 0.3], [1.0, 0.5, 0.1, 0.2, 0.3], [1.0, 0.5, -inf, 0.2, 0.3]]).double()
    student = torch.tensor([[0.7, 0.9, -inf, 0.1, 0.3], [0.7, 0.9, -inf, 0.1, 0.3], [0.7, 0.9, 0.3, 0.1, 0.3]]).double()
    check_values(name, teacher, student, **options)
    if name == "tad":
        # rows are compared with what they are by themselves
        options["tail_weighting"] = "constant"
        check_values(name, teacher, student, **options)
    values, gradient = value_and_gradient(FUNCTIONS[name], teacher, student, **options)
    kept = [0, 1, 3, 4]
    _, expected = value_and_gradient(FUNCTIONS[name], teacher[:1, kept], student[:1, kept], **options)
    torch.testing.assert_close(gradient[:1, kept], expected, rtol=1e-6, atol=1e-12)
    assert gradient[0, 2] == 0
    # an id that is forbidden to one side, where that costs something finite, is as one of very little mass
    almost = value_and_gradient(FUNCTIONS[name], teacher.clamp(min=-60), student.clamp(min=-60), **options)
    for row in values.isfinite().nonzero()[:, 0]:
        torch.testing.assert_close(values[row], almost[0][row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient[row], almost[1][row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [4, 10])
def test_a_teacher_without_a_tail(top_k):
    teacher, student = logits_of("normal", 10)
    teacher[:, 4:] = -math.inf
    teacher, student = teacher[:, :top_k], student[:, :top_k]
    found = value_and_gradient(litgpt_akl.tail_aware_kl, teacher, student, top_k=top_k)
    torch.testing.assert_close(found, value_and_gradient(litgpt_akl.forward_kl, teacher, student))
    teacher[:, 3], student[:, 3:] = 0.1, -math.inf
    assert litgpt_akl.tail_aware_kl(teacher, student, top_k=3).tolist() == [math.inf] * 3


def test_a_sequence_is_the_last_dimension_but_the_vocabulary():
    generator = torch.Generator().manual_seed(3)
    teacher, student = torch.randn(2, 2, 5, 40, generator=generator, dtype=torch.float64)
    teacher[1] *= 6  # one sequence has far thinner tails than the other
    found = litgpt_akl.tail_aware_kl(teacher, student, top_k=3)
    for place in range(2):
        torch.testing.assert_close(found[place], litgpt_akl.tail_aware_kl(teacher[place], student[place], top_k=3))
    assert not torch.allclose(found.flatten(), litgpt_akl.tail_aware_kl(teacher.view(10, 40), student.view(10, 40)))
    # of a token alone, and on average over a sequence, the weight is as given
    constant = {"top_k": 3, "tail_weighting": "constant"}
    alone = litgpt_akl.tail_aware_kl(teacher[0, 0], student[0, 0], top_k=3)
    torch.testing.assert_close(alone, litgpt_akl.tail_aware_kl(teacher[0, 0], student[0, 0], **constant))
    top = litgpt_akl.tail_aware_kl(teacher[0], student[0], top_k=3, tail_weight=0.0)
    p = teacher[0].softmax(-1)
    tails = 1 - p.topk(3).values.sum(-1)
    among = litgpt_akl.tail_aware_kl(teacher[0], student[0], **constant) - top
    torch.testing.assert_close(found[0], top + tails / tails.mean() * among)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_broken_logit_is_never_hidden(name):
    for broken in (math.nan, math.inf):
        for side in (0, 1):
            logits = torch.zeros(2, 1, 15, dtype=torch.float64)
            logits[side, 0, 2] = broken
            assert math.isnan(FUNCTIONS[name](logits[0], logits[1]).item())


@each_case
def test_extreme_logits_in_float32(name, options):
    teacher, student = torch.linspace(0, 1, 20).repeat(2, 2, 1)
    teacher[:, 0], student[0, 0], student[1, 1] = 1000.0, -1000.0, 1000.0
    values, gradient = value_and_gradient(FUNCTIONS[name], teacher, student, **options)
    assert values.isfinite().all() and gradient.isfinite().all()
    # a variance about a mean of 1000 that is rounded in its seventh digit
    check_values(name, teacher, student, **options, atol=1e-7 if name == "csd" else 1e-12)


@each_case
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(name, options, kind):
    teacher, student = (x.float() for x in logits_of(kind, 5000))
    found = value_and_gradient(FUNCTIONS[name], teacher, student, **options)
    exact = value_and_gradient(FUNCTIONS[name], teacher.double(), student.double(), **options)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=1e-6)


LIMITS = [
    ("jsd", {"beta": 0}, {"beta": 1e-7}, "forward_kl"),
    ("jsd", {"beta": 1}, {"beta": 1 - 1e-7}, "reverse_kl"),
    ("skewed_fkl", {"skew": 0}, {"skew": 1e-9}, "forward_kl"),
    ("skewed_rkl", {"skew": 0}, {"skew": 1e-9}, "reverse_kl"),
    ("alpha_beta", {"alpha": 1, "beta": 0}, {"alpha": 1 - 1e-7, "beta": 1e-7}, "forward_kl"),
    ("alpha_beta", {"alpha": 0, "beta": 1}, {"alpha": 1e-7, "beta": 1 - 1e-7}, "reverse_kl"),
]


@pytest.mark.parametrize(("name", "at", "near", "limit"), LIMITS, ids=str)
def test_limits(name, at, near, limit):
    for temperature in (1.0, 2.0):
        logits = logits_of("normal", 300)
        expected = value_and_gradient(getattr(litgpt_akl, limit), *logits, temperature=temperature)
        exactly = value_and_gradient(FUNCTIONS[name], *logits, temperature=temperature, **at)
        assert all(torch.equal(a, b) for a, b in zip(exactly, expected, strict=True))
        nearly = value_and_gradient(FUNCTIONS[name], *logits, temperature=temperature, **near)
        torch.testing.assert_close(nearly, expected, rtol=1e-4, atol=1e-6)


def test_a_skew_of_almost_one_leaves_nothing():
    for name in ("skewed_fkl", "skewed_rkl"):
        values, gradient = value_and_gradient(FUNCTIONS[name], *logits_of("normal", 300), skew=1 - 1e-6)
        assert values.abs().max() < 1e-9 and gradient.abs().max() < 1e-9


def test_relations_to_the_two_kls():
    teacher, student = logits_of("normal", 300)
    forward, reverse = litgpt_akl.forward_kl(teacher, student), litgpt_akl.reverse_kl(teacher, student)
    torch.testing.assert_close(litgpt_akl.token_wise_kl(teacher, student), forward + reverse)
    mass = 1 - teacher[:1].softmax(-1).topk(10).values.sum().item()
    torch.testing.assert_close(litgpt_akl.tail_aware_kl(teacher[:1], student[:1], tail_weight=mass), forward[:1])
    # where the models nearly agree, rescaled JSD is KL for every beta
    close = teacher + 1e-3 * student
    for beta in (0.01, 0.5, 0.99):
        torch.testing.assert_close(
            litgpt_akl.generalised_jsd(teacher, close, beta=beta),
            litgpt_akl.forward_kl(teacher, close),
            rtol=1e-2,
            atol=0,
        )


WEIGHTS = ("mean", "teacher_student", "student", "teacher")


def test_the_concrete_score_divergence_is_a_sum_over_pairs():
    teacher, student = logits_of("normal", 30)
    p, q, d = teacher.softmax(-1), student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
    squares = (d[:, :, None] - d[:, None, :]).square()
    mean = (p + q) / 2
    for weight, (a, b) in zip(WEIGHTS, ((mean, mean), (p, q), (q, q), (p, p)), strict=True):
        expected = (a[:, :, None] * b[:, None, :] * squares).sum((1, 2)) / 4
        torch.testing.assert_close(FUNCTIONS["csd"](teacher, student, weight=weight), expected)
        if a is b:
            variance = (a * d * d).sum(-1) - (a * d).sum(-1).square()
            torch.testing.assert_close(expected, variance / 2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_relations_of_the_concrete_score_divergence(temperature):
    teacher, student = logits_of("normal", 300)
    own, given = FUNCTIONS["csd"], {"temperature": temperature}
    # by the student's weights it has the gradient of reverse KL
    _, reverse = value_and_gradient(litgpt_akl.reverse_kl, teacher, student, **given)
    torch.testing.assert_close(value_and_gradient(own, teacher, student, weight="student", **given)[1], reverse)
    # by one of each it is that by their mean with a part of forward KL, whose weight is a quarter of both KLs' sum
    both = litgpt_akl.forward_kl(teacher, student, **given) + litgpt_akl.reverse_kl(teacher, student, **given)
    _, forward = value_and_gradient(litgpt_akl.forward_kl, teacher, student, **given)
    _, mean = value_and_gradient(own, teacher, student, **given)
    _, mixed = value_and_gradient(own, teacher, student, weight="teacher_student", **given)
    torch.testing.assert_close(mixed, mean + both[:, None] / temperature**2 / 4 * forward)
    # where the models nearly agree it is KL
    close = teacher + 1e-3 * student
    expected = value_and_gradient(litgpt_akl.forward_kl, teacher, close, **given)
    for weight in WEIGHTS:
        found = value_and_gradient(own, teacher, close, weight=weight, **given)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_relations_of_diversity_aware_reverse_kl(temperature):
    own, given = FUNCTIONS["drkl"], {"temperature": temperature}
    teacher, student = logits_of("normal", 300)
    labels = labels_of(teacher)[:, None]
    q = (student / temperature).softmax(-1).gather(-1, labels)[:, 0]
    reverse = litgpt_akl.reverse_kl(teacher, student, **given)
    for row in range(len(teacher)):
        found = own(teacher, student, gamma=1 - q[row].item(), **given)
        torch.testing.assert_close(found[row], reverse[row])
    # what is among the others does not reach the label's logit
    gradients = [value_and_gradient(own, teacher, student, gamma=gamma, **given)[1] for gamma in (0.0, 0.5, 7.0)]
    at_label = [gradient.gather(-1, labels) for gradient in gradients]
    assert torch.equal(at_label[0], at_label[1]) and torch.equal(at_label[0], at_label[2])
    assert not torch.allclose(gradients[0], gradients[1])
    # of two ids the other one is all others: reverse KL, whatever gamma
    teacher, student = logits_of("normal", 2)
    expected = value_and_gradient(litgpt_akl.reverse_kl, teacher, student, **given)
    for gamma in (0.0, 0.5, 7.0):
        torch.testing.assert_close(value_and_gradient(own, teacher, student, gamma=gamma, **given), expected)


def test_labels_without_any_other_id():
    inf = math.inf
    alone = torch.tensor([[0.3, -inf, -inf]]).double()
    both, neither = torch.tensor([[0.1, 0.2, -inf]]).double(), torch.tensor([[-inf, 0.2, 0.5]]).double()
    # teacher, student, whether the teacher allows what the student does
    for teacher, student, allowed in (
        (alone, alone, True),
        (both, alone, True),
        (both, neither, False),
        (neither, neither, True),
        (alone, both, False),
        (neither, both, False),
        (alone, neither, False),
    ):
        check_values("drkl", teacher, student)
        values, gradient = value_and_gradient(FUNCTIONS["drkl"], teacher, student)
        assert values.isfinite().all() == allowed
        assert not allowed or gradient.isfinite().all()


def test_labels_that_do_not_fit():
    logits = torch.zeros(2, 3, 5)
    values = litgpt_akl.diversity_aware_reverse_kl(logits, logits, torch.zeros(2, 3, dtype=torch.long))
    assert values.shape == (2, 3)
    for labels, message in (
        (torch.zeros(2, dtype=torch.long), r"labels \(2,\) must have the shape \(2, 3\) of the tokens"),
        (torch.full((2, 3), 5), "labels must be from 0 to 4"),
        (torch.full((2, 3), -100), "labels must be from 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            litgpt_akl.diversity_aware_reverse_kl(logits, logits, labels)
    with pytest.raises(TypeError, match="labels"):
        litgpt_akl.diversity_aware_reverse_kl(logits, logits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jsd", {"beta": 1.1}, "beta must be between 0 and 1 for jsd, got 1.1"),
        ("skewed_fkl", {"skew": 1.0}, "skew must be at least 0 and below 1, got 1.0"),
        ("alpha_beta", {"alpha": 0.0}, "alpha must be above 0, except for the limits .*, got 0.0"),
        ("alpha_beta", {"beta": -0.5}, "beta must be above 0, except for the limits .*, got -0.5"),
        ("tad", {"top_k": 0}, "top_k must be at least 1, got 0"),
        ("tad", {"tail_weight": -1.0}, "tail_weight must be at least 0, got -1.0"),
        ("tad", {"tail_weighting": "step"}, "tail_weighting must be one of sequence, constant, got 'step'"),
        ("csd", {"weight": "both"}, "weight must be one of mean, teacher_student, student, teacher, got 'both'"),
        ("drkl", {"gamma": -1.0}, "gamma must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](torch.zeros(1, 4), torch.zeros(1, 4), **options)
