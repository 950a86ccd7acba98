"""The formats of other tools' records: which field is what, and that none which matters goes unread."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from litgpt_akl.data.chat_messages import (
    as_messages,
    check_text,
    is_given,
    kind,
    parse_json,
    read_message,
    speaker,
    with_answer,
)
from litgpt_akl.messages import quoted

FORMATS = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt and completion": ("prompt", "completion"),
    "question and answer": ("question", "answer"),
    "ShareGPT": ("conversations",),
}
"""The fields by which a record's format is told; the first is what a model is asked, the last what it answers."""
KEYWORDS = ("tools", "documents")
"""Lists beside the messages that a chat template may write."""
BESIDE = (*KEYWORDS, "chat_template_kwargs")
"""Fields of a record that are told to a chat template beside the messages."""
COLUMNS = ("messages", "instruction", "output", "input", "system", "history", *KEYWORDS)
"""Names that a field of the data can be given."""
SYSTEM = ("system_prompt", "system_message")
"""Other tools' names for the field ``system``."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Fields of what is no text, which a text speaks of."""
OTHERS = frozenset({"functions", *SYSTEM, *MEDIA, "label", "weight", "train"})
"""Fields of a record that may mean that it is not to be read."""
NO_RESPONSE = ": it has no response"
"""How what is wrong with a prompt alone ends."""
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
    _check_none_is_lost(record)
    if form in ("chat", "ShareGPT"):
        return _read_conversation(record, "messages" if form == "chat" else "conversations")
    ask, answer = FORMATS[form]
    if isinstance(record[ask], list) or as_messages(record[ask]) or as_messages(record[answer]):
        return _read_prompt_messages(record, ask, answer)
    if is_given(record[ask]) and record[answer] is None:
        raise ValueError(f"'{answer}' is null{NO_RESPONSE}")
    for name in (ask, answer):
        check_text(record[name], f"'{name}'")
    if not record[answer].strip():
        raise ValueError("its response is empty")
    return _read_instruction(record, ask, answer)


def _check_none_is_lost(record: Mapping[str, Any]) -> None:
    """Refuses a record with a field that says what is asked, and that is known by another name or not at all."""
    if OTHERS.isdisjoint(record):
        return
    if is_given(record.get("functions")):
        raise ValueError("has 'functions', which is not read; give --data.columns '{tools: functions}'")
    for name in SYSTEM:
        if is_given(record.get(name)) and not is_given(record.get("system")):
            raise ValueError(f"has '{name}', which is not read; give --data.columns '{{system: {name}}}'")
    for name in MEDIA:
        if is_given(record.get(name)):
            raise ValueError(f"has '{name}', which is not read: a model here reads text alone")
    if record.get("label") is False:
        raise ValueError("has 'label' false, by which a response that nobody wants is marked: leave it out")
    for name in ("weight", "train"):
        if record.get(name) in (0, False):
            raise ValueError(f"has '{name}' {record[name]!r} for the whole record: leave it out")


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
        response = with_answer(_read_messages(renamed[ask], ask), text)
    elif isinstance(renamed[ask], list):
        response = [{"role": "assistant", "content": text}]
    return {**record, columns.get(answer, answer): response}


def asks_only(record: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> bool:
    """Whether a record has a prompt and no response: the field of the response is missing, or no message has one."""
    renamed = _renamed(record, columns or {})
    if _open_format(renamed) is not None:
        return True
    named = (renamed[name] for name in ("messages", "conversations") if is_given(renamed.get(name)))
    messages = as_messages(next(named, None)) or []
    return bool(messages) and not any(speaker(message) == "assistant" for message in messages)


def _open_format(renamed: Mapping[str, Any]) -> str | None:
    """The one format of which the question is given and the field of the response is not."""
    asking = [form for form, (ask, *_) in FORMATS.items() if is_given(renamed.get(ask))]
    return asking[0] if len(asking) == 1 and not is_given(renamed.get(FORMATS[asking[0]][-1])) else None


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return dict(record)
    taken = {name: record[theirs] for name, theirs in columns.items() if theirs in record}
    theirs = set(columns.values())
    # a name that is given to another field is not this one's any more
    return {name: value for name, value in record.items() if name not in theirs and name not in columns} | taken


def _format_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    asking = [(form, names) for form, names in FORMATS.items() if names[0] in record]
    whole = [form for form, names in asking if all(is_given(record.get(name)) for name in names)]
    if columns:
        whole = [form for form in whole if columns.keys() & set(FORMATS[form])] or whole
    if len(whole) == 1:
        return whole[0]
    if whole:
        names = " and ".join(f"'{FORMATS[form][-1]}'" for form in whole[:2])
        raise ValueError(f"could be read by {names}: say which with --data.columns, such as {_mapping(whole[0])}")
    # a field that is there and empty tells the format, too; what is wrong with it is said then
    present = [form for form, names in asking if all(name in record for name in names)]
    if present:
        return present[0]
    raise ValueError(_describe_unknown(record, columns))


def _mapping(form: str) -> str:
    names = FORMATS[form]
    ours = ("messages",) if len(names) == 1 else ("instruction", "output")
    return "'{" + ", ".join(f"{our}: {name}" for our, name in zip(ours, names, strict=True)) + "}'"


def _describe_unknown(record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    chats = {name: messages for name, value in record.items() if (messages := as_messages(value))}
    answered = [name for name, messages in chats.items() if any(speaker(m) == "assistant" for m in messages)]
    for ask, answer in [] if answered else list(FORMATS.values())[1:-1]:
        for name, other, likely, end in ((ask, answer, ANSWERS, NO_RESPONSE), (answer, ask, ASKS, "")):
            if name in record and not _nearest(record, likely):
                named = f", which --data.columns names for '{other}'" if other in columns else ""
                return f"has no field '{columns.get(other, other)}'{named}{end}"
    told = "has neither 'messages' nor 'instruction' and 'output'"
    if not record:
        return f"{told}: it has no fields"
    names = ", ".join(f"'{quoted(name, 40)}'" for name in list(record)[:8])
    told = f"{told}, but {names}{' and more' if len(record) > 8 else ''}"
    return f"{told}{_advise(record, chats, answered)}"


def _advise(record: Mapping[str, Any], chats: Mapping[str, list], answered: list[str]) -> str:
    """What to do with a record of no known format.

    Args:
        record: one.
        chats: its fields that are lists of messages.
        answered: the names of those in which the assistant speaks.
    """
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    ask, answer = _nearest(texts | chats, ASKS), _nearest(texts, ANSWERS)
    if answered:
        chat = _nearest({name: "" for name in answered}, ANSWERS) or answered[0]
        asks = any(speaker(message) == "user" for message in chats[chat])
        if ask in (None, chat) or asks:
            return f"; give --data.columns '{{messages: {chat}}}'"
        answer = chat
    elif chats:
        return f"; give --data.columns '{{messages: {next(iter(chats))}}}'"
    if ask and answer and ask != answer:
        return f"; give --data.columns '{{instruction: {ask}, output: {answer}}}'"
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            fields = ", ".join(f"'{quoted(field, 40)}'" for field in list(value[0])[:4])
            found = (
                f": '{quoted(name, 40)}' is a list of {len(value):,} objects: write it to a file of its own if these"
            )
            return f"{found} are records, or with 'role' and 'content' in place of {fields}"
    if "text" in texts:
        return ": a text alone does not say where a response begins"
    if len(texts) < 2:
        return ": none of them is a text and a response, or a list of messages with 'role' and 'content'"
    return "; name them with --data.columns '{instruction: ..., output: ...}'"


def _nearest(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The field whose name is most like one of ``names``, which are in the order of preference."""
    fields = {str(name).lower(): name for name, value in record.items() if isinstance(value, str) or as_messages(value)}
    for name in names:
        if name in fields:
            return fields[name]
    for name in names:
        if close := [field for field in fields if name in field] or get_close_matches(name, fields, 1, 0.8):
            return fields[close[0]]
    return None


def _read_instruction(record: dict[str, Any], ask: str, answer: str) -> Instruction | Conversation:
    for name in ("input", "sys_prompt", "system"):
        if record.get(name) is not None:
            check_text(record[name], f"'{name}'")
    for name in sorted({"instruction", "output"} - {ask, answer}):
        if is_given(record.pop(name, None)):
            raise ValueError(
                f"has '{name}' beside '{ask}' and '{answer}': say which is meant with --data.columns, such as"
                f" '{{instruction: {ask}, output: {answer}}}'"
            )
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
            value = parse_json(value, f"'{name}'")
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


def _read_conversation(record: dict[str, Any], name: str) -> Conversation:
    return _conversation(_read_messages(record[name], name), record, {name})


def _read_messages(messages: Any, name: str) -> list[Any]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = parse_json(messages, f"'{name}'")
    messages = as_messages(messages) or messages
    if not isinstance(messages, list):
        raise ValueError(f"'{name}' is {kind(messages)}, not a list")
    return messages


def _read_prompt_messages(record: dict[str, Any], ask: str, answer: str) -> Conversation:
    """Of a prompt or a completion that is a list of messages; the other may be the text of one."""
    both = []
    for name, role in ((ask, "user"), (answer, "assistant")):
        messages = as_messages(record[name]) or record[name]
        messages = [{"role": role, "content": messages}] if isinstance(messages, str) else messages
        if not isinstance(messages, list):
            raise ValueError(f"'{name}' is {kind(messages)}, neither text nor a list of messages")
        both.append(messages)
    conversation = _conversation([*both[0], *both[1]], record, {ask, answer})
    first = len(conversation.trained) - len(both[1])
    trained = [number >= first and trained for number, trained in enumerate(conversation.trained)]
    if not any(trained):
        raise ValueError(f"'{answer}' has no message of the role 'assistant'")
    return replace(conversation, trained=trained)


def _conversation(messages: list[Any], record: Mapping[str, Any], used: set[str]) -> Conversation:
    read = [read_message(message, number) for number, message in enumerate(messages, start=1)]
    texts, trained = [message for message, _ in read], [is_trained for _, is_trained in read]
    system = record.get("system")
    if is_given(system):
        check_text(system, "'system'")
        if texts and texts[0]["role"] == "system":
            raise ValueError("has a field 'system' and a message of the role 'system'")
        texts, trained = [{"role": "system", "content": system}, *texts], [False, *trained]
    if not any(message["role"] == "assistant" for message in texts):
        roles = ", ".join(f"'{quoted(role, 40)}'" for role in dict.fromkeys(message["role"] for message in texts))
        raise ValueError(f"has no message of the role 'assistant'{f', only of {roles}' if roles else ''}{NO_RESPONSE}")
    if not any(trained):
        raise ValueError("has no message to learn from: all of the assistant's have weight 0 or train false")
    return Conversation(texts, trained, _keywords(record), _unread(record, {*used, "system", *BESIDE}))


def _unread(record: Mapping[str, Any], used: set[str]) -> tuple[str, ...]:
    return tuple(name for name, value in record.items() if name not in used and is_given(value))
