"""Random conversations by templates of the families' shapes: the ids are Transformers', and the labels what is said."""

import json
import random

import pytest
from helpers.encoding_cases import Case, encoder, responses, train_tokenizer, write_tokenizer
from helpers.marks import with_all_slow_but
from transformers import PreTrainedTokenizerFast

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + OPENING
LLAMA_3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\n\n' }}{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n\n' %}
{%- set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI = """{% for m in messages %}{{ '<|im_start|>' + m.role + '<|/header|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|/header|>' }}{% else %}{{ eos_token }}{% endif %}"""
MISTRAL = """{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\n\n' %}
{%- set turns = messages[1:] %}{%- else %}{%- set first = '' %}{%- set turns = messages %}{%- endif %}
{%- for m in turns %}{%- if m.role == 'user' %}
{{- '[INST] ' + (first if loop.last or loop.index0 == turns | length - 2 else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"""
QWEN_3 = """{%- set ns = namespace(last=-1) %}{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set c = m.content %}{%- set r = m.reasoning_content or '' %}
{%- if not r and '</think>' in c %}
{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set c = c.split('</think>')[-1].lstrip('\n') %}
{%- endif %}{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or r) %}{{- '<think>\n' + r.strip('\n') + '\n</think>\n\n' }}{%- endif %}
{{- c }}{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>\n' + call | tojson + '\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<|header|>User:' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|header|>Assistant:' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|header|>Assistant:<think>\n' }}{% endif %}"""
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}
{%- else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

FAMILIES = {
    "chatml": Case(CHATML, "<|im_end|>", eos_token="<|im_end|>"),
    "llama-3": Case(LLAMA_3, "<|eot_id|>", eos_token="<|eot_id|>", trims=True),
    "gemma": Case(GEMMA, "<end_of_turn>", eos_token="<|endoftext|>", trims=True),
    "phi": Case(PHI, "<|im_end|>", eos_token="<|endoftext|>"),
    "mistral": Case(MISTRAL, "</s>"),
    "qwen-3": Case(QWEN_3, "<|im_end|>", eos_token="<|im_end|>"),
    "r1": Case(R1, "</s>"),
    "deepseek": Case(DEEPSEEK, "</s>"),
}
PIECES = [
    *"abc .,!?\n",
    "  ",
    "\n\n",
    "Alice",
    " the",
    " rabbit",
    "é",
    "中文",
    "🐇",
    "user",
    "assistant:",
    "{{ x }}",
    "1",
]
PIECES += ["def f():\n    ", "[INST]", "<think>", "User: "]


def text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randrange(1, 12))) + draw.choice("xyz.")


def conversation(draw: random.Random, name: str) -> tuple[list[dict], dict]:
    messages = [{"role": "system", "content": text(draw)}] if draw.random() < 0.4 else []
    for _ in range(draw.randrange(1, 4)):
        answer = {"role": "assistant", "content": text(draw)}
        if name in ("qwen-3", "r1") and draw.random() < 0.5:
            answer["content"] = f"<think>\n{text(draw)}\n</think>\n\n{text(draw).strip()}"
        if name == "qwen-3" and draw.random() < 0.3:
            answer["reasoning_content"] = text(draw)
        if name == "qwen-3" and draw.random() < 0.3:
            answer["tool_calls"] = [{"name": "look", "arguments": {"in": text(draw)}}]
        messages += [{"role": "user", "content": text(draw)}, answer]
    keywords = {"tools": [{"name": "look"}]} if name == "qwen-3" and draw.random() < 0.3 else {}
    if name == "qwen-3" and draw.random() < 0.3:
        keywords["enable_thinking"] = False
    return messages, keywords


def bare(content: str) -> str:
    return "".join(content.split())


KINDS = {
    "byte-level": ("byte-level", {}),
    "spaces": ("prepended space", {}),
    "spaces, BOS": ("prepended space", {"add_bos_token": True}),
    "spaces, no BOS": ("prepended space", {"add_bos_token": False}),
    "one space": ("Metaspace", {}),
    "one space, BOS": ("Metaspace", {"add_bos_token": True}),
}
"""Tokenizers, of which those like SentencePiece's put a space before a text or before each part of it."""


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {kind: train_tokenizer(kind) for kind, _ in KINDS.values()}


@pytest.mark.parametrize("kind", with_all_slow_but(["byte-level", "spaces, BOS"], KINDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_transformers_and_labels_what_a_model_would_write(tmp_path, tokenizers, name, kind):
    case, draw = FAMILIES[name], random.Random(name)
    directory = write_tokenizer(tmp_path, tokenizers[KINDS[kind][0]], case, **KINDS[kind][1])
    # where tokens have spaces of their own, decoding cannot tell
    plain = str.lstrip if kind == "byte-level" else bare
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    encode = encoder(directory).encode
    said = lost = told = found = 0
    for _ in range(125):
        messages, keywords = conversation(draw, name)
        tools = {"tools": keywords["tools"]} if "tools" in keywords else {}
        more = {key: value for key, value in keywords.items() if key != "tools"}
        encoded = encode({"messages": messages, **tools, "chat_template_kwargs": more})
        assert encoded.ids == reference.apply_chat_template(messages, return_dict=False, **keywords)
        rendered = reference.apply_chat_template(messages, tokenize=False, **keywords)
        labels = responses(directory, encoded.ids, encoded.spans)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(labels) == len(answers)
        for label, number in zip(labels, answers, strict=True):
            asked = reference.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=True, **keywords
            )
            begins = rendered.startswith(asked)
            told += begins
            if begins:
                # a token may reach over the edge by white space
                assert plain(rendered[len(asked) :]).startswith(plain(label))
            assert label.endswith(case.ends_turn)
            final = bare(messages[number]["content"].split("</think>\n\n")[-1])
            assert final in bare(label)
            for call in messages[number].get("tool_calls", []):
                assert bare(json.dumps(call["arguments"]["in"], ensure_ascii=False)) in bare(label)
            found += 1
        said, lost = said + encoded.said, lost + encoded.lost
    assert found > 200
    assert told == 0 if name == "r1" else told > 0.3 * found
    assert lost == 0 if name not in ("qwen-3", "r1") else 0 < lost < said
