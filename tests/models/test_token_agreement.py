"""Files that name tokens, ends, templates and weights: a changed entry is refused with both values, or harmless."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.family_chats import CHATS, RECORDS, write_chat_family
from helpers.runs import alice, distil, evaluate
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.data import StreamingSFT
from litgpt_akl.messages import UserError
from litgpt_akl.models import hf as hf_weights
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.models.pair import check_pair
from litgpt_akl.models.weights import find_checkpoint_dir, open_weights, read_config

OTHER = "{% for m in messages %}{{ m.content }}{% endfor %}"
BOTH = "{% for m in messages %}one{{ m.content }}{% endfor %}"
TEXT = "Who is <|eot_id|> Alice?"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Ids 1000 to 1004 are marks, 1001 and 1004 end texts."""
    directory = tmp_path_factory.mktemp("original") / "model"
    write_chat_family("Llama-3.2-1B", directory, tied=False)
    return directory


@pytest.fixture
def model(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def edit(directory: Path, name: str, **entries) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **entries}))


REFUSED = {
    "an end that is text": ("generation_config.json", {"eos_token_id": "x"}, "'x', and the tokenizer's ids are 0 to"),
    "an end beyond": ("generation_config.json", {"eos_token_id": 99999}, "eos_token_id 99999, and the tokenizer's"),
    "one of several ends": ("generation_config.json", {"eos_token_id": [1001, -1]}, "eos_token_id -1, and the tok"),
    "a truth value": ("generation_config.json", {"eos_token_id": True}, "eos_token_id True, and the tokenizer's ids"),
    "the model's end": ("config.json", {"eos_token_id": 99999}, "config.json has the eos_token_id 99999, and the"),
    "no EOS token": (
        "tokenizer_config.json",
        {"eos_token": "<nope>"},
        "token that tokenizer.json lacks: token '<nope>' not found",
    ),
    "no BOS token": ("tokenizer_config.json", {"bos_token": "<nope>"}, "token '<nope>' not found"),
    "a token under another id": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"1002": {"content": "<|eot_id|>"}}},
        r"says that id 1002 is '<\|eot_id\|>', and tokenizer.json has '<\|start_header_id\|>', id 1002",
    ),
    "an id of another token": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"2000": {"content": "<|eot_id|>"}}},
        r"says that id 2000 is '<\|eot_id\|>', and tokenizer.json has '<\|eot_id\|>', id 1001",
    ),
    "added tokens": ("added_tokens.json", {"<|eot_id|>": 3}, r"id 3 is '<\|eot_id\|>', and tokenizer.json has '\$'"),
    "another EOS token": ("special_tokens_map.json", {"eos_token": "<|eom_id|>"}, r"'<\|eom_id\|>', and tokenizer_con"),
    "another BOS token": ("special_tokens_map.json", {"bos_token": {"content": "!"}}, "bos_token '!', and tokenizer_"),
    "templates": ("chat_template.json", {"chat_template": OTHER}, "different chat templates: '.*' and '.*'"),
    "a template's file": ("chat_template.jinja", OTHER, "tokenizer_config.json and chat_template.jinja have different"),
    "no template": ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "cannot be read as a file with"),
}
"""What is written into which file, and what the refusal says."""


def change(directory: Path, name: str, content) -> None:
    if isinstance(content, str):
        (directory / name).write_text(content)
    else:
        edit(directory, name, **content)


@pytest.mark.parametrize("case", REFUSED)
def test_a_contradiction_is_refused_with_both_values_by_all_that_read_a_model(tmp_path, model, case):
    name, content, message = REFUSED[case]
    change(model, name, content)
    out_dir = tmp_path / "out"
    for command in (
        lambda: check_pair(model, model),
        lambda: make_student(model, out_dir, layers=1),
        lambda: export_hf(model, out_dir),
    ):
        with pytest.raises(UserError, match=message):
            command()
        assert not out_dir.exists()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_run_and_an_evaluation_refuse_before_they_begin(tmp_path, original, model, alice_json, role):
    edit(model, "generation_config.json", eos_token_id=99999)
    pair = (model, original) if role == "student" else (original, model)
    for command in (distil, evaluate):
        with pytest.raises(UserError, match="eos_token_id 99999, and the tokenizer's ids are 0 to 1007"):
            command(*pair, alice(alice_json), tmp_path / "run")
        assert not (tmp_path / "run").exists()


HARMLESS = {
    "ends as a list": ("generation_config.json", {"eos_token_id": [1004, 1001]}),
    "another BOS id": ("generation_config.json", {"bos_token_id": 7}),
    "the model's BOS id": ("config.json", {"bos_token_id": 7}),
    "the model's end": ("config.json", {"eos_token_id": 1004}),
    "sampling": ("generation_config.json", {"temperature": 0.1, "top_k": 1}),
    "a longest length": ("tokenizer_config.json", {"model_max_length": 4}),
    "a side": ("tokenizer_config.json", {"padding_side": "left", "truncation_side": "left"}),
    "an EOS token to be added": ("tokenizer_config.json", {"add_eos_token": True}),
    "the same token": ("tokenizer_config.json", {"added_tokens_decoder": {"1001": {"content": "<|eot_id|>"}}}),
    "the same EOS token": ("special_tokens_map.json", {"eos_token": "<|eot_id|>"}),
    "the same template": ("chat_template.jinja", CHATS["Llama-3.2-1B"].template + "\n"),
    "another name": ("tokenizer_config.json", {"name_or_path": "elsewhere"}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_contradiction_changes_no_id(tmp_path, original, model, case):
    change(model, *HARMLESS[case])
    before, after = (check_pair(directory, directory).tokenizer for directory in (original, model))
    assert after.encode(TEXT).tolist() == before.encode(TEXT).tolist()
    assert (after.eos_id, after.bos_id, {*after.end_ids}) == (before.eos_id, before.bos_id, {*before.end_ids})
    messages = RECORDS[0]["messages"]
    texts = [ChatTemplate.find(directory).render(messages).text for directory in (original, model)]
    assert texts[0] == texts[1]
    export_hf(model, tmp_path / "exported")
    reference = AutoTokenizer.from_pretrained(tmp_path / "exported")
    expected = before.processor.encode(texts[0], add_special_tokens=False).ids
    assert reference.apply_chat_template(messages, return_dict=False) == expected


def test_without_generation_config_the_ends_are_those_of_config_json(tmp_path, model):
    """As in Transformers; a trained student has a generation_config.json with those of its labels."""
    (model / "generation_config.json").unlink()
    edit(model, "config.json", eos_token_id=[1001, 1003])
    assert read_tokenizer(model).end_ids == (1001, 1003)
    edit(model, "tokenizer_config.json", eos_token="<|eom_id|>")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    data = StreamingSFT(str(tmp_path / "data.jsonl"), mask_prompt=True, num_workers=0, val_split_fraction=0.0)
    data.cache_dir = tmp_path / "prepared"
    teacher = shutil.copytree(model, tmp_path / "teacher")
    distil(model, teacher, data, tmp_path / "run", train={"max_steps": 1})
    written = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert {*written["eos_token_id"]} == {1001, 1003, 1004}


@pytest.fixture
def sharded(original, tmp_path) -> Path:
    """A Hugging Face folder in several files, beside LitGPT's configuration."""
    directory = shutil.copytree(original, tmp_path / "sharded")
    config = read_config(directory)
    weights = torch.load(directory / "lit_model.pth", weights_only=True)
    hf_weights.write(directory, config, weights, "100KB")
    (directory / "lit_model.pth").unlink()
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def zeros(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}


INDEX_CASES = {
    "a stale file": (lambda d: save_file(zeros(shards(d)[0]), d / "model.safetensors"), None),
    "a stale shard": (lambda d: save_file(zeros(shards(d)[0]), d / "model-00001-of-00009.safetensors"), None),
    "another format": (lambda d: save_file({"norm.weight": torch.ones(2)}, d / "consolidated.safetensors"), None),
    "an adapter": (lambda d: save_file({"q.lora_A.weight": torch.ones(2)}, d / "adapter_model.safetensors"), None),
    "a weight in two files": (
        lambda d: save_file({**load_file(shards(d)[0]), **load_file(shards(d)[1])}, shards(d)[0]),
        "which another file of .* holds, too",
    ),
    "a missing file": (lambda d: shards(d)[1].unlink(), "No such file|not a LitGPT checkpoint|cannot be read"),
    "a weight elsewhere": (
        lambda d: (lambda one, two: (save_file(load_file(two), one), save_file({"x": torch.ones(1)}, two)))(
            *shards(d)[:2]
        ),
        "lacks .* which is in it by .*index.json",
    ),
    "a file out of the folder": (
        lambda d: edit(d, hf_weights.INDEX, weight_map={"lm_head.weight": "../model.safetensors"}),
        "no plain file name",
    ),
    "an LM head that the index lacks": (lambda d: unlist(d, "lm_head.weight"), "says tie_word_embeddings: false"),
    "a norm that the index lacks": (lambda d: unlist(d, "model.norm.weight"), None),
    "no index": (lambda d: (d / hf_weights.INDEX).unlink(), None),
}


def unlist(directory: Path, name: str) -> None:
    places = json.loads((directory / hf_weights.INDEX).read_text())["weight_map"]
    edit(directory, hf_weights.INDEX, weight_map={key: place for key, place in places.items() if key != name})


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_file_without_entries_is_named(model, name):
    (model / "generation_config.json").unlink()
    (model / name).write_text("[]")
    with pytest.raises(UserError, match=rf"{name} \(2 bytes\) cannot be read as .*it is a list"):
        read_tokenizer(model)


@pytest.mark.parametrize("case", INDEX_CASES)
def test_files_that_the_index_does_not_name_are_not_read_and_others_are_refused(original, sharded, case):
    spoil, message = INDEX_CASES[case]
    spoil(sharded)
    expected = torch.load(original / "lit_model.pth", weights_only=True)
    if message is None:
        directory = find_checkpoint_dir(sharded, "teacher")
        found = open_weights(directory, read_config(directory))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        return
    with pytest.raises(UserError, match=message):
        directory = find_checkpoint_dir(sharded, "teacher")
        open_weights(directory, read_config(directory))
