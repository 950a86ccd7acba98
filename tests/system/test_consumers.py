"""LitGPT's own commands, run as a user runs them, on the student in `final/` of one real run."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import materials
import pytest
import torch
from helpers.litgpt_commands import GREEDY, NEW_TOKENS, QUESTION, litgpt, serving, training_options
from litgpt import LLM
from litgpt.config import Config
from litgpt.eval.evaluate import convert_and_evaluate
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

IDS = torch.arange(4, 132).view(1, 128)
# models as small as these run ten times faster so, where other processes want the cores too


@pytest.fixture(scope="module")
def student(teacher_dir, tmp_path_factory) -> Path:
    """The English model in a folder whose name makes LitGPT begin every text with a BOS token."""
    directory = tmp_path_factory.mktemp("source") / "Llama-3-glassllm"
    shutil.copytree(teacher_dir, directory)
    return directory


@pytest.fixture(scope="module")
def final(student, teacher_dir, alice_json, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("out")
    options = training_options(alice_json, learning_rate=1e-3, max_steps=4)
    to = ("--teacher_checkpoint_dir", teacher_dir, "--out_dir", out_dir, "--distill.compile", "false")
    litgpt("finetune_akl", student, *to, *options, directory=out_dir)
    return out_dir / "final"


@pytest.fixture(scope="module")
def logits(student, final) -> Callable[[torch.Tensor], torch.Tensor]:
    """The trained model's logits: the student's own configuration with the weights in `final/`."""
    model = GPT(Config.from_file(student / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(final / "lit_model.pth", weights_only=True))
    return torch.no_grad()(model)


@pytest.fixture(scope="module")
def answer(student, logits) -> str:
    """The trained model's answer to QUESTION, by its tokenizer as it was in training and without a cache."""
    tokenizer = Tokenizer(student)
    answers = []
    for bos in (True, False):
        ids = start = tokenizer.encode(QUESTION, bos=bos).long()
        for _ in range(NEW_TOKENS):
            ids = torch.cat((ids, logits(ids.view(1, -1))[0, -1:].argmax(-1)))
        answers.append(tokenizer.decode(ids[len(start) :]))
    # or nobody would see that a consumer forgets the BOS token
    assert answers[0] != answers[1]
    return answers[0]


def load(checkpoint_dir: Path) -> LLM:
    llm = LLM.load(checkpoint_dir, distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    return llm


def test_api(final, answer):
    assert load(final).generate(QUESTION, max_new_tokens=NEW_TOKENS, top_k=1) == answer


def test_generate(final, answer, tmp_path):
    output = litgpt("generate", final, "--prompt", QUESTION, *GREEDY, directory=tmp_path)
    assert output.endswith(f"\n{QUESTION}{answer}\n")


def test_chat(final, answer, tmp_path):
    output = litgpt("chat", final, *GREEDY, directory=tmp_path, stdin=f"{QUESTION}\n\n")
    assert output.split(">> Reply: ")[1].startswith(f"{answer}\n")


@pytest.mark.slow
def test_serve(final, answer, tmp_path):
    with serving(final, tmp_path) as ask:
        assert ask(QUESTION) == answer


@torch.no_grad()
def test_convert_from_litgpt(final, logits, tmp_path):
    from transformers import AutoModelForCausalLM

    litgpt("convert_from_litgpt", final, tmp_path / "converted", directory=tmp_path)
    (tmp_path / "converted" / "model.pth").rename(tmp_path / "converted" / "pytorch_model.bin")
    shutil.copy(final / "config.json", tmp_path / "converted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert (model(IDS).logits - logits(IDS)).abs().max() < 1e-4


@torch.no_grad()
def test_finetune_full_starts_from_it(final, logits, alice_json, tmp_path):
    options = training_options(alice_json, learning_rate=1e-6, max_steps=2)
    litgpt("finetune_full", final, "--out_dir", tmp_path, *options, directory=tmp_path)
    difference = (load(tmp_path / "final")(IDS) - logits(IDS)).abs().max()
    assert 0 < difference < 1e-2


@torch.no_grad()
def test_finetune_lora_and_merge_start_from_it(final, logits, alice_json, tmp_path):
    options = training_options(alice_json, learning_rate=1e-4, max_steps=2)
    litgpt("finetune_lora", final, "--out_dir", tmp_path, *options, directory=tmp_path)
    merged = tmp_path / "final" / "lit_model.pth"
    # finetune_lora has merged already
    merged.unlink()
    litgpt("merge_lora", tmp_path / "final", directory=tmp_path)
    weights, start = (torch.load(path, weights_only=True) for path in (merged, final / "lit_model.pth"))
    changed = {name for name in start if not torch.equal(weights[name], start[name])}
    assert weights.keys() == start.keys()
    assert changed == {f"transformer.h.{layer}.attn.qkv.weight" for layer in range(materials.TEACHER_CONFIG.n_layer)}
    difference = (load(tmp_path / "final")(IDS) - logits(IDS)).abs().max()
    assert 0 < difference < 0.1


@torch.no_grad()
def test_evaluate_by_lm_eval(final, logits, tmp_path, monkeypatch):
    """`litgpt evaluate` with a task that needs no network: the perplexity of continuations, and how many are greedy."""
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    pairs = [("Alice was", " beginning"), ("The Queen", " of Hearts"), ("Off with", " her head")]
    lines = [json.dumps({"text": text, "more": more}) for text, more in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{more}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "pairs.yaml").write_text(json.dumps(task))
    monkeypatch.setattr(lm_eval.evaluator, "TaskManager", partial(TaskManager, include_path=str(tmp_path)))
    convert_and_evaluate(final, tasks="pairs", out_dir=tmp_path / "out", device="cpu", dtype="float32")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["pairs"]
    tokenizer, sums, greedy = Tokenizer(final), [], []
    for text, more in pairs:
        ids, start = tokenizer.encode(text + more), len(tokenizer.encode(text))
        scores = torch.log_softmax(logits(ids.view(1, -1))[0, start - 1 : -1], dim=-1)
        sums.append(scores.gather(1, ids[start:, None].long()).sum().item())
        greedy.append(torch.equal(scores.argmax(dim=-1), ids[start:].long()))
    assert found["perplexity,none"] == pytest.approx(math.exp(-sum(sums) / len(sums)), rel=1e-3)
    assert found["acc,none"] == pytest.approx(sum(greedy) / len(greedy))
