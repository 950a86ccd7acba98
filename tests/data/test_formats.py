"""Records of other tools' formats: what is read of them, and what is refused by name."""

import json

import pytest

from litgpt_akl.data.formats import Conversation, Instruction, read_format, with_response

USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Alice."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"in": "the garden"}}}
TALK = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK},
        {"messages": json.dumps(TALK)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"text": "o?"}]}, ASSISTANT]},
        {"messages": [{**USER, "tool_calls": None}, {**ASSISTANT, "name": None}]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Alice."}]},
        {"conversations": TALK, "messages": None, "tools": [], "documents": ""},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "Alice."},
        {"prompt": "Who?", "completion": [ASSISTANT]},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])},
        {"messages": [{"role": "human", "content": "Who?"}, {"role": "gpt", "content": "Alice."}]},
        {"messages": [USER, {"role": "model", "content": ["Al", {"type": "text", "text": "ice."}]}]},
        {"messages": [{"role": "User", "content": "Who?"}, {**ASSISTANT, "role": "Assistant", "tool_calls": []}]},
        {"conversations": [{"from": "Human", "value": "Who?"}, {"from": "AI", "value": "Alice."}]},
        {"conversations": [{"from": "USER", "content": "Who?"}, {"role": "assistant", "value": "Alice."}]},
        {"conversations": {"from": ["human", "gpt"], "value": ["Who?", "Alice."]}},
    ],
)
def test_chats_of_every_tool_are_the_same(record):
    assert read_format(record) == Conversation(TALK, [False, True])


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"instruction": "Who?", "output": "Alice."}, {}),
        ({"prompt": "Who?", "completion": "Alice."}, {}),
        ({"question": "Who?", "answer": "Alice.", "history": [], "system": ""}, {}),
        ({"prompt": "Who?", "completion": "Alice.", "instruction": None, "output": ""}, {}),
        ({"frage": "Who?", "antwort": "Alice."}, {"instruction": "frage", "output": "antwort"}),
        ({"output": "Who?", "instruction": "Alice."}, {"instruction": "output", "output": "instruction"}),
        ({"messages": TALK, "q": "Who?", "output": "Alice."}, {"instruction": "q"}),
    ],
)
def test_instructions_of_every_tool_are_the_same(record, columns):
    found = read_format(record, columns)
    assert isinstance(found, Instruction) and not found.system
    assert {"instruction": "Who?", "output": "Alice."}.items() <= found.fields.items()
    assert found.fields.keys() <= {"instruction", "output", "messages"}


def test_a_history_and_tools_make_a_chat_of_an_instruction():
    record = {"instruction": "And", "input": "now?", "output": "Alice.", "system": "Be brief.", "history": [["a", "b"]]}
    talk = [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk += [{"role": "user", "content": "And\n\nnow?"}, ASSISTANT]
    assert read_format(record) == Conversation(talk, [False, False, True, False, True])
    record = {"question": "Who?", "answer": "Alice.", "tools": json.dumps([TOOL]), "id": 3}
    assert read_format(record) == Conversation(TALK, [False, True], {"tools": [TOOL]}, ("id",))


def test_what_stands_beside_the_messages():
    keywords = {"tools": [TOOL], "documents": [{"title": "Alice"}], "enable_thinking": False}
    record = {"messages": TALK, "system": "Be brief.", "tools": json.dumps([TOOL]), "documents": keywords["documents"]}
    record |= {"chat_template_kwargs": {"enable_thinking": False}, "source": "a book", "empty": None}
    assert read_format(record) == Conversation([SYSTEM, *TALK], [False, False, True], keywords, ("source",))


MARKS = [{name: value} for name in ("weight", "train", "training", "loss", "loss_mask") for value in (0, False)]


@pytest.mark.parametrize("mark", [{"weight": 0.0}, *MARKS])
def test_a_message_can_be_left_out_of_what_is_learnt(mark):
    found = read_format({"messages": [USER, {**ASSISTANT, **mark}, USER, {**ASSISTANT, "weight": 1, "train": True}]})
    assert found == Conversation(TALK * 2, [False, False, False, True])
    assert Conversation(TALK * 2, [False, True] * 2).with_last_only().trained == [False, False, False, True]


def test_calls_of_tools_need_no_text():
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answered = {"role": "tool", "content": "a rose"}
    expected = Conversation([USER, called, answered, ASSISTANT], [False, True, False, True])
    for first in (
        called,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
    ):
        assert read_format({"messages": [USER, first, answered, ASSISTANT]}) == expected
    said = json.dumps(CALL["function"])
    speakers = [("human", "Who?"), ("function_call", said), ("observation", "a rose"), ("gpt", "Alice.")]
    assert read_format({"conversations": [{"from": name, "value": text} for name, text in speakers]}) == expected


@pytest.mark.parametrize(
    ("record", "columns", "reason"),
    [
        ({"text": "a b"}, {}, "but 'text': a text alone does not say where a response begins"),
        (
            {"src_text": "a", "target_text": "b"},
            {},
            "give --data.columns '{instruction: src_text, output: target_text}'",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "'{instruction: prompt, output: chosen}'"),
        ({"chat": TALK}, {}, "give --data.columns '{messages: chat}'"),
        ({"frage": "a", "antwort": "b"}, {}, "name them with --data.columns '{instruction: ..., output: ...}'"),
        (
            {"messages": TALK, "instruction": "a", "output": "b"},
            {},
            "could be read by 'messages' and 'output': say",
        ),
        ({"prompt": "a", "completion": 3}, {}, "'completion' is a number, not text"),
        ({"prompt": "a", "completion": "b", "output": "c"}, {}, "has 'output' beside 'prompt' and 'completion': say"),
        ({"question": "a"}, {}, "has no field 'answer'"),
        ({"messages": TALK, "functions": [TOOL]}, {}, "has 'functions', which is not read; give --data.columns"),
        ({"messages": TALK, "tools": "look"}, {}, "'tools' is text that is not JSON"),
        ({"messages": TALK, "tools": {"a": 1}}, {}, "'tools' is not a list of objects"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, {}, "'chat_template_kwargs' is a list, not an object"),
        ({"messages": [SYSTEM, *TALK], "system": "?"}, {}, "has a field 'system' and a message of the role 'system'"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, {}, "'weight' of message 2 is 0.5, which is neither 0"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, {}, "has no message to learn from"),
        ({"messages": [{**USER, "train": True}, ASSISTANT]}, {}, "message 1 of the role 'user' is to be trained on"),
        ({"conversations": [{"from": "human"}]}, {}, "message 1 has no field 'value'"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, {}, "'value' of message 1 is text that is not"),
        ({"prompt": [USER], "completion": [USER]}, {}, "has no message of the role 'assistant'"),
        ({"prompt": TALK, "completion": [USER]}, {}, "'completion' has no message of the role 'assistant'"),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "look"}}]},
            {},
            "has 'function_call', which",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": "look"}]},
            {},
            "'tool_calls' of message 2 is text that is not",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": {"a": 1}}]},
            {},
            "'tool_calls' of message 2 is an object, not",
        ),
        ({"messages": [USER, {**ASSISTANT, "masked": True}]}, {}, "message 2 has 'masked', which is not read"),
        ({"messages": [{**USER, "loss": True}, ASSISTANT]}, {}, "message 1 of the role 'user' is to be trained on"),
        ({"messages": {"role": ["user"], "content": []}}, {}, "'messages' is an object, not a list"),
        ({"messages": TALK, "images": ["a.png"]}, {}, "has 'images', which is not read: a model here reads text"),
        ({"prompt": "a", "completion": "b", "label": False}, {}, "has 'label' false, by which a response that nobody"),
        ({"messages": TALK, "weight": 0}, {}, "has 'weight' 0 for the whole record"),
        ({"prompt": "a", "completion": b"b"}, {}, "'completion' is bytes, not text"),
        ({"prompt": [USER], "completion": 3}, {}, "'completion' is a number, neither text nor a list of messages"),
        ({"prompt": "a", "completion": None}, {}, "'completion' is null: it has no response"),
        ({"prompt": "a"}, {}, "has no field 'completion': it has no response"),
        ({"messages": [SYSTEM, USER]}, {}, "'assistant', only of 'system', 'user': it has no response"),
        ({"a": "?"}, {"instruction": "q", "output": "a"}, "has no field 'q', which --data.columns names for 'instr"),
        (
            {"talk": [{"input": "a", "output": "b"}]},
            {},
            "are records, or with 'role' and 'content' in place of 'input', 'output'",
        ),
        ({"id": "3", "data": ["a", "b"]}, {}, "none of them is a text and a response, or a list of messages"),
        ({"input_ids": [1], "labels": [1]}, {}, "none of them is a text and a response, or a list of messages"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, {}, "'history' is not a list of pairs of texts"),
    ],
)
def test_a_record_of_no_known_format_is_told_what_to_do(record, columns, reason):
    with pytest.raises(ValueError) as caught:
        read_format(record, columns)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"src_text": "a", "target_text": "b"}, {"instruction": "src_text", "output": "target_text"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"instruction": "prompt", "output": "chosen"}),
        ({"chat": TALK}, {"messages": "chat"}),
        ({"messages": TALK, "instruction": "a", "output": "b"}, {"messages": "messages"}),
        ({"messages": TALK, "functions": [TOOL]}, {"tools": "functions"}),
        ({"prompt": "a", "completion": "b", "instruction": "c"}, {"instruction": "prompt", "output": "completion"}),
        ({"question": "a", "answer": "b", "system_prompt": "c"}, {"system": "system_prompt"}),
        ({"messages": TALK, "system_message": "c"}, {"system": "system_message"}),
        (
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": TALK[1:]},
            {"instruction": "prompt", "output": "chosen"},
        ),
        ({"prompt": "Who?", "rejected": TALK, "chosen": TALK}, {"messages": "chosen"}),
        ({"prompt": "Who?", "chosen": [ASSISTANT]}, {"instruction": "prompt", "output": "chosen"}),
    ],
)
def test_what_a_refusal_advises_helps(record, columns):
    with pytest.raises(ValueError) as caught:
        read_format(record)
    assert "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items()) + "}" in str(caught.value)
    read_format(record, columns)


NEW = {"role": "assistant", "content": "The King."}
HUMAN, GPT, KING = (
    {"from": who, "value": v} for who, v in (("human", "Who?"), ("gpt", "Alice."), ("gpt", "The King."))
)
TOLD = {"from": "observation", "value": "a rose"}


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"messages": TALK, "id": 1}, {}, {"messages": [USER, NEW], "id": 1}),
        ({"messages": [USER]}, {}, {"messages": [USER, NEW]}),
        ({"messages": json.dumps([*TALK, USER])}, {}, {"messages": [*TALK, USER, NEW]}),
        ({"chat": TALK}, {"messages": "chat"}, {"chat": [USER, NEW]}),
        ({"conversations": [HUMAN, GPT]}, {}, {"conversations": [HUMAN, KING]}),
        (
            {"conversations": [HUMAN, GPT, TOLD]},
            {},
            {"conversations": [HUMAN, GPT, TOLD, KING]},
        ),
        ({"prompt": "Who?"}, {}, {"prompt": "Who?", "completion": "The King."}),
        ({"prompt": [USER], "completion": "Alice."}, {}, {"prompt": [USER], "completion": [NEW]}),
        ({"question": "Who?", "answer": None}, {}, {"question": "Who?", "answer": "The King."}),
        ({"instruction": "Who?", "input": "x"}, {}, {"instruction": "Who?", "input": "x", "output": "The King."}),
        ({"q": "Who?", "a": "b"}, {"instruction": "q", "output": "a"}, {"q": "Who?", "a": "The King."}),
        (
            {"conversations": [{"role": "User", "value": "Who?"}]},
            {},
            {"conversations": [{"role": "User", "value": "Who?"}, {"role": "assistant", "value": "The King."}]},
        ),
    ],
)
def test_a_record_gets_another_response(record, columns, expected):
    found = with_response(record, "The King.", columns)
    assert found == expected
    before = read_format(found, columns)
    assert before == read_format(with_response(found, "The King.", columns), columns)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a b"}, "has neither"),
        ({"messages": [ASSISTANT]}, "has no message that asks for a response"),
        ({"messages": ["Who?"]}, "message 1 is text, not one with"),
        ({"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}, "could be read by"),
    ],
)
def test_what_asks_nothing_gets_no_response(record, reason):
    with pytest.raises(ValueError, match=reason):
        with_response(record, "The King.")
