"""One format of prompts told to two readers: LitGPT by a prompt style, Hugging Face's libraries by a chat template."""

import json
from contextlib import suppress

from litgpt.prompts import PromptStyle, prompt_styles
from litgpt.tokenizer import Tokenizer

from litgpt_akl.models.chat_template import ChatTemplate

PROBES = ("probe", "Who is\nit?")
ASKED, ORDERED, ANSWERED = "\ue000asked\ue001", "\ue000ordered\ue001", "\ue000answered\ue001"
"""Texts that no style has in its own words."""
BLANK_LINE = "\n\n"


def style_like(template: ChatTemplate, tokenizer: Tokenizer) -> PromptStyle | None:
    """LitGPT's prompt style that makes the ids which a chat template makes of one message; None if there is none.

    Args:
        template: of the training data's chats.
        tokenizer: the model's, of Hugging Face's kind.
    """
    with suppress(ValueError):
        wanted = [_ids_by_template(template, tokenizer, text) for text in PROBES]
        for kind in dict.fromkeys(prompt_styles.values()):
            # some want more than a prompt, or a token that the tokenizer has not
            with suppress(AttributeError, KeyError, TypeError, NotImplementedError):
                style = kind()
                if [tokenizer.encode(style.apply(text)).tolist() for text in PROBES] == wanted:
                    return style
    return None


def _ids_by_template(template: ChatTemplate, tokenizer: Tokenizer, text: str) -> list[int]:
    prompt = template.generation_prompt([{"role": "user", "content": text}])
    return tokenizer.processor.encode(prompt, add_special_tokens=False).ids


def template_like(style: PromptStyle, tokenizer: Tokenizer) -> str | None:
    """A chat template, in Jinja's language, that writes what a prompt style does turn by turn; None if none can.

    It ends each answer in the EOS token, and begins a text with BOS where the tokenizer does so for LitGPT.

    Args:
        style: of the training data's instructions.
        tokenizer: the model's, of Hugging Face's kind.
    """
    try:
        plain, ordered = style.apply(ASKED), style.apply(ASKED, sys_prompt=ORDERED)
    except (AttributeError, KeyError, TypeError):
        return None
    if plain.count(ASKED) != 1 or ordered.count(ASKED) != 1 or ordered.count(ORDERED) > 1:
        return None
    processor = tokenizer.processor
    bos = processor.id_to_token(tokenizer.bos_id) if tokenizer.bos_id is not None else None
    ids = tokenizer.encode(plain).tolist()
    begin = bos if bos is not None and ids[:1] == [tokenizer.bos_id] and not plain.startswith(bos) else ""
    before, after = plain.split(ASKED)
    if ORDERED in ordered:
        first, rest = ordered.split(ORDERED)
        between, other_after = rest.split(ASKED)
        if other_after != after:
            return None
        system = f"{_quoted(first)} + messages[0].content + {_quoted(between)}"
    else:
        # as in training, where a style has no place for it
        system = f"{_quoted(before)} + messages[0].content + {_quoted(BLANK_LINE)}"
    return _TEMPLATE.format(
        begin=_quoted(begin),
        system=system,
        before=_quoted(before),
        after=_quoted(after),
        end=_quoted(processor.id_to_token(tokenizer.eos_id)),
    )


_TEMPLATE = """\
{{%- set has_system = messages and messages[0].role == 'system' %}}
{{{{- {begin} }}}}
{{%- for message in (messages[1:] if has_system else messages) %}}
{{%- if message.role == 'user' %}}
{{{{- ({system} if has_system and loop.first else {before}) + message.content + {after} }}}}
{{%- else %}}
{{{{- message.content + {end} }}}}
{{%- endif %}}
{{%- endfor %}}
"""


def _quoted(text: str) -> str:
    """A text as Jinja's language has it."""
    return json.dumps(text, ensure_ascii=False)
