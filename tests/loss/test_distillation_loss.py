"""The block-wise loss over two heads against the dense formula under autograd."""

import warnings
from functools import cache
from itertools import product
from typing import get_args

import pytest
import torch
from helpers.formulas import formula
from helpers.marks import with_all_slow_but
from helpers.reference import divergence as reference

from litgpt_akl.loss.blockwise import STATISTICS
from litgpt_akl.loss.compilation import compiled
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.divergences import adaptive_kl_weight
from litgpt_akl.loss.objective import DivergenceName


def problem(tokens=37, vocab=90, width=16, teacher_vocab=None, teacher_width=24, dtype=torch.float64, bias=False):
    """Random hidden states and heads; every fifth label masked, with NaN in one masked position."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    teacher_vocab = teacher_vocab or vocab
    labels = torch.randint(0, min(vocab, teacher_vocab), (tokens,), generator=generator)
    labels[::5] = -100
    inputs = {
        "student_hidden": draw(tokens, width).requires_grad_(),
        "student_head_weight": draw(vocab, width, scale=0.4).requires_grad_(),
        "teacher_hidden": draw(tokens, teacher_width),
        "teacher_head_weight": draw(teacher_vocab, teacher_width, scale=0.8),
        "labels": labels,
    }
    if bias:
        inputs["student_bias"] = draw(vocab).requires_grad_()
        inputs["teacher_bias"] = draw(teacher_vocab)
    with torch.no_grad():
        inputs["student_hidden"][0] = torch.nan
        inputs["teacher_hidden"][0] = torch.nan
    return inputs


LEAVES = ("student_hidden", "student_head_weight", "student_bias")


def dense(inputs, loss, student_softcap=None, teacher_softcap=None, vocab_size=None):
    """Loss and statistics by the plain formula on whole logits, differentiable by autograd."""
    kept = inputs["labels"] != -100
    logits = {}
    for side, cap in (("student", student_softcap), ("teacher", teacher_softcap)):
        x = inputs[f"{side}_hidden"][kept] @ inputs[f"{side}_head_weight"].T
        x = x + inputs[f"{side}_bias"] if f"{side}_bias" in inputs else x
        x = cap * torch.tanh(x / cap) if cap else x
        logits[side] = x[:, : vocab_size or min(len(inputs[f"{s}_head_weight"]) for s in ("student", "teacher"))]
    teacher, student, labels = logits["teacher"].detach(), logits["student"], inputs["labels"][kept]
    log_p, log_q = (teacher / loss.temperature).log_softmax(-1), (student / loss.temperature).log_softmax(-1)
    gap = (log_p.exp() - log_q.exp()).abs().sum(-1)
    # both models as they are, whatever the temperature of the objective
    plain_p, plain_q = teacher.log_softmax(-1), student.log_softmax(-1)
    forward, reverse = (
        torch.nn.functional.kl_div(one, other, reduction="none", log_target=True).sum(-1)
        for one, other in ((plain_q, plain_p), (plain_p, plain_q))
    )
    h = adaptive_kl_weight(teacher, student, mu=loss.mu, head_rule=loss.head_rule, temperature=loss.temperature)
    divergence = formula(loss, teacher, student, h, labels)
    cross_entropy = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    sums = {
        "divergence": divergence,
        "forward_kl": forward,
        "reverse_kl": reverse,
        "cross_entropy": cross_entropy,
        "teacher_cross_entropy": torch.nn.functional.cross_entropy(teacher, labels, reduction="none"),
        "h": h,
        "h_squared": h**2,
        "head_gap": h * gap,
        "tail_gap": (1 - h) * gap,
        "agreement": (teacher.argmax(-1) == student.argmax(-1)).double(),
        "confidence": student.softmax(-1).amax(-1),
        "accuracy": (student.argmax(-1) == labels).double(),
        "teacher_confidence": teacher.softmax(-1).amax(-1),
        "teacher_accuracy": (teacher.argmax(-1) == labels).double(),
    }
    total = (1 - loss.kd_ratio) * cross_entropy.sum() + loss.kd_ratio * divergence.sum()
    return total, {name: value.sum().detach() for name, value in sums.items()}


def gradients(value, inputs, scale=1.0):
    leaves = [inputs[name] for name in LEAVES if name in inputs]
    return torch.autograd.grad(value * scale, leaves)


def assert_equal_to_dense(inputs, loss, rtol=1e-9, **options):
    output = loss(**inputs, **options)
    expected, sums = dense(inputs, loss, **options)
    assert output.tokens == int((inputs["labels"] != -100).sum())
    torch.testing.assert_close(output.loss, expected, rtol=rtol, atol=1e-12)
    assert tuple(output.stats) == STATISTICS
    for name, value in output.stats.items():
        torch.testing.assert_close(
            value, sums[name].to(value.dtype), rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for found, wanted in zip(gradients(output.loss, inputs, 0.3), gradients(expected, inputs, 0.3), strict=True):
        wanted = wanted.nan_to_num()  # autograd of the plain formula carries the NaN of a masked position
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("divergence", get_args(DivergenceName))
@pytest.mark.parametrize("block_tokens", [1, 7, 29, 30, 1000, None])
def test_blocks_equal_dense(divergence, block_tokens, monkeypatch):
    monkeypatch.setattr("litgpt_akl.loss.distillation_loss._TILE_ELEMENTS", 4 * 90)
    loss = DistillationLoss(divergence=divergence, kd_ratio=0.7, mix_ratio=0.2, block_tokens=block_tokens)
    assert_equal_to_dense(problem(), loss)


@pytest.mark.parametrize("divergence", get_args(DivergenceName))
def test_every_divergence_with_softcaps_biases_temperature_and_without_gradient(divergence, monkeypatch):
    monkeypatch.setattr("litgpt_akl.loss.distillation_loss._TILE_ELEMENTS", 3 * 90)
    for kd_ratio in (0.0, 0.4, 1.0):
        loss = DistillationLoss(divergence=divergence, kd_ratio=kd_ratio, temperature=3.0, block_tokens=8)
        inputs = problem(bias=True)
        assert_equal_to_dense(inputs, loss, student_softcap=4.0, teacher_softcap=3.0)
        wanted = loss(**inputs)
        with torch.no_grad():
            assert all(torch.equal(value, wanted.stats[name]) for name, value in loss(**inputs).stats.items())


@pytest.mark.parametrize("kd_ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("softcaps", [(None, None), (4.0, None), (5.0, 3.0)])
def test_softcaps_biases_and_temperature(kd_ratio, temperature, softcaps):
    loss = DistillationLoss(kd_ratio=kd_ratio, temperature=temperature, block_tokens=8)
    for bias in (False, True):
        assert_equal_to_dense(problem(bias=bias), loss, student_softcap=softcaps[0], teacher_softcap=softcaps[1])


@pytest.mark.parametrize("widths", [(90, 97), (97, 90)])
@pytest.mark.parametrize("vocab_size", [None, 88])
def test_widths_that_differ_by_padding(widths, vocab_size):
    inputs = problem(vocab=widths[0], teacher_vocab=widths[1], bias=True)
    inputs["labels"].clamp_(max=87)
    assert_equal_to_dense(inputs, DistillationLoss(block_tokens=8), vocab_size=vocab_size)
    # padding ids get no mass in either model: their rows may hold anything
    output = DistillationLoss()(**inputs, vocab_size=vocab_size)
    for side in ("student", "teacher"):
        with torch.no_grad():
            inputs[f"{side}_head_weight"][vocab_size or 90 :] = 1e4
    assert DistillationLoss()(**inputs, vocab_size=vocab_size).loss == output.loss
    head_gradient = gradients(output.loss, inputs)[1]
    assert head_gradient[vocab_size or 90 :].abs().sum() == 0


@pytest.mark.parametrize("mu", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("head_rule", ["paper", "official"])
def test_statistics_of_the_head_equal_the_loop(mu, head_rule):
    inputs, loss = problem(vocab=300), DistillationLoss(mu=mu, head_rule=head_rule, block_tokens=5)
    kept = inputs["labels"] != -100
    teacher = inputs["teacher_hidden"][kept] @ inputs["teacher_head_weight"].T
    student = (inputs["student_hidden"][kept] @ inputs["student_head_weight"].T).detach()
    rows = [
        reference("akl", t, s, mu=mu, head_rule=head_rule)
        for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    stats = loss(**inputs).stats
    for name, column in zip(("divergence", "h", "head_gap", "tail_gap"), zip(*rows, strict=True), strict=True):
        assert stats[name].item() == pytest.approx(sum(column), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    inputs = problem(dtype=dtype, bias=True)
    wide = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.items()}
    for name in LEAVES:
        wide[name].requires_grad_()
    loss = DistillationLoss(block_tokens=8)
    output, exact = loss(**inputs), loss(**wide)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), exact.loss, rtol=1e-5, atol=0)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for found, wanted in zip(gradients(output.loss, inputs), gradients(exact.loss, wide), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=1e-5)


def test_the_sum_does_not_depend_on_how_tokens_are_split():
    inputs, loss = problem(), DistillationLoss(block_tokens=6)
    whole = loss(**inputs)
    parts = []
    for rows in (slice(0, 1), slice(1, 20), slice(20, 37)):
        cut = {name: x[rows] if name.endswith("hidden") or name == "labels" else x for name, x in inputs.items()}
        parts.append(loss(**cut))
    assert sum(part.tokens for part in parts) == whole.tokens and parts[0].tokens == 0
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss)
    for found, wanted in zip(gradients(total, inputs), gradients(whole.loss, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_tails_are_weighed_within_their_sequences():
    inputs = problem(tokens=40)
    sequences = torch.arange(40) // 8 % 4 * 7  # one of them lies in two places
    loss = DistillationLoss(divergence="tad", top_k=3, tail_weight=2.0, block_tokens=6)
    whole, parts = loss(**inputs, sequences=sequences), []
    # each by itself, with tokens of another one beside it, and all as one
    for numbers in ((0, 21), (7, 14)):
        rows = torch.isin(sequences, torch.tensor(numbers))
        cut = {name: x[rows] if name.endswith("hidden") or name == "labels" else x for name, x in inputs.items()}
        parts.append(loss(**cut, sequences=sequences[rows]))
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss)
    for found, wanted in zip(gradients(total, inputs), gradients(whole.loss, inputs), strict=True):
        torch.testing.assert_close(found, wanted)
    one = loss(**inputs, sequences=torch.full((40,), 3))
    assert torch.equal(one.loss, loss(**inputs).loss) and not torch.allclose(one.loss, whole.loss)
    nothing = {**inputs, "labels": torch.full((40,), -100)}
    assert loss(**nothing, sequences=sequences).loss == 0


def test_a_batch_without_response_tokens_keeps_its_graph():
    inputs = problem(bias=True)
    inputs["labels"].fill_(-100)
    output = DistillationLoss()(**inputs)
    assert output.tokens == 0 and output.loss.item() == 0
    assert all(g.abs().sum() == 0 for g in gradients(output.loss, inputs))


def test_only_what_is_asked_for_gets_a_gradient():
    inputs = problem(bias=True)
    wanted = gradients(DistillationLoss()(**inputs).loss, inputs)
    for name, expected in zip(LEAVES, wanted, strict=True):
        frozen = {key: x.detach() for key, x in inputs.items()}
        frozen[name].requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(DistillationLoss()(**frozen).loss, frozen[name])[0], expected)
    with torch.no_grad():
        assert not DistillationLoss()(**inputs).loss.requires_grad


def test_gradients_are_handed_out_once():
    inputs = problem()
    value = DistillationLoss()(**inputs).loss
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already handed out"):
        value.backward()


@pytest.mark.filterwarnings("error:torch.compile has compiled")
@pytest.mark.parametrize(
    ("divergence", "kd_ratio"),
    # other code if there is no cross-entropy
    with_all_slow_but((("akl", 0.6), ("jsd", 1.0)), product(get_args(DivergenceName), (0.6, 1.0))),
)
def test_compiled_gives_the_same_numbers(divergence, kd_ratio, monkeypatch):
    monkeypatch.setattr("litgpt_akl.loss.distillation_loss._TILE_ELEMENTS", 3 * 90)
    options = dict(divergence=divergence, kd_ratio=kd_ratio, block_tokens=8)
    compiled = DistillationLoss(compile=True, **options)
    assert compiled.compiles_on("cpu"), "the tests need a C++ compiler (apt-get install g++)"
    sizes = ((torch.float64, 37), (torch.float32, 37), (torch.float32, 11), (torch.float32, 3))
    for dtype, tokens in sizes if kd_ratio < 1 else ((torch.float64, 37), (torch.float64, 3)):
        inputs = problem(dtype=dtype, tokens=tokens)
        found, wanted = compiled(**inputs), DistillationLoss(compile=False, **options)(**inputs)
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(found.loss, wanted.loss, **close)
        torch.testing.assert_close(found.stats, wanted.stats, **close)
        if divergence == "csd":
            # its gradients are several times those of the others here, up to 7, and so is their rounding
            close["atol"] *= 5
        for a, b in zip(gradients(found.loss, inputs), gradients(wanted.loss, inputs), strict=True):
            torch.testing.assert_close(a, b, **close)


def test_each_variant_is_compiled_and_a_limit_is_said(monkeypatch):
    monkeypatch.setattr("litgpt_akl.loss.distillation_loss.compiled", cache(compiled.__wrapped__))
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile has compiled")
        # the comparison once, and three gradients: with cross-entropy, without it, without reverse KL
        for options in ({}, {"kd_ratio": 1.0}, {"divergence": "fkl"}):
            loss = DistillationLoss(compile=True, **options)
            loss(**problem(tokens=8))
        assert stats["unique_graphs"] == before + 4
        inputs = problem(tokens=8, dtype=torch.float32)
        with pytest.warns(UserWarning) as said:
            found = loss(**inputs)
    names = [str(warning.message).split(" as it may (1, ")[0].split()[-1] for warning in said]
    assert names == ["compare", "_replace_by_gradient"]
    assert stats["unique_graphs"] == before + 4
    wanted = DistillationLoss(divergence="fkl", compile=False)(**inputs)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(gradients(found.loss, inputs), gradients(wanted.loss, inputs))


def test_an_infinite_divergence_is_seen():
    inputs = problem(bias=True)
    with torch.no_grad():
        inputs["student_bias"][3] = -torch.inf
    assert torch.isinf(DistillationLoss(divergence="fkl")(**inputs).loss)
    inputs["teacher_bias"][3] = -torch.inf
    inputs["labels"][inputs["labels"] == 3] = 4
    assert torch.isfinite(DistillationLoss(divergence="akl")(**inputs).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(labels=i["labels"][:5]), r"student_hidden must be \[5 labels, 16\], got \[37, 16\]"),
        (lambda i: i.update(teacher_hidden=i["teacher_hidden"][:, :4]), r"teacher_hidden must be \[37 labels, 24\]"),
        (lambda i: i["labels"].fill_(90), "label 90 lies outside the 90 ids"),
        (lambda i: i.update(vocab_size=91), "vocab_size 91 is above the 90 ids of the student's head"),
    ],
)
def test_misfits_are_named(change, message):
    inputs = problem()
    change(inputs)
    with pytest.raises(ValueError, match=message):
        DistillationLoss()(**inputs)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="kd_ratio must be between 0 and 1, got 1.2"):
        DistillationLoss(kd_ratio=1.2)
    with pytest.raises(ValueError, match="block_tokens must be at least 1, got 0"):
        DistillationLoss(block_tokens=0)
