"""The command by which a teacher writes responses: what it asks and draws, and that it goes on where it stopped."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import materials
import pytest
import torch
from helpers.generation import slow_answer
from helpers.litgpt_commands import LITGPT
from helpers.ranks import in_processes
from helpers.runs import gpt
from litgpt.data import JSON
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer

from litgpt_akl.commands import generate_responses as module
from litgpt_akl.commands.generate_responses import generate_responses
from litgpt_akl.data import response_file
from litgpt_akl.data.response_file import ResponseFile
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.messages import UserError
from litgpt_akl.models import chat_template
from litgpt_akl.models.model_files import read_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' "
TEMPLATE += "else '') + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
ASKED = ("So she was considering", "Alice was beginning", "There was nothing so", "The rabbit-hole", "Down, down", "Oh")


@pytest.fixture(scope="module")
def chat_teacher(teacher_dir, tmp_path_factory) -> Path:
    directory = shutil.copytree(teacher_dir, tmp_path_factory.mktemp("chats") / teacher_dir.name)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    materials.write_json(directory / "tokenizer_config.json", config | {"chat_template": TEMPLATE})
    return directory


@pytest.fixture(scope="module")
def ending_teacher(teacher_dir, tmp_path_factory) -> Path:
    """One whose responses end at a comma or a space, too."""
    directory = shutil.copytree(teacher_dir, tmp_path_factory.mktemp("ending") / teacher_dir.name)
    tokenizer = Tokenizer(directory)
    ends = [
        id for id in range(1024) if tokenizer.decode(torch.tensor([id])).strip() in ("", ",", "the", "a", "and", "of")
    ]
    materials.write_json(directory / "generation_config.json", {"eos_token_id": [tokenizer.eos_id, *ends]})
    return directory


def write(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", [{"instruction": text, "id": n} for n, text in enumerate(ASKED * 2)])


def respond(teacher: Path, prompts: Path, out: Path, **changes) -> None:
    changes = {"max_new_tokens": 8, "truncated": "keep", "batch_size": 4, **changes}
    style = changes.pop("style", Default())
    data = changes.pop("data", None) or StreamingSFT(str(prompts), prompt_style=style, **changes.pop("options", {}))
    generate_responses(teacher, data=data, out=out, **changes)


def answer(teacher: Path, prompts: Path, out: Path, **changes) -> list[dict]:
    respond(teacher, prompts, out, **changes)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_greedy_responses_are_those_of_one_forward_after_another(teacher_dir, prompts, tmp_path):
    found = answer(teacher_dir, prompts, tmp_path / "out.jsonl", temperature=0.0)
    tokenizer, model = Tokenizer(teacher_dir), gpt(teacher_dir)
    assert len(found) == 12
    for number, record in enumerate(found):
        text = ASKED[number % len(ASKED)]
        ids = slow_answer(model, tokenizer.encode(text), 8, tokenizer.eos_id)
        assert record == {"instruction": text, "id": number, "output": tokenizer.decode(torch.tensor(ids))}


FORMATS = {
    "chat": {"messages": [{"role": "user", "content": "Who?"}], "source": "a book"},
    "answered": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The King."}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The King."}]},
    "prompt": {"prompt": [{"role": "user", "content": "Who?"}]},
    "turns": {
        "messages": [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "The King."},
            {"role": "user", "content": "And where?"},
        ]
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_trains_what_was_drawn(chat_teacher, tmp_path, name):
    """The ids before the labels are what the teacher was asked, and the labels are its response and its end."""
    given = write(tmp_path / "given.jsonl", [FORMATS[name]])
    (record,) = answer(chat_teacher, given, tmp_path / "out.jsonl", temperature=0.0, style=None)
    data = StreamingSFT(str(tmp_path / "out.jsonl"), mask_prompt=True, val_split_fraction=0, train_on="last")
    data.connect(read_tokenizer(chat_teacher))
    (sample,) = data.prepare(chat_teacher, 256)[0].read([0])
    begin = int((sample["labels"] != -100).int().argmax())
    asked, learnt = sample["input_ids"][:begin], sample["input_ids"][begin:].tolist()
    said = "user: Who?\nassistant: The King.<eos>\nuser: And where?\n" if name == "turns" else "user: Who?\n"
    tokenizer = Tokenizer(chat_teacher)
    wanted = tokenizer.processor.encode(f"<bos>{said}assistant: ", add_special_tokens=False).ids
    drawn = slow_answer(gpt(chat_teacher), torch.tensor(wanted), 8, tokenizer.eos_id)
    text = tokenizer.decode(torch.tensor(drawn))
    assert asked.tolist() == wanted
    assert tokenizer.decode(torch.tensor(learnt)).strip() == text.strip()
    assert {key: value for key, value in record.items() if key == "source"} == (
        {"source": "a book"} if name == "chat" else {}
    )


def test_samples_depend_on_nothing_but_their_seeds(teacher_dir, prompts, tmp_path):
    drawn = {"samples": 2, "temperature": 1.0}
    expected = answer(teacher_dir, prompts, tmp_path / "one.jsonl", **drawn)
    assert [record["id"] for record in expected] == [number for number in range(12) for _ in range(2)]
    texts = [record["output"] for record in expected]
    assert len(set(texts)) > 18
    for name, changes in {"single": {"batch_size": 1}, "records": {"max_records": 5}}.items():
        assert (
            answer(teacher_dir, prompts, tmp_path / f"{name}.jsonl", **drawn, **changes)
            == expected[: 10 if name == "records" else None]
        )
    other = answer(teacher_dir, prompts, tmp_path / "other.jsonl", **drawn, seed=43)
    assert sum(one == another for one, another in zip(expected, other, strict=True)) < 6
    in_processes(2, partial(respond, teacher_dir, prompts, tmp_path / "two.jsonl", devices=2, **drawn))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.parametrize("moment", ["lines are written", "it is noted how far they go"])
def test_a_killed_call_goes_on(teacher_dir, prompts, tmp_path, monkeypatch, capsys, moment):
    monkeypatch.setattr(module, "TOGETHER", 4)
    drawn = {"samples": 2, "batch_size": 1}
    answer(teacher_dir, prompts, tmp_path / "whole.jsonl", **drawn)
    out = tmp_path / "out.jsonl"

    def killed_at_the_second(function: Callable) -> Callable:
        calls = []

        def call(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                raise SystemExit
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if moment == "lines are written":
            patch.setattr(ResponseFile, "append", killed_at_the_second(ResponseFile.append))
        else:
            patch.setattr(response_file, "write_file", killed_at_the_second(response_file.write_file))
        with pytest.raises(SystemExit):
            answer(teacher_dir, prompts, out, **drawn)
    assert not out.exists()
    for name, change in {"temperature": 0.5, "samples": 1, "seed": 1, "max_new_tokens": 9}.items():
        with pytest.raises(
            UserError, match=rf"out.jsonl.part was begun with another {name}: .* -> {change}.\n.*--overw"
        ):
            answer(teacher_dir, prompts, out, **{**drawn, name: change})
    capsys.readouterr()
    answer(teacher_dir, prompts, out, **drawn)
    assert "4 of 12 records are done" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["out.jsonl", "prompts.jsonl", "whole.jsonl"]
    with pytest.raises(UserError, match="out.jsonl was made with another samples: 2 -> 1.\nGive --overwrite true"):
        answer(teacher_dir, prompts, out)
    assert len(answer(teacher_dir, prompts, out, overwrite=True)) == 12


def test_a_finished_file_is_left_as_it_is(teacher_dir, prompts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "taught" / "out.jsonl"
    out.parent.mkdir()
    answer(teacher_dir, prompts, out)
    monkeypatch.setattr(module, "load_frozen", lambda *of: pytest.fail("the teacher is not to be loaded"))
    before = out.stat().st_mtime_ns
    capsys.readouterr()
    assert len(answer(teacher_dir, prompts, out, batch_size=3)) == 12 and out.stat().st_mtime_ns == before
    assert f"{out} is finished already, by the same command: 12 records" in capsys.readouterr().out
    # what stands beside it is no data
    assert StreamingSFT(str(out.parent)).files() == ([str(out)], [])
    for name, change in {"top_k": 5, "top_p": 0.5, "seed": 1, "truncated": "drop", "max_records": 3}.items():
        with pytest.raises(UserError, match=rf"out.jsonl was made with another {name}: .* -> {change!r}.\n.*--overw"):
            answer(teacher_dir, prompts, out, **{name: change})
    given = prompts.read_text()
    write(prompts, [{"instruction": "Oh"}])
    with pytest.raises(UserError, match="out.jsonl was made with another data: "):
        answer(teacher_dir, prompts, out)
    prompts.unlink()
    with pytest.raises(UserError, match="prompts.jsonl does not exist"):
        answer(teacher_dir, prompts, out)
    prompts.write_text(given)
    (out.parent / ".out.jsonl.made_with").unlink()
    with pytest.raises(UserError, match="out.jsonl is there already.\nGive --overwrite true"):
        answer(teacher_dir, prompts, out)


@pytest.mark.parametrize("moment", ["the file has its name", "its name is to be given"])
def test_a_call_that_is_killed_at_its_end_is_finished_by_the_next(teacher_dir, prompts, tmp_path, monkeypatch, moment):
    out = tmp_path / "out.jsonl"
    replace = response_file.os.replace

    def killed(one, other):
        if Path(other) == out:
            if moment == "the file has its name":
                replace(one, other)
            raise SystemExit
        replace(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(response_file.os, "replace", killed)
        with pytest.raises(SystemExit):
            answer(teacher_dir, prompts, out)
    assert len(answer(teacher_dir, prompts, out)) == 12
    assert sorted(path.name for path in tmp_path.glob("*out*")) == [".out.jsonl.made_with", "out.jsonl"]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.2}, {"top_p": 0.7}])
def test_what_is_drawn_is_of_the_ids_that_were_asked_for(teacher_dir, prompts, tmp_path, options):
    found = answer(teacher_dir, prompts, tmp_path / "out.jsonl", **options)
    every = answer(teacher_dir, prompts, tmp_path / "every.jsonl")
    greedy = answer(teacher_dir, prompts, tmp_path / "greedy.jsonl", temperature=0.0)
    assert (found == greedy) == (options == {"top_k": 1}) and found != every
    # the first id of each is one of those
    tokenizer, model = Tokenizer(teacher_dir), gpt(teacher_dir)
    for record in found:
        logits = model(tokenizer.encode(record["instruction"])[None])[0, -1]
        probabilities, ids = logits.softmax(-1).sort(descending=True)
        count = options.get("top_k") or int((probabilities.cumsum(-1) < options["top_p"]).sum()) + 1
        starts = {tokenizer.decode(torch.tensor([id])).strip() for id in ids[:count].tolist()}
        assert any(record["output"].strip().startswith(start) for start in starts)


def test_the_command_stops_and_goes_on(teacher_dir, tmp_path):
    """A real one, which a signal stops while it is answering."""
    given = write(tmp_path / "given.jsonl", [{"prompt": f"{text} {n}"} for n in range(200) for text in ASKED])
    words = [
        LITGPT,
        "generate_responses",
        teacher_dir,
        "--data",
        "StreamingSFT",
        "--data.path",
        given,
        "--data.prompt_style.class_path",
    ]
    words += ["litgpt.prompts.Default", "--out", tmp_path / "out.jsonl", "--max_new_tokens", "30", "--batch_size", "1"]
    words += ["--temperature", "0", "--truncated", "keep"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    state = tmp_path / "out.jsonl.part.json"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT and "The same command goes on." in told, told
    done = json.loads(state.read_text())["progress"]["records"]
    assert 0 < done < 1200 and "Traceback" not in told
    data = StreamingSFT(str(given), prompt_style=Default())
    options = {"temperature": 0.0, "truncated": "keep", "batch_size": 1, "max_new_tokens": 31}
    with pytest.raises(UserError, match="was begun with another max_new_tokens: 30 -> 31"):
        generate_responses(teacher_dir, data=data, out=tmp_path / "out.jsonl", **options)
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == done


def test_what_has_no_end_or_says_nothing_is_counted(ending_teacher, prompts, tmp_path, capsys):
    assert answer(ending_teacher, prompts, tmp_path / "kept.jsonl") and "8 tokens" in (told := capsys.readouterr().out)
    count = int(re.search(r"(\d+) responses had no end within 8 tokens .* are kept", told)[1])
    found = answer(ending_teacher, prompts, tmp_path / "dropped.jsonl", truncated="drop")
    assert (
        len(found) <= 12 - count and "are left out; --max_new_tokens and --truncated decide" in capsys.readouterr().out
    )


def test_nothing_that_can_be_kept_is_no_file(ending_teacher, prompts, tmp_path):
    """Each way out is tried."""
    out, few = tmp_path / "out.jsonl", {"max_new_tokens": 1, "temperature": 0.0, "truncated": "drop"}
    with pytest.raises(UserError, match=r"is not written: \d+ had no end within 1 tokens, \d+ were empty.\nRaise"):
        answer(ending_teacher, prompts, out, **few)
    assert [path.name for path in tmp_path.glob("*out*")] == []
    assert answer(ending_teacher, prompts, out, **few | {"truncated": "keep"})
    assert answer(ending_teacher, prompts, tmp_path / "more.jsonl", **few | {"max_new_tokens": 20})


def test_prompts_that_cannot_be_answered(teacher_dir, tmp_path, capsys):
    records = [{"instruction": "Oh"}, {"text": "no prompt"}, {"instruction": "Oh dear " * 200}, "{broken"]
    given = write(tmp_path / "given.jsonl", records)
    with pytest.raises(UserError, match=r"given.jsonl, line 2: has neither .*\n.*--data.on_error skip"):
        answer(teacher_dir, given, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["given.jsonl"]
    assert len(answer(teacher_dir, given, tmp_path / "out.jsonl", options={"on_error": "skip"})) == 1
    told = capsys.readouterr().out
    assert "1 prompts of 4 records" in told and "left out 2 bad records of 4" in told
    assert "left out 1 prompts that are longer than" in told
    with pytest.raises(UserError, match="no record has a prompt that can be answered"):
        answer(teacher_dir, write(tmp_path / "long.jsonl", records[2:3]), tmp_path / "none.jsonl")


def test_mistakes_are_told_before_anything_is_read(teacher_dir, prompts, alice_json, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(prompts, folder / "a.jsonl")
    for changes, message in (
        ({"data": JSON(alice_json)}, r"--data JSON: .*\nGive --data StreamingSFT --data.path FILE"),
        ({"samples": 2, "temperature": 0.0}, r"--samples 2 with --temperature 0: .*\nGive --samples 1"),
        ({"samples": 2, "top_k": 1}, r"--samples 2 with --top_k 1: .*\nGive --samples 1"),
        ({"top_k": 5, "temperature": 0.0}, r"--top_k 5 has no effect with --temperature 0"),
        ({"top_p": 0.5, "temperature": 0.0}, r"--top_p 0.5 has no effect with --temperature 0"),
        ({"top_p": 0.0}, r"--top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, r"--top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": 0}, "--top_k must be at least 1"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"out": tmp_path / "out.json"}, r"give a name that ends in .jsonl"),
        ({"out": teacher_dir / "out.jsonl"}, "lies in the teacher's directory"),
        ({"out": folder / "out.jsonl", "prompts": folder}, r"--out .* lies in --data.path"),
        ({"teacher": tmp_path / "nothing"}, "nothing"),
    ):
        given = {"teacher": teacher_dir, "prompts": prompts, "out": tmp_path / "out.jsonl", **changes}
        with pytest.raises(UserError, match=message) as raised:
            answer(given.pop("teacher"), given.pop("prompts"), given.pop("out"), **given)
        assert len(str(raised.value).splitlines()) <= 2
    assert not list(tmp_path.rglob("out*"))


def test_a_call_goes_on_with_the_day_that_it_began_on(chat_teacher, tmp_path, monkeypatch, capsys):
    teacher = shutil.copytree(chat_teacher, tmp_path / chat_teacher.name)
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    dated = config | {"chat_template": "{{ strftime_now('%A') }}" + TEMPLATE}
    materials.write_json(teacher / "tokenizer_config.json", dated)
    given = write(tmp_path / "given.jsonl", [FORMATS["chat"]] * 6)
    monkeypatch.setattr(module, "TOGETHER", 4)
    options = {"temperature": 0.0, "batch_size": 1, "style": None}
    monkeypatch.setattr(chat_template, "today", lambda: "2026-11-27")
    expected = answer(teacher, given, tmp_path / "whole.jsonl", **options)
    with monkeypatch.context() as patch:
        patch.setattr(module, "leave_if_stopped", lambda *of: sys.exit())
        with pytest.raises(SystemExit):
            answer(teacher, given, tmp_path / "out.jsonl", **options)
    monkeypatch.setattr(chat_template, "today", lambda: "2026-12-14")
    capsys.readouterr()
    assert answer(teacher, given, tmp_path / "out.jsonl", **options) == expected
    assert "2026-11-27, as" in (told := capsys.readouterr().out) and "4 of 6 records are done" in told
