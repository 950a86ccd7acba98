"""A student that leaves here has no rows for ids that only pad: nobody who reads it can draw one."""

import json
import shutil
from pathlib import Path

import materials
import pytest
import torch
import yaml
from helpers import runs
from helpers.export_cases import edit_json
from helpers.families import write_family
from litgpt import LLM
from litgpt.config import Config
from litgpt.generate.base import generate
from litgpt.model import GPT
from litgpt.utils import save_config
from transformers import AutoModelForCausalLM

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.config.args import LoRAArgs
from litgpt_akl.messages import UserError
from litgpt_akl.models.vocabulary import count_ids

IDS, ROWS = 1024, 1088
"""What the tokenizer has, and what embeddings and LM head have."""
WIDE = ("lm_head.weight", "lm_head.bias", "transformer.wte.weight")
TEXT = torch.arange(4, 36).view(1, 32)


def pad(source: Path, directory: Path, rows: int = ROWS, **config) -> Path:
    """A copy with rows that would be drawn often; they are not the same in embeddings and LM head."""
    shutil.copytree(source, directory)
    found = yaml.safe_load((source / "model_config.yaml").read_text())
    save_config(Config(**{**found, "padded_vocab_size": rows, **config}), directory)
    weights = torch.load(source / "lit_model.pth", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name in WIDE:
        if name in weights:
            padding = torch.randn((rows - IDS, *weights[name].shape[1:]), generator=generator)
            weights[name] = torch.cat([weights[name], padding.to(weights[name])])
    torch.save(weights, directory / "lit_model.pth")
    edit_json(directory / "config.json", vocab_size=rows)
    return directory


def read(directory: Path) -> tuple[Config, dict[str, torch.Tensor]]:
    weights = torch.load(directory / "lit_model.pth", weights_only=True)
    return Config.from_file(directory / "model_config.yaml"), weights


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    config, weights = read(directory)
    model = GPT(config).eval()
    model.load_state_dict(weights)
    return model(TEXT)


def share_of_padding(found: torch.Tensor) -> float:
    return torch.softmax(found.double(), dim=-1)[..., IDS:].sum(dim=-1).mean().item()


@pytest.fixture(scope="module", params=["student_dir", "untied_student_dir"], ids=["tied", "untied"])
def student(request, tmp_path_factory) -> Path:
    source = request.getfixturevalue(request.param)
    return pad(source, tmp_path_factory.mktemp("padded") / "student")


@pytest.fixture(scope="module")
def run(student, teacher_dir, alice_json, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("run")
    options = {"train": {"max_steps": 2, "save_interval": 1}, "export_hf": True, "precision": "32-true"}
    runs.distil(student, teacher_dir, alice_json, out_dir, **options)
    return out_dir


def test_the_material_would_be_noticed(student):
    assert share_of_padding(logits(student)) > 0.1


def test_no_folder_of_a_run_has_rows_of_padding(student, run):
    for name in ("final", "step-000001", "step-000002"):
        config, weights = read(run / name)
        assert (config.padded_vocab_size, config.vocab_size) == (IDS, IDS), name
        assert {len(weights[part]) for part in WIDE if part in weights} == {IDS}, name
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in weights.values())
        entries, original = (json.loads((path / "config.json").read_text()) for path in (run / name, student))
        assert entries["vocab_size"] == IDS and entries["tie_word_embeddings"] == original["tie_word_embeddings"]
    assert json.loads((run / "final-hf" / "config.json").read_text())["vocab_size"] == IDS


@torch.no_grad()
def test_all_readers_agree_and_draw_no_padding(run):
    expected = logits(run / "final")
    llm = LLM.load(run / "final", distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    model = AutoModelForCausalLM.from_pretrained(run / "final-hf", dtype=torch.float32).eval()
    for found in (llm(TEXT), model(TEXT).logits):
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4
    torch.manual_seed(0)
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    assert model.generate(TEXT[:, :4], num_return_sequences=200, **options).max() < IDS
    config, weights = read(run / "final")
    with_cache = GPT(config).eval()
    with_cache.load_state_dict(weights)
    with_cache.set_kv_cache(batch_size=1)
    for _ in range(200):
        # what `litgpt generate` draws with
        assert generate(with_cache, TEXT[0, :4], 10, temperature=1.0, top_k=None, top_p=1.0).max() < IDS


def test_a_run_goes_on_where_it_stopped(student, run, teacher_dir, alice_json, tmp_path):
    shutil.copytree(run / "step-000001", tmp_path / "step-000001")
    options = {"train": {"max_steps": 2, "save_interval": 1}, "export_hf": True, "precision": "32-true"}
    found = runs.distil(student, teacher_dir, alice_json, tmp_path, resume="auto", **options)
    expected = torch.load(run / "final" / "lit_model.pth", weights_only=True)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_student_from_here_is_distilled_again(untied_student_dir, teacher_dir, alice_json, tmp_path):
    make_student(pad(untied_student_dir, tmp_path / "wide"), tmp_path / "student", layers=1)
    found = runs.distil(tmp_path / "student", teacher_dir, alice_json, tmp_path / "out", train={"max_steps": 1})
    assert len(found["lm_head.weight"]) == IDS


def test_adapters_on_the_head(student_dir, teacher_dir, alice_json, tmp_path):
    student, options = pad(student_dir, tmp_path / "student"), {"lora": LoRAArgs(r=2, head=True)}
    found = runs.distil(student, teacher_dir, alice_json, tmp_path / "out", train={"max_steps": 1}, **options)
    adapters = torch.load(tmp_path / "out" / "final" / "lit_model.pth.lora", weights_only=True)["model"]
    assert len(found["lm_head.weight"]) == len(adapters["lm_head.lora_B"]) == IDS


@torch.no_grad()
def test_commands_that_write_a_model(student, tmp_path, capsys):
    make_student(student, tmp_path / "half", layers=1)
    export_hf(student, tmp_path / "exported")
    export_hf(tmp_path / "half", tmp_path / "half-exported")
    said = capsys.readouterr().out
    assert said.count("Of the 1,088 rows of embeddings and LM head the last 64 only pad") == 2
    for source, exported in ((student, "exported"), (tmp_path / "half", "half-exported")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / exported, dtype=torch.float32).eval()
        assert model.config.vocab_size == IDS
        assert (model(TEXT).logits - logits(source)[..., :IDS]).abs().max() < 1e-4
    assert logits(tmp_path / "half").shape[-1] == IDS


def test_ids_above_the_vocabulary_of_the_configuration_are_tokens(student_dir, tmp_path):
    """Qwen2.5's vocab_size is 151,643 and lies below its own <|im_end|>."""
    export_hf(pad(student_dir, tmp_path / "qwen", vocab_size=1000), tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == IDS


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("added_tokens.json", {"<more>": 1040}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {}, "1040": {"content": "<more>"}}}),
        ("config.json", {"pad_token_id": 1040, "eos_token_id": [3, 5]}),
        ("config.json", {"text_config": {"image_token_id": 1040}, "eos_token_id": None}),
    ],
)
def test_what_other_files_name_is_no_padding(student_dir, tmp_path, name, entries):
    directory = shutil.copytree(student_dir, tmp_path / "student")
    found = json.loads((directory / name).read_text()) if (directory / name).is_file() else {}
    materials.write_json(directory / name, {**found, **entries})
    assert count_ids(directory) == 1041


@torch.no_grad()
def test_a_head_with_a_bias(tmp_path):
    write_family("phi-2", tmp_path / "narrow", tied=False)
    student = pad(tmp_path / "narrow", tmp_path / "phi")
    export_hf(student, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    assert len(model.lm_head.bias) == IDS
    assert (model(TEXT).logits - logits(student)[..., :IDS]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", '{"a": "b"}'),
        ("added_tokens.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
        ("config.json", '{"text_config": "a"}'),
        ("config.json", '{"eos_token_id": 3'),
    ],
)
def test_a_damaged_file_that_names_ids_is_named(student_dir, tmp_path, name, content):
    student = shutil.copytree(student_dir, tmp_path / "student")
    if name == "tokenizer_config.json":
        # with its other entries, without which nobody has a tokenizer
        content = json.dumps(json.loads((student / name).read_text()) | json.loads(content))
    (student / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} .*cannot be read as .*\n"):
        count_ids(student)
