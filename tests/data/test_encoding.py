"""Records become token ids and the spans of their responses."""

import json

import pytest
from helpers.encoding_cases import (
    CASES,
    CHATML,
    CONVERSATIONS,
    LLAMA_2,
    TOKENIZERS,
    Case,
    decode,
    encoder,
    rendered_ids,
    responses,
    talk,
    train_tokenizer,
    write_tokenizer,
)
from litgpt.data import JSON
from litgpt.prompts import Alpaca, ChatML, Default, Gemma, Llama2, SmolLM2
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, processors
from transformers import PreTrainedTokenizerFast

from litgpt_akl.data.encoding import Encoder, puts_marks
from litgpt_akl.messages import UserError

QUESTION = {"instruction": "Why?", "output": "Because."}
WORDS = ("one", "two", "three", "four", "five", "six")
TALK = talk("Who?", "Alice.")
TOOL = {"type": "function", "function": {"name": "look"}}
CALLING = {"role": "assistant", "content": "Let me look.", "tool_calls": [TOOL]}


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {kind: train_tokenizer(kind) for kind in TOKENIZERS}


@pytest.fixture
def chat_dir(tmp_path, tokenizers):
    """A function that writes a byte-level tokenizer with a chat template."""

    def write(case: Case | str, **config):
        case = CASES[case] if isinstance(case, str) else case
        return write_tokenizer(tmp_path / "checkpoint", tokenizers["byte-level"], case, **config)

    return write


@pytest.mark.parametrize("use_bos", [False, True])
@pytest.mark.parametrize("max_length", [None, 60])
@pytest.mark.parametrize("style", [Default(), Alpaca(), Llama2(), SmolLM2()])
def test_instructions_give_what_litgpts_dataset_gives(teacher_dir, alice_json, style, max_length, use_bos):
    tokenizer = Tokenizer(teacher_dir)
    tokenizer.use_bos = use_bos
    data = JSON(json_path=alice_json, mask_prompt=True, prompt_style=style)
    data.connect(tokenizer, max_seq_length=max_length)
    data.setup()
    encode = Encoder(tokenizer, style, None, max_length).encode
    cut_off = 0
    for record, sample in zip(data.train_dataset.data, data.train_dataset, strict=True):
        labels = sample["labels"].tolist()
        if labels.count(-100) == len(labels):
            cut_off += 1
            with pytest.raises(ValueError, match="has no token to learn from: the limit of 60 tokens cuts"):
                encode(record)
            continue
        ids, (begin, end) = encode(record)[:2]
        assert ids == sample["input_ids"].tolist()
        assert [-100] * begin + ids[begin:end] == labels
    assert cut_off == (0 if max_length is None or isinstance(style, Default) else 200)


def test_other_fields_reach_the_prompt_style(teacher_dir):
    plain = Encoder(Tokenizer(teacher_dir), Alpaca(), None).encode
    for field in ("prompt", "self", "id"):
        encoded = plain(QUESTION | {"input": None, field: "?"})
        assert encoded[:2] == plain(QUESTION | {"input": ""})[:2] == plain(QUESTION)[:2]
        assert encoded.notes == (f"the field '{field}' is not read",)
    ids = plain(QUESTION | {"input": "the text", "sys_prompt": "Answer. "}).ids
    text = decode(teacher_dir, ids).replace("<unk>", "#")
    assert text.startswith("Answer. ### Instruction:\nWhy?\n\n### Input:\nthe text\n\n### Resp")


def test_no_token_predicts_the_first(teacher_dir):
    ids, spans = Encoder(Tokenizer(teacher_dir), Default(), None).encode({"instruction": "", "output": "Because."})[:2]
    assert spans == [1, len(ids)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", CASES)
def test_chats_give_what_transformers_gives_and_mark_the_assistant(tmp_path, tokenizers, name, kind):
    case, directory = CASES[name], write_tokenizer(tmp_path, tokenizers[kind], CASES[name])
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    encode = encoder(directory).encode
    for messages in CONVERSATIONS.values():
        ids, spans = encode({"messages": messages})[:2]
        assert ids == reference.apply_chat_template(messages, return_dict=False)
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        for text, content in zip(responses(directory, ids, spans), contents, strict=True):
            expected = (content.strip() if case.trims else content) + case.ends_turn
            if not kind.startswith("byte-level"):
                # where these write a space of their own, decoding cannot tell
                assert text.replace(" ", "").strip() == expected.replace(" ", "").strip()
            elif content == content.strip():
                # the first word's token begins with the space that Llama 2 has before it
                assert text == " " * (name == "llama-2" and text[0] == " ") + expected
            else:
                assert text.strip() == expected.strip()


def test_the_assistant_may_speak_twice_or_first(chat_dir):
    messages = [*talk("", "a")[1:], *talk("b", "c"), *talk("", "d")[1:]]
    for name in ("chatml", "gemma", "qwen-3", "no-end", "generation", "phi-3"):
        directory = chat_dir(name)
        ids, spans = encoder(directory).encode({"messages": messages})[:2]
        assert responses(directory, ids, spans) == [text + CASES[name].ends_turn for text in "acd"]
        assert ids == rendered_ids(directory, messages)


def test_a_turn_without_a_header_begins_after_the_first_token(chat_dir):
    directory = chat_dir(Case("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}", ""))
    messages = talk("?", "Alice")[1:]
    ids, spans = encoder(directory).encode({"messages": messages})[:2]
    assert spans == [1, len(ids)]
    assert decode(directory, ids) == "Alice</s>"


@pytest.mark.parametrize("template", [True, False])
def test_truncation(chat_dir, template):
    directory = chat_dir("chatml")
    record = {"messages": talk("Who?", "The Queen of Hearts", "Who?", "The Dormouse and the Hatter")}
    ids, spans = encoder(directory, ChatML(), template=template).encode(record)[:2]
    first, _, third, last = spans
    for limit in range(first + 1, len(ids) + 2):
        cut, kept = encoder(directory, ChatML(), limit, template).encode(record)[:2]
        assert cut == ids[:limit]
        assert kept == (spans[:2] if limit <= third else spans)[:-1] + [min(limit, last if limit > third else spans[1])]
    with pytest.raises(ValueError, match=f"no token to learn from: the limit of {first} tokens cuts its response off"):
        encoder(directory, ChatML(), first, template).encode(record)


def test_what_tokenizer_json_adds_or_cuts_off_is_for_litgpt_only(tmp_path):
    tokenizer = train_tokenizer("byte-level")
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=200)
    directory = write_tokenizer(tmp_path, tokenizer, CASES["chatml"])
    messages = talk("Who are you?", "I hardly know, just at present.")
    ids, _ = encoder(directory).encode({"messages": messages})[:2]
    assert ids == rendered_ids(directory, messages)
    assert len(ids) < 100
    assert len(encoder(directory).encode(QUESTION)[0]) > 200


def test_tokens_that_reach_over_an_edge(tmp_path):
    tokens = [*":abcd.\n!", ":a", "\na", "d.", "d\n"]
    model = models.BPE({token: number for number, token in enumerate(tokens)}, [tuple(token) for token in tokens[8:]])
    tokenizer = HFTokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<go>"])
    for before, after, expected in [
        ("!", "!", "a b c d"),
        (":", ".", "b c"),
        ("\n", "\n!", "\na b c d\n"),
        ("\n", "</s>", "\na b c d </s>"),
        ("<s>", "<go>", "a b c d"),
    ]:
        case = Case("!" + before + "{{ messages[0].content }}" + after, "")
        directory = write_tokenizer(tmp_path, tokenizer, case)
        ids, (begin, end) = encoder(directory).encode({"messages": talk("", "abcd")[1:]})[:2]
        assert [tokenizer.id_to_token(id) for id in ids[begin:end]] == expected.split(" ")


def test_without_a_template_the_prompt_style_writes_every_turn(chat_dir):
    directory = chat_dir("chatml")
    messages = talk("one", "two", "three", "four", "five", system="Count.")
    for style, expected in [
        (Gemma(), ["user\nCount.\n\none<end_of_turn>", "user\nthree<end_of_turn>"]),
        (Default(), ["Count.\n\none", "three"]),
        (ChatML(), ["system\nCount.<|im_end|>\n<|im_start|>user\none<", "<|im_start|>user\nthree<"]),
        (Alpaca(), ["Count.### Instruction:\none", "Below is an instruction"]),
    ]:
        ids, spans = encoder(directory, style, template=False).encode({"messages": messages})[:2]
        assert responses(directory, ids, spans) == ["two<|im_end|>", "four<|im_end|>"]
        assert len(ids) == spans[-1]
        for prompt, text in zip((ids[: spans[0]], ids[spans[1] : spans[2]]), expected, strict=True):
            assert text in decode(directory, prompt)


@pytest.mark.parametrize("use_bos", [False, True])
def test_only_the_first_turn_has_a_bos_token(tmp_path, use_bos):
    tokenizer = train_tokenizer("byte-level")
    bos = "<|begin|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    # this style writes it too
    style = Default()
    style.apply = lambda prompt, sys_prompt=None: f"{bos}{prompt}:"
    directory = write_tokenizer(tmp_path, tokenizer, CASES["llama-3"], add_bos_token=use_bos)
    ids, _ = encoder(directory, style, template=False).encode({"messages": talk("a", "b", "c", "d")})[:2]
    assert decode(directory, ids) == bos * (1 + use_bos) + "a:b<|eot_id|>c:d<|eot_id|>"


@pytest.mark.parametrize("use_bos", [False, True])
def test_a_bos_token_that_opens_every_message_stays(chat_dir, use_bos):
    directory = chat_dir("chatml", add_bos_token=use_bos)
    ids, spans = encoder(directory, ChatML(), template=False).encode({"messages": talk("one", "two", "three", "four")})[
        :2
    ]
    opening = "<|im_start|>" if use_bos else ""
    assert decode(directory, ids[: spans[0]]) == opening + "user\none<|im_end|>\n<|im_start|>assistant\n"
    later = "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    assert decode(directory, ids[spans[1] : spans[2]]) == later


def test_what_matters_and_has_no_place_in_a_style_joins_the_instruction(teacher_dir):
    plain = Encoder(Tokenizer(teacher_dir), Default(), None).encode
    encoded = plain(QUESTION | {"input": "the text", "system": "Be brief."})
    assert encoded[:2] == plain(QUESTION | {"instruction": "Be brief.\n\nWhy?\n\nthe text"})[:2]
    missing = Encoder(Tokenizer(teacher_dir), Default(), None, columns={"input": "context", "system": "sys"})
    assert missing.encode(QUESTION | {"output": "!", "context": "?"}).notes[1:] == (
        "there is no field 'sys', which --data.columns names for 'system'",
    )
    assert len(encoded.notes) == 1 and encoded.notes[0].startswith("the field 'input' stands after the instruction")
    assert Encoder(Tokenizer(teacher_dir), ChatML(), None).encode(QUESTION | {"system": "Be brief."}).ids == (
        Encoder(Tokenizer(teacher_dir), ChatML(), None).encode(QUESTION | {"sys_prompt": "Be brief."}).ids
    )


def test_chats_without_a_template_can_be_refused(teacher_dir):
    record = {"messages": talk("one", "two", "three", "four")}
    Encoder(Tokenizer(teacher_dir), Default(), None).encode(record)
    refusing = Encoder(Tokenizer(teacher_dir), Default(), None, refuse_chats="There is no template.")
    refusing.encode(QUESTION)
    with pytest.raises(UserError, match="There is no template."):
        refusing.encode(record)
    assert puts_marks(ChatML()) and puts_marks(Alpaca()) and not puts_marks(Default())


ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
NEXT_ENDS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "answers", "note"),
    [
        (ENDLESS, ["two", "four"], "the chat template writes no special token that ends a response"),
        (NEXT_ENDS, ["two", "four"], "the chat template writes no special token that ends a response"),
        (CHATML, ["two", "four<|im_end|>"], "a response has <|im_end|> at its end, and the chat template writes"),
        (CHATML, ["two <|im_end|>\n", "four"], "a response has <|im_end|> at its end, and the chat template writes"),
        (CHATML, ["two", "four"], None),
        (CHATML, ["two <|im_end|> or", "four"], None),
        (LLAMA_2, ["two", "four"], None),
    ],
)
def test_a_response_that_does_not_end_once_is_told(chat_dir, source, answers, note):
    messages = talk("one", answers[0], "three", answers[1])
    notes = encoder(chat_dir(Case(source, ""))).encode({"messages": messages}).notes
    assert len(notes) == (note is not None) and all(each.startswith(note) for each in notes)
    prompt = encoder(chat_dir(Case(CHATML, "")), prompts_alone=True).encode({"messages": messages[:1]})
    assert prompt.notes == ()


def test_arguments_that_a_template_quotes_are_told(chat_dir):
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    source += "{{ c.function.arguments WRITTEN }}{% endfor %}<|im_end|>\n{% endfor %}"
    arguments = {"in": "the gärden"}
    for written, given, told in (("| tojson", json.dumps(arguments), 1), ("| tojson", arguments, 0), ("", "{}", 0)):
        call = {"type": "function", "function": {"name": "look", "arguments": given}}
        messages = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        notes = encoder(chat_dir(Case(source.replace("WRITTEN", written), ""))).encode({"messages": messages}).notes
        assert [note.startswith("arguments of tools are text") for note in notes] == [True] * told


def test_a_record_that_is_cut_off_is_told(chat_dir):
    record = {"messages": talk("one", "two " * 30)}
    whole = encoder(chat_dir("chatml")).encode(record)
    for length, notes in ((len(whole.ids), ()), (len(whole.ids) - 1, (f"cut off after {len(whole.ids) - 1} tokens",))):
        assert encoder(chat_dir("chatml"), max_length=length).encode(record).notes == notes


@pytest.mark.parametrize("template", [True, False])
def test_what_is_not_to_be_learnt_is_no_response(chat_dir, template):
    directory = chat_dir("chatml")
    messages = talk("one", "two", "three", "four", "five", "six")
    messages[3]["weight"] = 0
    ids, spans = encoder(directory, ChatML(), template=template).encode({"messages": messages})[:2]
    assert responses(directory, ids, spans) == ["two<|im_end|>", "six<|im_end|>"]
    assert ids == encoder(directory, ChatML(), template=template).encode({"messages": talk(*WORDS)}).ids
    ids, spans = encoder(directory, ChatML(), template=template, last_only=True).encode({"messages": messages})[:2]
    assert responses(directory, ids, spans) == ["six<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": TALK, "tools": [TOOL]}, "has 'tools', which the chat template does not read"),
        ({"messages": [TALK[0], CALLING]}, "has 'tool_calls', which the chat template does not read"),
        ({"messages": [*TALK, {"role": "tool", "content": "a rose"}]}, "the chat template leaves out message 3 of the"),
    ],
)
def test_what_a_template_does_not_write_is_refused(chat_dir, record, reason):
    source = (
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(ValueError, match=reason):
        encoder(chat_dir(Case(source, ""))).encode(record)
    with pytest.raises(ValueError, match="which only a chat template can read|has the role 'tool', expected 'user'"):
        encoder(chat_dir(Case(source, "")), ChatML(), template=False).encode(record)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "is a list, not a record"),
        ({}, "has neither 'messages' nor 'instruction' and 'output': it has no fields"),
        ({"instruction": "?"}, "has no field 'output'"),
        ({"output": "!"}, "has no field 'instruction'"),
        (QUESTION | {"output": ["!"]}, "'output' is a list, not text"),
        (QUESTION | {"input": 3.5}, "'input' is a number, not text"),
        (QUESTION | {"sys_prompt": True}, "'sys_prompt' is a truth value, not text"),
        (QUESTION | {"output": " \n"}, "its response is empty"),
        (QUESTION | {"output": "</s>"}, "has no token to learn from: its response has none"),
        (QUESTION | {"output": "\ud83d"}, "'output' holds '\\ud83d', half of a character that takes two"),
        (
            QUESTION | {"context": "?"},
            "has 'context', which the prompt style Default does not read; give --data.columns",
        ),
        ({"messages": {}}, "'messages' is an object, not a list"),
        ({"messages": []}, "has no message of the role 'assistant'"),
        ({"messages": talk("?")}, "has no message of the role 'assistant'"),
        ({"messages": ["?"]}, "message 1 is text, not one with 'role' and 'content'"),
        ({"messages": [*talk("?"), {"content": "!"}]}, "message 2 has no field 'role'"),
        ({"messages": [{"role": "user"}]}, "message 1 has no field 'content'"),
        ({"messages": [{"role": [], "content": ""}]}, "'role' of message 1 is a list, not text"),
        ({"messages": talk([{"type": "image"}], "!")}, "message 1 has a part that is no text: image"),
        ({"messages": talk("?", None)}, "'content' of message 2 is null, not text"),
        ({"messages": talk("?", "!", "?", " ")}, "its response is empty: message 4"),
        ({"messages": [*talk("?"), *talk("?", "!")]}, "message 2 has the role 'user', expected 'assistant'"),
        ({"messages": talk("?", "!")[::-1]}, "message 1 has the role 'assistant', expected 'user'"),
        ({"messages": talk("?", "!", system="")[::2]}, "message 2 has the role 'assistant', expected 'user'"),
        ({"messages": [{"role": "tool", "content": ""}, *talk("?", "!")]}, "message 1 has the role 'tool', expected"),
    ],
)
def test_a_record_that_cannot_be_used_is_told_why(chat_dir, record, reason):
    with pytest.raises(ValueError) as caught:
        encoder(chat_dir("llama-2"), template=False).encode(record)
    assert str(caught.value).startswith(reason)


def test_a_text_that_cannot_be_tokenised_is_told(chat_dir):
    directory = chat_dir(Case("{{ messages[0].name }}:{{ messages[0].content }}", ""))
    record = {"messages": [{"role": "assistant", "name": "\ud83d", "content": "!"}]}
    with pytest.raises(ValueError, match="its text holds"):
        encoder(directory).encode(record)
