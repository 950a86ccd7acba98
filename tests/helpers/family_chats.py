"""How the families in families.py are asked: templates of the shapes that theirs have, and special tokens."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from litgpt.config import Config
from litgpt.prompts import Phi2, PromptStyle
from litgpt.utils import save_config
from materials import write_json
from tokenizers import processors

from helpers.encoding_cases import Case, talk, train_tokenizer, write_tokenizer
from helpers.families import write_family

BYTES, PREPENDED, METASPACE = "byte-level", "prepended space", "Metaspace"


@dataclass
class Chat:
    """A family's files beside the weights, and what its chats look like."""

    template: str | None
    """None for a model that has none."""
    end: str
    """The token by which its responses end."""
    eos: str
    bos: str | None = None
    marks: tuple[str, ...] = ()
    """Its special tokens beside those."""
    kind: str = BYTES
    """Of tokenizer."""
    adds_bos: bool = False
    """Does tokenizer.json put BOS before every text?"""
    config: dict[str, Any] = field(default_factory=dict)
    """Entries of tokenizer_config.json."""
    ends: tuple[str, ...] = ()
    """Tokens that generation_config.json has beside EOS."""
    keywords: dict[str, Any] | None = None
    """``--data.chat_template_kwargs``"""
    chosen: str | None = None
    """A template that the user has in a file."""
    style: PromptStyle | None = None
    """Asks in place of a template."""


LLAMA_3 = """{{- bos_token }}{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN_2_5 = """{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\nYou are a rabbit.<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

QWEN_3 = """{%- set ns = namespace(last=-1) %}{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n' + (m.reasoning_content or '') }}
{{- '\n</think>\n\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

GEMMA_3 = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}
{%- set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

OLMO_2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<|assistant|>\n' + m.content + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}
{%- else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

PHI_3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI_4 = """{{ '<|im_start|>system<|im_sep|>You are a careful hare. Think first.' }}
{%- if messages[0].role == 'system' %}{{ ' ' + messages[0].content }}{% endif %}{{ '<|im_end|>' }}
{%- for m in messages %}{% if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

FALCON = """{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}
{%- if m.role == 'assistant' %}{{ 'Assistant: ' + m.content.strip() + eos_token }}
{%- else %}{{ m.role | capitalize + ': ' + m.content.strip().replace('\n\n', '\n') }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"""

MIXTRAL = """{{- bos_token }}{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if m.role == 'user' %}{{- ' [INST] ' + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"""

CHATML_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
GEMMA_ENTRIES = {"add_bos_token": True, "tokenizer_class": "GemmaTokenizer"}
ONE_OF_GEMMA = {
    "end": "<end_of_turn>",
    "eos": "<eos>",
    "bos": "<bos>",
    "marks": ("<start_of_turn>", "<end_of_turn>", "<pad>"),
    "kind": METASPACE,
    "adds_bos": True,
    "config": GEMMA_ENTRIES,
}

CHATS: dict[str, Chat] = {
    "Llama-3.2-1B": Chat(
        LLAMA_3,
        end="<|eot_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        marks=("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
        adds_bos=True,
        ends=("<|eom_id|>",),
    ),
    "Qwen2.5-0.5B": Chat(QWEN_2_5, "<|im_end|>", "<|im_end|>", marks=CHATML_MARKS, config={"add_bos_token": False}),
    "Qwen3-0.6B": Chat(QWEN_3, "<|im_end|>", "<|endoftext|>", marks=CHATML_MARKS, config={"add_bos_token": False}),
    "Gemma-2b": Chat(GEMMA, **ONE_OF_GEMMA),
    "Gemma-2-2b": Chat(GEMMA, **ONE_OF_GEMMA, ends=("<end_of_turn>",)),
    "Gemma-3-1b-it": Chat(GEMMA_3, **ONE_OF_GEMMA, ends=("<end_of_turn>",)),
    "OLMo-2-1124-7B": Chat(
        OLMO_2, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", ("<|pad|>",), config={"add_bos_token": False}
    ),
    "Phi-3-mini-4k-instruct": Chat(
        PHI_3,
        end="<|end|>",
        eos="<|endoftext|>",
        bos="<s>",
        marks=("<|user|>", "<|assistant|>", "<|system|>"),
        kind=PREPENDED,
        config={"add_bos_token": False},
        ends=("<|end|>", "<|assistant|>"),
    ),
    "Phi-4-reasoning": Chat(
        PHI_4,
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
        ("<|im_start|>", "<|im_sep|>"),
        config={"add_bos_token": False},
    ),
    "pythia-14m": Chat(None, "<|im_end|>", "<|endoftext|>", "<|endoftext|>", CHATML_MARKS, chosen=QWEN_2_5),
    "phi-2": Chat(None, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", style=Phi2()),
    "falcon-7b": Chat(FALCON, "<|endoftext|>", "<|endoftext|>"),
    "Qwen3-30B-A3B": Chat(QWEN_3, "<|im_end|>", "<|im_end|>", marks=CHATML_MARKS, keywords={"enable_thinking": False}),
    "Mixtral-8x7B-v0.1": Chat(
        MIXTRAL,
        end="</s>",
        eos="</s>",
        bos="<s>",
        kind=PREPENDED,
        adds_bos=True,
        config={"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"},
    ),
}
"""By the names of FAMILIES."""

ANSWERS = ("She fell down.", "A white rabbit ran.", "The Queen shouts loudly!", "Nobody knows why.", "It was tea time.")
QUESTION = "Who is Alice?"
RECORDS = [{"messages": talk(QUESTION, answer)} for answer in ANSWERS]
RECORDS += [{"messages": talk("And who?", "The Knave.", "Why?", answer)} for answer in ANSWERS]
INSTRUCTIONS = [{"instruction": QUESTION, "output": answer} for answer in ANSWERS]


def write_chat_family(name: str, directory: Path, *, tied: bool) -> None:
    """A random LitGPT checkpoint of a family, with a tokenizer and a chat template of its shape."""
    chat = CHATS[name]
    special = [token for token in dict.fromkeys((chat.bos, chat.eos, chat.end, *chat.marks)) if token is not None]
    tokenizer = train_tokenizer(chat.kind, special)
    if chat.adds_bos:
        template = processors.TemplateProcessing(
            single=f"{chat.bos} $A",
            pair=f"{chat.bos} $A $B",
            special_tokens=[(chat.bos, tokenizer.token_to_id(chat.bos))],
        )
        before = [] if tokenizer.post_processor is None else [tokenizer.post_processor]
        tokenizer.post_processor = processors.Sequence([*before, template])
    write_family(name, directory, tied=tied, ids=tokenizer.get_vocab_size())
    write_tokenizer(directory, tokenizer, Case(chat.template, "", chat.eos, chat.bos), **chat.config)
    widen_window(directory)
    ids = {"eos_token_id": tokenizer.token_to_id(chat.eos)}
    ids |= {"bos_token_id": None if chat.bos is None else tokenizer.token_to_id(chat.bos)}
    hf_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    write_json(directory / "config.json", {**hf_config, **ids})
    ends = [ids["eos_token_id"], *map(tokenizer.token_to_id, chat.ends)]
    write_json(directory / "generation_config.json", {**ids, "eos_token_id": ends if chat.ends else ends[0]})


def widen_window(directory: Path) -> None:
    """LitGPT answers no prompt that is longer than a sliding window."""
    config = Config.from_file(directory / "model_config.yaml")
    hf_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.sliding_window_size is not None and hf_config.get("sliding_window"):
        save_config(replace(config, sliding_window_size=64), directory)
        write_json(directory / "config.json", {**hf_config, "sliding_window": 64})
