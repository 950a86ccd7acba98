"""What is not trained on, or otherwise than it stands in the data, is counted and said; each way out helps."""

import json
import shutil

import pytest
from helpers.encoding_cases import decode, talk
from litgpt.prompts import ChatML, Default
from test_streaming import records, samples, splits, write
from tokenizers import Tokenizer

from litgpt_akl.messages import UserError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ANSWERS_ONLY = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
CHATS = [{"messages": talk("Who?", "Alice.", "And?", "The Queen.")}] * 4


@pytest.fixture
def chat_dir(tmp_path, teacher_dir):
    """A function that gives a copy of a checkpoint the chat template that it is told."""

    def write_checkpoint(template, name="checkpoint"):
        directory = shutil.copytree(teacher_dir, tmp_path / name)
        processor = Tokenizer.from_file(str(directory / "tokenizer.json"))
        processor.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        processor.save(str(directory / "tokenizer.json"))
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config |= {"chat_template": template} if template is not None else {}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        return directory

    return write_checkpoint


def texts(directory, dataset) -> list[tuple[str, str]]:
    """Each sample, and what of it is learnt."""
    read = samples(dataset)
    learnt = [[label for label in sample["labels"] if label != -100] for sample in read]
    return [
        (decode(directory, sample["input_ids"]), decode(directory, ids))
        for sample, ids in zip(read, learnt, strict=True)
    ]


@pytest.mark.parametrize("limit", ["option", "models"])
def test_records_that_are_too_long(tmp_path, teacher_dir, capsys, limit):
    path = write(tmp_path / "data.jsonl", [*records(19), {"instruction": "a", "output": "one two " * 300}])
    limits = {"max_seq_length": 200} if limit == "option" else {"context_length": 200}
    options = {"val_split_fraction": 0.0, "cache_dir": tmp_path / "cache", **limits}
    for _ in range(2):
        assert len(splits(path, teacher_dir, **options)[0]) == 19
        assert "dropped 1 of 20 records (5.0%), which are too long; --train.max_seq_length" in capsys.readouterr().err
    cut = splits(path, teacher_dir, too_long="cut", **options)[0]
    assert len(cut) == 20 and cut.longest == 200
    assert "dropped" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data.jsonl, line 20: has [\d,]+ tokens; .* 200"):
        splits(path, teacher_dir, too_long="error", **options)


def test_fields_that_are_not_read_are_named(tmp_path, teacher_dir, capsys):
    rows = [
        row | ({"id": number} if number % 2 else {}) | {"source": "a book"} for number, row in enumerate(records(20))
    ]
    path, options = write(tmp_path / "data.jsonl", rows), {"val_split_fraction": 0.0, "cache_dir": tmp_path / "cache"}
    for _ in range(2):
        splits(path, teacher_dir, **options)
        told = capsys.readouterr().err
        assert "the field 'source' is not read (all 20 records)" in told
        assert "the field 'id' is not read (10 of 20 records)" in told
        assert "'input' stands after the instruction: the prompt style Default has no place for it (10 of 20" in told
    splits(path, teacher_dir, prompt_style="alpaca", **options)
    assert "'input'" not in capsys.readouterr().err
    write(path, [row | {"context": "what is asked about"} for row in rows])
    with pytest.raises(UserError, match="line 1: has 'context', which the prompt style Default does not read"):
        splits(path, teacher_dir, **options)
    columns = {"input": "context", "instruction": "instruction"}
    assert len(splits(path, teacher_dir, columns=columns, **options)[0]) == 20


def test_what_a_template_leaves_out_of_responses_is_counted(tmp_path, chat_dir, capsys):
    directory = chat_dir(ANSWERS_ONLY)
    said = "<think>a long way to it</think>Alice."
    path = write(tmp_path / "data.jsonl", [{"messages": talk("Who?", said)}] * 3 + CHATS)
    dataset = splits(path, directory, tmp_path / "cache", val_split_fraction=0.0)[0]
    assert len(dataset) == 7
    lost, whole = (
        3 * len("<think>alongwaytoit</think>"),
        3 * len("<think>alongwaytoit</think>Alice.") + 4 * len("Alice.TheQueen."),
    )
    told = (
        f"{lost} of {whole} characters that the assistant says ({lost / whole:.1%}) are not learnt, in 3 of 7 records"
    )
    assert told in capsys.readouterr().err


def test_chats_need_a_template_or_a_style_that_is_chosen(tmp_path, chat_dir):
    path, options = write(tmp_path / "data.jsonl", CHATS), {"val_split_fraction": 0.0, "cache_dir": tmp_path / "cache"}
    plain, named = chat_dir(None, "plain"), chat_dir([{"name": "tool_use", "template": CHATML}], "named")
    with pytest.raises(
        UserError, match=r"no chat template that its tokenizer reads, .*Default puts no marks"
    ) as caught:
        splits(path, plain, prompt_style=None, **options)
    assert "--data.chat_template FILE" in str(caught.value) and "--data.prompt_style" in str(caught.value)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    expected = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAlice.<|im_end|>"
    for directory, choice in (
        (plain, {"chat_template": str(tmp_path / "chatml.jinja")}),
        (plain, {"prompt_style": ChatML()}),
    ):
        dataset = splits(path, directory, **{"prompt_style": None, **choice}, **options)[0]
        assert texts(directory, dataset)[0][0].removeprefix("<s>").startswith(expected.split("Alice")[0])
    assert len(splits(path, plain, prompt_style=Default(), **options)[0]) == 4
    with pytest.raises(UserError, match="has chat templates named tool_use, and none is the default"):
        splits(path, named, prompt_style=None, **options)
    dataset = splits(path, named, prompt_style=None, chat_template="tool_use", **options)[0]
    assert texts(named, dataset)[0][0].startswith(expected)
    with pytest.raises(
        UserError, match="--data.chat_template rag is neither a file nor a template's name: .* tool_use"
    ):
        splits(path, named, prompt_style=None, chat_template="rag", **options)


def test_tools_and_keywords_reach_the_template(tmp_path, chat_dir):
    tool = {"type": "function", "function": {"name": "look"}}
    path = write(tmp_path / "data.jsonl", [{**CHATS[0], "tools": [tool]}, {**CHATS[0], "tools": json.dumps([tool])}])
    options = {"val_split_fraction": 0.0, "cache_dir": tmp_path / "cache"}
    directory = chat_dir(WITH_TOOLS + "{{ more }}", "tools")
    for dataset, more in (
        (splits(path, directory, **options)[0], ""),
        (splits(path, directory, chat_template_kwargs={"more": "And so on"}, **options)[0], "And so on"),
    ):
        for text, _ in texts(directory, dataset):
            # this tokenizer has no quotation marks
            assert text.startswith("[{") and "look" in text.split("<|im_start|>")[0] and text.endswith(more)
    with pytest.raises(UserError, match="line 1: has 'tools', which the chat template does not read"):
        splits(path, chat_dir(CHATML, "plain"), **options)


@pytest.mark.parametrize(
    ("train_on", "expected"), [("all", "Alice.<|im_end|>The Queen.<|im_end|>"), ("last", "The Queen.<|im_end|>")]
)
def test_which_responses_are_learnt(tmp_path, chat_dir, train_on, expected):
    directory = chat_dir(CHATML)
    path = write(tmp_path / "data.jsonl", CHATS)
    dataset = splits(path, directory, tmp_path / "cache", val_split_fraction=0.0, train_on=train_on)[0]
    assert {learnt for _, learnt in texts(directory, dataset)} == {f"{first}The Queen.<|im_end|>"}
