"""A LoRA student: LitGPT's adapters on a frozen base, their loss and gradients, and what is saved of them."""

import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import materials
import pytest
import torch
from helpers.lora_cases import IDS, TARGETS, adapted, litgpt_lora_model, litgpt_model, read, read_adapters
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.config.args import LoRAArgs
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.divergences import adaptive_kl
from litgpt_akl.messages import UserError
from litgpt_akl.models.gpt import build_model, distillation_loss, hidden_states, set_up_teacher
from litgpt_akl.models.lora import adapters_of, lora_config, with_new_adapters, without_adapters
from litgpt_akl.models.model_files import read_model_files
from litgpt_akl.models.parallel import load_weights
from litgpt_akl.models.prompt_format import PromptFormat
from litgpt_akl.models.weights import read_config
from litgpt_akl.training.checkpoint import write_student

PLAIN = {"prompt_format": PromptFormat(), "recipe": ""}
SOURCES = ("student_dir", "untied_student_dir", "biased_dir")


@pytest.fixture(scope="session")
def biased_dir(tmp_path_factory) -> Path:
    """Biases everywhere, as many groups as heads, capped logits, heads that are not n_embd wide in all."""
    directory = tmp_path_factory.mktemp("materials") / "biased"
    changes = {"bias": True, "attn_bias": True, "lm_head_bias": True, "n_query_groups": 4, "head_size": 24}
    config = replace(materials.STUDENT_CONFIG, **changes, final_logit_softcapping=2.0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GPT(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_f" not in name:
                torch.nn.init.normal_(parameter, std=0.05)
    materials.write_checkpoint(directory, config, model.state_dict(), tied=False)
    # no class of Transformers is such a model
    described = json.loads((directory / "config.json").read_text())
    materials.write_json(directory / "config.json", described | {"model_type": "biased", "architectures": ["Biased"]})
    return directory


def make(source: Path, lora: LoRAArgs, tied: bool = False, trained: bool = True) -> torch.nn.Module:
    """A student as the command makes it; trained, its adapters are no longer what they were at the start."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        student = build_model(lora_config(read_config(source), lora), tied)
    student = fabric.setup_module(student)
    load_weights(student, with_new_adapters(student, read(source), seed=0))
    if trained:
        generator = torch.Generator().manual_seed(1)
        for adapter in adapters_of(student).values():
            adapter.data = torch.randn(adapter.shape, generator=generator) * 0.1
    return student.eval()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_what_is_saved_gives_the_logits_of_the_student(request, source, targets, tmp_path):
    source, lora, tied = request.getfixturevalue(source), adapted(targets), source == "student_dir"
    student = make(source, lora, tied)
    write_student(
        tmp_path,
        student,
        read_model_files(source),
        tied=tied and not lora.head,
        prompt_format=PromptFormat(),
        recipe="",
    )
    # in float32 two ways to the same logits differ by 1e-5 on some processors
    logits, weights, adapters = student.double()(IDS), read(tmp_path), read_adapters(tmp_path)
    assert (litgpt_model(source, read(source)).double()(IDS) - logits).abs().max() > 0.01
    assert (litgpt_model(source, weights).double()(IDS) - logits).abs().max() < 1e-5
    assert (litgpt_lora_model(source, lora, adapters).double()(IDS) - logits).abs().max() < 1e-5
    head, embeddings = weights["lm_head.weight"], weights["transformer.wte.weight"]
    assert (head.data_ptr() == embeddings.data_ptr()) == (tied and not lora.head)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == (tied and not lora.head)


@pytest.mark.parametrize("targets", TARGETS)
def test_only_what_has_an_adapter_changes(untied_student_dir, targets, tmp_path):
    lora = adapted(targets)
    student = make(untied_student_dir, lora)
    write_student(tmp_path, student, read_model_files(untied_student_dir), tied=False, **PLAIN)
    start, weights = read(untied_student_dir), read(tmp_path)
    assert weights.keys() == start.keys()
    layers = {
        "attn.qkv": lora.query or lora.key or lora.value,
        "attn.proj": lora.projection,
        "mlp.": lora.mlp,
        "lm_head": lora.head,
    }
    wanted = {name for name in start if any(has_one and layer in name for layer, has_one in layers.items())}
    assert {name for name in start if not torch.equal(weights[name], start[name])} == wanted
    config = materials.STUDENT_CONFIG
    rows = [config.head_size * count for count in (config.n_head, config.n_query_groups, config.n_query_groups)]
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}.attn.qkv.weight"
        parts = zip(weights[name].split(rows), start[name].split(rows), strict=True)
        assert [not torch.equal(*part) for part in parts] == [lora.query, lora.key, lora.value]


def test_a_merged_weight_in_bfloat16_is_rounded_once(untied_student_dir, tmp_path):
    student = make(untied_student_dir, adapted("all")).bfloat16()
    write_student(tmp_path, student, read_model_files(untied_student_dir), tied=False, **PLAIN)
    layer = student.transformer.h[0].mlp.fc_1
    expected = layer.linear.weight.double() + 4 * layer.lora_B.double() @ layer.lora_A.double()
    found = read(tmp_path)["transformer.h.0.mlp.fc_1.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.float().bfloat16())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("targets", TARGETS)
def test_the_gradients_are_those_of_the_dense_formula(request, teacher_dir, source, targets):
    source, lora, tied = request.getfixturevalue(source), adapted(targets), source == "student_dir"
    student, teacher = make(source, lora, tied), litgpt_model(teacher_dir, read(teacher_dir))
    adapters = adapters_of(student)
    reference = litgpt_lora_model(source, lora, {name: value.detach() for name, value in adapters.items()})
    positions, labels = torch.arange(3, 100), torch.arange(3, 100) * 7 % 1024
    logits = reference(IDS).flatten(0, 1)[positions]
    with torch.no_grad():
        teacher_logits = teacher(IDS).flatten(0, 1)[positions]
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    expected = 0.4 * cross_entropy + 0.6 * adaptive_kl(teacher_logits, logits).sum()
    expected.backward()

    fabric = L.Fabric(accelerator="cpu", devices=1)
    frozen = build_model(Config.from_file(teacher_dir / "model_config.yaml"), tied=True)
    frozen = set_up_teacher(fabric, frozen)
    load_weights(frozen, read(teacher_dir))
    loss = DistillationLoss(kd_ratio=0.6, block_tokens=40, compile=False)
    hidden = hidden_states(frozen, IDS, positions)
    result = distillation_loss(student, frozen, loss, IDS, positions, labels, hidden, 1024)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0)
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.requires_grad}
    assert wanted.keys() == adapters.keys()
    for name, parameter in adapters.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4 * wanted[name].abs().max())
    with_gradient = {name for name, parameter in student.module.named_parameters() if parameter.grad is not None}
    assert with_gradient == adapters.keys()


def test_the_heads_dropout_is_litgpts(untied_student_dir):
    head, hidden = make(untied_student_dir, adapted("head", dropout=0.3)).lm_head.train(), torch.randn(50, 64)
    torch.manual_seed(5)
    logits = head(hidden)
    torch.manual_seed(5)
    left, right = head.factors(hidden)
    torch.testing.assert_close(left @ right.T, logits)
    assert (head.eval()(hidden) - logits).abs().max() > 0.01


def test_adapters_start_as_litgpts_and_change_nothing(untied_student_dir):
    student = make(untied_student_dir, adapted("all"), trained=False)
    adapters = adapters_of(student)
    for name, adapter in adapters.items():
        if name.endswith("lora_B"):
            assert not adapter.any()
            continue
        bound = adapter.size(1) ** -0.5
        assert 0.9 * bound < adapter.abs().max() <= bound
        assert adapter.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    with torch.no_grad():
        assert torch.equal(student(IDS), litgpt_model(untied_student_dir, read(untied_student_dir))(IDS))
    again, other = (with_new_adapters(student, read(untied_student_dir), seed) for seed in (0, 1))
    assert all(torch.equal(again[name], adapter) for name, adapter in adapters.items())
    assert not torch.equal(other["lm_head.lora_A"], adapters["lm_head.lora_A"])


@torch.no_grad()
def test_without_adapters_a_student_is_its_base(biased_dir):
    student = make(biased_dir, adapted("all", dropout=0.5)).train()
    base = litgpt_model(biased_dir, read(biased_dir))
    with without_adapters(student):
        assert torch.equal(student(IDS), base(IDS))
    hidden = hidden_states(student, IDS, torch.arange(128))
    cap = torch.nn.functional.linear(hidden, student.lm_head.weight, student.lm_head.bias).div(2).tanh().mul(2)
    torch.testing.assert_close(cap, base(IDS).flatten(0, 1))
    assert (student.eval()(IDS) - base(IDS)).abs().max() > 0.01


MISTAKES = [
    ({"r": 0}, "--lora.r must be at least 1, got 0"),
    ({"alpha": 8}, r"--lora.alpha 8 has no effect without --lora.r. Give it"),
    ({"mlp": True}, r"--lora.mlp True has no effect"),
    ({"r": 8, "dropout": 1.0}, "--lora.dropout must be at least 0 and below 1, got 1.0"),
    ({"r": 8, "query": False, "value": False}, "nothing to adapt: set one of --lora.query, key, value"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_adapters_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LoRAArgs(**options)


def test_an_architecture_that_litgpts_lora_lacks_is_named(student_dir):
    student = make(student_dir, adapted("default"))
    weights = read(student_dir) | {"transformer.h.0.mlp.shared.fc_1.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"lacks 1 of the student's tensors, transformer.h.0.mlp.shared.fc_1.weight"):
        with_new_adapters(student, weights, seed=0)
