"""The loss across two tokenizers, against dense logits under autograd."""

import math

import pytest
import torch
from torch import Tensor

from litgpt_akl.loss.aligned_loss import NONE, AlignedLoss, Alignment, SharedIds, chunk_divergence
from litgpt_akl.loss.blockwise import LMHead, blockwise_surprisal
from litgpt_akl.loss.distillation_loss import DistillationLoss

# 9 ids of the student and a padded one, 7 of the teacher and two padded ones; student 0, 3, 4, 8 = teacher 5, 0, 1, 6
PARTNERS = torch.tensor([5, NONE, NONE, 0, 1, NONE, 8, NONE, 6])
SHARED = SharedIds.make(PARTNERS, 9, 7)
# student: position, chunk 0 of two tokens, position, no chunk, chunk 1, position; teacher: position, 0, 0, position, 1
LABELS, TEACHER_LABELS = torch.tensor([3, 1, 8, 0, 7, 2, 4]), torch.tensor([0, 2, 6, 5, 1, 3, 1])
ALIGNMENT = Alignment(
    student_positions=torch.tensor([0, 3, 6]),
    teacher_positions=torch.tensor([0, 3, 6]),
    student_others=torch.tensor([1, 2, 4, 5]),
    student_chunks=torch.tensor([0, 0, NONE, 1]),
    teacher_others=torch.tensor([1, 2, 4, 5]),
    teacher_chunks=torch.tensor([0, 0, 1, 1]),
    chunks=2,
)


def heads(bias: bool = False, softcap: float | None = None, dtype=torch.float64) -> tuple[LMHead, LMHead]:
    torch.manual_seed(0)
    sizes = (7, 5, 10), (7, 4, 9)
    found = []
    for (n, d, v), cap in zip(sizes, (softcap, None if softcap is None else 3.0), strict=True):
        tensors = [torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype)]
        tensors += [torch.randn(v, dtype=dtype)] if bias else []
        if not found:
            tensors = [tensor.requires_grad_() for tensor in tensors]
        found.append(LMHead(tensors[0], tensors[1], tensors[2] if bias else None, cap))
    return tuple(found)


def log_probabilities(head: LMHead, size: int) -> Tensor:
    logits = head.hidden @ head.weight[:size].T
    logits = logits if head.bias is None else logits + head.bias[:size]
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)).log_softmax(-1)


def reference(student: LMHead, teacher: LMHead, kd_ratio: float, temperature: float) -> Tensor:
    """Forward KL at positions, token by token and chunk by chunk."""
    own, others = log_probabilities(student, 9), log_probabilities(teacher, 7).detach()
    ids, other_ids = [0, 3, 4, 8], [5, 0, 1, 6]
    total = -(1 - kd_ratio) * own[range(7), LABELS].sum()
    for at, other_at in ((0, 0), (3, 3), (6, 6)):
        p = others[other_at, other_ids].log_softmax(-1)
        # the teacher renormalised against all of the student's ids
        total = total + kd_ratio * (p.exp() * (p - own[at, ids])).sum()
    for tokens, other_tokens in (((1, 2), (1, 2)), ((5,), (4, 5))):
        p = others[other_tokens, TEACHER_LABELS[list(other_tokens)]].sum() / temperature
        q = own[tokens, LABELS[list(tokens)]].sum() / temperature
        binary = p.exp() * (p - q) + (1 - p.exp()) * torch.log((1 - p.exp()) / (1 - q.exp()))
        total = total + kd_ratio * temperature * binary
    return total


@pytest.mark.parametrize("bias, softcap", [(False, None), (True, 2.0)])
@pytest.mark.parametrize("kd_ratio, temperature", [(0.0, 100.0), (0.3, 1.0), (0.3, 100.0), (1.0, 7.0)])
def test_value_and_gradient_of_forward_kl(kd_ratio, temperature, bias, softcap):
    loss = DistillationLoss(divergence="fkl", kd_ratio=kd_ratio, block_tokens=2, compile=False)
    student, teacher = heads(bias, softcap)
    found = AlignedLoss(loss, SHARED, temperature)(student, teacher, LABELS, TEACHER_LABELS, ALIGNMENT)
    expected = reference(student, teacher, kd_ratio, temperature)
    # both surprisals of a chunk are raised by 1e-6 nats
    assert found.loss.item() == pytest.approx(expected.item(), abs=2e-5)
    inputs = [tensor for tensor in student[:3] if tensor is not None]
    gradients = torch.autograd.grad(found.loss, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    # what it tells of the tokens adds up to the loss
    sums = found.stats
    total = (1 - kd_ratio) * sums["cross_entropy"] + kd_ratio * sums["divergence"]
    assert found.loss.item() == pytest.approx(total.item())
    assert sums["aligned"] == 3 and found.tokens == 7


def test_statistics_are_of_the_whole_vocabularies():
    student, teacher = heads()
    loss = AlignedLoss(DistillationLoss(divergence="akl", compile=False), SHARED, 100.0)
    values = loss(student, teacher, LABELS, TEACHER_LABELS, ALIGNMENT).values
    own, others = log_probabilities(student, 9), log_probabilities(teacher, 7)
    torch.testing.assert_close(values["cross_entropy"], -own[range(7), LABELS].detach())
    expected = -others[range(7), TEACHER_LABELS]
    at = [0, 3, 6]
    torch.testing.assert_close(values["teacher_cross_entropy"][at], expected[at])
    torch.testing.assert_close(values["teacher_cross_entropy"][[1, 2]], (expected[1] + expected[2]).expand(2) / 2)
    assert values["teacher_cross_entropy"][5].item() == pytest.approx((expected[4] + expected[5]).item())
    torch.testing.assert_close(values["teacher_mass"][at], others[at][:, [5, 0, 1, 6]].exp().sum(-1))
    # a token that the teacher lacks has a cross-entropy and nothing else
    assert values["divergence"][4] == values["teacher_cross_entropy"][4] == values["forward_kl"][4] == 0
    assert values["aligned"].tolist() == [1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("divergence", ["akl", "rkl", "jsd", "tad", "drkl", "tv"])
def test_every_divergence_is_over_the_shared_ids(divergence):
    """At positions the loss is the ordinary one of both heads' rows, but for the mass of the shared ids."""
    student, teacher = heads()
    loss = DistillationLoss(divergence=divergence, temperature=1.5, kd_ratio=0.4, compile=False)
    sequences = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    options = {"alignment": ALIGNMENT, "sequences": sequences}
    found = AlignedLoss(loss, SHARED, 100.0)(student, teacher, LABELS, TEACHER_LABELS, **options)
    at = torch.tensor([0, 3, 6])
    weights = student.weight[SHARED.student], teacher.weight[SHARED.teacher]
    labels = torch.tensor([1, 0, 2])
    rows = loss(
        student.hidden[at], weights[0], teacher.hidden[at], weights[1], labels, sequences=torch.tensor([0, 0, 1])
    )
    outside = -log_probabilities(student, 9)[at][:, SHARED.student].logsumexp(-1)
    torch.testing.assert_close(found.values["divergence"][at], rows.values["divergence"] + outside.detach())
    torch.testing.assert_close(found.values["h"][at], rows.values["h"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_tokenizers_it_is_the_ordinary_loss_bit_for_bit(dtype):
    torch.manual_seed(1)
    hidden, weight = torch.randn(6, 5, dtype=dtype), torch.randn(11, 5, dtype=dtype)
    teacher = LMHead(torch.randn(6, 4, dtype=dtype), torch.randn(12, 4, dtype=dtype), None, None)
    labels, rows, none = torch.randint(9, (6,)), torch.arange(6), torch.empty(0, dtype=torch.int64)
    shared = SharedIds.make(torch.arange(9), 9, 9)
    assert shared.are_all
    loss = DistillationLoss(kd_ratio=0.3, block_tokens=4, compile=False)
    found = []
    for aligned in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        if aligned:
            alignment = Alignment(rows, rows, none, none, none, none, 0)
            result = AlignedLoss(loss, shared, 100.0)(LMHead(*inputs, None, None), teacher, labels, labels, alignment)
        else:
            result = loss(*inputs, teacher.hidden, teacher.weight, labels, vocab_size=9)
        found.append((result.loss.detach(), *torch.autograd.grad(result.loss, inputs), result.stats))
    for one, other in zip(*(each[:3] for each in found), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(value, found[1][3][name]) for name, value in found[0][3].items())


def test_a_batch_without_tokens_keeps_the_graph():
    student, teacher = (head._replace(hidden=head.hidden[:0]) for head in heads())
    none = torch.empty(0, dtype=torch.int64)
    alignment = Alignment(*[none] * 6, 0)
    found = AlignedLoss(DistillationLoss(compile=False), SHARED, 100.0)(student, teacher, none, none, alignment)
    assert found.loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(found.loss, [student.hidden, student.weight]))


@pytest.mark.parametrize("whole_set", [False, True])
def test_surprisal_against_autograd(whole_set):
    student, _ = heads(bias=True, softcap=1.5)
    ids = torch.tensor([1, 3, 8]) if whole_set else LABELS
    options = {"whole_set": whole_set, "vocab_size": 9, "block_tokens": 3}
    found = blockwise_surprisal(student, ids, **options)
    own = log_probabilities(student, 9)
    expected = -own[:, ids].logsumexp(-1) if whole_set else -own[range(7), ids]
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    gradients = (torch.autograd.grad((each * weights).sum(), student[:3]) for each in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_divergence_of_chunks():
    x = torch.tensor([0.0, 0.01, 1.0, 5.0, 40.0], dtype=torch.float64)
    for temperature in (1.0, 100.0):
        assert (chunk_divergence(x, x, temperature) == 0).all()
        assert (chunk_divergence(x[:, None], x, temperature) >= 0).all()
        # a certain student, in either precision, is far from a teacher that is not, and not infinitely far
        assert chunk_divergence(x[2:].float(), torch.zeros(3), temperature).isfinite().all()
    # at 1 it is below forward KL, of which it knows two outcomes
    p, q = (torch.randn(8, dtype=torch.float64).log_softmax(0) for _ in range(2))
    assert (chunk_divergence(-p, -q, 1.0) <= (p.exp() * (p - q)).sum() + 1e-5).all()
    # with a large temperature it tends to that of two rates
    one, other = torch.tensor(2.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    limit = 2 * math.log(2 / 5) - 2 + 5
    assert chunk_divergence(one, other, 1e5).item() == pytest.approx(limit, rel=1e-4)


def test_shared_ids_are_those_that_both_heads_have():
    shared = SharedIds.make(PARTNERS, 9, 7)
    # the teacher's id 8 is padding
    assert shared.student.tolist() == [0, 3, 4, 8] and shared.teacher.tolist() == [5, 0, 1, 6]
    assert shared.places.tolist() == [0, -1, -1, 1, 2, -1, -1, -1, 3]
    assert not shared.are_all and not SharedIds.make(torch.tensor([1, 0]), 2, 2).are_all
