"""The student in `final/` is the student that was trained: for LitGPT's own model and API, and for Transformers."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import runs
from helpers.export_cases import BOS_ID, CASES, Case, write_gemma_2, write_source
from litgpt import LLM
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.model import GPT
from litgpt.prompts import Default, load_prompt_style
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.tokenizer import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt_akl.messages import UserError
from litgpt_akl.training import main as run_module

HEAD, EMBEDDINGS = "lm_head.weight", "transformer.wte.weight"
IDS = torch.arange(4, 132).view(1, 128)
MESSAGES = [{"role": "user", "content": "Who stole the tarts?"}]


@dataclass
class Distilled:
    """A finished run."""

    case: Case
    source: Path
    final: Path
    student: torch.nn.Module
    """The very model that was trained."""
    data: JSON

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.student.eval()(IDS)

    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.final / "lit_model.pth", weights_only=True)

    def start(self) -> dict[str, torch.Tensor]:
        return torch.load(self.source / "lit_model.pth", weights_only=True)


def distil(student: Path, teacher: Path, data: JSON | Path, out_dir: Path, tie_embeddings: bool | None) -> None:
    """A few large steps with an example answer between them."""
    train = {"max_steps": 4, "lr_warmup_steps": 1, "tie_embeddings": tie_embeddings}
    validation = {"interval": 2, "max_new_tokens": 8, "max_iters": 1, "initial_validation": False}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
    runs.distil(student, teacher, data, out_dir, train=train, eval=validation, optimizer=optimizer, precision="32-true")


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("materials") / "gemma"
    write_gemma_2(directory)
    return directory


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def distilled(request, teacher_dir, alice_json, tmp_path_factory) -> Distilled:
    case, base = request.param, tmp_path_factory.mktemp("distilled")
    source, teacher = base / case.folder, base / f"{case.folder}-teacher"
    write_source(case, request.getfixturevalue(case.source), source)
    teacher.symlink_to(teacher_dir)
    data, states = runs.alice(alice_json), []

    def make_state(*arguments):
        states.append(make_state_of_the_command(*arguments))
        return states[0]

    make_state_of_the_command = run_module.make_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_state", make_state)
        distil(source, teacher, data, base / "out", case.tie_option)
    return Distilled(case, source, base / "out" / "final", states[0]["student"].cpu(), data)


@pytest.fixture(scope="module")
def transformers_dir(distilled, tmp_path_factory) -> Path:
    """What a user of Transformers has: the converted weights beside the configuration and tokenizer of `final/`."""
    directory = tmp_path_factory.mktemp("transformers")
    convert_lit_checkpoint(distilled.final, directory)
    (directory / "model.pth").rename(directory / "pytorch_model.bin")
    for path in distilled.final.iterdir():
        if path.name != "lit_model.pth":
            shutil.copy(path, directory)
    return directory


def test_weights_file_is_the_flat_state_of_the_trained_model(distilled):
    weights, live = distilled.weights(), distilled.student.state_dict()
    with torch.device("meta"):
        names = GPT(Config.from_file(distilled.source / "model_config.yaml")).state_dict().keys()
    assert weights.keys() == names == live.keys()
    assert all(torch.equal(weights[name], live[name]) for name in names)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in weights.values())


def test_every_matrix_was_trained(distilled):
    weights, start = distilled.weights(), distilled.start()
    moved = {name: (weights[name] - start[name]).abs().max().item() for name in start}
    assert min(moved.values()) > 1e-3, moved


def test_head_and_embeddings_are_tied_as_in_training(distilled):
    weights, tied = distilled.weights(), distilled.case.tied
    assert torch.equal(weights[HEAD], weights[EMBEDDINGS]) == tied
    assert (weights[HEAD].data_ptr() == weights[EMBEDDINGS].data_ptr()) == tied
    assert json.loads((distilled.final / "config.json").read_text())["tie_word_embeddings"] is tied


@torch.no_grad()
def test_litgpt_model_gives_the_training_logits(distilled):
    for config_dir in (distilled.source, distilled.final):
        model = GPT(Config.from_file(config_dir / "model_config.yaml")).eval()
        model.load_state_dict(distilled.weights())
        assert (model(IDS) - distilled.logits()).abs().max() < 1e-4


@torch.no_grad()
def test_litgpt_api_gives_the_training_logits_and_prompts(distilled):
    llm = LLM.load(distilled.final, distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    assert (llm(IDS) - distilled.logits()).abs().max() < 1e-4
    assert type(llm.prompt_style) is Default


@torch.no_grad()
def test_transformers_model_gives_the_training_logits(distilled, transformers_dir):
    # Gemma 2's softcap in attention is computed by the eager attention only
    model = AutoModelForCausalLM.from_pretrained(transformers_dir, dtype=torch.float32, attn_implementation="eager")
    assert (model(IDS).logits - distilled.logits()).abs().max() < 1e-4
    assert torch.equal(model.lm_head.weight, distilled.weights()[HEAD])
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == distilled.case.tied


def test_transformers_reads_the_weights_in_the_precision_they_have(distilled, transformers_dir):
    assert AutoModelForCausalLM.from_pretrained(transformers_dir).dtype == torch.float32


def test_prompts_get_the_ids_they_had_in_training(distilled, transformers_dir):
    tokenizer, transformers_tokenizer = Tokenizer(distilled.final), AutoTokenizer.from_pretrained(transformers_dir)
    # LitGPT's own samples: a run lets them go when it has prepared its own
    distilled.data.setup()
    dataset = distilled.data.train_dataset
    for number in range(20):
        sample = dataset[number]
        prompt_ids = sample["input_ids"][sample["labels"] == -100].tolist()
        assert (prompt_ids[0] == BOS_ID) == distilled.case.bos
        prompt = load_prompt_style(distilled.final).apply(dataset.data[number]["instruction"])
        assert tokenizer.encode(prompt).tolist() == prompt_ids
        assert transformers_tokenizer(prompt)["input_ids"] == prompt_ids
    for token in ("bos_id", "eos_id"):
        assert getattr(tokenizer, token) == getattr(distilled.data.tokenizer, token)


@torch.no_grad()
def test_softcap_is_in_the_configuration_and_in_the_logits(distilled):
    config = Config.from_file(distilled.final / "model_config.yaml")
    assert config == Config.from_file(distilled.source / "model_config.yaml")
    assert config.final_logit_softcapping == distilled.case.softcap
    uncapped = GPT(replace(config, final_logit_softcapping=None)).eval()
    uncapped.load_state_dict(distilled.weights())
    assert ((uncapped(IDS) - distilled.logits()).abs().max() > 0.1) == (distilled.case.softcap is not None)


def test_files_beside_the_weights(distilled):
    unchanged = [
        "generation_config.json",
        "model_config.yaml",
        "special_tokens_map.json",
        "tokenizer.json",
    ]
    written = [
        "chat_template.jinja",
        "config.json",
        "hyperparameters.yaml",
        "lit_model.pth",
        "manifest.json",
        "prompt_style.yaml",
        "tokenizer_config.json",
    ]
    final, source = distilled.final, distilled.source
    assert {path.name for path in final.iterdir()} == {*unchanged, *written}
    for name in unchanged:
        assert (final / name).read_bytes() == (source / name).read_bytes(), name
    for name, expected in (
        ("config.json", {"tie_word_embeddings": distilled.case.tied, "dtype": "float32"}),
        ("tokenizer_config.json", {"add_bos_token": distilled.case.bos}),
    ):
        entries, original = (json.loads((path / name).read_text()) for path in (final, source))
        if name == "tokenizer_config.json":
            # it was not asked by the template, which is replaced
            original["chat_template"] = (final / "chat_template.jinja").read_text()
        assert entries == {**original, **expected}
    assert type(load_prompt_style(final)) is Default
    recipe = yaml.safe_load((final / "hyperparameters.yaml").read_text())
    assert recipe["checkpoint_dir"] == str(source)
    assert recipe["train"]["max_steps"] == 4


def test_transformers_asks_as_training_did(transformers_dir, distilled):
    found = AutoTokenizer.from_pretrained(transformers_dir).apply_chat_template(MESSAGES, return_dict=False)
    assert found == Tokenizer(distilled.source).encode(Default().apply("Who stole the tarts?")).tolist()


def test_matrices_that_differ_are_not_tied(untied_student_dir, teacher_dir, alice_json, tmp_path):
    with pytest.raises(UserError, match="tie_embeddings true"):
        distil(untied_student_dir, teacher_dir, alice_json, tmp_path, tie_embeddings=True)
    assert not (tmp_path / "final").exists()
