"""Values, gradients and limits of the divergences against a float64 loop with a full sort."""

import math

import pytest
import torch
from helpers.reference import divergence as reference

import litgpt_akl

FUNCTIONS = {
    "akl": litgpt_akl.adaptive_kl,
    "fkl": litgpt_akl.forward_kl,
    "rkl": litgpt_akl.reverse_kl,
    "mix": litgpt_akl.mixed_kl,
}
HEAD_OPTIONS = [(mu, rule) for mu in (0.1, 0.5, 0.9, 1.0) for rule in ("paper", "official")]


def logits_of(kind: str, vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of teacher and student logits in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 3, vocab, generator=generator, dtype=torch.float64)
    if kind == "peaked":
        teacher = 8 * teacher
    if kind == "flat":
        teacher = 1e-3 * teacher
    if kind == "tied":
        # four values only, none of which lets a cumulative mass meet mu
        teacher = (
            torch.tensor([0.0, 0.37, 1.1, 2.3], dtype=torch.float64)[torch.arange(vocab) % 4].expand(3, -1).clone()
        )
        student = teacher + torch.linspace(0, 1, 4, dtype=torch.float64)[torch.arange(vocab) % 4] ** 2
    return teacher, student


def options_of(name: str, mu: float, head_rule: str, temperature: float) -> dict:
    options = {"temperature": temperature}
    if name == "akl":
        options.update(mu=mu, head_rule=head_rule)
    if name == "mix":
        options.update(mix_ratio=0.3)
    return options


def check_values(name, teacher, student, mu, head_rule, temperature=1.0):
    options = options_of(name, mu, head_rule, temperature)
    values = FUNCTIONS[name](teacher, student, **options)
    expected = [reference(name, t, s, **options)[0] for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=values.dtype), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "tied"])
@pytest.mark.parametrize("vocab", [2, 3, 50, 65, 1500])
@pytest.mark.parametrize(("mu", "head_rule"), HEAD_OPTIONS)
def test_adaptive_kl_equals_the_loop(kind, vocab, mu, head_rule):
    teacher, student = logits_of(kind, vocab)
    for temperature in (1.0, 2.5):
        check_values("akl", teacher, student, mu, head_rule, temperature)
        weights = litgpt_akl.adaptive_kl_weight(teacher, student, mu=mu, head_rule=head_rule, temperature=temperature)
        for weight, t, s in zip(weights.tolist(), teacher.tolist(), student.tolist(), strict=True):
            h = reference("akl", t, s, mu=mu, head_rule=head_rule, temperature=temperature)[1]
            assert weight == pytest.approx(h, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["fkl", "rkl", "mix"])
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "tied"])
@pytest.mark.parametrize("vocab", [2, 65, 1500])
def test_other_divergences_equal_the_loop(name, kind, vocab):
    for temperature in (0.5, 1.0, 4.0):
        check_values(name, *logits_of(kind, vocab), 0.5, "paper", temperature)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_the_largest_vocabulary(name, kind):
    teacher, student = logits_of(kind, 152_064)
    for mu, head_rule in [(0.5, "paper"), (0.9, "official")] if name == "akl" else [(0.5, "paper")]:
        check_values(name, teacher[:1], student[:1], mu, head_rule)


def test_the_two_head_rules_on_the_worked_example():
    teacher, student = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log(), torch.zeros(4).double()
    # |p - q| = .15 .05 .05 .15: the id that crosses mu = .5 is in the head under one rule, out of it under the other
    assert litgpt_akl.adaptive_kl_weight(teacher, student, mu=0.5, head_rule="paper").item() == pytest.approx(0.5)
    assert litgpt_akl.adaptive_kl_weight(teacher, student, mu=0.5, head_rule="official").item() == pytest.approx(0.375)
    # a mass that equals mu exactly ends the head under paper and stays in it under official
    teacher = torch.tensor([0.5, 0.25, 0.25]).double().log()
    student = torch.tensor([0.4, 0.4, 0.2]).double().log()
    for rule in ("paper", "official"):
        assert litgpt_akl.adaptive_kl_weight(teacher, student, head_rule=rule).item() == pytest.approx(1 / 3)


def autograd_of_the_formula(name, teacher, student, h, mix_ratio, temperature):
    """Gradient of the sum of values by autograd through plain log-softmaxes, h held fixed."""
    student = student.clone().requires_grad_()
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    share = {"akl": h, "fkl": 1.0, "rkl": 0.0, "mix": mix_ratio}[name]
    (temperature**2 * (share * forward + (1 - share) * reverse)).sum().backward()
    return student.grad


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "tied"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_equal_autograd(name, kind, temperature):
    teacher, student = logits_of(kind, 300)
    options = options_of(name, 0.5, "paper", temperature)
    leaf = student.clone().requires_grad_()
    FUNCTIONS[name](teacher.requires_grad_(), leaf, **options).sum().backward()
    pairs = zip(teacher.tolist(), student.tolist(), strict=True)
    h = torch.tensor([reference("akl", t, s, temperature=temperature)[1] for t, s in pairs], dtype=torch.float64)
    expected = autograd_of_the_formula(name, teacher.detach(), student, h, 0.3, temperature)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-12)
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["fkl", "rkl", "mix"])
def test_gradients_equal_finite_differences_of_the_value(name):
    # a temperature whose square reached only the value, or only the gradient, would show here
    teacher, student = logits_of("normal", 7)
    for temperature in (0.5, 1.0, 3.0):
        torch.autograd.gradcheck(
            lambda s, T=temperature: FUNCTIONS[name](teacher, s, temperature=T), student.requires_grad_(), atol=1e-6
        )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_zero_when_the_models_agree(name, dtype):
    for kind in ("normal", "peaked", "flat"):
        teacher = logits_of(kind, 500)[0].to(dtype)
        student = teacher.clone().requires_grad_()
        values = FUNCTIONS[name](teacher, student, temperature=2.0)
        values.sum().backward()
        assert values.tolist() == [0.0] * 3 and student.grad.abs().max() == 0
        assert litgpt_akl.adaptive_kl_weight(teacher, student).tolist() == [0.5] * 3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forbidden_ids(name):
    inf = math.inf
    teacher = torch.tensor([[1.0, 0.5, -inf, 0.2], [1.0, 0.5, 0.1, 0.2], [1.0, 0.5, -inf, 0.2]]).double()
    student = torch.tensor([[0.7, 0.9, -inf, 0.1], [0.7, 0.9, -inf, 0.1], [0.7, 0.9, 0.3, 0.1]]).double()
    leaf = student.clone().requires_grad_()
    values = FUNCTIONS[name](teacher, leaf)
    expected = [reference(name, t, s)[0] for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    # finite where both sides exclude the same id, and then the gradient is that of the ids that are left
    values[0].backward()
    kept = [0, 1, 3]
    smaller = student[:1, kept].clone().requires_grad_()
    FUNCTIONS[name](teacher[:1, kept], smaller).sum().backward()
    torch.testing.assert_close(leaf.grad[:1, kept], smaller.grad, rtol=1e-6, atol=1e-12)
    assert leaf.grad[0, 2] == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_broken_logit_is_never_hidden(name):
    for broken in (math.nan, math.inf):
        for side in (0, 1):
            logits = torch.zeros(2, 1, 5, dtype=torch.float64)
            logits[side, 0, 2] = broken
            assert math.isnan(FUNCTIONS[name](logits[0], logits[1]).item())


def test_shapes_and_float32():
    teacher, student = logits_of("normal", 60)
    wide = FUNCTIONS["akl"](teacher.view(3, 1, 60), student.view(3, 1, 60))
    assert wide.shape == (3, 1) and wide.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = student.to(dtype).requires_grad_()
        values = FUNCTIONS["akl"](teacher.to(dtype), low)
        assert values.dtype == torch.float32
        values.sum().backward()
        assert low.grad.dtype == dtype
        exact = FUNCTIONS["akl"](teacher.to(dtype).double(), student.to(dtype).double())
        torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("akl", {"mu": 0.0}, "mu must be above 0 and at most 1, got 0.0"),
        ("akl", {"head_rule": "papers"}, "head_rule must be one of paper, official, got 'papers'"),
        ("mix", {"mix_ratio": 1.5}, "mix_ratio must be between 0 and 1, got 1.5"),
        ("fkl", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](torch.zeros(1, 4), torch.zeros(1, 4), **options)
