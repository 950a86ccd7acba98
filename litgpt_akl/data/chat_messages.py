"""Messages of chats in the words of whichever tool wrote them: who speaks, what is said, and whether it is learnt."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from litgpt_akl.messages import quoted
from litgpt_akl.models.chat_template import ALSO_SAID

SPEAKERS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
"""Names of roles, in small letters, that chat templates have other names for."""
PLAIN, ROLES = {"role", "content"}, ("user", "assistant", "system", "tool")
"""Fields that a message has at least, and roles that are the same in all tools and templates."""
SHAREGPT_SPEAKERS = {"observation": "tool", "function_call": "assistant", "function_response": "tool"}
"""Further ones in ShareGPT's ``from``; as a ``role`` some templates know them."""
LEARNT = ("weight", "train", "training", "loss", "loss_mask")
"""Fields of a message by which tools say whether it is learnt, 0 or 1."""
PARTLY_LEARNT = ("train_detail", "training_detail", "masked")
"""Fields of a message by which tools say what of it is not learnt."""


def is_given(value: Any) -> bool:
    """Whether a field says anything; in a Parquet file every record has every field."""
    return value is not None and value != "" and value != [] and value != {}


def kind(value: Any) -> str:
    """What a value is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    kinds |= {int: "a number", float: "a number", bytes: "bytes"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")


def check_text(value: Any, name: str) -> None:
    """Raises ValueError if a value is no text, or such as cannot be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {value[error.start]!r}, half of a character that takes two") from error


def parse_json(text: str, name: str) -> Any:
    """The value of a field that holds JSON as text; raises ValueError if it does not."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is text that is not JSON: {error}") from error


def is_message(value: Any) -> bool:
    """Whether a value looks like a message."""
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """A field's messages, also if it is their JSON as text, or an object of lists; None if it holds none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if is_message(value) and all(isinstance(column, list) for column in value.values()):
        # Hugging Face's datasets make this of a list of objects in a Sequence
        if len(set(map(len, value.values()))) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) and value and all(map(is_message, value)) else None


def speaker(message: Mapping[str, Any]) -> Any:
    """The role of a message in the words of chat templates, as far as it has one."""
    name = message.get("role", message.get("from"))
    if not isinstance(name, str):
        return name
    lower = name.lower()
    if "role" not in message and lower in SHAREGPT_SPEAKERS:
        return SHAREGPT_SPEAKERS[lower]
    return SPEAKERS.get(lower, lower if lower in ("user", "assistant", "system") else name)


def with_answer(messages: Sequence[Any], text: str) -> list[Any]:
    """The messages with a response at their end, in the words of the messages before it.

    Raises:
        ValueError: one is no message, or none asks for a response.
    """
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    before = messages[:-1] if messages and speaker(messages[-1]) == "assistant" else messages
    if not before:
        raise ValueError("has no message that asks for a response")
    who = {"role": "assistant"} if "role" in before[-1] else {"from": "gpt"}
    return [*before, {**who, "content" if "content" in before[-1] else "value": text}]


def read_message(message: Any, number: int) -> tuple[dict[str, Any], bool]:
    """A message as chat templates read it, and whether it is to be learnt.

    Args:
        message: as read from a file: nothing about it is taken for granted.
        number: its place, from 1 on, for messages.

    Raises:
        ValueError: it is no message, or a field of it is not what it must be.
    """
    if type(message) is dict and message.keys() == PLAIN and message["role"] in ROLES:
        # most are like this, and need none of what follows
        fields = {"role": message["role"], "content": _text(message, "content", number, may_lack=False)}
        _check_says_something(fields, number)
        return fields, fields["role"] == "assistant"
    _check_message(message, number)
    name = "role" if "role" in message else "from"
    if name not in message:
        raise ValueError(f"message {number} has no field 'role'")
    check_text(message[name], f"'{name}' of message {number}")
    if is_given(message.get("function_call")):
        raise ValueError(f"message {number} has 'function_call', which is not read: write it as 'tool_calls'")
    # in a Parquet file every message has every field
    fields = {key: value for key, value in message.items() if value is not None and key not in ("role", "from")}
    fields = {"role": speaker(message), **fields}
    _read_content(message, fields, number)
    is_trained = _is_trained(fields, number)
    for key in LEARNT:
        fields.pop(key, None)
    return fields, is_trained


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {kind(message)}, not one with 'role' and 'content'")


def _read_content(message: dict[str, Any], fields: dict[str, Any], number: int) -> None:
    """Put a message's text into its fields, and calls of tools as templates read them."""
    name = "content" if "content" in message or "value" not in message and "from" not in message else "value"
    if "from" in message and "role" not in message and message["from"] == "function_call" and name == "value":
        call = fields.pop("value", None)
        call = parse_json(call, f"'value' of message {number}") if isinstance(call, str) else call
        fields |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
        return
    if "tool_calls" in fields:
        calls = fields.pop("tool_calls")
        calls = parse_json(calls, f"'tool_calls' of message {number}") if isinstance(calls, str) and calls else calls
        if not isinstance(calls, list) and is_given(calls):
            raise ValueError(f"'tool_calls' of message {number} is {kind(calls)}, not a list")
        # of a message without calls many templates ask only whether it has the field
        if is_given(calls):
            fields["tool_calls"] = calls
    says_more = fields["role"] == "assistant" and any(is_given(fields.get(each)) for each in ALSO_SAID)
    if name == "value":
        fields.pop("value", None)
    fields["content"] = _text(message, name, number, may_lack=says_more)
    if not says_more:
        _check_says_something(fields, number)


def _check_says_something(fields: dict[str, Any], number: int) -> None:
    if fields["role"] == "assistant" and not fields["content"].strip():
        raise ValueError(f"its response is empty: message {number}")


def _text(message: dict[str, Any], name: str, number: int, may_lack: bool) -> str:
    if may_lack and message.get(name) is None:
        return ""
    if name not in message:
        raise ValueError(f"message {number} has no field '{name}'")
    content = message[name]
    if isinstance(content, list) and content:
        content = "".join(_text_of_part(part, number) for part in content)
    check_text(content, f"'{name}' of message {number}")
    return content


def _text_of_part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    shown = quoted(str(part["type"]), 40) if isinstance(part, dict) and "type" in part else kind(part)
    raise ValueError(f"message {number} has a part that is no text: {shown}")


def _is_trained(message: dict[str, Any], number: int) -> bool:
    for name in PARTLY_LEARNT:
        if message.get(name):
            raise ValueError(f"message {number} has '{name}', which is not read: give whole messages 'train' false")
    wanted = True
    for name in LEARNT:
        value = message.get(name, 1)
        if value not in (0, 1):
            raise ValueError(f"'{name}' of message {number} is {value!r}, which is neither 0 nor 1")
        wanted = wanted and value == 1
        if message["role"] != "assistant" and value == 1 and name in message and name != "weight":
            raise ValueError(f"message {number} of the role '{quoted(message['role'], 40)}' is to be trained on")
    return wanted and message["role"] == "assistant"
