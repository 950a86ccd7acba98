"""A divergence of the user's own, given by its import path."""

import re

import pytest
import torch
import yaml
from helpers import own_functions
from helpers.runs import distil, metrics
from test_distillation_loss import gradients, problem

from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.objective import user_function
from litgpt_akl.messages import UserError


@pytest.fixture(autouse=True)
def never_called():
    user_function.cache_clear()
    own_functions.ROWS.clear()


@pytest.mark.parametrize("kd_ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_equals_the_closed_form_in_blocks(kd_ratio, temperature, dtype, monkeypatch):
    monkeypatch.setattr("litgpt_akl.loss.distillation_loss._TILE_ELEMENTS", 3 * 90)
    inputs = problem(bias=True, dtype=dtype)
    options = dict(kd_ratio=kd_ratio, temperature=temperature, block_tokens=8)
    found = DistillationLoss(divergence="helpers.own_functions.forward_kl", **options)(**inputs, student_softcap=4.0)
    wanted = DistillationLoss(divergence="fkl", **options)(**inputs, student_softcap=4.0)
    torch.testing.assert_close(found.stats, wanted.stats, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    pairs = zip(gradients(found.loss, inputs), gradients(wanted.loss, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype != torch.bfloat16 else 2**-7, atol=1e-5)
    assert max(own_functions.ROWS) <= 3, "more than a tile was differentiated at once"


def test_a_function_of_logits_that_no_distribution_knows():
    inputs = problem()
    loss = DistillationLoss(divergence="helpers.own_functions.squared_logits", kd_ratio=1.0, block_tokens=8)(**inputs)
    kept = inputs["labels"] != -100
    student = inputs["student_hidden"][kept] @ inputs["student_head_weight"].T
    teacher = inputs["teacher_hidden"][kept] @ inputs["teacher_head_weight"].T
    expected = own_functions.squared_logits(teacher, student).sum()
    torch.testing.assert_close(loss.loss, expected)
    for found, wanted in zip(gradients(loss.loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted.nan_to_num())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"own_functions.mean must give one number for each row of its logits \[29, 90\], a tensor \[29\]"),
        ("number", "it gave float"),
        ("detached", "own_functions.detached does not depend on the student's logits"),
        ("distance", "own_functions.distance has a gradient that is not finite where the student's logits equal"),
        ("logarithm", "own_functions.logarithm has a value that is not finite"),
    ],
)
def test_functions_that_cannot_be_minimised(name, message):
    with pytest.raises(UserError, match=message):
        DistillationLoss(divergence=f"helpers.own_functions.{name}")(**problem())


def test_a_forbidden_id_that_is_not_thought_of():
    inputs = problem(bias=True)
    inputs["teacher_bias"][3] = -torch.inf
    inputs["labels"][inputs["labels"] == 3] = 4
    with pytest.raises(UserError, match="value that is not finite .* Logits may be -inf"):
        DistillationLoss(divergence="helpers.own_functions.forward_kl")(**inputs)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module.function", "cannot be imported: No module named 'no_such_module'. .*PYTHON"),
        ("helpers.own_functions.reverse", "cannot be imported: .* has no attribute 'reverse'"),
        ("helpers.own_functions.constant", "must be a function of two blocks of logits, got a int"),
        (".forward_kl", "cannot be imported: Empty module name"),
    ],
)
def test_paths_that_lead_nowhere(path, message):
    with pytest.raises(UserError, match=f"--distill.divergence {path} {message}"):
        DistillArgs(divergence=path)


def test_runs(teacher_dir, student_dir, alice_json, tmp_path, capsys):
    rows = {}
    for name in ("fkl", "helpers.own_functions.forward_kl", "jsd"):
        out_dir = tmp_path / name
        distil(student_dir, teacher_dir, alice_json, out_dir, distill={"divergence": name}, train={"max_steps": 12})
        assert re.search(rf"Objective +{name}( \(beta 0.5\))?, kd_ratio 0.5", capsys.readouterr().out)
        recipe = yaml.safe_load((out_dir / "hyperparameters.yaml").read_text())
        assert recipe["distill"]["divergence"] == name
        rows[name] = metrics(out_dir)
        first, last = (row["val_divergence"] for row in (rows[name][0], rows[name][-1]))
        assert last < 0.95 * first
    for own, named in zip(rows["helpers.own_functions.forward_kl"], rows["fkl"], strict=True):
        assert own["val_loss" if "val_loss" in own else "loss"] == pytest.approx(
            named["val_loss" if "val_loss" in named else "loss"], rel=1e-4
        )
