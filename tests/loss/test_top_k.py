"""k ids of a teacher and the mass of all others: how they are stored, and the loss on them, against slow references."""

import math
from itertools import product

import pytest
import torch
from helpers.reference import log_softmax, lumped, ranked_divergence

from litgpt_akl.loss.blockwise import STATISTICS, LMHead
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.objective import DivergenceName
from litgpt_akl.loss.top_k import TopK
from litgpt_akl.loss.top_k_loss import DEFINED
from litgpt_akl.loss.top_k_loss import top_k_loss as loss_of_heads

VOCAB, TOKENS = 90, 23
LEAVES = ("student_hidden", "student_head_weight", "student_bias")


def draw(*shape, scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(k, dtype=torch.float64, student_scale=0.4, teacher=None, **changes) -> dict:
    """A student's hidden states and head, labels, and rows of a teacher's logits."""
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))
    teacher = draw(TOKENS, VOCAB, scale=2.5) if teacher is None else teacher
    inputs = {
        "student_hidden": draw(TOKENS, 16, seed=3).to(dtype).requires_grad_(),
        "student_head_weight": draw(VOCAB, 16, scale=student_scale, seed=4).to(dtype).requires_grad_(),
        "teacher_rows": TopK(k, VOCAB).pack(teacher.to(dtype), labels),
        "labels": labels,
        "vocab_size": VOCAB,
    }
    return inputs | changes


def top_k_loss(
    loss,
    student_hidden,
    student_head_weight,
    teacher_rows,
    labels,
    *,
    vocab_size,
    student_bias=None,
    student_softcap=None,
    sequences=None,
):
    student = LMHead(student_hidden, student_head_weight, student_bias, student_softcap)
    return loss_of_heads(loss, student, teacher_rows, labels, vocab_size=vocab_size, sequences=sequences)


def student_logits(inputs):
    logits = inputs["student_hidden"] @ inputs["student_head_weight"].T + inputs.get("student_bias", 0)
    cap = inputs.get("student_softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def dense(inputs, loss):
    """The loss under autograd on whole float64 logits, all ids but k put together by logsumexp."""
    logits, labels = student_logits(inputs).double(), inputs["labels"]
    teacher = TopK.of(inputs["teacher_rows"], VOCAB).unpack(inputs["teacher_rows"], torch.float64)
    log_q = logits.log_softmax(-1)
    among = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, teacher.ids, True)
    others = log_q.masked_fill(among, -torch.inf).logsumexp(-1, keepdim=True)
    log_q_of, log_p = torch.cat([log_q.gather(-1, teacher.ids), others], dim=1), teacher.log_p
    rows = list(zip(log_p.tolist(), log_q_of.tolist(), strict=True))
    h = torch.tensor(
        [ranked_divergence("akl", *row, mu=loss.mu, head_rule=loss.head_rule)[1] for row in rows], dtype=torch.float64
    )
    forward = (log_p.exp() * (log_p - log_q_of)).sum(-1)
    reverse = (log_q_of.exp() * (log_q_of - log_p)).sum(-1)
    weight = torch.full_like(h, loss.tail_weight)
    share = {"akl": h, "fkl": 1.0, "rkl": 0.0, "mix": loss.mix_ratio}.get(loss.divergence)
    if loss.divergence == "tad":
        top, parts = loss.top_k, []
        for logs in (log_p, log_q_of):
            mass = logs[:, top:].logsumexp(-1, keepdim=True)
            parts.append((torch.cat([logs[:, :top], mass], dim=1), logs[:, top:] - mass, mass[:, 0].exp()))
        (top_p, rest_p, masses), (top_q, rest_q, _) = parts
        weight *= masses / masses.mean() if loss.tail_weighting == "sequence" else 1
        divergence = (top_p.exp() * (top_p - top_q)).sum(-1)
        divergence = divergence + weight * (rest_p.exp() * (rest_p - rest_q)).sum(-1)
    else:
        divergence = share * forward + (1 - share) * reverse
    options = {"mu": loss.mu, "head_rule": loss.head_rule, "mix_ratio": loss.mix_ratio, "top_k": loss.top_k}
    slow = [
        ranked_divergence(loss.divergence, *row, tail_weight=of, **options)[0]
        for row, of in zip(rows, weight.tolist(), strict=True)
    ]
    assert divergence.tolist() == pytest.approx(slow, rel=1e-9, abs=1e-10)
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    gap = (log_p.exp() - log_q_of.exp()).abs().sum(-1)
    values = {
        "divergence": divergence,
        "forward_kl": forward,
        "reverse_kl": reverse,
        "cross_entropy": cross_entropy,
        "teacher_cross_entropy": -teacher.label_log_p,
        "h": h,
        "h_squared": h**2,
        "head_gap": h * gap,
        "tail_gap": (1 - h) * gap,
        "agreement": teacher.ids[:, 0] == logits.argmax(-1),
        "confidence": log_q.amax(-1).exp(),
        "accuracy": logits.argmax(-1) == labels,
        "teacher_confidence": log_p[:, 0].exp(),
        "teacher_accuracy": teacher.ids[:, 0] == labels,
    }
    total = (1 - loss.kd_ratio) * cross_entropy.sum() + loss.kd_ratio * divergence.sum()
    return total, {name: value.detach().double() for name, value in values.items()}


def gradients(value, inputs):
    return torch.autograd.grad(0.3 * value, [inputs[name] for name in LEAVES if name in inputs])


def assert_equal_to_dense(inputs, loss, rtol=1e-9, atol=1e-10):
    output, (expected, values) = top_k_loss(loss, **inputs), dense(inputs, loss)
    torch.testing.assert_close(output.loss.double(), expected, rtol=rtol, atol=atol)
    assert (tuple(output.values), output.tokens) == (STATISTICS, TOKENS)
    for name, value in output.values.items():
        within = {"rtol": rtol, "atol": atol, "msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(value.double(), values[name], **within)
    for found, wanted in zip(gradients(output.loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("k", [1, 12, VOCAB - 1])
def test_what_is_read_is_what_was_stored_up_to_rounding(k):
    logits, labels = draw(TOKENS, VOCAB, scale=4.0), torch.arange(TOKENS) * 3
    layout = TopK(k, VOCAB)
    rows = layout.pack(logits.clone(), labels)
    assert (rows.shape, rows.dtype) == ((TOKENS, layout.bytes_of_token), torch.uint8)
    assert TopK.of(rows, VOCAB) == layout
    found = layout.unpack(rows, torch.float64)
    for row, label, ids, log_p, label_log_p in zip(logits.tolist(), labels.tolist(), *map(list, found), strict=True):
        expected = log_softmax(row)
        order = sorted(range(VOCAB), key=lambda id, of=row: -of[id])[:k]
        assert ids.tolist() == order
        assert log_p.tolist() == pytest.approx(lumped(expected, order), rel=2**-11, abs=2**-10)
        assert math.fsum(map(math.exp, log_p.tolist())) == pytest.approx(1, abs=1e-14)
        assert label_log_p.item() == pytest.approx(expected[label], rel=1e-6)


@pytest.mark.parametrize(("vocab_size", "of_ids"), [(256, 1), (257, 2), (2**16, 2), (2**16 + 1, 3)])
def test_ids_take_no_more_bytes_than_they_need(vocab_size, of_ids):
    layout = TopK(2, vocab_size)
    logits = torch.zeros(1, vocab_size)
    logits[0, vocab_size - 1], logits[0, 254] = 19.0, 18.0
    rows = layout.pack(logits, torch.tensor([vocab_size - 1]))
    assert layout.bytes_of_token == rows.size(1) == 2 * of_ids + 2 * 3 + 4
    assert layout.unpack(rows, torch.float32).ids.tolist() == [[vocab_size - 1, 254]]


@pytest.mark.parametrize(("divergence", "k"), [*product(DEFINED, (12, VOCAB - 1)), *product(DEFINED[:-1], (1,))])
def test_value_and_gradient_equal_the_dense_formula(divergence, k):
    for kd_ratio in (0.0, 0.4, 1.0):
        loss = DistillationLoss(divergence=divergence, kd_ratio=kd_ratio, mix_ratio=0.2, block_tokens=7)
        assert_equal_to_dense(problem(k), loss)
        bias = draw(VOCAB, seed=5).requires_grad_()
        assert_equal_to_dense(problem(k, student_bias=bias, student_softcap=3.0), loss)


@pytest.mark.parametrize("mu", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("head_rule", ["paper", "official"])
def test_heads_of_other_masses(mu, head_rule):
    for k in (1, 3, 30):
        assert_equal_to_dense(problem(k), DistillationLoss(mu=mu, head_rule=head_rule))


@pytest.mark.parametrize("weighting", ["sequence", "constant"])
def test_tad_weighs_the_rest_of_the_ids_and_all_others_as_one(weighting):
    loss = DistillationLoss(divergence="tad", top_k=4, tail_weight=2.0, tail_weighting=weighting, block_tokens=5)
    assert_equal_to_dense(problem(9), loss)
    # sequences of their own have means of their own
    inputs, sequences = problem(9), torch.arange(TOKENS) // 10
    whole = top_k_loss(loss, **inputs, sequences=sequences).loss
    parts = [part(inputs, sequences == number) for number in range(3)]
    torch.testing.assert_close(whole, sum(top_k_loss(loss, **each).loss for each in parts))


def part(inputs, rows):
    names = ("student_hidden", "teacher_rows", "labels")
    return inputs | {name: inputs[name][rows] for name in names}


@pytest.mark.parametrize("divergence", DEFINED)
def test_all_ids_but_one_give_the_exact_divergence(divergence):
    inputs = problem(VOCAB - 1)
    teacher = TopK(VOCAB - 1, VOCAB).unpack(inputs["teacher_rows"], torch.float64)
    ids = torch.cat([teacher.ids, (VOCAB * (VOCAB - 1) // 2 - teacher.ids.sum(-1))[:, None]], dim=1)
    logits = torch.zeros(TOKENS, VOCAB, dtype=torch.float64).scatter(-1, ids, teacher.log_p)
    loss = DistillationLoss(divergence=divergence, kd_ratio=0.7, block_tokens=8)
    student = inputs["student_hidden"], inputs["student_head_weight"]
    exact = loss(*student, logits, torch.eye(VOCAB, dtype=torch.float64), inputs["labels"])
    found = top_k_loss(loss, **inputs)
    torch.testing.assert_close(found.loss, exact.loss, rtol=1e-10, atol=0)
    for name, value in found.values.items():
        within = {"rtol": 1e-5, "atol": 0.02} if name == "teacher_cross_entropy" else {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(value, exact.values[name], **within, msg=lambda m, n=name: f"{n}: {m}")
    for one, other in zip(gradients(found.loss, inputs), gradients(exact.loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", ["akl", "tad"])
def test_micro_batches_and_blocks_change_nothing(divergence):
    inputs = problem(12)
    whole = top_k_loss(DistillationLoss(divergence=divergence, tail_weighting="constant"), **inputs)
    wanted = gradients(whole.loss, inputs)
    for block_tokens in (1, 4, TOKENS, 1000):
        loss = DistillationLoss(divergence=divergence, tail_weighting="constant", block_tokens=block_tokens)
        parts = [top_k_loss(loss, **part(inputs, slice(*cut))) for cut in ((0, 0), (0, 9), (9, 10), (10, TOKENS))]
        total = sum(each.loss for each in parts)
        torch.testing.assert_close(total, whole.loss)
        for one, other in zip(gradients(total, inputs), wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [0.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ["akl", "fkl", "rkl"])
def test_students_whose_others_have_nearly_no_mass_or_all_of_it(divergence, dtype, scale):
    """With k ids of a mass of 1e-50, or 1 up to rounding, 1 - sum q could not be told from 0."""
    inputs = problem(6, dtype)
    teacher = TopK(6, VOCAB).unpack(inputs["teacher_rows"], dtype)
    for sign in (1.0, -1.0):
        away = torch.zeros(TOKENS, VOCAB, dtype=dtype).scatter_(-1, teacher.ids, sign * scale)
        # so that a row's logits are what is wanted
        hidden = torch.cat([inputs["student_hidden"].detach(), torch.eye(TOKENS, dtype=dtype)], dim=1).requires_grad_()
        weight = torch.cat([inputs["student_head_weight"].detach(), away.T], dim=1).requires_grad_()
        changed = inputs | {"student_hidden": hidden, "student_head_weight": weight}
        within = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
        assert_equal_to_dense(changed, DistillationLoss(divergence=divergence, kd_ratio=0.5), **within)


def test_ids_that_the_teacher_forbids_and_equal_ones():
    teacher = draw(TOKENS, VOCAB, scale=2.5)
    teacher[:, 4:] = -torch.inf
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    inputs = problem(12) | {"labels": labels, "teacher_rows": TopK(12, VOCAB).pack(teacher, labels)}
    forward = top_k_loss(DistillationLoss(divergence="fkl", kd_ratio=1.0), **inputs)
    exact = student_logits(inputs).log_softmax(-1)
    p = inputs["teacher_rows"], torch.float64
    p = TopK(12, VOCAB).unpack(*p)
    expected = torch.where(p.log_p.isneginf(), 0, p.log_p.exp() * p.log_p)[:, :-1].sum(-1)
    expected = expected - torch.zeros_like(exact).scatter(-1, p.ids, p.log_p[:, :-1].exp()).mul(exact).sum(-1)
    torch.testing.assert_close(forward.values["forward_kl"], expected)
    assert all(gradient.isfinite().all() for gradient in gradients(forward.loss, inputs))
    assert top_k_loss(DistillationLoss(divergence="rkl"), **inputs).loss == torch.inf
    equal = problem(12, teacher=torch.zeros(TOKENS, VOCAB, dtype=torch.float64))
    assert_equal_to_dense(equal, DistillationLoss())


def test_a_student_that_forbids_all_others_and_one_that_equals_its_teacher():
    teacher = draw(TOKENS, VOCAB, scale=2.5)
    forbids = torch.zeros(VOCAB, dtype=torch.float64)
    forbids[3:] = -torch.inf
    inputs = problem(3, teacher=teacher + forbids, student_bias=forbids.requires_grad_())
    inputs["labels"] = torch.zeros(TOKENS, dtype=torch.int64)
    found = top_k_loss(DistillationLoss(kd_ratio=0.5), **inputs)
    assert found.loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(found.loss, inputs)[:2])
    layout, labels = TopK(VOCAB - 1, VOCAB), inputs["labels"]
    logits = layout.unpack(layout.pack(teacher.clone(), labels), torch.float64)
    student = torch.zeros_like(teacher).scatter(-1, logits.ids, logits.log_p[:, :-1])
    rest = VOCAB * (VOCAB - 1) // 2 - logits.ids.sum(-1)
    student = student.scatter(-1, rest[:, None], logits.log_p[:, -1:]).requires_grad_()
    eye = torch.eye(VOCAB, dtype=torch.float64)
    same = top_k_loss(
        DistillationLoss(kd_ratio=1.0), student, eye, layout.pack(teacher, labels), labels, vocab_size=VOCAB
    )
    assert abs(same.loss.item()) < 1e-12 and torch.autograd.grad(same.loss, student)[0].abs().max() < 1e-15


def test_a_nan_shows():
    teacher = draw(TOKENS, VOCAB)
    teacher[4, 7] = torch.nan
    assert top_k_loss(DistillationLoss(), **problem(12, teacher=teacher)).loss.isnan()
    inputs = problem(12)
    inputs["student_head_weight"] = inputs["student_head_weight"].detach().clone()
    inputs["student_head_weight"][9, 0] = torch.nan
    assert top_k_loss(DistillationLoss(), **inputs).loss.isnan()


@pytest.mark.parametrize("k", [1, 4, 20])
def test_kl_is_at_most_that_of_whole_distributions(k):
    teacher = draw(TOKENS, VOCAB, scale=2.5)
    inputs = problem(k, teacher=teacher.clone())
    student = inputs["student_hidden"], inputs["student_head_weight"]
    exact = DistillationLoss()(*student, teacher, torch.eye(VOCAB, dtype=torch.float64), inputs["labels"])
    found = top_k_loss(DistillationLoss(), **inputs)
    for name in ("forward_kl", "reverse_kl"):
        assert (found.values[name] <= exact.values[name] + 1e-3).all()
    # what does not depend on the others one by one is exact
    for name in ("cross_entropy", "agreement", "confidence", "accuracy", "teacher_accuracy"):
        torch.testing.assert_close(found.values[name], exact.values[name])
    torch.testing.assert_close(
        found.values["teacher_cross_entropy"], exact.values["teacher_cross_entropy"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("divergence", sorted({*DivergenceName.__args__} - {*DEFINED}))
def test_other_divergences_are_refused(divergence):
    with pytest.raises(ValueError, match=f"divergence {divergence}: it is not defined on 12 ids"):
        top_k_loss(DistillationLoss(divergence=divergence), **problem(12))


def test_other_temperatures_and_a_rest_without_ids_are_refused():
    with pytest.raises(ValueError, match="temperature 2.0: it needs each of the probabilities"):
        top_k_loss(DistillationLoss(temperature=2.0), **problem(12))
    with pytest.raises(ValueError, match="top_k 12: none of 12 ids is left"):
        top_k_loss(DistillationLoss(divergence="tad", top_k=12), **problem(12))
