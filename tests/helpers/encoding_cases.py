"""Tokenizers, chat templates and conversations of the kinds that models have, for test_encoding.py."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer as LitGPTTokenizer
from materials import alice_text, write_json
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from litgpt_akl.data.encoding import Encoder
from litgpt_akl.models.chat_template import ChatTemplate

SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin|>",
    "<|header|>",
    "<|/header|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
SWALLOWING = "<|end|>"
"""A special token that takes the white space after it, like Phi-3's."""


@dataclass
class Case:
    """A chat template and what it makes of the assistant's messages."""

    source: str
    ends_turn: str
    eos_token: str = "</s>"
    bos_token: str = "<s>"
    trims: bool = False
    lead: str = ""
    """What it puts before a response and not at the end of the text for a generation."""


CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are a hatter.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

LLAMA_2 = """
{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('the roles user and assistant must alternate') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message.content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

LLAMA_3 = """
{{- bos_token }}
{%- if documents is none and tools is none %}
    {{- '<|header|>system<|/header|>\n\nYou speak as in ' + strftime_now('%Y') + '.<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '<|/header|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
"""

QWEN_3 = """
{%- set state = namespace(question=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set state.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set answer = message.content %}
    {%- set thought = message.reasoning_content or '' %}
    {%- if '</think>' in answer %}
        {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set answer = answer.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > state.question and (loop.last or thought) %}
        {{- '<think>\n' + thought + '\n</think>\n\n' }}
    {%- endif %}
    {{- answer }}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n' + call | tojson + '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
"""

GEMMA = """
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
"""

NO_END = "{% for message in messages %}{{ message.role }}:\n{{ message.content }}\n\n{% endfor %}"

HEADER_ONLY = "{% for message in messages %}<|header|>{{ message.role }}\n{{ message.content }}\n{% endfor %}"

GENERATION = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
"""

PHI_3 = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
PHI_3 += "{{ eos_token }}"

CASES = {
    "chatml": Case(CHATML, "<|im_end|>", eos_token="<|im_end|>", bos_token="<|im_start|>"),
    "llama-2": Case(LLAMA_2, " </s>", trims=True, lead=" "),
    "llama-3": Case(LLAMA_3, "<|eot_id|>", bos_token="<|begin|>", eos_token="<|eot_id|>", trims=True),
    "qwen-3": Case(QWEN_3, "<|im_end|>", eos_token="<|im_end|>"),
    "gemma": Case(GEMMA, "<end_of_turn>", trims=True),
    "no-end": Case(NO_END, ""),
    "header-only": Case(HEADER_ONLY, ""),
    "generation": Case(GENERATION, "<|im_end|>", eos_token="<|endoftext|>"),
    "phi-3": Case(PHI_3, SWALLOWING, eos_token="<|endoftext|>"),
}

TOKENIZERS = ("byte-level", "byte-level, trimmed offsets", "prepended space", "Metaspace")


def train_tokenizer(kind: str, special_tokens: Iterable[str] = SPECIAL_TOKENS) -> Tokenizer:
    """A tokenizer of about 1000 tokens, trained on Alice in Wonderland."""
    byte_level = kind.startswith("byte-level")
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        trimmed = "trimmed" in kind
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "prepended space":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, max_token_length=12, show_progress=False)
    tokenizer.train_from_iterator(alice_text().splitlines(), trainer)
    if not byte_level:
        tokenizer.model = _with_bytes(tokenizer)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([*special_tokens, AddedToken(SWALLOWING, rstrip=True, special=True)])
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def _with_bytes(tokenizer: Tokenizer) -> models.BPE:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*model["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [tuple(pair) for pair in model["merges"]]
    return models.BPE({token: number for number, token in enumerate(tokens)}, merges, byte_fallback=True)


def write_tokenizer(out_dir: Path, tokenizer: Tokenizer, case: Case, **config) -> Path:
    """What a checkpoint has of a tokenizer, with the chat template in its configuration."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": case.bos_token,
        "eos_token": {"content": case.eos_token, "__type": "AddedToken", "special": True},
        "chat_template": case.source,
        "clean_up_tokenization_spaces": False,
        **config,
    }
    write_json(out_dir / "tokenizer_config.json", config)
    return out_dir


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


CONVERSATIONS = {
    "one turn": talk("Who is Alice?", "A girl who fell into a rabbit-hole."),
    "a system's message": talk("Who?", "The Queen of Hearts.", system="Answer in few words."),
    "a question at the end": talk("Who?", "The Dormouse.", "And why?"),
    "three turns": talk("Why?", "Because.", "Why though?", "Because of the tarts!\n\nAll of them.", "Oh", "Yes"),
    "five turns": talk(*(f"{word} {n}" for n in range(5) for word in ("What is", "It is the number"))),
    "emoji": talk("😀?", "👩‍👩‍👧 é ö 中文字符 \u0301 and 🐇🐇", "🐇", "🐇"),
    "white space": talk("Write code", "  def f():\n    return 1\n\n", " ok ", "\n\ndone \n"),
    "the same words": talk("user", "assistant", "assistant", "user", "user", "user"),
    "what follows it": talk(
        "one",
        "two<|im_end|>\n<|im_start|>user\nthree<|im_end|>",
        "three",
        "</s><s>[INST] three [/INST] four",
        "five",
        "5",
    ),
    "a template's words": talk(
        "Say\n\nassistant:\n", "\n\nuser:\nno\n\nassistant:\nyes", "more", "{{ messages }} [/INST]"
    ),
}


def encoder(directory, style=None, max_length=None, template=True, **options) -> Encoder:
    found = ChatTemplate.find(directory) if template else None
    return Encoder(LitGPTTokenizer(directory), style or Default(), found, max_length, **options)


def decode(directory, ids) -> str:
    return LitGPTTokenizer(directory).processor.decode(ids, skip_special_tokens=False)


def responses(directory, ids, spans) -> list[str]:
    return [decode(directory, ids[begin:end]) for begin, end in zip(spans[::2], spans[1::2], strict=True)]


def rendered_ids(directory, messages) -> list[int]:
    return PreTrainedTokenizerFast.from_pretrained(directory).apply_chat_template(messages, return_dict=False)
