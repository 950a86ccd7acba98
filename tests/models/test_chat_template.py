"""A checkpoint's chat template: where it is found, what it refuses, and where the assistant speaks."""

import json
import pickle

import pytest
from helpers.encoding_cases import (
    CASES,
    CONVERSATIONS,
    TOKENIZERS,
    Case,
    encoder,
    rendered_ids,
    responses,
    talk,
    train_tokenizer,
    write_tokenizer,
)
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from materials import write_json
from transformers import PreTrainedTokenizerFast

from litgpt_akl.data.encoding import Encoder
from litgpt_akl.messages import UserError
from litgpt_akl.models.chat_template import ChatTemplate

ALL = "{% for message in messages %}{{ message.content }}{% endfor %}"
TOKENS = "{{ bos_token }} {{ eos_token }} {{ pad_token }} {{ image_token }}" + ALL


def config(directory, template=None, **fields):
    write_json(directory / "tokenizer_config.json", {"bos_token": "<s>", "chat_template": template, **fields})
    return directory


def text(directory) -> str:
    return ChatTemplate.find(directory).render(talk("?", "!"))[0]


def test_where_a_template_is_found(tmp_path):
    assert ChatTemplate.find(tmp_path) is None
    assert ChatTemplate.find(config(tmp_path)) is None
    assert ChatTemplate.find(config(tmp_path, [{"name": "tool_use", "template": ALL}])) is None
    assert text(config(tmp_path, "one " + ALL)) == "one ?!"
    named = [{"name": name, "template": f"{name} {ALL}"} for name in ("tool_use", "default", "rag")]
    assert text(config(tmp_path, named)) == "default ?!"
    assert text(config(tmp_path, {"default": "object " + ALL, "rag": "rag"})) == "object ?!"
    write_json(tmp_path / "chat_template.json", {"chat_template": "json " + ALL})
    assert text(config(tmp_path, named)) == "json ?!"
    (tmp_path / "chat_template.jinja").write_text("größer\n" + ALL + "\n", encoding="utf-8")
    assert text(config(tmp_path, named)) == "größer\n?!"


def test_special_tokens_are_variables(tmp_path):
    pad = {"content": "<pad>", "special": True}
    config(tmp_path, TOKENS, eos_token={"content": "</s>"}, pad_token=None, add_bos_token=True)
    assert text(tmp_path) == "<s> </s>  ?!"
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<b>", "pad_token": pad, "image_token": "<i>"})
    assert text(tmp_path) == "<b> </s> <pad> <i>?!"
    config(tmp_path, TOKENS, added_tokens_decoder={})
    assert text(tmp_path) == "<s>   ?!"


def test_special_tokens_are_those_of_transformers(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), Case(TOKENS, ""), pad_token="<|endoftext|>")
    for tokens in ({}, {"bos_token": "<|begin|>", "pad_token": {"content": "<|im_end|>"}}):
        write_json(directory / "special_tokens_map.json", tokens)
        reference = PreTrainedTokenizerFast.from_pretrained(directory)
        assert text(directory) == reference.apply_chat_template(talk("?", "!"), tokenize=False)


def test_a_template_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer_config.json has an error in its line 2: .*'endfor'"):
        ChatTemplate.find(config(tmp_path, "{{ bos_token }}\n{% endfor %}"))
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"chat_template.jinja has an error in its line 1"):
        ChatTemplate.find(tmp_path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CASES["llama-2"].source, "the chat template refuses it: the roles user and assistant must alternate"),
        ("{{ nothing + bos_token }}", "the chat template refuses it: 'nothing' is undefined"),
        ("{{ messages + 1 }}", "the chat template refuses it: can only concatenate list"),
        ("{{ 1 / 0 }}", "the chat template refuses it: division by zero"),
        (
            "{{ messages.clear() }}",
            "the chat template refuses it: access to attribute 'clear' of 'list' object is unsafe",
        ),
        ("{{ messages[0].content }}", "the chat template shows message 2 0 times"),
        (ALL + ALL, "the chat template shows message 2 2 times"),
        ("{{ messages[1].content | upper }}", "the chat template shows message 2 0 times"),
        ("{{ messages[1].content | length }} " + ALL, "it cannot be told where the chat template puts message 2"),
        (ALL + "{{ messages[1].content | length }}", "it cannot be told where the chat template puts message 2"),
    ],
)
def test_a_refusal_is_passed_on(source, reason):
    messages = (
        talk("?", "I shall think about it until tomorrow", "?") if "alternate" not in reason else talk("?", "!")[::-1]
    )
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(ValueError, match=reason):
        template.render(messages)


def test_a_message_of_which_nothing_is_shown_is_refused():
    with pytest.raises(ValueError, match="it cannot be told where the chat template puts message 2"):
        ChatTemplate(CASES["qwen-3"].source, {}).render(talk("?", "<think>Hm</think>", "?", "!"))


def test_a_message_with_its_own_opening_begins_before_it():
    source = "{% set parts = messages[0].content.split('</think>') %}"
    source += "<think>{{ parts[0].split('<think>')[-1] if parts[1:] }}</think>{{ parts[-1] }}"
    content = "<think><b>Hm</b></think>Yes"
    assert ChatTemplate(source, {}).render(talk("", content)[1:])[:2] == (content, [(0, len(content))])


def test_the_spans_are_of_the_text(tmp_path):
    for case in CASES.values():
        template = ChatTemplate(case.source, {"bos_token": case.bos_token, "eos_token": case.eos_token})
        for messages in CONVERSATIONS.values():
            rendered, spans, _, _ = template.render(messages)
            contents = [message["content"] for message in messages if message["role"] == "assistant"]
            expected = [case.lead + (content.strip() if case.trims else content) for content in contents]
            assert [rendered[begin:end] for begin, end in spans] == expected


MOODY = "{% for m in messages %}{{ 'Q: ' if '?' in m.content else 'A: ' }}{{ m.content }}{{ loop.last }}{% endfor %}"


@pytest.mark.parametrize("source", [*(case.source for case in CASES.values()), MOODY])
def test_what_is_remembered_by_roles_changes_no_span(monkeypatch, source):
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    conversations = [*CONVERSATIONS.values(), *CONVERSATIONS.values()]
    keywords = [{}] * len(CONVERSATIONS) + [{"enable_thinking": False}] * len(CONVERSATIONS)
    found = list(map(template.render, conversations, keywords))
    monkeypatch.setattr(ChatTemplate, "_find_by_layout", lambda *_: None)
    assert found == list(map(template.render, conversations, keywords))


def test_a_conversation_of_known_roles_is_rendered_once(monkeypatch):
    template = ChatTemplate(CASES["chatml"].source, {})
    template.render(talk("Who?", "Alice."))
    rendered, render = [], template._render

    def count(messages, *options) -> str:
        rendered.append(messages)
        return render(messages, *options)

    monkeypatch.setattr(template, "_render", count)
    for messages in (talk("Why?", "Because."), talk("How?", "So.")):
        template.render(messages)
        assert rendered.pop() == messages and not rendered


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_generation_block_encloses_the_same_tokens(tmp_path, kind):
    directory = write_tokenizer(tmp_path, train_tokenizer(kind), CASES["generation"])
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    for messages in CONVERSATIONS.values():
        if all(message["content"] == message["content"].strip() for message in messages):
            mask = reference.apply_chat_template(messages, return_assistant_tokens_mask=True)["assistant_masks"]
            ids, spans = encoder(directory).encode({"messages": messages})[:2]
            inside = {n for begin, end in zip(spans[::2], spans[1::2], strict=True) for n in range(begin, end)}
            assert [int(number in inside) for number in range(len(ids))] == mask


def test_what_an_assistant_thinks_and_calls_is_its_response(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), CASES["qwen-3"])
    encode = encoder(directory).encode
    call = {"name": "look", "arguments": {"in": "größe"}}
    earlier = {"role": "assistant", "content": "<think>\nHm\n</think>\n\nNo"}
    for fields, expected in [
        ({"content": "Yes"}, "Yes"),
        ({"content": "<think>\nLet me see.\n</think>\n\nYes"}, "<think>\nLet me see.\n</think>\n\nYes"),
        ({"content": "<think>Let me see.</think>Yes"}, "<think>\nLet me see.\n</think>\n\nYes"),
        ({"content": "Let me see.\n</think>\n\nYes"}, "Let me see.\n</think>\n\nYes"),
        ({"content": "Yes", "reasoning_content": "Let me see."}, "Let me see.\n</think>\n\nYes"),
        (
            {"content": "Yes", "tool_calls": [call]},
            f"Yes\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>",
        ),
    ]:
        messages = [*talk("one"), earlier, *talk("two"), {"role": "assistant", **fields}]
        ids, spans = encode({"messages": messages})[:2]
        assert ids == rendered_ids(directory, messages)
        assert responses(directory, ids, spans) == ["No<|im_end|>", expected + "<|im_end|>"]


def test_a_generation_block_has_variables_of_its_own():
    source = "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}" + ALL
    assert ChatTemplate(source, {}).render(talk("?", "!"))[0] == "inout?!"


def test_tojson_keeps_characters():
    source = "{{ messages[0].content | tojson }} {{ {'b': 1, 'a': '<é>'} | tojson(indent=1, sort_keys=True) }}" + ALL
    assert ChatTemplate(source, {}).render(talk("é<", "!"))[0] == '"é<" {\n "a": "<é>",\n "b": 1\n}é<!'


def test_pickling(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), CASES["chatml"])
    record = {"messages": talk("Who?", "Alice")}
    original = encoder(directory)
    assert pickle.loads(pickle.dumps(original)).encode(record) == original.encode(record)


def test_a_tokenizer_that_cannot_read_special_tokens_is_refused(tmp_path):
    directory = write_tokenizer(tmp_path, train_tokenizer("byte-level"), CASES["chatml"])
    tokenizer = Tokenizer(directory)
    tokenizer.backend = "sentencepiece"
    with pytest.raises(ValueError, match="a chat template needs a tokenizer.json"):
        Encoder(tokenizer, Default(), ChatTemplate.find(directory))
