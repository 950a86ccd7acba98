"""A checkpoint's own chat template, which makes a text of messages, and where in it the assistant speaks."""

import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from operator import add
from os.path import commonprefix
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import jinja2
import jinja2.filters
import psutil
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Const, Getattr, Name, Scope
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from litgpt_akl.files.reading import explain_damage, read_json
from litgpt_akl.messages import UserError, reason

if sys.platform == "linux":
    import resource
else:
    # others have no such limit, or do not keep to it
    resource = None

SECONDS = 10.0
"""Of one rendering, which usually takes a ten-thousandth of a second."""
MEMORY = 2**30
"""Bytes beyond what the process has."""
BITS = 2**16
"""Of a whole number."""

Result = TypeVar("Result")


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


class OverBudget(Exception):
    """The message follows "the chat template": "does not end within 10 s"."""


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Templates that compute with no number of more than ``BITS`` bits: no signal ends what would take hours."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["round"] = _round

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power; raises OverBudget if it would have too many bits."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            _check_bits(bits * right if operator == "**" else bits + right.bit_length())
        return super().call_binop(context, operator, left, right)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    _check_bits(4 * abs(precision))
    return jinja2.filters.do_round(value, precision, method)


def _check_bits(bits: int) -> None:
    if bits > BITS:
        raise OverBudget(f"computes with a number of more than {BITS:,} bits")


def within_budget(function: Callable[[], Result]) -> Result:
    """What ``function`` returns, a part of a template's work.

    The time is not limited outside of a process's main thread, and neither is on systems without such limits.

    Raises:
        OverBudget: it takes more than ``SECONDS`` or ``MEMORY``.
    """
    for is_last in (False, True):
        try:
            with _budget:
                return function()
        except MemoryError:
            # the process may have grown by itself since its size was asked for
            if is_last or not _budget.has_grown():
                raise OverBudget(f"takes more than {MEMORY / 2**30:g} GiB of memory") from None


class _Budget:
    """The limits, set while it is entered; that takes as long as a few steps of a template, so it is done with care."""

    def __init__(self) -> None:
        self._is_armed = self._is_installed = self._is_over = False
        self._before: Any = None
        self._size: int | None = None

    def __enter__(self) -> None:
        self._is_over = False
        if resource is not None:
            self._size = self._size or _size()
            self._limits = resource.getrlimit(resource.RLIMIT_AS)
            others = [limit for limit in self._limits if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(self._size + MEMORY, *others, sys.maxsize), self._limits[1]))
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            if not self._is_installed:
                self._before, self._is_installed = signal.signal(signal.SIGALRM, self._end), True
            self._begin, self._is_armed = time.monotonic(), True
            # again and again, since what an exception meets on its way may drop it
            self._other = signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._is_armed:
            self._is_armed = False
            left, interval = self._other
            if left:
                left = max(1e-3, left - (time.monotonic() - self._begin))
            signal.setitimer(signal.ITIMER_REAL, left, interval)
        if resource is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._limits)
        if self._is_over and kind is not None:
            # now and then CPython loses an exception of a signal, and raises a SystemError in its place
            raise OverBudget(f"does not end within {SECONDS:g} s") from None

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed:
            self._is_over = True
            raise OverBudget
        if callable(self._before):
            self._before(number, frame)

    def has_grown(self) -> bool:
        """Whether the process needs more room than when it was asked last."""
        if resource is None:
            return False
        before, self._size = self._size, _size()
        return before is not None and self._size > before


def _size() -> int:
    """Bytes of addresses that this process has."""
    return psutil.Process().memory_info().vms


_budget = _Budget()


STAND_IN = secrets.token_hex(16)
"""What is rendered in place of an assistant's message to see where the template puts it; no data can hold it."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message with what it says before its content."""
ALSO_SAID = (*REASONING, "tool_calls")
"""Fields of an assistant's message that templates render beside its content, and that the assistant says too."""
ASKED = {"role": "user", "content": "probe"}
CLOCK = "strftime_now"
"""The function by which a template writes the date, in Transformers."""
WAY_OUT = "Take the file from the model's publisher again, or remove the template to use LitGPT's prompt style."
LONGEST_OPENING = 64
"""Characters of a mark such as ``<think>`` that a template writes itself unless a message begins with it."""


def today() -> str:
    """The present day where this machine is, as 2026-11-27."""
    return datetime.now().date().isoformat()


class ChatTemplate:
    """Renders messages as Transformers does, and says where the assistant's are. It can be pickled.

    A template is a program: it may trim a message, cut reasoning out of it, or treat the last one otherwise, so a
    message cannot be searched for in the text. Instead the conversation is rendered again with a stand-in for the
    message: what comes before and after the stand-in encloses the message itself, too.
    """

    def __init__(self, source: str, variables: dict[str, str], date: str | None = None) -> None:
        """Compiles the template; ``variables`` are ``bos_token`` and the like, ``date`` is as 2026-11-27 or of today.

        Raises:
            jinja2.TemplateSyntaxError: the source is no template.
            OverBudget: it cannot be compiled in the time and the memory that it may take.
        """
        self._source, self._variables, self.date = source, variables, date or today()
        extensions = [_GenerationTag, loopcontrols]
        environment = BudgetedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, CLOCK: datetime.fromisoformat(self.date).strftime}
        # templates compare these two with none, which an undefined variable is not
        names = {"tools": None, "documents": None, **variables}
        parsed = environment.parse(source)
        self._names = {node.name for node in parsed.find_all(Name)} | {node.attr for node in parsed.find_all(Getattr)}
        self._names |= {node.value for node in parsed.find_all(Const) if isinstance(node.value, str)}
        self.writes_date = CLOCK in self._names
        self._openings: dict[str, str | None] = {}
        self._template = within_budget(lambda: environment.from_string(parsed, globals=names))

    def __reduce__(self) -> tuple:
        return ChatTemplate, (self._source, self._variables, self.date)

    @classmethod
    def find(cls, checkpoint_dir: Path, date: str | None = None) -> "ChatTemplate | None":
        """The chat template of a checkpoint, or None if it has none; ``date`` is the constructor's.

        It is ``chat_template.jinja``, else ``chat_template`` of ``tokenizer_config.json``, of several the one named
        ``default``: what Transformers takes without being told otherwise.

        Raises:
            UserError: its file is empty or damaged, or it is not written in Jinja's language.
        """
        config = _read_json(checkpoint_dir / "tokenizer_config.json")
        path = checkpoint_dir / "chat_template.jinja"
        if path.is_file():
            with explain_damage(path, "a chat template"):
                source = path.read_text(encoding="utf-8")
                if not source.strip():
                    raise ValueError("it is empty")
        else:
            path, source = checkpoint_dir / "tokenizer_config.json", config.get("chat_template")
            with explain_damage(path, "a file with chat templates"):
                if isinstance(source, list):
                    source = {entry["name"]: entry["template"] for entry in source}.get("default")
                if not isinstance(source, (str, type(None))):
                    raise TypeError(f"chat_template is {source!r}")
        if not source:
            return None
        try:
            return cls(source, _special_tokens(checkpoint_dir, config), date)
        except (jinja2.TemplateSyntaxError, OverBudget) as error:
            what = f"{error}."
            if isinstance(error, jinja2.TemplateSyntaxError):
                what = f"has an error in its line {error.lineno}: {error.message}"
            raise UserError(f"The chat template in {path} {what}\n{WAY_OUT}") from error

    def reads(self, name: str) -> bool:
        """Whether the template names a variable or a field, whatever it does with it."""
        return name in self._names

    def render(self, messages: list[dict], keywords: dict[str, Any] | None = None) -> Rendering:
        """The text of a conversation and what of it the assistant says.

        A response begins where the text for a generation ends that has the messages before it, so that all is learnt
        which the template does not write itself then. Of a template without such an end it begins with its content.

        Args:
            messages: each with ``role`` and ``content``, both text, and what else the template reads.
            keywords: what else the template is given, such as ``tools``.

        Raises:
            ValueError: the template refuses the conversation or fails, or it cannot be told where a message is.
        """
        text = self._render(messages, keywords := keywords or {})
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = self._find_unchanged(text, messages, numbers, keywords)
        spans = spans or [self._find_message(text, messages, number, keywords) for number in numbers]
        said = [_said(messages[number]) for number in numbers]
        lost = [_count_lost(parts, text[begin:end]) for parts, (begin, end) in zip(said, spans, strict=True)]
        return Rendering(text, spans, [sum(map(len, parts)) for parts in said], lost)

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
        key = json.dumps(switches, sort_keys=True)
        if key not in self._openings:
            try:
                without, full = (self._render([ASKED], switches, adds) for adds in (False, True))
            except ValueError:
                without, full = "", ""
            self._openings[key] = full.removeprefix(without) if full.startswith(without) else None
        return self._openings[key] or None

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


def _stand_in(message: dict) -> dict:
    return {name: value for name, value in message.items() if name not in ALSO_SAID} | {"content": STAND_IN}


def _said(message: dict) -> list[str]:
    """What an assistant's message says, without white space, which templates change."""
    parts = [next((message[name] for name in REASONING if isinstance(message.get(name), str)), ""), message["content"]]
    return ["".join(part.split()) for part in parts]


def _count_lost(said: list[str], shown: str) -> int:
    """Characters of the parts that a text lacks; of a part of which some is left, all between its begin and end."""
    shown = "".join(shown.split())
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


def _special_tokens(checkpoint_dir: Path, config: dict) -> dict[str, str]:
    """``bos_token`` and the like by name, as Transformers gathers them."""
    entries = config
    if "added_tokens_decoder" not in config:
        entries = config | _read_json(checkpoint_dir / "special_tokens_map.json")
    contents = {name: of.get("content") if isinstance(of, dict) else of for name, of in entries.items()}
    return {name: token for name, token in contents.items() if name.endswith("_token") and isinstance(token, str)}


def _read_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
