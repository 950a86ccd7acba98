"""What a person reads of a run in 80 columns: what it is, what to doubt, what it came to, and what is next."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
from helpers.commands import complete
from helpers.runs import distil, metrics, short_data
from litgpt.prompts import Default, save_prompt_style

from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.messages import INDENT, WIDTH, entry
from litgpt_akl.training import logging
from litgpt_akl.training.logging import progress_line
from litgpt_akl.training.reporting import plain_text, without_frame
from litgpt_akl.training.summary import amount, command_line, readable_measure

LINES = ["Pair", "Data", "Objective", "Optimizer", "Memory", "Output", "Sample"]
SMALL = "--train.global_batch_size 4 --train.micro_batch_size 4 --train.max_steps 1 --eval.max_iters 2"
SMALL += " --eval.max_new_tokens 4 --train.max_seq_length 128 --distill.compile false --data.num_workers 0"


def of_label(printed: str, label: str) -> list[str]:
    """The texts with that label, each as one line."""
    found = re.findall(rf"^{label} .*(?:\n {{{INDENT}}}.*)*", printed, flags=re.MULTILINE)
    return [" ".join(text.removeprefix(label).split()) for text in found]


@pytest.fixture
def terminal(monkeypatch) -> Callable[[], None]:
    """Makes the standard output a terminal, of which not even the width is known."""
    monkeypatch.setenv("COLUMNS", "0")
    # pytest puts another one in place of it before the test is called
    return lambda: monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


@pytest.mark.page
def test_a_run_says_what_it_is_and_what_is_next(student_dir, teacher_dir, alice_json, tmp_path, terminal, capsys):
    (tmp_path / "a place").mkdir()
    data, out_dir = short_data(alice_json, tmp_path / "a place" / "short"), tmp_path / "a place" / "my run"
    options = {"train": {"max_steps": 3}, "eval": {"interval": 2, "max_new_tokens": 6}}
    terminal()
    distil(student_dir, teacher_dir, data, out_dir, **options)
    printed = capsys.readouterr().out
    lines, commands = printed[: printed.index("\nNext:\n")].splitlines(), printed[printed.index("\nNext:\n") :]
    # a path is not broken
    assert [line for line in lines if len(line) > WIDTH and str(tmp_path) not in line] == []
    labels = [line[:INDENT].strip() for line in lines]
    assert [label for label in labels if label in LINES] == LINES and "Warning" not in labels
    (pair,), (text,), (optimizer,) = (of_label(printed, label) for label in ("Pair", "Data", "Optimizer"))
    assert "(2 layers, 0.2 M parameters)" in pair and "(4 layers, 0.9 M parameters), 5.5 times" in pair
    assert text.startswith("40 records of ") and " 7 more held out" in text and "prompts masked" in text
    assert optimizer.startswith("AdamW, lr 0.003, then by a cosine to 0; 3 steps of 8 records, 0.6 epochs")
    # the example is of the first validation record, and has no more of its form than a person writes
    record = json.loads((data.json_path / "val.json").read_text())[0]
    assert of_label(printed, "  Prompt") == [" ".join(record["instruction"].split())]
    assert of_label(printed, "  Recorded")[0].startswith(" ".join(record["output"].split())[:40])
    assert len(of_label(printed, "  Teacher")) == len(of_label(printed, "  Student")) == 1
    first, last = (row for row in metrics(out_dir) if "val_forward_kl" in row and row["step"] in (0, 3))
    name, key, better, digits = "forward KL to the teacher, nats a token", "val_forward_kl", "lower", "0.000"
    assert re.search(rf"{name} +{better} +{first[key]:.3f} +{last[key]:.3f} +{digits}\n", printed)
    assert of_label(printed, "Report") == [" ".join(str(out_dir / "report.html").split())]
    # as a shell reads them
    commands = [
        shlex.split(each.replace("\\\n", ""))
        for each in re.findall(r"^  (litgpt (?:.*\\\n)*.*)", commands, flags=re.MULTILINE)
    ]
    assert [words[1] for words in commands] == ["chat", "evaluate_akl", "export_hf"]
    for words in commands:
        finished = complete(words[1:], stdin="Who?\n!quit\n")
        assert finished.returncode == 0, finished.stderr
    found = json.loads((out_dir / "evaluate_akl" / "evaluation.json").read_text())
    assert found["data"]["records"] == 7 and found["before"]["forward_kl"] > found["student"]["forward_kl"]
    assert (out_dir / "final-hf" / "model.safetensors").is_file()
    # what was printed does not stand in the way of the next run, which loses none of it
    distil(student_dir, teacher_dir, data, out_dir, overwrite=True, train={"max_steps": 1})
    told = " ".join(capsys.readouterr().out.split())
    assert "evaluate_akl is of the student before: it is renamed to evaluate_akl.other." in told
    assert json.loads((out_dir / "evaluate_akl.other" / "evaluation.json").read_text()) == found
    assert not (out_dir / "evaluate_akl").exists()


def test_what_may_not_be_meant_is_warned_of_once_and_the_way_out_works(student_dir, teacher_dir, alice_json, tmp_path):
    models = {}
    for source in (student_dir, teacher_dir):
        models[source] = shutil.copytree(source, tmp_path / "models" / source.name)
        save_prompt_style("phi-2", models[source])
    small, large = models.values()
    words = ["finetune_akl", large, "--teacher_checkpoint_dir", small, "--distill.kd_ratio", "0"]
    options = ["--data", "JSON", "--data.json_path", short_data(alice_json, tmp_path / "short").json_path]
    options += [*SMALL.split(), "--out_dir", tmp_path / "out", "--overwrite", "true"]
    finished = complete([*words, *options])
    assert finished.returncode == 0, finished.stderr
    told = of_label(finished.stdout, "Warning")
    assert len(told) == 4
    swapped = shlex.split(re.search(r"litgpt (finetune_akl .*)", told[0])[1])
    ways_out = [word for text in told[1:] for word in re.search(r"(--\S+) (\S+[^.\s])", text).groups()]
    assert ways_out == ["--data.mask_prompt", "true", "--data.prompt_style", "phi-2", "--distill.kd_ratio", "0.5"]
    finished = complete([*swapped, *options, *ways_out])
    assert finished.returncode == 0 and of_label(finished.stdout, "Warning") == [], finished.stderr


def test_few_held_out_records_are_warned_of(student_dir, teacher_dir, alice_records, tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in alice_records[:30]))
    options = {"mask_prompt": True, "prompt_style": Default(), "num_proc": 1, "num_workers": 0}
    for fraction, count in ((0.05, 1), (0.2, 0)):
        data = StreamingSFT(str(tmp_path / "records.jsonl"), val_split_fraction=fraction, **options)
        distil(student_dir, teacher_dir, data, tmp_path / str(fraction), train={"max_steps": 1})
        told = capsys.readouterr().out
        held_out = int(re.search(r"(\d+) more held out", " ".join(told.split()))[1])
        assert (0 < held_out < 5) == bool(count)
        assert sum("--data.val_split_fraction 0.2" in text for text in of_label(told, "Warning")) == count
        assert f"On {held_out} held-out records, which way is better" in told


def test_responses_that_a_teacher_writes_are_no_riddle_to_it(student_dir, teacher_dir, alice_records, tmp_path, capsys):
    """In a form that it does not know, a teacher is worse than a guess; of its own responses it knows more."""
    records = tmp_path / "records.jsonl"
    # what it never reads: it was trained on English
    lines = [{**record, "output": "QZXJKVWY" * 6} for record in alice_records[:8]]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    taught = tmp_path / "taught.jsonl"
    words = ["generate_responses", teacher_dir, "--data", "StreamingSFT", "--data.path", records, "--out", taught]
    finished = complete([*words, "--max_new_tokens", "12", "--truncated", "keep", "--data.num_proc", "1"])
    assert finished.returncode == 0, finished.stderr
    for path, count in ((records, 1), (taught, 0)):
        data = StreamingSFT(str(path), mask_prompt=True, prompt_style=Default(), num_proc=1, num_workers=0)
        distil(student_dir, teacher_dir, data, tmp_path / path.stem, train={"max_steps": 2, "global_batch_size": 4})
        assert sum("uniform guess" in text for text in of_label(capsys.readouterr().out, "Warning")) == count


def test_an_entry_is_broken_for_a_terminal_alone(terminal, capsys, monkeypatch):
    terminal()
    entry("Data", "word " * 40 + "\nx\x1b[2J /a/very/long/" + "path/" * 20)
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH and lines[0].startswith("Data       word")
    assert all(line.startswith(" " * INDENT) for line in (*lines[1:], last)) and len(lines) > 3
    # a path is found and copied as one
    assert last.strip().startswith("/a/very/long/path/path/") and r"x\x1b[2J" in lines[-1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    entry("Data", "word " * 40 + "\nx")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_training_lines_have_one_width():
    few = {"step": 1, "loss": 0.5, "tokens_per_second": 7.0, "memory_gb": 0.1}
    many = {"step": 9_999, "loss": 11.25, "tokens_per_second": 123_456.0, "memory_gb": 140.5}
    for more in ({}, {"own_answers_time": 0.5}):
        lines = [progress_line({**of, **more}, 10_000, left) for of, left in ((few, 4e5), (many, 2.0))]
        assert len(lines[0]) == len(lines[1]) < WIDTH, lines
        assert "left 111h06m" in lines[0] and "left   0m02s" in lines[1]


def test_numbers_have_as_many_digits_as_say_something():
    assert [readable_measure("val_ppl", value) for value in (4.2e5, 1234.5, 99.714)] == ["> 10,000", "1,234", "99.71"]
    assert readable_measure("val_agreement", 0.37931) == "37.9%" and readable_measure("val_forward_kl", 1.69) == "1.690"
    assert [amount(number) for number in (8.03e9, 134_515_008, 4_096)] == ["8.03 B", "134.5 M", "4.1 K"]


def test_what_is_shown_of_a_prompt_and_of_an_answer():
    form = "system\nYou are Sam.\nuser\nWhat is {}?\nassistant\n"
    assert without_frame(form.format("a cat"), form.format("a cap")) == "What is a cat?"
    assert without_frame(form.format("this"), form.format("this")) == form.format("this")
    assert without_frame("penny") == without_frame("penny", "a jar") == "penny"
    assert plain_text("a\x1b[2J\u202e \n\n\tb") == "a[2J b" and len(plain_text("x y " * 500)) < 320


def test_a_command_is_broken_where_a_shell_allows_it():
    words = ["litgpt", "evaluate_akl", "a b/final", *("--data.path", "x" * 60, "--data.note", "it's") * 2]
    text = command_line(words)
    found = subprocess.run(["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True)
    assert len(text.splitlines()) > 2 and found.stdout.splitlines() == words
    assert all(line.endswith("\\") for line in text.splitlines()[:-1])


def test_a_long_step_says_how_far_it_is(student_dir, teacher_dir, alice_json, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "LINE_SECONDS", 0.0)
    train = {"max_steps": 2, "global_batch_size": 3, "micro_batch_size": 1}
    distil(student_dir, teacher_dir, alice_json, tmp_path / "out", train=train, eval={"initial_validation": False})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    for done, line in enumerate(lines[:2], start=1):
        found = re.fullmatch(rf"step 1/2  micro-batch {done} of 3  left +(\d+)m(\d\d)s", line)
        assert found is not None and int(found[1]) < 10, line
    assert lines[2].startswith("step 1/2") and "loss" in lines[2] and len(lines) == 6
