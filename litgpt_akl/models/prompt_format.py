"""One format of prompts told to two readers: LitGPT by a prompt style, Hugging Face's libraries by a chat template."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from litgpt.prompts import PromptStyle, prompt_styles, save_prompt_style
from litgpt.tokenizer import Tokenizer

from litgpt_akl.files.reading import read_json
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.model_files import write_json
from litgpt_akl.models.tokenizer import as_list, read_generation_config

PROBES = ("probe", "Who is\nit?")
TEMPLATE = "chat_template.jinja"
ASKED, ORDERED = "\ue000asked\ue001", "\ue000ordered\ue001"
"""Texts that no style has in its own words."""
BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class PromptFormat:
    """How a student was asked in training, for what lies beside its weights."""

    style: PromptStyle | None = None
    """For LitGPT; None if nothing is known."""
    template: str | None = None
    """For Hugging Face's libraries, in Jinja's language; None if the student's own files say it."""
    end_ids: tuple[int, ...] = ()
    """What ended responses."""

    def write(self, directory: Path) -> None:
        """Make the files of a checkpoint say so, as far as they are there."""
        if self.style is not None:
            save_prompt_style(self.style, directory)
        if self.template is not None and (directory / "tokenizer_config.json").is_file():
            tokenizer_config = read_json(directory / "tokenizer_config.json")
            # the file of its own counts, but some readers know only this entry
            tokenizer_config |= {"chat_template": self.template}
            write_json(directory / "tokenizer_config.json", tokenizer_config)
            (directory / "chat_template.json").unlink(missing_ok=True)
            (directory / TEMPLATE).write_text(self.template, encoding="utf-8")
        path = directory / "generation_config.json"
        if self.end_ids and path.is_file():
            generation_config = read_generation_config(directory)
            known = as_list(generation_config.get("eos_token_id"))
            if missing := [id for id in self.end_ids if id not in known]:
                write_json(path, {**generation_config, "eos_token_id": [*known, *missing]})


def trained_format(
    style: PromptStyle | None,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    ends: Iterable[int],
    *,
    has_written: bool,
    is_own: bool,
) -> tuple[PromptFormat, str | None]:
    """What tells both readers of a student how it was asked, and what a user is to know where one cannot be told.

    Args:
        style: wrote the prompts, if no template did.
        template: wrote them, or lies beside the student without having done so.
        tokenizer: the student's.
        ends: ids that ended responses.
        has_written: whether the template wrote the prompts, or some of them.
        is_own: whether it is the one that the student's files have.
    """
    ends, note = tuple(ends), None
    if tokenizer.backend != "huggingface":
        return PromptFormat(style, None, ends), None
    if template is not None and has_written:
        found = style_like(template, tokenizer)
        if found is None:
            note = (
                "LitGPT has no prompt style that writes what the chat template of the training data does: `litgpt chat`"
                " will ask the student otherwise. Its export to Hugging Face has the template."
            )
        return PromptFormat(found or style, None if is_own else template.source, ends), note
    if style is None or (template is not None and _same_ids(style, template, tokenizer)):
        return PromptFormat(style, None, ends), None
    source = template_like(style, tokenizer)
    if source is None:
        note = (
            f"The prompt style {type(style).__name__}, which wrote the prompts, cannot be told to Hugging Face's"
            " libraries: apply_chat_template will ask the student otherwise."
        )
    return PromptFormat(style, source, ends), note


def _same_ids(style: PromptStyle, template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    with suppress(ValueError, AttributeError, KeyError, TypeError):
        wanted = [_ids_by_template(template, tokenizer, text) for text in PROBES]
        return [tokenizer.encode(style.apply(text)).tolist() for text in PROBES] == wanted
    return False


def style_like(template: ChatTemplate, tokenizer: Tokenizer) -> PromptStyle | None:
    """LitGPT's prompt style that makes the ids which a chat template makes of one message; None if there is none.

    Args:
        template: of the training data's chats.
        tokenizer: the model's, of Hugging Face's kind.
    """
    styles = (kind() for kind in dict.fromkeys(prompt_styles.values()))
    return next((style for style in styles if _same_ids(style, template, tokenizer)), None)


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
