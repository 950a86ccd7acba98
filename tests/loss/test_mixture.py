"""Several teachers' distributions, averaged block by block, against the dense formula under autograd."""

from typing import get_args

import pytest
import torch
from helpers.formulas import formula
from test_distillation_loss import gradients, problem

from litgpt_akl.loss.blockwise import LMHead
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.divergences import adaptive_kl_weight
from litgpt_akl.loss.mixture import Mixture
from litgpt_akl.loss.objective import DivergenceName

WEIGHTS = (0.2, 0.5, 0.3)


def teachers(labels):
    """Three heads of other widths, vocabularies, softcaps and biases."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = []
    for width, vocab, softcap, bias in ((24, 97, None, False), (8, 90, 5.0, True), (12, 128, 3.0, False)):
        hidden = draw(len(labels), width)
        hidden[0] = torch.nan
        heads.append(LMHead(hidden, draw(vocab, width), draw(vocab) if bias else None, softcap))
    return heads


def dense_logarithms(heads, kept, vocab, temperature):
    """The logarithm of the mixture at a temperature, ``[n, vocab]``, by the plain formula."""
    mixed = 0.0
    for head, weight in zip(heads, WEIGHTS, strict=True):
        logits = head.hidden[kept] @ head.weight.T
        logits = logits if head.bias is None else logits + head.bias
        logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
        mixed = mixed + weight * torch.softmax(logits[:, :vocab] / temperature, dim=-1)
    return mixed.log()


@pytest.mark.parametrize("divergence", get_args(DivergenceName))
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 0.7), (2.5, 1.0)])
def test_value_gradient_and_statistics_are_those_of_the_averaged_distribution(divergence, temperature, kd_ratio):
    inputs = problem()
    labels, kept = inputs["labels"], inputs["labels"] != -100
    loss = DistillationLoss(divergence=divergence, temperature=temperature, kd_ratio=kd_ratio, block_tokens=7)
    heads = teachers(labels)
    student = LMHead(inputs["student_hidden"], inputs["student_head_weight"])
    output = loss.of_heads(student, Mixture(heads, WEIGHTS), labels)

    logits = inputs["student_hidden"][kept] @ inputs["student_head_weight"].T
    log_p, plain = (dense_logarithms(heads, kept, 90, t) for t in (temperature, 1.0))
    plain_q = logits.log_softmax(-1)
    # as logits that are divided by the temperature
    scaled = log_p * temperature
    h = adaptive_kl_weight(scaled, logits.detach(), mu=loss.mu, head_rule=loss.head_rule, temperature=temperature)
    value = formula(loss, scaled, logits, h, labels[kept])
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none")
    total = (1 - kd_ratio) * cross_entropy.sum() + kd_ratio * value.sum()
    torch.testing.assert_close(output.loss, total, rtol=1e-9, atol=1e-10)
    for found, wanted in zip(gradients(output.loss, inputs), gradients(total, inputs), strict=True):
        torch.testing.assert_close(found, wanted.nan_to_num(), rtol=1e-9, atol=1e-10)
    expected = {
        "divergence": value,
        # at temperature 1, whatever the divergence is at
        "forward_kl": (plain.exp() * (plain - plain_q)).sum(-1),
        "reverse_kl": (plain_q.exp() * (plain_q - plain)).sum(-1),
        "cross_entropy": cross_entropy,
        "teacher_cross_entropy": -plain.gather(-1, labels[kept, None])[:, 0],
        "teacher_confidence": plain.exp().amax(-1),
        "teacher_accuracy": (plain.argmax(-1) == labels[kept]).double(),
        "agreement": (plain.argmax(-1) == logits.argmax(-1)).double(),
        "h": h,
    }
    for name, wanted in expected.items():
        found = output.values[name].double()
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_mixture_at_a_temperature_is_not_that_at_1_divided_by_it():
    """Each teacher is as sharp as the temperature makes it, and another id may be the most probable one."""
    hidden, labels = torch.ones(1, 1, dtype=torch.float64), torch.tensor([2])
    heads = [LMHead(hidden, torch.tensor(z, dtype=torch.float64)[:, None]) for z in ([10, 8, -100], [-5, 0, 3])]
    mixture, (plain, tempered) = Mixture(heads, [0.5, 0.5]), torch.empty(2, 1, 3, dtype=torch.float64)
    for temperature, block in ((1.0, plain), (10.0, tempered)):
        mixture.logits_into(block, slice(0, 1), temperature)
    assert (plain / 10).softmax(-1).sub(tempered.exp()).abs().max() > 0.1
    assert (plain.argmax().item(), tempered.argmax().item()) == (2, 1)
    student = LMHead(hidden, torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64))
    stats = DistillationLoss(temperature=10.0).of_heads(student, mixture, labels).stats
    assert stats["teacher_accuracy"].item() == stats["agreement"].item() == 1
    assert stats["teacher_confidence"].item() == pytest.approx(plain.exp().max().item())


@pytest.mark.parametrize("divergence", ["fkl", "jsd"])
def test_equal_teachers_are_as_one_and_an_id_that_all_forbid_gets_no_mass(divergence):
    inputs = problem(dtype=torch.float32)
    student = LMHead(inputs["student_hidden"], inputs["student_head_weight"])
    bias = torch.zeros(90)
    bias[3:5] = -torch.inf
    head = LMHead(inputs["teacher_hidden"], inputs["teacher_head_weight"], bias)
    loss, labels = DistillationLoss(divergence=divergence, kd_ratio=1.0), inputs["labels"]
    one, both = (loss.of_heads(student, teacher, labels) for teacher in (head, Mixture([head] * 2, [0.25, 0.75])))
    torch.testing.assert_close(both.loss, one.loss, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients(both.loss, inputs), gradients(one.loss, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
