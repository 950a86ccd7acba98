"""The formats of other tools' records: which field is what, and that none which matters goes unread."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from litgpt_akl.messages import quoted
from litgpt_akl.models.chat_template import ALSO_SAID

FORMATS = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt and completion": ("prompt", "completion"),
    "question and answer": ("question", "answer"),
    "ShareGPT": ("conversations",),
}
"""The fields by which a record's format is told; the first is what a model is asked, the last what it answers."""
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    "function_response": "tool",
}
"""Roles of ShareGPT's messages that chat templates have other names for."""
KEYWORDS = ("tools", "documents")
"""Lists beside the messages that a chat template may write."""
BESIDE = (*KEYWORDS, "chat_template_kwargs")
"""Fields of a record that are told to a chat template beside the messages."""
COLUMNS = ("messages", "instruction", "output", "input", "system", "history", *KEYWORDS)
"""Names that a field of the data can be given."""
ASKS = ("question", "prompt", "query", "problem", "instruction", "input", "user", "source", "context", "task", "text")
ANSWERS = ("answer", "response", "completion", "output", "solution", "chosen", "target", "label", "reply", "assistant")


@dataclass(frozen=True)
class Instruction:
    """A record for a prompt style."""

    fields: dict[str, Any]
    """``instruction``, ``output``, and what else a prompt style may read."""
    system: str | None = None
    unread: tuple[str, ...] = ()
    """Fields of the record that are in none of these."""


@dataclass(frozen=True)
class Conversation:
    """A record for a chat template; without one, for a prompt style turn by turn."""

    messages: list[dict[str, Any]]
    """Each with the text ``role`` and ``content``, and what else a template may read."""
    trained: list[bool]
    """Whether a message is to be learnt; of each."""
    keywords: dict[str, Any] = field(default_factory=dict)
    """``tools``, ``documents`` and what else a template is told beside the messages."""
    unread: tuple[str, ...] = ()
    """Fields of the record that are in none of these."""

    def with_last_only(self) -> "Conversation":
        """The same, of which only the last message that is to be learnt is learnt."""
        last = max(number for number, is_trained in enumerate(self.trained) if is_trained)
        return replace(self, trained=[number == last for number in range(len(self.trained))])


def read_format(record: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Instruction | Conversation:
    """What a record says, whichever of the known formats it has.

    Args:
        record: as read from JSON or Parquet: nothing about it is taken for granted.
        columns: the data's name by ours, of ``COLUMNS``.

    Raises:
        ValueError: the record has no known format, or two, or a field that is not what it must be.
    """
    record = _renamed(record, columns or {})
    form = _format_of(record, columns or {})
    if form in ("chat", "ShareGPT"):
        return _read_conversation(record, "messages" if form == "chat" else "conversations")
    ask, answer = FORMATS[form]
    if isinstance(record[ask], list):
        return _read_prompt_messages(record, ask, answer)
    for name in (ask, answer):
        check_text(record[name], f"'{name}'")
    if not record[answer].strip():
        raise ValueError("its response is empty")
    return _read_instruction(record, ask, answer)


def with_response(record: Mapping[str, Any], text: str, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The same record with another response, or with one if it has none; all other fields stay.

    Of a chat the last message is another one if it is the assistant's; one that ends otherwise gets one more.

    Args:
        record: as for :func:`read_format`, but for the response, which may be missing.
        text: the response.
        columns: the data's name by ours, of ``COLUMNS``.

    Raises:
        ValueError: the record has no known format, or two.
    """
    columns = columns or {}
    renamed = _renamed(record, columns)
    form = _open_format(renamed) or _format_of(renamed, columns)
    ask, answer = FORMATS[form][0], FORMATS[form][-1]
    response: Any = text
    if ask == answer:
        response = _answered(_read_messages(renamed[ask], ask), text)
    elif isinstance(renamed[ask], list):
        response = [{"role": "assistant", "content": text}]
    return {**record, columns.get(answer, answer): response}


def asks_only(record: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> bool:
    """Whether a record has a prompt and no response: the field of the response is missing, or no message has one."""
    renamed = _renamed(record, columns or {})
    if _open_format(renamed) is not None:
        return True
    messages = next((renamed[name] for name in ("messages", "conversations") if is_given(renamed.get(name))), None)
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return False
    roles = [message.get("role", message.get("from")) for message in messages]
    return not any(SPEAKERS.get(role, role) == "assistant" for role in roles if isinstance(role, str))


def _open_format(renamed: Mapping[str, Any]) -> str | None:
    """The one format of which the question is given and the field of the response is not."""
    asking = [form for form, (ask, *_) in FORMATS.items() if is_given(renamed.get(ask))]
    return asking[0] if len(asking) == 1 and not is_given(renamed.get(FORMATS[asking[0]][-1])) else None


def _answered(messages: list[Any], text: str) -> list[Any]:
    """The messages with a response at their end, in the words of the messages before it."""
    for number, message in enumerate(messages, start=1):
        if not _is_message(message):
            raise ValueError(f"message {number} is {kind(message)}, not one with 'role' and 'content'")
    last = messages[-1].get("role", messages[-1].get("from")) if messages else None
    before = messages[:-1] if SPEAKERS.get(last, last) == "assistant" else messages
    if not before:
        raise ValueError("has no message that asks for a response")
    if "role" in before[-1]:
        return [*before, {"role": "assistant", "content": text}]
    return [*before, {"from": "gpt", "value": text}]


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = {name: record[theirs] for name, theirs in columns.items() if theirs in record}
    theirs = set(columns.values())
    # a name that is given to another field is not this one's any more
    return {name: value for name, value in record.items() if name not in theirs and name not in columns} | taken


def _format_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    whole = [form for form, names in FORMATS.items() if all(is_given(record.get(name)) for name in names)]
    whole = [form for form in whole if columns.keys() & set(FORMATS[form])] or whole
    if len(whole) == 1:
        return whole[0]
    if whole:
        names = " and ".join(f"'{FORMATS[form][-1]}'" for form in whole[:2])
        raise ValueError(f"could be read by {names}: say which with --data.columns, such as {_mapping(whole[0])}")
    # a field that is there and empty tells the format, too; what is wrong with it is said then
    present = [form for form, names in FORMATS.items() if all(name in record for name in names)]
    if present:
        return present[0]
    raise ValueError(_describe_unknown(record))


def _mapping(form: str) -> str:
    names = FORMATS[form]
    ours = ("messages",) if len(names) == 1 else ("instruction", "output")
    return "'{" + ", ".join(f"{our}: {name}" for our, name in zip(ours, names, strict=True)) + "}'"


def _describe_unknown(record: Mapping[str, Any]) -> str:
    for ask, answer in list(FORMATS.values())[1:-1]:
        if ask in record and not _nearest(record, ANSWERS):
            return f"has no field '{answer}'"
        if answer in record and not _nearest(record, ASKS):
            return f"has no field '{ask}'"
    told = "has neither 'messages' nor 'instruction' and 'output'"
    if not record:
        return f"{told}: it has no fields"
    names = ", ".join(f"'{quoted(name, 40)}'" for name in list(record)[:8])
    told = f"{told}, but {names}{' and more' if len(record) > 8 else ''}"
    lists = [name for name, value in record.items() if isinstance(value, list) and value and _is_message(value[0])]
    others = [
        name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if others and not lists:
        found = f"'{quoted(others[0], 40)}' is a list of {len(record[others[0]]):,} objects"
        return f"{told}: {found}: write it to a file of its own if these are the records"
    ask, answer = _nearest(record, ASKS), _nearest(record, ANSWERS)
    if lists:
        return f"{told}; give --data.columns '{{messages: {lists[0]}}}'"
    if ask and answer and ask != answer:
        return f"{told}; give --data.columns '{{instruction: {ask}, output: {answer}}}'"
    if "text" in record:
        return f"{told}: a text alone does not say where a response begins"
    return f"{told}; name them with --data.columns '{{instruction: ..., output: ...}}'"


def _nearest(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The text field whose name is most like one of ``names``, which are in the order of preference."""
    fields = {str(name).lower(): name for name, value in record.items() if isinstance(value, str)}
    for name in names:
        if name in fields:
            return fields[name]
    for name in names:
        if close := [field for field in fields if name in field] or get_close_matches(name, fields, 1, 0.8):
            return fields[close[0]]
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def is_given(value: Any) -> bool:
    """Whether a field says anything; in a Parquet file every record has every field."""
    return value is not None and value != "" and value != [] and value != {}


def _read_instruction(record: dict[str, Any], ask: str, answer: str) -> Instruction | Conversation:
    for name in ("input", "sys_prompt", "system"):
        if record.get(name) is not None:
            check_text(record[name], f"'{name}'")
    system = record.get("system") or None
    keywords = _keywords(record)
    used = {ask, answer, "system", "history", *BESIDE}
    history = _history(record.get("history"))
    if history or keywords:
        asked = "\n\n".join(text for text in (record[ask], record.get("input")) if text)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [*history, {"role": "user", "content": asked}, {"role": "assistant", "content": record[answer]}]
        trained = [message["role"] == "assistant" for message in messages]
        return Conversation(messages, trained, keywords, _unread(record, used | {"input"}))
    others = {name: value for name, value in record.items() if name not in used}
    return Instruction({"instruction": record[ask], "output": record[answer], **others}, system)


def _history(history: Any) -> list[dict[str, Any]]:
    if not is_given(history):
        return []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise ValueError("'history' is not a list of pairs of texts: what was asked, and what was answered")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _keywords(record: Mapping[str, Any]) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    for name in KEYWORDS:
        value = record.get(name)
        if not is_given(value):
            continue
        if isinstance(value, str):
            value = _from_json(value, f"'{name}'")
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ValueError(f"'{name}' is not a list of objects")
        if value:
            keywords[name] = value
    more = record.get("chat_template_kwargs")
    if is_given(more):
        if not isinstance(more, dict):
            raise ValueError(f"'chat_template_kwargs' is {kind(more)}, not an object")
        keywords |= more
    return keywords


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is text that is not JSON: {error}") from error


def _read_conversation(record: dict[str, Any], name: str) -> Conversation:
    return _conversation(_read_messages(record[name], name), record, {name})


def _read_messages(messages: Any, name: str) -> list[Any]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _from_json(messages, f"'{name}'")
    if not isinstance(messages, list):
        raise ValueError(f"'{name}' is {kind(messages)}, not a list")
    return messages


def _read_prompt_messages(record: dict[str, Any], ask: str, answer: str) -> Conversation:
    """Of a prompt that is a list of messages: its completion is one, too, or the text of the last message."""
    completion = record[answer]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(completion, list):
        raise ValueError(f"'{answer}' is {kind(completion)}, not a list of messages as '{ask}' is")
    conversation = _conversation([*record[ask], *completion], record, {ask, answer})
    trained = [number >= len(record[ask]) and trained for number, trained in enumerate(conversation.trained)]
    if not any(trained):
        raise ValueError(f"'{answer}' has no message of the role 'assistant'")
    return replace(conversation, trained=trained)


def _conversation(messages: list[Any], record: Mapping[str, Any], used: set[str]) -> Conversation:
    read = [_read_message(message, number) for number, message in enumerate(messages, start=1)]
    texts, trained = [message for message, _ in read], [is_trained for _, is_trained in read]
    system = record.get("system")
    if is_given(system):
        check_text(system, "'system'")
        if texts and texts[0]["role"] == "system":
            raise ValueError("has a field 'system' and a message of the role 'system'")
        texts, trained = [{"role": "system", "content": system}, *texts], [False, *trained]
    if not any(message["role"] == "assistant" for message in texts):
        raise ValueError("has no message of the role 'assistant'")
    if not any(trained):
        raise ValueError("has no message to learn from: all of the assistant's have weight 0 or train false")
    if is_given(record.get("functions")):
        raise ValueError("has 'functions', which is not read; give --data.columns '{tools: functions}'")
    return Conversation(texts, trained, _keywords(record), _unread(record, {*used, "system", *BESIDE}))


def _unread(record: Mapping[str, Any], used: set[str]) -> tuple[str, ...]:
    return tuple(name for name, value in record.items() if name not in used and is_given(value))


def _read_message(message: Any, number: int) -> tuple[dict[str, Any], bool]:
    """A message as chat templates read it, and whether it is to be learnt."""
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {kind(message)}, not one with 'role' and 'content'")
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, number)
    if "role" not in message:
        raise ValueError(f"message {number} has no field 'role'")
    check_text(message["role"], f"'role' of message {number}")
    # in a Parquet file every message has every field
    fields = {name: value for name, value in message.items() if value is not None or name == "content"}
    says_more = message["role"] == "assistant" and any(is_given(message.get(n)) for n in ALSO_SAID)
    fields["content"] = _content(message, number, may_lack=says_more)
    is_trained = _is_trained(fields, number)
    for name in ("weight", "train"):
        fields.pop(name, None)
    if fields["role"] == "assistant" and not fields["content"].strip() and not says_more:
        raise ValueError(f"its response is empty: message {number}")
    return fields, is_trained


def _from_sharegpt(message: dict[str, Any], number: int) -> dict[str, Any]:
    if "value" not in message:
        raise ValueError(f"message {number} has no field 'value'")
    speaker, value = message["from"], message["value"]
    check_text(speaker, f"'from' of message {number}")
    others = {name: other for name, other in message.items() if name not in ("from", "value")}
    if speaker == "function_call":
        call = _from_json(value, f"'value' of message {number}") if isinstance(value, str) else value
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}], **others}
    return {"role": SPEAKERS.get(speaker, speaker), "content": value, **others}


def _content(message: dict[str, Any], number: int, may_lack: bool) -> str:
    if may_lack and message.get("content") is None:
        return ""
    if "content" not in message:
        raise ValueError(f"message {number} has no field 'content'")
    content = message["content"]
    if isinstance(content, list) and content:
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                shown = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"message {number} has a part that is no text: {quoted(str(shown), 40)}")
        content = "".join(part["text"] for part in content)
    check_text(content, f"'content' of message {number}")
    return content


def _is_trained(message: dict[str, Any], number: int) -> bool:
    for name in ("weight", "train"):
        if name in message and message[name] not in (0, 1):
            raise ValueError(f"'{name}' of message {number} is {message[name]!r}, which is neither 0 nor 1")
    wanted = message.get("weight", 1) == 1 and message.get("train", 1) == 1
    if message["role"] != "assistant" and message.get("train") == 1:
        raise ValueError(f"message {number} of the role '{quoted(message['role'], 40)}' is to be trained on")
    return wanted and message["role"] == "assistant"


def check_text(value: Any, name: str) -> None:
    """Raises ValueError if a value is no text, or such as cannot be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {value[error.start]!r}, half of a character that takes two") from error


def kind(value: Any) -> str:
    """What a value is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
