"""Of each family: LitGPT's commands and Transformers take a student of some of its teacher's layers and channels."""

import json
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES, write_family
from helpers.family_chats import widen_window
from helpers.litgpt_commands import GREEDY, NEW_TOKENS, QUESTION, litgpt, serving, training_options
from helpers.marks import with_all_slow_but
from helpers.runs import gpt
from litgpt.prompts import Default, save_prompt_style
from litgpt.tokenizer import Tokenizer
from transformers import AutoModelForCausalLM

from litgpt_akl.models.student_config import FAMILIES as KINDS
from litgpt_akl.models.student_config import IN_STEP, full_sizes
from litgpt_akl.models.weights import read_config

IDS = torch.arange(4, 64).view(1, 60)


def sizes_of(teacher: Path) -> list[str]:
    """Options of a student that lacks something of all that its family allows, and one of four layers."""
    config, kind = read_config(teacher), json.loads((teacher / "config.json").read_text())["model_type"]
    full = full_sizes(config)
    wanted = {"layers": 3, "mlp": full["mlp"] - 16}
    wanted["heads"] = full["heads"] - (1 if config.n_query_groups == full["heads"] else config.n_query_groups)
    wanted["width"] = wanted["heads"] * config.head_size if KINDS[kind] == IN_STEP else full["width"] - 16
    wanted |= {"experts": full["experts"] - 1} if full["experts"] else {}
    return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]


@torch.no_grad()
def answer_of(student: Path) -> str:
    """Greedy, without a cache."""
    model, tokenizer = gpt(student).eval(), Tokenizer(student)
    ids = start = tokenizer.encode(QUESTION).long()
    while len(ids) < len(start) + NEW_TOKENS and (len(ids) == len(start) or ids[-1] != tokenizer.eos_id):
        ids = torch.cat((ids, model(ids.view(1, -1))[0, -1:].argmax(-1)))
    ids = ids[:-1] if ids[-1] == tokenizer.eos_id else ids
    return tokenizer.decode(ids[len(start) :])


@torch.no_grad()
@pytest.mark.parametrize("name", with_all_slow_but([], FAMILIES))  # each starts five commands and a server
def test_litgpt_and_transformers_take_a_made_student(alice_json, tmp_path, name):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    write_family(name, teacher, tied=False, layers=4)
    widen_window(teacher)
    save_prompt_style(Default(), teacher)
    data = ["--data", "JSON", "--data.json_path", alice_json, "--data.mask_prompt", "true", "--data.num_workers", "0"]
    data += ["--data.prompt_style", '{"class_path": "litgpt.prompts.Default"}', "--records", "6", "--kl_records", "2"]
    litgpt("make_student", teacher, student, *sizes_of(teacher), *data, directory=tmp_path)
    config, logits = read_config(student), gpt(student).eval()(IDS)
    assert config.n_layer == 3 and full_sizes(config).items().isdisjoint(
        (size, value) for size, value in full_sizes(read_config(teacher)).items() if value
    )
    said = litgpt("chat", student, *GREEDY, directory=tmp_path, stdin=f"{QUESTION}\n\n").split(">> Reply: ")[1]
    with serving(student, tmp_path, timeout=400) as ask:
        answer = ask(QUESTION).strip()
    assert answer and len(said) > len("\n>> Prompt: ")
    if config.attention_logit_softcapping is None:
        # where scores are capped, LitGPT's cache adds a mask of truth values to them
        assert answer in said and answer == answer_of(student).strip()
    litgpt("export_hf", student, tmp_path / "exported", directory=tmp_path)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    exported, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", **options)
    assert not any(loading.values()), loading
    assert (exported.eval()(IDS).logits - logits).abs().max() < 1e-4 * logits.abs().max()
    options = training_options(alice_json, learning_rate=1e-6, max_steps=2)
    litgpt("finetune_full", student, "--out_dir", tmp_path / "out", *options, directory=tmp_path)
    trained = gpt(student).eval()
    trained.load_state_dict(torch.load(tmp_path / "out" / "final" / "lit_model.pth", weights_only=True)["model"])
    assert 0 < (trained(IDS) - logits).abs().max() < 1e-2 * logits.abs().max()
