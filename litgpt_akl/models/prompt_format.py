"""One format of prompts told to two readers: LitGPT by a prompt style, Hugging Face's libraries by a chat template."""

import json
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.prompts import PromptStyle, prompt_styles
from litgpt.tokenizer import Tokenizer

from litgpt_akl.files.reading import read_json
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.model_files import write_json
from litgpt_akl.models.template_style import TemplateStyle, save_style
from litgpt_akl.models.tokenizer import bos_text, generation_ends, read_generation_config

PROBES = ("probe", "Who is\nit?", " {{ Who }}  </think>\n\nis it?\n")
ASKED_ONCE = [{"role": "user", "content": PROBES[0]}]
TEMPLATE = "chat_template.jinja"
READ_BY_TRANSFORMERS = (TEMPLATE, "tokenizer_config.json")
"""Files in which its tokenizers look for the template that they take without being told."""
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
            save_style(self.style, directory)
        if self.template is not None and (directory / "tokenizer_config.json").is_file():
            tokenizer_config = read_json(directory / "tokenizer_config.json")
            # the file of its own counts, but some readers know only this entry
            tokenizer_config |= {"chat_template": self.template}
            write_json(directory / "tokenizer_config.json", tokenizer_config)
            (directory / "chat_template.json").unlink(missing_ok=True)
            (directory / TEMPLATE).write_text(self.template, encoding="utf-8")
        known = generation_ends(directory)
        if missing := [id for id in self.end_ids if id not in known]:
            # without this file Transformers stops at config.json's
            generation_config = {**read_generation_config(directory), "eos_token_id": [*known, *missing]}
            write_json(directory / "generation_config.json", generation_config)


class Learnt(NamedTuple):
    """What a run's data taught its student of the form of a conversation."""

    style: PromptStyle | None
    """Wrote the prompts, if no template did."""
    template: ChatTemplate | None
    """Wrote them, or lies beside the student without having done so."""
    has_written: bool
    """Whether the template wrote the prompts, or some of them."""
    is_own: bool
    """Whether it is the one that the student's files have."""
    keywords: dict[str, Any]
    """What it was given beside the messages."""
    ends: tuple[int, ...]
    """Ids by which responses end in the data."""
    stop: tuple[int, ...]
    """Ids that end a response wherever one is generated, those among them."""


def trained_format(learnt: Learnt, tokenizer: Tokenizer) -> tuple[PromptFormat, list[str]]:
    """What tells both readers of a student how it was asked, and what a user is to know of it."""
    style, template = learnt.style, learnt.template
    if tokenizer.backend != "huggingface":
        return PromptFormat(style, None, learnt.stop), []
    if template is not None and learnt.has_written:
        template = template.with_source(_as_in_training(template, learnt.keywords))
        found = style_like(learnt._replace(template=template), tokenizer)
        source = None if learnt.is_own and template.source == learnt.template.source else template.source
        return PromptFormat(found or style, source, learnt.stop), _notes_on(found, template, learnt, tokenizer)
    if style is None or (template is not None and same_ids(style, template, tokenizer)):
        return PromptFormat(style, None, learnt.stop), []
    source = template_like(style, tokenizer)
    notes = []
    if source is None:
        notes.append(
            f"The prompt style {type(style).__name__}, which wrote the prompts, cannot be told to Hugging Face's"
            " libraries: apply_chat_template will ask the student otherwise."
        )
    return PromptFormat(style, source, learnt.stop), notes


def _as_in_training(template: ChatTemplate, keywords: dict[str, Any]) -> str:
    """The source of a template that writes for a generation what stood before responses, by the same keywords."""
    line = "{{%- if {0} is not defined %}}{{% set {0} = {1!r} %}}{{% endif %}}\n"
    source = "".join(line.format(*each) for each in keywords.items()) + template.source
    opening = template.opening_of_responses
    if opening.strip():
        source += f"{{%- if add_generation_prompt %}}{{{{- {_quoted(opening)} }}}}{{%- endif %}}"
    return source


def _notes_on(found: PromptStyle | None, template: ChatTemplate, learnt: Learnt, tokenizer: Tokenizer) -> list[str]:
    """What a user is to know of a student whose prompts a template wrote, and who is asked by a style and by it."""
    notes = []
    if (opening := learnt.template.opening_of_responses).strip():
        notes.append(
            f"The chat template writes nothing for a generation; the student's writes what stands before responses in"
            f" the training data: {opening!r}."
        )
    with suppress(ValueError):
        text, spans, *_ = template.render([*ASKED_ONCE, {"role": "assistant", "content": PROBES[0]}], learnt.keywords)
        trained, asked = text[: spans[0][0]], template.generation_prompt(ASKED_ONCE, learnt.keywords)
        if trained != asked:
            same = len(commonprefix((trained, asked)))
            notes.append(
                f"The chat template puts {trained[same:]!r} before a response, and {asked[same:]!r} where it asks for"
                " one: a student is asked otherwise than it was trained. Give another with --data.chat_template FILE."
            )
    if not learnt.ends:
        notes.append(
            "No response of the data ends in a special token: the student learns no end, and writes on as long as it is"
            " let. Give a template that writes one with --data.chat_template FILE."
        )
    if found is None:
        notes.append(
            "LitGPT has no prompt style that writes what the chat template of the training data does: `litgpt chat`"
            " will ask the student otherwise. Its export to Hugging Face has the template."
        )
        return notes
    if isinstance(found, TemplateStyle):
        notes.append(
            "LitGPT has no prompt style of its own that does what the chat template of the training data does: the"
            " student's is litgpt-akl's, which has to be installed where LitGPT's commands ask the student."
        )
    if others := [id for id in learnt.ends if id != tokenizer.eos_id]:
        names = ", ".join(tokenizer.processor.id_to_token(id) for id in others)
        notes.append(
            f"Responses end in {names}, at which `litgpt chat` and Hugging Face's libraries stop; `litgpt generate` and"
            f" `litgpt serve` stop at the tokenizer's {tokenizer.processor.id_to_token(tokenizer.eos_id)} alone."
        )
    return notes


def same_ids(style: PromptStyle, template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether LitGPT makes of a style's prompt the ids of a template's text; ours has BOS only where it writes it."""
    with suppress(ValueError, AttributeError, KeyError, TypeError):
        for text in PROBES:
            wanted = template.generation_prompt([{"role": "user", "content": text}])
            bos = wanted.startswith(bos_text(tokenizer) or "\0") if isinstance(style, TemplateStyle) else None
            ids = tokenizer.processor.encode(wanted, add_special_tokens=False).ids
            if tokenizer.encode(style.apply(text), bos=bos).tolist() != ids:
                return False
        return True
    return False


def style_like(learnt: Learnt, tokenizer: Tokenizer) -> PromptStyle | None:
    """A prompt style that makes the ids which a template makes of one message, and stops where responses end.

    It is the student's own, one of LitGPT's, or one made of the template; None if LitGPT changes what that writes.
    """
    kinds = [kind() for kind in dict.fromkeys(prompt_styles.values())]
    for style in (learnt.style, *kinds, TemplateStyle(*learnt.template.identity[:3], ends=learnt.stop)):
        if style is not None and same_ids(style, learnt.template, tokenizer):
            with suppress(ValueError):
                if {(id,) for id in learnt.ends} <= {*map(tuple, style.stop_tokens(tokenizer))}:
                    return style
    return None


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
