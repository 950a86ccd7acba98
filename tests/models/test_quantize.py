"""A teacher in 8 or 4 bits: near its full weights, as near as is said, and only on one device."""

import re

import pytest
import torch
from helpers.runs import distil, metrics
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.data.steps import MicroBatch
from litgpt_akl.messages import UserError
from litgpt_akl.models.gpt import build_model, load_quantized
from litgpt_akl.training.teacher_accuracy import loss_of_quantization

FORWARD_KL = {"int8": 2e-3, "nf4": 0.15}
"""At most, in nats per token."""


def open_teacher(directory):
    return Config.from_file(directory / "model_config.yaml"), torch.load(directory / "lit_model.pth", mmap=True)


@pytest.mark.parametrize("kind", FORWARD_KL)
def test_it_is_near_its_full_weights_and_as_near_as_is_said(teacher_dir, kind):
    config, weights = open_teacher(teacher_dir)
    with torch.device("meta"):
        teacher = build_model(config, tied=True)
    teacher = load_quantized(teacher, weights, kind, torch.float32, torch.device("cpu"))
    assert teacher.transformer.wte.weight is teacher.lm_head.weight
    # the MLP of this model has a width of 341
    for block, name in ((block, name) for block in teacher.transformer.h for name in ("qkv", "proj")):
        layer = block.attn.get_submodule(name)
        assert layer.weight.nbytes == layer.in_features * layer.out_features / (1 if kind == "int8" else 2)

    ids = torch.randint(4, config.vocab_size, (2, 30))
    positions = torch.tensor([0, 3, 29, 31, 50])
    batch = MicroBatch(ids, positions, ids.flatten()[positions])
    full = GPT(config)
    full.load_state_dict(weights)
    with torch.no_grad():
        expected, found = (torch.log_softmax(model(ids).flatten(0, 1)[positions], -1) for model in (full, teacher))
    kl = (expected.exp() * (expected - found)).sum().item()
    said = str(loss_of_quantization(teacher, config, weights, [batch], config.vocab_size))
    assert float(said.split()[0]) == pytest.approx(kl / 5, rel=1e-2, abs=5e-5) and said.endswith("of 5 response tokens")
    assert 0 < kl / 5 < FORWARD_KL[kind]


@pytest.mark.parametrize("kind", FORWARD_KL)
def test_a_run_tells_what_it_costs_and_learns(student_dir, teacher_dir, alice_json, tmp_path, capsys, kind):
    distil(student_dir, teacher_dir, alice_json, tmp_path / "run", teacher=TeacherArgs(quantize=kind))
    said = re.search(rf"The teacher in {kind}: forward KL .* (\d\.\d+) nats per token", capsys.readouterr().out)
    assert float(said[1]) < FORWARD_KL[kind]
    distil(student_dir, teacher_dir, alice_json, tmp_path / "full")
    losses = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("run", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_it_is_refused_on_many_devices(student_dir, teacher_dir, alice_json, tmp_path):
    with pytest.raises(UserError, match="nf4 is for one device, and this run has 2"):
        distil(student_dir, teacher_dir, alice_json, tmp_path, devices=2, teacher=TeacherArgs(quantize="nf4"))
