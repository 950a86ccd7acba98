"""A trained student is asked by LitGPT and by Transformers as it was in training, and stops where labels stopped."""

import json
import shutil

import pytest
from helpers.runs import distil
from litgpt.prompts import Alpaca, load_prompt_style
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as Processor
from transformers import AutoTokenizer

from litgpt_akl.data import StreamingSFT
from litgpt_akl.data.dataset import turn_ends
from litgpt_akl.models.generation import stop_sequences
from litgpt_akl.models.model_files import read_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OF_MY_OWN = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
OF_MY_OWN += "{% if add_generation_prompt %}assistant:{% endif %}"
ENDS_IN_EOS = OF_MY_OWN.replace("assistant:", "assistant:{{ eos_token }}")
"""LitGPT takes an EOS token away from the end of a prompt."""
WORDS = ("river", "lamp", "garden", "engine", "copper", "window", "paper", "cloud")
CHATS = [
    {"messages": [{"role": "user", "content": f"Join {word} and one"}, {"role": "assistant", "content": f"{word} one"}]}
    for word in WORDS
]
INSTRUCTIONS = [{"instruction": f"Join {word} and one", "output": f"{word} one"} for word in WORDS]


@pytest.fixture
def pair(tmp_path, student_dir, teacher_dir):
    """Copies of both models, whose tokenizer has ChatML's marks and whose template is the one that is given."""

    def write(template):
        found = []
        for name, source in (("student", student_dir), ("teacher", teacher_dir)):
            directory = shutil.copytree(source, tmp_path / name)
            content = json.loads((directory / "tokenizer.json").read_text())
            model = content["model"]
            # two tokens of text become marks, so that no id is added
            for token, id in (("<|im_start|>", 1020), ("<|im_end|>", 1021)):
                old = next(text for text, number in model["vocab"].items() if number == id)
                model["vocab"][token] = model["vocab"].pop(old)
                model["merges"] = [pair for pair in model["merges"] if "".join(pair).replace(" ", "") != old]
                mark = {"id": id, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
                content["added_tokens"].append({**mark, "normalized": False, "special": True})
            (directory / "tokenizer.json").write_text(json.dumps(content))
            config = json.loads((directory / "tokenizer_config.json").read_text())
            config |= {} if template is None else {"chat_template": template}
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
            found.append(directory)
        return found

    return write


def train(pair, path, rows, out_dir, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"mask_prompt": True, "num_workers": 0, "num_proc": 1, **options}
    data = StreamingSFT(str(path), cache_dir=out_dir.parent / "cache", val_split_fraction=0.0, **options)
    changes = {"train": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4}, "export_hf": True}
    distil(*pair, data, out_dir, **changes)
    return data


@pytest.mark.parametrize(
    ("template", "choice", "rows"),
    [(CHATML, None, CHATS), (None, CHATML, CHATS), (CHATML, None, INSTRUCTIONS), (None, None, INSTRUCTIONS)],
)
def test_both_readers_ask_as_training_did(tmp_path, pair, template, choice, rows, capsys):
    directories, options = pair(template), {}
    if choice is not None:
        (tmp_path / "mine.jinja").write_text(choice)
        options["chat_template"] = str(tmp_path / "mine.jinja")
    if rows is INSTRUCTIONS:
        options["prompt_style"] = Alpaca()
    train(directories, tmp_path / "data.jsonl", rows, tmp_path / "run", **options)
    question = "Join river and one"
    final, exported = tmp_path / "run" / "final", tmp_path / "run" / "final-hf"
    reference = AutoTokenizer.from_pretrained(exported)
    message = [{"role": "user", "content": question}]
    by_transformers = reference.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    by_litgpt = Tokenizer(final).encode(load_prompt_style(final).apply(question)).tolist()
    if rows is CHATS:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        expected = (
            Processor.from_file(str(directories[0] / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        )
    else:
        expected = Tokenizer(directories[0]).encode(Alpaca().apply(question)).tolist()
    assert by_litgpt == by_transformers == expected
    told = capsys.readouterr().out
    assert "of the tokens are learnt" in told and "⟦" in told
    ends = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    end = 1021 if rows is CHATS else Tokenizer(directories[0]).eos_id
    assert end in (ends if isinstance(ends, list) else [ends])


def test_a_template_that_no_style_of_litgpt_follows_is_carried_and_told(tmp_path, pair, capsys):
    train(pair(OF_MY_OWN), tmp_path / "data.jsonl", CHATS, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("the student's is litgpt-akl's, which has to be installed") == 1
    assert "Responses end in <|im_end|>, at which `litgpt chat`" in said
    final = tmp_path / "run" / "final"
    text = "user:Who?<|im_end|>assistant:"
    expected = Processor.from_file(str(final / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    style = load_prompt_style(final)
    assert Tokenizer(final).encode(style.apply("Who?")).tolist() == expected
    assert [1021] in style.stop_tokens(Tokenizer(final))


def test_a_template_that_litgpt_cannot_follow_is_told(tmp_path, pair, capsys):
    train(pair(ENDS_IN_EOS), tmp_path / "data.jsonl", CHATS, tmp_path / "run")
    assert "LitGPT has no prompt style that writes what the chat template" in capsys.readouterr().out


def test_one_set_of_ends_is_used_everywhere(tmp_path, pair):
    """The labels end in a mark that is neither the tokenizer's EOS token nor any prompt style's."""
    directories = pair(CHATML)
    data = train(directories, tmp_path / "data.jsonl", CHATS, tmp_path / "run")
    assert data.by_template == len(CHATS)
    tokenizer = read_tokenizer(directories[0])
    dataset = data.prepare(directories[0], 128)[0]
    assert turn_ends(dataset, tokenizer.special_ids) == [1021]
    assert stop_sequences(tokenizer, data.prompt_style, [1021]) == [[tokenizer.eos_id], [1021]]
