"""A checkpoint's own chat template, which makes a text of messages, and where in it the assistant speaks."""

import json
import re
import secrets
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import add
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Const, Getattr, Name, Scope
from jinja2.parser import Parser

from litgpt_akl.files.reading import explain_damage, read_json
from litgpt_akl.messages import UserError, reason
from litgpt_akl.models.template_budget import BudgetedEnvironment, OverBudget, within_budget

STAND_IN = secrets.token_hex(16)
"""What is rendered in place of an assistant's message to see where the template puts it; no data can hold it."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message with what it says before its content."""
ALSO_SAID = (*REASONING, "tool_calls")
"""Fields of an assistant's message that templates render beside its content, and that the assistant says too."""
ASKED = {"role": "user", "content": "probe"}
CONFIG = "tokenizer_config.json"
DEFAULT, TOOL_USE = "default", "tool_use"
"""The names of the template that is taken without being chosen, and of the one that is where tools are given."""
CLOCK = "strftime_now"
"""The function by which a template writes the date, in Transformers."""
WAY_OUT = "Take the file from the model's publisher again, or remove the template to use LitGPT's prompt style."
LAYOUTS, LONGEST_LAYOUT = 256, 2**14
"""Layouts that are kept, and the characters of one, so that they take no more than 4 MB."""
NUMBERED = re.compile(STAND_IN + r"\((\d+)\)")
"""A stand-in of one of a conversation's messages."""
LONGEST_OPENING = 64
"""Characters of a mark such as ``<think>`` that a template writes itself unless a message begins with it."""


class Rendering(NamedTuple):
    """A conversation's text; the lists are of the assistant's messages, in their order."""

    text: str
    spans: list[tuple[int, int]]
    """``(begin, end)`` of each in the text's characters. What the template puts before it is not in it, what ends the
    turn neither."""
    said: list[int]
    """Characters that each has, its reasoning too; white space does not count."""
    lost: list[int]
    """Of these, characters that its span has not."""


def today() -> str:
    """The present day where this machine is, as 2026-11-27."""
    return datetime.now().date().isoformat()


class ChatTemplate:
    """Renders messages as Transformers does, and says where the assistant's are. It can be pickled.

    A template is a program: it may trim a message, cut reasoning out of it, or treat the last one otherwise, so a
    message cannot be searched for in the text. Instead the conversation is rendered again with a stand-in for the
    message: what comes before and after the stand-in encloses the message itself, too. Most texts are what the template
    writes around stand-ins for all messages, which is remembered by their roles, and the messages in their places: then
    nothing is rendered again.
    """

    def __init__(
        self,
        source: str,
        variables: dict[str, str],
        date: str | None = None,
        for_tools: "ChatTemplate | None" = None,
    ) -> None:
        """Compiles the template.

        Args:
            source: in Jinja's language.
            variables: ``bos_token``, ``eos_token`` and the like.
            date: the day that it is to write, as 2026-11-27; by default the present one.
            for_tools: another, which Transformers takes in its place where tools are given.

        Raises:
            jinja2.TemplateSyntaxError: the source is no template.
            OverBudget: it cannot be compiled in the time and the memory that it may take.
        """
        self.source, self._variables, self.date = source, variables, date or today()
        environment = BudgetedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, CLOCK: datetime.fromisoformat(self.date).strftime}
        # templates compare these two with none, which an undefined variable is not
        names = {"tools": None, "documents": None, **variables}
        parsed = environment.parse(source)
        self._names = {node.name for node in parsed.find_all(Name)} | {node.attr for node in parsed.find_all(Getattr)}
        self._names |= {node.value for node in parsed.find_all(Const) if isinstance(node.value, str)}
        self.for_tools = for_tools
        self._openings: dict[str, str | None] = {}
        self.path: Path | None = None
        """The file that it is from, if it was found in one."""
        self._template = within_budget(lambda: environment.from_string(parsed, globals=names))
        # every rendering copies these names, which takes long of a chain of mappings
        self._template.globals = dict(self._template.globals)
        self._layout = lru_cache(LAYOUTS)(self._lay_out)

    def __reduce__(self) -> tuple:
        return ChatTemplate, (self.source, self._variables, self.date, self.for_tools)

    @classmethod
    def find(cls, checkpoint_dir: Path, date: str | None = None, choice: str | None = None) -> "ChatTemplate | None":
        """A chat template of a checkpoint, or None if it has none that is taken without being chosen.

        That is the one of ``chat_template.jinja``, ``chat_template.json`` or ``tokenizer_config.json``; of several the
        one named ``default``: what Transformers takes without being told otherwise. With it comes the one named
        ``tool_use``, if both are in ``tokenizer_config.json``, which a student has, too.

        Args:
            checkpoint_dir: whose special tokens the template writes, too.
            date: the constructor's.
            choice: another file with a template, or the name of one of several.

        Raises:
            UserError: its file is empty or damaged, or it is not written in Jinja's language; there is no such choice.
        """
        config = _read_json(checkpoint_dir / CONFIG)
        if choice is not None and Path(choice).is_file():
            path, source = Path(choice), _read_jinja(Path(choice))
        else:
            found = named_templates(checkpoint_dir)
            if choice is not None and choice not in found:
                has = f"has the templates {', '.join(found)}" if found else "has no chat template"
                raise UserError(
                    f"--data.chat_template {choice} is neither a file nor a template's name: {checkpoint_dir} {has}.\n"
                    "Give the path of a file in Jinja's language, or one of those names."
                )
            path, source = found.get(choice or DEFAULT, (checkpoint_dir, ""))
        if not source:
            return None
        variables, for_tools = _special_tokens(checkpoint_dir, config), None
        if choice is None and TOOL_USE in found and {each[0].name for each in found.values()} == {CONFIG}:
            for_tools = cls._compiled(path, found[TOOL_USE][1], variables, date)
        return cls._compiled(path, source, variables, date, for_tools)

    @classmethod
    def _compiled(cls, path: Path, *arguments: Any) -> "ChatTemplate":
        try:
            template = cls(*arguments)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The chat template in {path} has an error in its line {error.lineno}: {error.message}\n{WAY_OUT}"
            ) from error
        except OverBudget as error:
            raise UserError(f"The chat template in {path} {error}.\n{WAY_OUT}") from error
        template.path = path
        return template

    @property
    def writes_date(self) -> bool:
        """Whether some text has the day in it."""
        return CLOCK in self._names or (self.for_tools is not None and self.for_tools.writes_date)

    @property
    def identity(self) -> list:
        """What tells templates apart, as plain data: the date only where it is written."""
        own = [self.source, self._variables, self.date if self.writes_date else None]
        return own if self.for_tools is None else [*own, self.for_tools.identity]

    def reads(self, name: str) -> bool:
        """Whether the template names a variable or a field, whatever it does with it."""
        return name in self._names

    def render(self, messages: list[dict], keywords: dict[str, Any] | None = None) -> Rendering:
        """The text of a conversation and what of it the assistant says.

        A response begins where the text for a generation ends that has the messages before it, so that all is learnt
        which the template does not write itself then. Of a template that writes nothing more for a generation it begins
        with its content, and with white space that alone stands between the messages before and that.

        Args:
            messages: each with ``role`` and ``content``, both text, and what else the template reads.
            keywords: what else the template is given, such as ``tools``.

        Raises:
            ValueError: the template refuses the conversation or fails, or it cannot be told where a message is.
        """
        text = self._render(messages, keywords := keywords or {})
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = self._find_by_layout(text, messages, numbers, keywords)
        is_unchanged = spans is not None
        if spans is None:
            spans = self._find_unchanged(text, messages, numbers, keywords)
            spans = spans or [self._find_message(text, messages, number, keywords) for number in numbers]
        spans = [(self._without_lead(text, begin), end) for begin, end in spans]
        said = [said_in(messages[number]) for number in numbers]
        lost = [
            0 if is_unchanged else _count_lost(parts, text[begin:end])
            for parts, (begin, end) in zip(said, spans, strict=True)
        ]
        return Rendering(text, spans, [sum(map(len, parts)) for parts in said], lost)

    def generation_prompt(self, messages: list[dict], keywords: dict[str, Any] | None = None) -> str:
        """The text after which a model answers; raises ValueError as :meth:`render` does."""
        return self._render(messages, keywords or {}, add_generation_prompt=True)

    def _render(self, messages: list[dict], keywords: dict[str, Any], add_generation_prompt: bool = False) -> str:
        values = {**keywords, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return within_budget(lambda: self._template.render(values))
        except OverBudget as error:
            raise ValueError(f"the chat template {error}") from error
        except Exception as error:  # a template is a program, it can fail in every way
            raise ValueError(f"the chat template refuses it: {reason(error)}") from error

    def _opening(self, keywords: dict[str, Any]) -> str | None:
        """What the template adds for a generation; "" if it never adds anything, None if it cannot be told."""
        if not self.reads("add_generation_prompt"):
            return ""
        switches = {name: value for name, value in keywords.items() if isinstance(value, (str, int, float, bool))}
        key = _key(switches)
        if key not in self._openings:
            try:
                without, full = (self._render([ASKED], switches, adds) for adds in (False, True))
            except ValueError:
                without, full = "", ""
            self._openings[key] = full.removeprefix(without) if full.startswith(without) else None
        return self._openings[key] or None

    @cached_property
    def opening_of_responses(self) -> str:
        """What stands between a question and its response, of a template that writes nothing more for a generation.

        Empty also where that cannot be told.
        """
        if self.reads("add_generation_prompt"):
            return ""
        try:
            asked = self._render([ASKED], {})
            answered = self._render([ASKED, {"role": "assistant", "content": STAND_IN}], {})
        except ValueError:
            return ""
        return answered.removeprefix(asked).split(STAND_IN)[0] if answered.startswith(asked) else ""

    def _without_lead(self, text: str, begin: int) -> int:
        """Where a response begins with the white space before it, if a model is to write that, too."""
        lead = self.opening_of_responses
        return begin - len(lead) if lead.isspace() and text.endswith(lead, 0, begin) else begin

    def with_source(self, source: str) -> "ChatTemplate":
        """Another template of the same model, which writes the same date."""
        return ChatTemplate(source, self._variables, self.date)

    def _lay_out(self, roles: tuple[str, ...], switches: str) -> list[str] | None:
        """What the template writes before, between and after messages of these roles, in their order.

        None if it leaves one out, shows one twice or in another order, refuses the conversation, or writes too much.
        """
        spoken = [{"role": role, "content": f"{STAND_IN}({number})"} for number, role in enumerate(roles)]
        try:
            text = self._render(spoken, json.loads(switches))
        except ValueError:
            return None
        pieces = NUMBERED.split(text) if len(text) <= LONGEST_LAYOUT else []
        return pieces[::2] if pieces[1::2] == list(map(str, range(len(roles)))) else None

    def _find_by_layout(
        self, text: str, messages: list[dict], numbers: list[int], keywords: dict[str, Any]
    ) -> list[tuple[int, int]] | None:
        """All messages by no rendering; None if the text is not that of the layout with the messages in it."""
        opening = self._opening(keywords)
        is_plain = all(isinstance(value, (str, int, float, bool)) for value in keywords.values())
        if opening is None or not is_plain or any(len(message) != 2 for message in messages):
            return None
        pieces = self._layout(tuple(message["role"] for message in messages), _key(keywords))
        if pieces is None:
            return None
        *pieces, last = pieces
        contents = (message["content"] for message in messages)
        parts = [part for pair in zip(pieces, contents, strict=True) for part in pair]
        if text != "".join(parts) + last:
            return None
        ends = list(accumulate(map(len, parts)))
        spans = [(ends[2 * number], ends[2 * number + 1]) for number in numbers]
        return spans if all(text.endswith(opening, 0, begin) for begin, _ in spans) else None

    def _find_unchanged(
        self, text: str, messages: list[dict], numbers: list[int], keywords: dict[str, Any]
    ) -> list[tuple[int, int]] | None:
        """All messages by one rendering; None if the text holds them otherwise than they are, or begins them so."""
        opening = self._opening(keywords)
        if opening is None:
            return None
        spoken = [_stand_in(message) if message["role"] == "assistant" else message for message in messages]
        first, *others = self._render(spoken, keywords).split(STAND_IN)
        contents = [messages[number]["content"] for number in numbers]
        if len(others) != len(contents) or text != first + "".join(map(add, contents, others)):
            return None
        spans, begin = [], len(first)
        for content, other in zip(contents, others, strict=True):
            if not text.endswith(opening, 0, begin):
                return None
            spans.append((begin, begin + len(content)))
            begin += len(content) + len(other)
        return spans

    def _find_message(self, text: str, messages: list[dict], number: int, keywords: dict[str, Any]) -> tuple[int, int]:
        message = messages[number]
        spoken = [*messages[:number], _stand_in(message), *messages[number + 1 :]]
        before, *after = self._render(spoken, keywords).split(STAND_IN)
        if len(after) != 1:
            raise ValueError(f"the chat template shows message {number + 1} {len(after)} times")
        end = len(text) - len(after[0])
        begin = self._generation_begin(text, messages[:number], keywords)
        if begin is None or begin >= end:
            begin = len(before) if text.startswith(before) else _begin_after_changed(text, before, message)
        if begin is None or begin >= end or not text.endswith(after[0]):
            raise ValueError(f"it cannot be told where the chat template puts message {number + 1}")
        return begin, end

    def _generation_begin(self, text: str, messages: list[dict], keywords: dict[str, Any]) -> int | None:
        """Where the text for a generation after ``messages`` ends, if ``text`` goes on from there."""
        if self._opening(keywords) == "":
            return None
        try:
            asked = self._render(messages, keywords, add_generation_prompt=True)
        except ValueError:
            # many refuse a conversation that the assistant begins
            return None
        return len(asked) if text.startswith(asked) else None


class _GenerationTag(Extension):
    """``{% generation %}``, by which Transformers finds what the assistant says; here it shows what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        # Transformers makes a macro of it, so a variable that is set inside is not known outside
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _key(switches: dict[str, Any]) -> str:
    return json.dumps(switches, sort_keys=True) if switches else "{}"


def _stand_in(message: dict) -> dict:
    return {name: value for name, value in message.items() if name not in ALSO_SAID} | {"content": STAND_IN}


def bare(text: str) -> str:
    """A text without its white space, which templates change."""
    return "".join(text.split())


def said_in(message: dict) -> list[str]:
    """What an assistant's message says, bare: its reasoning, and its content."""
    thought = next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")
    return [bare(thought), bare(message["content"])]


def _count_lost(said: list[str], shown: str) -> int:
    """Characters of the parts that a text lacks; of a part of which some is left, all between its begin and end."""
    shown = bare(shown)
    lost = 0
    for part in said:
        if part not in shown:
            begin = len(commonprefix((part, shown)))
            end = len(commonprefix((part[begin:][::-1], shown[::-1])))
            lost += len(part) - begin - end
    return lost


def _begin_after_changed(text: str, before: str, message: dict) -> int | None:
    """Where a message begins whose own opening takes the place of one that the template would write before it.

    Qwen3 writes an empty ``<think>`` block before a last message without one. Of a message that only closes the block,
    and of reasoning in a field of its own, the opening remains the template's.
    """
    common, content = commonprefix((text, before)), message["content"].lstrip()
    shared = common.rstrip()
    for length in range(min(len(content), LONGEST_OPENING), 0, -1):
        if shared.endswith(content[:length]):
            return len(shared) - length
    follows = text.startswith(content.split(" ")[0], len(common))
    return len(common) if follows or any(message.get(name) for name in ALSO_SAID) else None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own escapes what HTML would take for its own
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def named_templates(checkpoint_dir: Path) -> dict[str, tuple[Path, str]]:
    """File and text of each chat template that a checkpoint has, by name; most have one, ``default``.

    Raises:
        UserError: a file with a template is empty or damaged.
    """
    in_config = _templates_in_config(checkpoint_dir)
    found = dict(in_config)
    for path in sorted((checkpoint_dir / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path, _read_jinja(path)
    for each in _default_templates(checkpoint_dir, in_config):
        found[DEFAULT] = each
    return found


def default_templates(checkpoint_dir: Path) -> list[tuple[Path, str]]:
    """File and text of each template that is taken without being chosen, the one that counts last; raises as above."""
    return _default_templates(checkpoint_dir, _templates_in_config(checkpoint_dir))


def _default_templates(checkpoint_dir: Path, in_config: dict[str, tuple[Path, str]]) -> list[tuple[Path, str]]:
    found = [*filter(None, [in_config.get(DEFAULT)])]
    if (path := checkpoint_dir / "chat_template.json").is_file():
        template = _read_json(path).get("chat_template")
        with explain_damage(path, "a file with a chat template"):
            if not isinstance(template, str):
                raise TypeError(f"chat_template is {template!r}")
        found.append((path, template))
    if (path := checkpoint_dir / "chat_template.jinja").is_file():
        found.append((path, _read_jinja(path)))
    return found


def _templates_in_config(checkpoint_dir: Path) -> dict[str, tuple[Path, str]]:
    path = checkpoint_dir / CONFIG
    entry = _read_json(path).get("chat_template")
    with explain_damage(path, "a file with chat templates"):
        templates = {each["name"]: each["template"] for each in entry} if isinstance(entry, list) else entry
        # Transformers takes an object, too
        templates = templates if isinstance(templates, dict) else {DEFAULT: entry}
        if not all(isinstance(template, (str, type(None))) for template in templates.values()):
            raise TypeError(f"chat_template is {entry!r}")
    return {name: (path, template) for name, template in templates.items() if template}


def _read_jinja(path: Path) -> str:
    with explain_damage(path, "a chat template"):
        source = path.read_text(encoding="utf-8")
        if not source.strip():
            raise ValueError("it is empty")
    return source


def _special_tokens(checkpoint_dir: Path, config: dict) -> dict[str, str]:
    """``bos_token`` and the like by name, as Transformers gathers them."""
    entries = config
    if "added_tokens_decoder" not in config:
        entries = config | _read_json(checkpoint_dir / "special_tokens_map.json")
    tokens = {
        name: entry.get("content") if isinstance(entry, dict) else entry
        for name, entry in entries.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _read_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
