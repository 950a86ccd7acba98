"""A text has the ids of training in every folder that is written, for LitGPT and for Transformers: one BOS token."""

import json
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.encoding_cases import CASES, CHATML, GEMMA, LLAMA_3, talk, train_tokenizer
from helpers.encoding_cases import Case as Template
from helpers.encoding_cases import write_tokenizer as write_tokenizer_files
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.prompts import (
    Alpaca,
    CodeLlama,
    Default,
    Gemma,
    Llama3,
    OLMo,
    Phi3,
    PromptStyle,
    Qwen2_5,
    SmolLM2,
    save_prompt_style,
)
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.data.encoding import Encoder
from litgpt_akl.messages import UserError
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.model_files import copy_model_files, read_tokenizer
from litgpt_akl.models.tokenizer import OneBosTokenizer

QUESTIONS = ("Who stole the tarts?", " 2 + 2 =\n", "", "Say <s> and <|im_start|> twice")
NO_TEMPLATE = ""


@dataclass
class Kind:
    """A model's files, and what makes its prompts."""

    folder: str
    style: PromptStyle
    template: str
    bos: str | None
    adds_bos: bool = False
    """Does tokenizer.json put BOS before every text?"""
    config: dict = field(default_factory=dict)
    """Entries of tokenizer_config.json"""
    tokenizer: str = "byte-level"
    named: bool = False
    """Does LitGPT know the style by the model's name? Otherwise prompt_style.yaml has it."""


KINDS = {
    "SmolLM2": Kind("SmolLM2-135M-Instruct", SmolLM2(), CHATML, "<|im_start|>", named=True),
    "SmolLM2 elsewhere": Kind("teacher", SmolLM2(), CHATML, "<|im_start|>"),
    "SmolLM2, false": Kind("teacher", SmolLM2(), CHATML, "<|im_start|>", config={"add_bos_token": False}),
    "SmolLM2, other prompts": Kind("SmolLM2-135M-Instruct", Alpaca(), CHATML, "<|im_start|>"),
    "SmolLM2, no template": Kind("SmolLM2-135M-Instruct", Default(), NO_TEMPLATE, "<|im_start|>"),
    "Llama 3": Kind("Llama-3.2-1B-Instruct", Llama3(), LLAMA_3, "<|begin_of_text|>", adds_bos=True, named=True),
    "Llama 3 elsewhere": Kind("teacher", Llama3(), LLAMA_3, "<|begin_of_text|>", adds_bos=True),
    "Llama 3 base": Kind("Llama-3.2-1B", Default(), NO_TEMPLATE, "<|begin_of_text|>", adds_bos=True, named=True),
    "Llama 3 base elsewhere": Kind("teacher", Default(), NO_TEMPLATE, "<|begin_of_text|>", adds_bos=True),
    "Gemma": Kind("gemma", Gemma(), GEMMA, "<s>", adds_bos=True, config={"add_bos_token": True}),
    "Gemma, from its class": Kind("gemma", Gemma(), GEMMA, "<s>", config={"add_bos_token": True}),
    "Llama 2": Kind("llama", Alpaca(), NO_TEMPLATE, "<s>", True, {"tokenizer_class": "LlamaTokenizer"}),
    "OLMo": Kind("olmo", OLMo(), "{{ bos_token }}" + CHATML, "<|endoftext|>", config={"add_bos_token": False}),
    "Qwen": Kind("qwen", Qwen2_5(), CHATML, None, config={"add_bos_token": False}),
    "Llama 2, spaces": Kind(
        "llama", Alpaca(), NO_TEMPLATE, "<s>", True, {"tokenizer_class": "LlamaTokenizer"}, "prepended space"
    ),
    "Mistral, spaces": Kind(
        "mistral",
        CodeLlama(),
        CASES["llama-2"].source,
        "<s>",
        True,
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        "prepended space",
    ),
    "Gemma, one space": Kind("gemma", Gemma(), GEMMA, "<s>", True, {"add_bos_token": True}, "Metaspace"),
    "Phi 3, spaces": Kind("phi", Phi3(), CHATML, "<s>", False, {"add_bos_token": False}, "prepended space"),
    "told not to": Kind("neutral", Default(), NO_TEMPLATE, "<s>", True, {"add_bos_token": False}),
}


@cache
def trained_tokenizer(kind: str) -> str:
    tokenizer = train_tokenizer(kind)
    tokenizer.add_special_tokens(["<|begin_of_text|>"])
    return tokenizer.to_str()


def write_model(kind: Kind, directory: Path) -> None:
    tokenizer = FastTokenizer.from_str(trained_tokenizer(kind.tokenizer))
    if kind.adds_bos:
        bos = (kind.bos, tokenizer.token_to_id(kind.bos))
        template = processors.TemplateProcessing(
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A $B", special_tokens=[bos]
        )
        before = [] if tokenizer.post_processor is None else [tokenizer.post_processor]
        tokenizer.post_processor = processors.Sequence([*before, template])
    case = Template(kind.template, "", eos_token="<|im_end|>", bos_token=kind.bos)
    write_tokenizer_files(directory, tokenizer, case, **kind.config)
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_query_groups": 1, "intermediate_size": 16}
    rows = tokenizer.get_vocab_size()
    config = Config.from_name("Llama-3.2-1B", **small, head_size=8, vocab_size=rows, padded_vocab_size=rows)
    config.name = kind.folder if kind.named else "llama"
    save_config(config, directory)
    torch.save(GPT(config).state_dict(), directory / "lit_model.pth")
    if not kind.named:
        save_prompt_style(kind.style, directory)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def kind(request) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def folders(kind, tmp_path_factory) -> dict[str, Path]:
    """All that are made of one: the source's, LitGPT's, and Transformers'."""
    base = tmp_path_factory.mktemp("bos")
    source = base / kind.folder
    write_model(kind, source)
    made = {"source": source, "student": base / "student", "final": base / "final"}
    make_student(source, made["student"], layers=1)
    # what `final/` and `step-*` have beside their weights
    copy_model_files_to(made["student"], made["final"], kind.style)
    for name in ("source", "student"):
        export_hf(made[name], base / f"{name}-hf")
    copy_model_files_to(made["final"], base / "again", kind.style)
    return {**made, "again": base / "again", "source-hf": base / "source-hf", "student-hf": base / "student-hf"}


def copy_model_files_to(source: Path, out_dir: Path, style: PromptStyle) -> None:
    out_dir.mkdir()
    copy_model_files(source, out_dir, style)


def for_litgpt(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in folders.items() if name in ("student", "final", "again")}


def written(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in folders.items() if name != "source"}


def prompts(kind: Kind) -> list[str]:
    return [kind.style.apply(question) for question in QUESTIONS]


@cache
def transformers_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    # an export is to be read without being told how; what is LitGPT's may name a class that reads other files
    return (AutoTokenizer if path.name.endswith("-hf") else PreTrainedTokenizerFast).from_pretrained(path)


def test_no_prompt_has_two(kind, folders):
    tokenizer = OneBosTokenizer(folders["source"])
    for text in prompts(kind):
        ids = tokenizer.encode(text).tolist()
        plain = tokenizer.processor.encode(text, add_special_tokens=False).ids
        assert ids in (plain, [tokenizer.bos_id, *plain])
        assert tokenizer.bos is None or ids[:2] != [tokenizer.bos_id] * 2
        if kind.bos is not None and kind.config.get("add_bos_token") is not False and kind.folder != "teacher":
            assert ids[:1] == [tokenizer.bos_id]


def test_litgpt_gives_every_prompt_the_ids_of_training(kind, folders):
    training = OneBosTokenizer(folders["source"])
    for name, path in for_litgpt(folders).items():
        for text in prompts(kind):
            assert Tokenizer(path).encode(text).tolist() == training.encode(text).tolist(), (name, text)


def test_transformers_gives_every_prompt_the_ids_of_training(kind, folders):
    training = OneBosTokenizer(folders["source"])
    for name, path in written(folders).items():
        tokenizer = transformers_tokenizer(path)
        for text in prompts(kind):
            expected = training.encode(text).tolist()
            if name.endswith("-hf") and kind.adds_bos and text.startswith(kind.bos):
                # as of the original's: Llama 3's tokenizer is to be told that the text has it
                assert tokenizer(text, add_special_tokens=False).input_ids == expected, (name, text)
            elif kind.bos is None or kind.template == NO_TEMPLATE or kind.adds_bos or text.startswith(kind.bos):
                assert tokenizer(text).input_ids == expected, (name, text)
            else:
                # only LitGPT begins such a text with BOS; the model's own tokenizer never did
                assert tokenizer(text).input_ids == transformers_tokenizer(folders["source"])(text).input_ids


def test_conversations_have_the_ids_of_training(kind, folders):
    if kind.template == NO_TEMPLATE:
        return
    source = folders["source"]
    encoder = Encoder(OneBosTokenizer(source), kind.style, ChatTemplate.find(source))
    original = transformers_tokenizer(source)
    for question in QUESTIONS:
        messages = talk(question, "The Knave of Hearts.")
        ids, _ = encoder.encode({"messages": messages})[:2]
        assert ids == original.apply_chat_template(messages, return_dict=False)
        for name, path in written(folders).items():
            tokenizer = transformers_tokenizer(path)
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            assert tokenizer.apply_chat_template(messages, return_dict=False) == ids, name
            assert tokenizer(text, add_special_tokens=False).input_ids == ids, name
            if not kind.adds_bos:
                assert tokenizer(text).input_ids == ids, name
            if name in for_litgpt(folders) and kind.style.apply("").startswith(kind.bos or "none"):
                assert Tokenizer(path).encode(text).tolist() == ids, name


def test_texts_of_any_beginning_get_one_in_litgpt(kind, folders):
    """Whatever is typed, where tokenizer.json adds none."""
    if kind.bos is None:
        return
    training = OneBosTokenizer(folders["source"])
    for name, path in for_litgpt(folders).items():
        if transformers_tokenizer(path)("a").input_ids[:1] == [training.bos_id]:
            continue
        tokenizer = Tokenizer(path)
        for text in ("Alice", f"{kind.bos}Alice"):
            ids = tokenizer.encode(text).tolist()
            assert ids[:1] == [training.bos_id] if tokenizer.use_bos else ids[:1] != [training.bos_id], name
            assert training.bos_id not in ids[1:], name


def test_tokenizer_file_is_left_as_it_is_where_it_says_so_already(kind, folders):
    source = json.loads((folders["source"] / "tokenizer.json").read_text(encoding="utf-8"))
    for name, path in written(folders).items():
        found = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        assert {**found, "post_processor": None} == {**source, "post_processor": None}, name
        if kind.template == CHATML or kind.template == GEMMA:
            assert found == source, name


def appending_eos(content: dict) -> None:
    eos = "<|eot_id|>"
    id = next(token["id"] for token in content["added_tokens"] if token["content"] == eos)
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*sequence, {"SpecialToken": {"id": eos, "type_id": 0}}],
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {eos: {"id": eos, "ids": [id], "tokens": [eos]}},
    }


def cutting(content: dict) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


def padding(content: dict) -> None:
    fixed = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**fixed, "pad_id": 1, "pad_type_id": 0, "pad_token": "a"}


@pytest.mark.parametrize("change", [None, appending_eos, cutting, padding])
def test_a_response_ends_with_one_eos_token_whatever_tokenizer_json_does(tmp_path, change):
    plain_dir = tmp_path / "plain"
    directory = write_tokenizer_files(plain_dir, train_tokenizer("byte-level"), CASES["llama-3"], add_bos_token=False)
    plain = OneBosTokenizer(directory).encode("Who stole the tarts?", bos=False).tolist()
    if change is not None:
        content = json.loads((directory / "tokenizer.json").read_text())
        change(content)
        (directory / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = OneBosTokenizer(directory)
    for text in ("Who stole the tarts?", "Who stole the tarts?<|eot_id|>", "Who stole the tarts?<|eot_id|><|eot_id|>"):
        assert tokenizer.encode(text, bos=False, eos=True).tolist() == [*plain, tokenizer.eos_id]
        assert tokenizer.encode(text, bos=False, eos=True, max_length=2).tolist() == plain[:2]
    assert tokenizer.encode("Who stole the tarts?", bos=False).tolist() == plain
    (tmp_path / "copy").mkdir()
    copy_model_files(directory, tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy").encode("Who stole the tarts?", bos=False).tolist() == plain


@pytest.mark.parametrize("entry", ["missing", None])
def test_a_tokenizer_without_a_class_is_read_and_copied_with_one(tmp_path, entry):
    directory = write_tokenizer_files(tmp_path / "plain", train_tokenizer("byte-level"), CASES["llama-3"])
    expected = OneBosTokenizer(directory).encode("Who?").tolist()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    config |= {} if entry == "missing" else {"tokenizer_class": entry}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert OneBosTokenizer(directory).encode("Who?").tolist() == expected
    (tmp_path / "copy").mkdir()
    copy_model_files(directory, tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy").encode("Who?").tolist() == expected


def test_all_ids_that_end_texts_are_known(tmp_path):
    directory = write_tokenizer_files(tmp_path, train_tokenizer("byte-level"), CASES["llama-3"])
    eos = OneBosTokenizer(directory).eos_id
    for entry, expected in ((None, (eos,)), (eos, (eos,)), ([7, eos, 9], (eos, 7, 9)), (7, (eos, 7))):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": entry}))
        assert OneBosTokenizer(directory).end_ids == expected
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    tokenizer = OneBosTokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.end_ids) == (7, (7, 9))


def test_a_tokenizer_model_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match="is read by sentencepiece, .*\nInstall it .pip install sentencep"):
        read_tokenizer(tmp_path)
