"""What `litgpt export_hf` writes is the model that LitGPT has: its logits, texts and prompts in Transformers."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import materials
import pytest
import torch
from helpers import runs
from helpers.checkpoints import in_a_copy
from helpers.commands import complete
from helpers.export_cases import CASES, CHAT_TEMPLATE, Case, edit_json, write_source
from helpers.families import FAMILIES, write_family
from helpers.marks import with_all_slow_but
from litgpt import LLM
from litgpt.model import GPT
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.messages import UserError
from litgpt_akl.models import hf as hf_weights
from litgpt_akl.models.export import write_export
from litgpt_akl.models.weights import open_weights, read_config

IDS = torch.arange(4, 132).view(1, 128)
TEXT = "Who stole the tarts?"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@torch.no_grad()
def litgpt_logits(directory: Path) -> torch.Tensor:
    config = read_config(directory)
    model = GPT(config).eval()
    model.load_state_dict(open_weights(directory, config))
    return model(IDS)


def from_pretrained(directory: Path):
    """In float32; every parameter must have come from the files."""
    # the cap on attention scores of Gemma 2 is in the eager attention only
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def difference(source: Path, exported: Path) -> float:
    """The largest between a logit in LitGPT and in Transformers."""
    return (from_pretrained(exported)(IDS).logits - litgpt_logits(source)).abs().max().item()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("materials") / "gemma"
    write_family("Gemma-2-2b", directory, tied=True)
    return directory


@pytest.fixture(scope="module", params=[case for case in CASES.values() if case.tie_option is None])
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def source(case, request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("source") / case.folder
    write_source(case, request.getfixturevalue(case.source), directory)
    return directory


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory) -> Path:
    # a name that means a BOS token to LitGPT means nothing here
    directory = tmp_path_factory.mktemp("exported") / "Llama-3-exported"
    export_hf(source, directory)
    return directory


def test_transformers_has_litgpts_logits(source, exported):
    assert difference(source, exported) < 1e-4


def test_tied_matrices_are_written_once_and_said_to_be_tied(case, exported):
    assert read_json(exported / "config.json")["tie_word_embeddings"] is case.tied
    assert (HEAD in tensors(exported)) is not case.tied


def test_directory_has_what_its_readers_expect(source, exported):
    names = ["chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer.json"]
    for name in names:
        assert (exported / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted(os.listdir(exported)) == sorted([*names, "config.json", "model.safetensors", "tokenizer_config.json"])
    hf_config, original = read_json(exported / "config.json"), read_json(source / "config.json")
    assert hf_config == {**original, "tie_word_embeddings": hf_config["tie_word_embeddings"], "dtype": "float32"}


def test_whoever_may_read_the_source_may_read_the_export(source, exported):
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {
        (source / "config.json").stat().st_mode & 0o777
    }


def test_tokenizer_gives_the_ids_of_litgpt_and_knows_the_chat_template(case, source, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer(TEXT)["input_ids"] == Tokenizer(source).encode(TEXT).tolist()
    assert read_json(exported / "tokenizer_config.json")["add_bos_token"] is case.bos
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False) == f"<user>{TEXT}"


@torch.no_grad()
def test_greedy_answer_is_that_of_litgpt(case, source, exported):
    prompt, config = "Who stole", read_config(source)
    ids = start = Tokenizer(source).encode(prompt).long().view(1, -1)
    model = GPT(config).eval()
    model.load_state_dict(open_weights(source, config))
    for _ in range(12):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(from_pretrained(exported).generate(start, max_new_tokens=12, do_sample=False), ids)
    if case.softcap is None:
        # with its cache LitGPT's Gemma 2 has other logits than without
        llm = LLM.load(source, distribute=None)
        llm.distribute(accelerator="cpu", precision="32-true")
        llm.prompt_style = Default()
        answer = llm.generate(prompt, max_new_tokens=12, top_k=1, return_as_token_ids=True)
        assert torch.equal(answer.view(1, -1), ids[:, start.size(1) :])


@pytest.mark.parametrize(
    "left",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
        {"_name_or_path": "/home/somebody/model", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    ],
)
def test_what_config_json_says_of_other_files_does_not_travel(untied_student_dir, tmp_path, left):
    source, exported = shutil.copytree(untied_student_dir, tmp_path / "source"), tmp_path / "exported"
    edit_json(source / "config.json", **left)
    export_hf(source, exported)
    assert not left.keys() & read_json(exported / "config.json").keys()
    assert difference(source, exported) < 1e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", with_all_slow_but(("Llama-3.2-1B", "Gemma-3-1b-it", "Qwen3-30B-A3B"), FAMILIES))
def test_every_family_has_litgpts_logits(name, tied, tmp_path, capsys):
    write_family(name, tmp_path / "source", tied=tied)
    export_hf(tmp_path / "source", tmp_path / "exported")
    assert ("vLLM refuses a Gemma" in capsys.readouterr().out) == (name.startswith("Gemma") and not tied)
    assert difference(tmp_path / "source", tmp_path / "exported") < 1e-4


@pytest.mark.parametrize("name", with_all_slow_but(("Llama-3.2-1B", "Gemma-3-1b-it", "Qwen3-30B-A3B"), FAMILIES))
def test_what_is_exported_is_read_back(name, tmp_path):
    source, exported = tmp_path / "source", tmp_path / "exported"
    write_family(name, source, tied=False)
    config = read_config(source)
    weights = open_weights(source, config)
    # the order in the file means nothing
    torch.save(dict(sorted(weights.items(), reverse=True)), source / "reversed.pth")
    (source / "reversed.pth").rename(source / "lit_model.pth")
    export_hf(source, exported)
    found = hf_weights.translate(config, hf_weights.read(exported, "Export it again."))
    assert found.keys() == weights.keys()
    assert all(torch.equal(tensor, found[part]) for part, tensor in weights.items())


@pytest.mark.parametrize("name", ["glassllm", "Llama-3.2-1B", "Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_a_missing_config_is_made(untied_student_dir, name, tmp_path):
    source = tmp_path / "source"
    if name in FAMILIES:
        write_family(name, source, tied=True)
    else:
        shutil.copytree(untied_student_dir, source)
    original = read_json(source / "config.json")
    (source / "config.json").unlink()
    export_hf(source, tmp_path / "exported")
    assert difference(source, tmp_path / "exported") < 1e-4
    made = read_json(tmp_path / "exported" / "config.json")
    assert made.pop("torch_dtype") == "float32"
    assert made == {entry: original[entry] for entry in made}


def test_a_student_of_fewer_layers(teacher_dir, tmp_path):
    make_student(teacher_dir, tmp_path / "student", layers=[0, 1, 3])
    export_hf(tmp_path / "student", tmp_path / "exported")
    assert from_pretrained(tmp_path / "exported").config.num_hidden_layers == 3
    assert difference(tmp_path / "student", tmp_path / "exported") < 1e-4


def test_the_language_model_of_a_gemma_3_with_several_parts(tmp_path):
    source = tmp_path / "source"
    write_family("Gemma-3-1b-it", source, tied=True)
    text_config = read_json(source / "config.json")
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16"}
    materials.write_json(source / "config.json", {**whole, "vision_config": {}, "text_config": text_config})
    make_student(source, tmp_path / "student", layers=[1])
    for directory in (source, tmp_path / "student"):
        export_hf(directory, tmp_path / f"{directory.name}-exported")
        assert difference(directory, tmp_path / f"{directory.name}-exported") < 1e-4


def test_bfloat16_stays_bfloat16(untied_student_dir, tmp_path):
    source, exported = shutil.copytree(untied_student_dir, tmp_path / "source"), tmp_path / "exported"
    weights = torch.load(source / "lit_model.pth", weights_only=True)
    torch.save({name: tensor.bfloat16() for name, tensor in weights.items()}, source / "lit_model.pth")
    export_hf(source, exported)
    assert read_json(exported / "config.json")["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(exported).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in tensors(exported).values()} == {torch.bfloat16}
    # both models compute in float32
    assert difference(source, exported) < 1e-4


def test_rows_that_pad_the_vocabulary_are_kept(untied_student_dir, tmp_path):
    source, exported = shutil.copytree(untied_student_dir, tmp_path / "source"), tmp_path / "exported"
    edit_json(source / "config.json", vocab_size=1000, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    export_hf(source, exported)
    assert difference(source, exported) < 1e-4
    hf_config = read_json(exported / "config.json")
    assert hf_config["vocab_size"] == 1024 and "auto_map" not in hf_config


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_large_model_is_in_several_files(student_dir, untied_student_dir, tmp_path, tied):
    source, exported = student_dir if tied else untied_student_dir, tmp_path / "exported"
    write_export(source, exported, max_shard_size=150_000)
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index, found = read_json(exported / "model.safetensors.index.json"), tensors(exported)
    assert index["weight_map"].keys() == found.keys()
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    # only the embeddings alone are larger
    assert sorted(path.stat().st_size for path in exported.glob("*.safetensors"))[: -1 if tied else -2][-1] < 155_000
    assert difference(source, exported) < 1e-4
    whole = tmp_path / "whole"
    export_hf(source, whole)
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors(whole).items())


def test_a_run_exports_its_student(untied_student_dir, teacher_dir, alice_json, tmp_path):
    runs.distil(untied_student_dir, teacher_dir, alice_json, tmp_path, export_hf=True, precision="32-true")
    assert difference(tmp_path / "final", tmp_path / "final-hf") < 1e-4
    assert (litgpt_logits(tmp_path / "final") - litgpt_logits(untied_student_dir)).abs().max() > 0.01
    assert not list(tmp_path.glob(".final*"))


def test_a_run_whose_student_cannot_be_exported_does_not_start(untied_student_dir, teacher_dir, alice_json, tmp_path):
    source = shutil.copytree(untied_student_dir, tmp_path / "source")
    edit_json(source / "config.json", num_hidden_layers=30)
    with pytest.raises(UserError, match="num_hidden_layers is 30, and model_config.yaml says 2"):
        runs.distil(source, teacher_dir, alice_json, tmp_path / "out", export_hf=True)
    assert not (tmp_path / "out").exists()


def test_the_command(student_dir, tmp_path):
    """In a process of its own; a second time it refuses."""
    first, second = (complete(["export_hf", student_dir, "exported"], directory=tmp_path) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("exported: config.json, generation_config.json, model.safetensors, tokenizer.json")
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("error: out_dir exported is not empty.")
    assert difference(student_dir, tmp_path / "exported") < 1e-4


def export_without_transformers(source: str, out_dir: str) -> None:
    # every import of it fails from here on
    sys.modules["transformers"] = None
    write_export(Path(source), Path(out_dir))


def test_transformers_need_not_be_there(untied_student_dir, tmp_path):
    source = shutil.copytree(untied_student_dir, tmp_path / "source")
    (source / "config.json").unlink()
    in_a_copy(export_without_transformers, source, tmp_path / "exported")
    assert difference(source, tmp_path / "exported") < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: shutil.rmtree(source), "does not exist"),
        (lambda source: (source / "lit_model.pth").unlink(), "is not a LitGPT checkpoint: it lacks lit_model.pth"),
        (
            lambda source: (source / "lit_model.pth").rename(source / "lit_model.pth.lora"),
            "Merge its LoRA weights first: litgpt merge_lora",
        ),
        (lambda source: add_weight(source, "transformer.h.0.attn.qkv.lora_A"), "holds LoRA weights. Merge them first"),
        (lambda source: (source / "lit_model.pth").write_bytes(b"PK"), "cannot be read as weights"),
        (lambda source: (source / "config.json").write_text("{"), r"config.json \(1 bytes\) cannot be read"),
        (lambda source: edit_json(source / "config.json", architectures=None), "lacks architectures"),
        (lambda source: edit_json(source / "config.json", hidden_size=65), "hidden_size is 65, and"),
        (lambda source: edit_json(source / "config.json", text_config={}), "of a model with several parts"),
    ],
)
def test_what_cannot_be_exported_is_refused(student_dir, tmp_path, change, message):
    source = shutil.copytree(student_dir, tmp_path / "source")
    change(source)
    with pytest.raises(UserError, match=message) as refused:
        export_hf(source, tmp_path / "exported")
    assert str(refused.value).count("\n") <= 1
    assert set(os.listdir(tmp_path)) <= {"source"}


def add_weight(source: Path, name: str) -> None:
    weights = torch.load(source / "lit_model.pth", weights_only=True)
    torch.save({**weights, name: torch.ones(1)}, source / "lit_model.pth")


def test_models_that_litgpt_cannot_convert_or_describe_are_refused(tmp_path):
    write_family("Qwen2.5-0.5B", tmp_path / "renamed", tied=True)
    config = tmp_path / "renamed" / "model_config.yaml"
    config.write_text(config.read_text().replace("Qwen2.5-0.5B", "mine"))
    with pytest.raises(UserError, match=r"LitGPT cannot convert mine .*\(KeyError: 'transformer.h.{}.attn.qkv.bias'"):
        export_hf(tmp_path / "renamed", tmp_path / "exported")
    write_family("Gemma-2b", tmp_path / "gemma", tied=True)
    (tmp_path / "gemma" / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json, and one can be made only for models like Llama.*GemmaMLP"):
        export_hf(tmp_path / "gemma", tmp_path / "exported")
    assert sorted(os.listdir(tmp_path)) == ["gemma", "renamed"]


def test_directories_that_are_taken_are_refused(student_dir, untied_student_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    for out_dir, message in (
        (student_dir, "is the model's own directory"),
        (untied_student_dir, "is not empty"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            export_hf(student_dir, out_dir)
    assert os.listdir(tmp_path) == ["file"]


def export_with_small_files(source: str, out_dir: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    with pytest.raises(UserError) as refused:
        write_export(Path(source), Path(out_dir))
    print(refused.value)


def test_a_file_too_large_leaves_what_was_there(student_dir, untied_student_dir, tmp_path):
    export_hf(student_dir, tmp_path / "exported")
    before = tensors(tmp_path / "exported")
    message = in_a_copy(export_with_small_files, untied_student_dir, tmp_path / "exported")
    assert message.startswith(f"{tmp_path / 'exported'} cannot be written (") and "File too large" in message
    assert tensors(tmp_path / "exported").keys() == before.keys()
    assert os.listdir(tmp_path) == ["exported"]
