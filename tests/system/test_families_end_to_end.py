"""Of each family, tied and untied: what a student was trained on is what LitGPT and Transformers make of it."""

import builtins
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.family_chats import CHATS, INSTRUCTIONS, QUESTION, RECORDS, Chat, write_chat_family
from helpers.marks import with_all_slow_but
from helpers.runs import distil, gpt
from litgpt.chat import base as litgpt_chat
from litgpt.prompts import load_prompt_style
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.data import StreamingSFT
from litgpt_akl.models.generation import generate
from litgpt_akl.models.gpt import load_frozen
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.models.template_style import TemplateStyle
from litgpt_akl.models.weights import read_config
from litgpt_akl.training import main as run_module

CASES = [(name, tied) for name in CHATS for tied in (False, True)]
FEW = ["Llama-3.2-1B", "Gemma-2b", "phi-2", "Mixtral-8x7B-v0.1", "Qwen3-30B-A3B"]
FEW = [(name, number % 2 == 1) for number, name in enumerate(FEW)]


@dataclass
class Trained:
    """A finished run of one step on conversations that begin with one question."""

    chat: Chat
    run: Path
    prompt: list[int]
    """Before the first response to that question."""
    response: list[int]
    """With what ends it."""
    stop: list[list[int]]
    """What ended what the run generated."""
    said: str
    """What the run printed."""

    @property
    def final(self) -> Path:
        return self.run / "final"

    @property
    def exported(self) -> Path:
        return self.run / "final-hf"


def train(name: str, tied: bool, directory: Path, capsys) -> Trained:
    chat, student = CHATS[name], directory / name
    write_chat_family(name, student, tied=tied)
    records, options = RECORDS, {"chat_template_kwargs": chat.keywords, "prompt_style": chat.style}
    if chat.chosen is not None:
        (directory / "chosen.jinja").write_text(chat.chosen)
        options["chat_template"] = str(directory / "chosen.jinja")
    if chat.style is not None:
        records = INSTRUCTIONS
    (directory / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options |= {"mask_prompt": True, "num_workers": 0, "num_proc": 1, "cache_dir": directory / "prepared"}
    data, runs = StreamingSFT(str(directory / "data.jsonl"), val_split_fraction=0.0, **options), []

    def make_state(fabric, run, *arguments):
        runs.append(run)
        return original(fabric, run, *arguments)

    original = run_module.make_state
    changes = {"train": {"max_steps": 1, "global_batch_size": 5, "micro_batch_size": 5}, "export_hf": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_state", make_state)
        distil(student, shutil.copytree(student, directory / "teacher"), data, directory / "run", **changes)
    sample = data.prepare(student, 128)[0].read([0])[0]
    ids, learnt = sample["input_ids"].tolist(), (sample["labels"] != -100).tolist()
    begin, end = learnt.index(True), len(learnt) - learnt[::-1].index(True)
    prompt, response = ids[:begin], ids[begin:end]
    return Trained(chat, directory / "run", prompt, response, runs[0].stop, capsys.readouterr().out)


def ask_litgpt(directory: Path, capsys) -> tuple[list[int], tuple[list[int], ...], str]:
    """The ids with which `litgpt chat` asks, what stops it, and what it prints."""
    asked, lines = [], iter((QUESTION, ""))

    def note(model, prompt, max_returned_tokens, *, stop_tokens, **options):
        asked.append((prompt.tolist(), stop_tokens))
        return original(model, prompt, max_returned_tokens, stop_tokens=stop_tokens, **options)

    original = litgpt_chat.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(litgpt_chat, "generate", note)
        patch.setattr(builtins, "input", lambda text: next(lines))
        litgpt_chat.main(directory, max_new_tokens=40, top_k=1, precision="32-true")
    return *asked[0], capsys.readouterr().out


def from_pretrained(directory: Path) -> PreTrainedModel:
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(directory, **options)
    assert not any(loading.values()), loading
    return model.eval()


def ask_transformers(directory: Path) -> list[int]:
    message = [{"role": "user", "content": QUESTION}]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def make_it_say(directory: Path, prompt: list[int], response: list[int]) -> None:
    """Give an untied checkpoint weights by which each id of a response follows the one before, and its begin the end.

    The blocks add nothing, so that the last hidden state is the embedding of the last id, which the head knows.
    """
    said, model = [prompt[-1], *response], gpt(directory)
    embeddings, head = model.transformer.wte.weight, model.lm_head.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if {"proj", "bias"} & {*name.split(".")}:
                parameter.zero_()
        torch.nn.init.normal_(embeddings, generator=torch.Generator().manual_seed(0))
        head.zero_()
        for before, after in zip(said, [*response, response[0]], strict=True):
            head[after] += embeddings[before] / embeddings.size(1)
    torch.save(model.state_dict(), directory / "lit_model.pth")
    (directory / "manifest.json").unlink()


def eos_ids(directory: Path) -> list[int]:
    """Those of generation_config.json."""
    found = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize(("name", "tied"), with_all_slow_but(FEW, CASES))
def test_a_student_is_asked_and_stops_as_it_was_trained(tmp_path, capsys, name, tied):
    trained = train(name, tied, tmp_path, capsys)
    end = read_tokenizer(trained.final).token_to_id(trained.chat.end)
    assert trained.response[-1] == end
    # all readers make the ids of training
    asked, stops, _ = ask_litgpt(trained.final, capsys)
    assert asked == trained.prompt
    assert ask_transformers(trained.exported) == trained.prompt
    if "tokenizer_class" not in trained.chat.config:
        # LitGPT decodes by the class, which Transformers may take for another tokenizer
        assert ask_transformers(trained.final) == trained.prompt
    # and know the labels' end
    assert [end] in trained.stop
    assert [end] in [*stops]
    assert end in eos_ids(trained.final) and end in eos_ids(trained.exported)
    assert {*eos_ids(trained.exported)} == {id for [id] in trained.stop}
    # the run says what somebody must know who asks the student by LitGPT
    style = load_prompt_style(trained.final)
    assert ("is litgpt-akl's" in trained.said) == isinstance(style, TemplateStyle)
    assert "will ask the student otherwise" not in trained.said
    # all have one model
    ids = torch.tensor([trained.prompt + trained.response])
    with torch.no_grad():
        logits = gpt(trained.final).eval()(ids)
        assert (from_pretrained(trained.exported)(ids).logits - logits).abs().max() < 1e-4
    assert json.loads((trained.exported / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("name", with_all_slow_but(["Gemma-2b", "Qwen3-0.6B"], CHATS))
def test_what_is_generated_ends_where_the_label_ended(tmp_path, capsys, name):
    """By untied weights that write the labelled response, and would begin it anew after its end."""
    trained = train(name, False, tmp_path, capsys)
    # the longest end of the response of which each id has one that follows
    lengths = range(len(trained.response), 0, -1)
    distinct = [n for n in lengths if len({trained.prompt[-1], *trained.response[-n:]}) == n + 1]
    response = trained.response[-distinct[0] :]
    assert len(response) >= 4
    make_it_say(trained.final, trained.prompt, response)
    export_hf(trained.final, tmp_path / "exported")
    *_, printed = ask_litgpt(trained.final, capsys)
    text = read_tokenizer(trained.final).decode(torch.tensor(response[:-1]))
    assert text.strip() in printed.split(">> Reply: ")[1]
    assert printed.split(">> Reply: ")[1].count(text.strip()) == 1
    fabric = L.Fabric(devices=1, accelerator="cpu")
    model = load_frozen(fabric, trained.final, config := read_config(trained.final), torch.float32)
    options = {"max_new_tokens": 40, "stop": trained.stop, "vocab_size": config.padded_vocab_size}
    assert generate(fabric, model, [torch.tensor(trained.prompt)], **options) == [response]
    model = from_pretrained(tmp_path / "exported")
    found = model.generate(torch.tensor([trained.prompt]), max_new_tokens=40, do_sample=False)
    assert found[0].tolist() == trained.prompt + response
