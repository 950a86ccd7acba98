"""What is not trained on, or otherwise than it stands in the data, is counted and said; each way out helps."""

import json
import re
import shutil

import datasets
import pytest
from helpers.encoding_cases import decode, talk
from litgpt.args import TrainArgs
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer as LitGPTTokenizer
from test_streaming import records, samples, splits, write
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from litgpt_akl.data import StreamingSFT
from litgpt_akl.data.data_module import prepare_datasets
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
    data = StreamingSFT(str(path), **options)
    for _ in range(2):
        # the style that was chosen for want of another is no wish
        with pytest.raises(UserError, match="puts no marks"):
            prepare_datasets(data, LitGPTTokenizer(plain), TrainArgs(), 512, plain)
    assert "--data.chat_template FILE" in str(caught.value) and "--data.prompt_style" in str(caught.value)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    expected = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAlice.<|im_end|>"
    for choice in ({"chat_template": str(tmp_path / "chatml.jinja")}, {"prompt_style": "qwen3"}):
        dataset = splits(path, plain, **{"prompt_style": None, **choice}, **options)[0]
        assert texts(plain, dataset)[0][0].removeprefix("<s>").startswith(expected.split("Alice")[0])
    assert len(splits(path, plain, prompt_style=Default(), **options)[0]) == 4
    with pytest.raises(UserError, match="has chat templates named tool_use, and none is the default"):
        splits(path, named, prompt_style=None, **options)
    dataset = splits(path, named, prompt_style=None, chat_template="tool_use", **options)[0]
    assert texts(named, dataset)[0][0].startswith(expected)
    with pytest.raises(UserError, match="rag is neither a file nor a template's name: .* tool_use"):
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


def test_records_with_tools_have_the_template_for_tools(tmp_path, chat_dir):
    """As Transformers chooses, as long as the student's files leave it the choice."""
    tools = [{"type": "function", "function": {"name": "look"}}]
    path = write(tmp_path / "data.jsonl", [{**CHATS[0], "tools": tools}, CHATS[0]])
    options = {"val_split_fraction": 0.0, "cache_dir": tmp_path / "cache"}
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    named = [{"name": "default", "template": CHATML + asks}, {"name": "tool_use", "template": WITH_TOOLS + asks}]
    directory = chat_dir(named, "named")
    found = splits(path, directory, **options)[0].read([0, 1])
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    for sample, given in zip(found, (tools, None), strict=True):
        ids = reference.apply_chat_template(CHATS[0]["messages"], tools=given, return_dict=False)
        assert sample["input_ids"].tolist() == ids
    for more in ({"chat_template": "default"}, {"chat_template_kwargs": {"more": "And so on"}}):
        with pytest.raises(UserError, match="line 1: has 'tools', which the chat template does not read"):
            splits(path, directory, **more, **options)
    (directory / "chat_template.jinja").write_text(CHATML + asks)
    with pytest.raises(UserError, match="line 1: has 'tools', which the chat template does not read"):
        splits(path, directory, **options)


@pytest.mark.parametrize(("train_on", "first"), [("all", "Alice.<|im_end|>"), ("last", "")])
def test_which_responses_are_learnt(tmp_path, chat_dir, train_on, first):
    directory = chat_dir(CHATML)
    path = write(tmp_path / "data.jsonl", CHATS)
    dataset = splits(path, directory, tmp_path / "cache", val_split_fraction=0.0, train_on=train_on)[0]
    assert {learnt for _, learnt in texts(directory, dataset)} == {f"{first}The Queen.<|im_end|>"}


def test_one_object_is_no_file_of_records(tmp_path, teacher_dir):
    """Each way out is tried."""
    rows, options = records(5), {"val_split_fraction": 0.0, "cache_dir": tmp_path / "cache"}
    for name, text, told in (
        ("wrapped.json", json.dumps({"data": rows}, indent=1), "line 1: begins a JSON object of several lines"),
        ("line.json", json.dumps({"version": 1, "data": rows}), "'data' is a list of 5 objects: write it to a file"),
        ("pretty.jsonl", "\n".join(json.dumps(row, indent=1) for row in rows), "begins a JSON object of several lines"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=told):
            splits(tmp_path / name, teacher_dir, **options)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert len(splits(tmp_path / "list.json", teacher_dir, **options)[0]) == 5
    # one broken line is one bad record all the same
    broken = [json.dumps(row) for row in records(200)]
    (tmp_path / "cut.jsonl").write_text("\n".join([broken[0][:20], *broken[1:]]))
    assert len(splits(tmp_path / "cut.jsonl", teacher_dir, on_error="skip", **options)[0]) == 199


def test_a_saved_dataset_is_told_from_a_folder_of_records(tmp_path, teacher_dir):
    dataset, options = datasets.Dataset.from_list(records(5)), {"val_split_fraction": 0.0, "cache_dir": tmp_path / "c"}
    dataset.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"is a dataset by save_to_disk.*\n.*to_parquet"):
        splits(tmp_path / "saved", teacher_dir, **options)
    datasets.load_from_disk(str(tmp_path / "saved")).to_parquet(str(tmp_path / "saved.parquet"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"load_from_disk\(.*splits'\)\['train'\].to_parquet"):
        splits(tmp_path / "splits", teacher_dir, **options)
    datasets.load_from_disk(str(tmp_path / "splits"))["train"].to_parquet(str(tmp_path / "train.parquet"))
    assert len(splits(tmp_path / "saved.parquet", teacher_dir, **options)[0]) == 5


def test_the_splits_of_a_folder_are_kept_apart(tmp_path, teacher_dir, capsys):
    folder, options = tmp_path / "data", {"cache_dir": tmp_path / "cache"}
    folder.mkdir()
    for name, first in (("train-00000", 0), ("train-00001", 20), ("validation-00000", 40), ("test-00000", 60)):
        write(folder / f"{name}.jsonl", records(20, first))
    write(folder / "more.jsonl", records(20, 80))
    train, validation = splits(folder, teacher_dir, **options)
    assert (len(train), len(validation)) == (40, 20)
    told = capsys.readouterr().err
    assert "2 files named train are trained on, 1 named validation are held out, 2 more are left out, such as" in told
    train, validation = splits(folder, teacher_dir, val_split_fraction=0.5, **options)
    assert len(train) + len(validation) == 40 and len(validation) > 5
    assert "3 more are left out" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"validation-00000.jsonl is in both --data.path .* and --data.val_path .*\(1 such"
    ):
        splits(folder, teacher_dir, val_path=str(folder / "validation*"), **options)
    options["val_path"] = str(folder / "validation*")
    assert len(splits(folder / "train*.jsonl", teacher_dir, **options)[0]) == 40
    # a folder without names of splits is one
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "train.jsonl", records(20))
    write(tmp_path / "plain" / "other.jsonl", records(20, 20))
    train, validation = splits(tmp_path / "plain", teacher_dir, cache_dir=tmp_path / "cache")
    assert len(train) + len(validation) == 40


@pytest.mark.parametrize(
    ("names", "training", "held_out", "told"),
    [
        ("data.jsonl val.jsonl", "data.jsonl", "val.jsonl", "1 files named as no split are trained on, 1 named valid"),
        ("alpaca.jsonl alpaca_test.jsonl", "alpaca.jsonl", "", "1 more are left out, such as"),
        ("trainset.jsonl devset.jsonl testset.jsonl", "trainset.jsonl", "devset.jsonl", "1 more are left out"),
        ("TrainData.jsonl ValidationData.jsonl", "TrainData.jsonl", "ValidationData.jsonl", "1 named validation"),
        ("train/a.jsonl held-out/a.jsonl", "train/a.jsonl", "held-out/a.jsonl", "1 named validation"),
        ("train.jsonl holdout.jsonl", "train.jsonl", "holdout.jsonl", "1 named validation"),
        ("train_sft.jsonl train_gen.jsonl test_sft.jsonl", "train_gen.jsonl train_sft.jsonl", "", "1 more are"),
        ("en/train.jsonl de/train.jsonl en/dev.jsonl", "de/train.jsonl en/train.jsonl", "en/dev.jsonl", "2 files"),
        ("train.jsonl dataset_infos.json dataset_info.json", "train.jsonl", "", ""),
        ("a.jsonl test.csv b.txt README.md", "a.jsonl", "", "2 files of other formats are not read, such as .*b.txt"),
        ("test.jsonl", "test.jsonl", "", ""),
        ("train_val/a.jsonl train_val/b.jsonl", "train_val/a.jsonl train_val/b.jsonl", "", ""),
    ],
)
def test_splits_are_told_by_the_names_that_people_give(tmp_path, capsys, names, training, held_out, told):
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    expected = [[str(tmp_path / name) for name in each.split()] for each in (training, held_out)]
    assert StreamingSFT(str(tmp_path)).files() == (*expected,)
    said = capsys.readouterr().err
    assert re.search(told, said) and bool(said) == bool(told)


def test_what_is_held_out_is_never_trained_on(tmp_path, capsys):
    for name in ("train", "validation", "test"):
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.jsonl").write_text("")
    one, two = tmp_path / "one", tmp_path / "two"
    expected = [str(one / "train.jsonl")], [str(two / "validation.jsonl")]
    assert StreamingSFT(str(one), val_path=str(two)).files() == expected
    told = capsys.readouterr().err
    assert "1 files named train are trained on, 2 more are left out" in told
    assert "1 files are held out, 2 of other splits are left out, such as" in told
    (two / "validation.jsonl").unlink()
    assert StreamingSFT(str(one), val_path=str(two)).files()[1] == [str(two / "test.jsonl")]
    (tmp_path / "link.jsonl").symlink_to(one / "train.jsonl")
    with pytest.raises(UserError, match=r"is in both --data.path .* and --data.val_path .*\(1 such files\)"):
        StreamingSFT(str(one / "train.jsonl"), val_path=str(tmp_path / "link.jsonl")).files()
    (one / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"named test and validation, and none named train: .*\nGive the file"):
        StreamingSFT(str(one)).files()
    StreamingSFT(str(one / "test.jsonl"), val_path=str(one / "validation.jsonl")).files()


def test_a_file_of_two_names_is_read_once(tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text("")
    for link, target in (("b.jsonl", "a.jsonl"), ("deep/up", ".."), ("more", "../elsewhere")):
        (folder / link).symlink_to(target)
    assert StreamingSFT(str(folder)).files()[0] == [str(folder / "a.jsonl"), str(folder / "more" / "b.jsonl")]
    assert "1 files are others by another name, and are read once, such as" in capsys.readouterr().err


def test_validation_records_that_are_trained_on_are_counted(tmp_path, teacher_dir, capsys):
    path, other = write(tmp_path / "a.jsonl", records(30)), write(tmp_path / "b.jsonl", records(10, 25))
    splits(path, teacher_dir, tmp_path / "cache", val_path=str(other))
    assert "5 of 10 validation records are in the training data, too." in capsys.readouterr().err
    splits(path, teacher_dir, tmp_path / "cache", val_path=str(write(tmp_path / "c.jsonl", records(10, 50))))
    assert "validation records are in the training" not in capsys.readouterr().err
