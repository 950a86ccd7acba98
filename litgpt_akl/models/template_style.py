"""A prompt style that writes what a chat template does of one question, for LitGPT's own commands.

LitGPT keeps of a style where its class is imported from, and calls that without arguments. So the whole style is in the
name under which this module has it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import yaml
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.tokenizer import Tokenizer

from litgpt_akl.models.chat_template import ChatTemplate


@dataclass(frozen=True)
class TemplateStyle(PromptStyle):
    """A chat template's text for a generation. It can be pickled."""

    source: str
    """In Jinja's language."""
    variables: dict[str, str]
    """``bos_token``, ``eos_token`` and the like."""
    date: str | None
    """What it writes as the present day, if it writes one."""
    ends: tuple[int, ...] = ()
    """Ids that end a response, beside the tokenizer's EOS token."""

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """The text of a question, after a system's message if there is one; raises ValueError if it is refused."""
        messages = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
        template = _compiled(self.source, json.dumps(self.variables), self.date)
        return template.generation_prompt([*messages, {"role": "user", "content": prompt}])

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        return tuple([id] for id in dict.fromkeys((tokenizer.eos_id, *self.ends)))


@lru_cache(maxsize=8)
def _compiled(source: str, variables: str, date: str | None) -> ChatTemplate:
    return ChatTemplate(source, json.loads(variables), date)


def __getattr__(name: str) -> Callable[[], TemplateStyle]:
    """What LitGPT calls for the style that a name describes; the name is the style's fields as JSON."""
    try:
        style = TemplateStyle(**json.loads(name))
    except (ValueError, TypeError):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return lambda: replace(style, ends=tuple(style.ends))


def save_style(style: PromptStyle, directory: Path) -> None:
    """Write a prompt style into a checkpoint directory, as LitGPT's commands read it."""
    if not isinstance(style, TemplateStyle):
        save_prompt_style(style, directory)
        return
    # LitGPT takes from the module what follows the last dot
    fields = json.dumps(asdict(style)).replace(".", r"\u002e")
    content = yaml.safe_dump({"class_path": f"{__name__}.{fields}"})
    (directory / "prompt_style.yaml").write_text(content, encoding="utf-8")
