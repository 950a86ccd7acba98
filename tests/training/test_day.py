"""A chat template that writes the date: one day for a run and all that goes on with it, whatever the clock says."""

import json
import os
import shutil
import time
from functools import partial
from itertools import count
from pathlib import Path

import materials
import pytest
import torch
from helpers.cache_runs import assert_equal
from helpers.encoding_cases import talk
from helpers.ranks import in_processes
from helpers.runs import distil
from litgpt.prompts import Default

from litgpt_akl.commands.evaluate_akl import RESULTS, evaluate_akl
from litgpt_akl.config.args import GenerationArgs, TeacherArgs
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.files.reading import with_checksum
from litgpt_akl.messages import UserError
from litgpt_akl.models import chat_template
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.teacher.cache_identity import IDENTITY, read_identity

# as Llama 3.2's own does it, and told by words, since the tokenizer knows no numbers
DATED = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%A, %B") %}
    {%- else %}
        {%- set date_string = "Friday, July" %}
    {%- endif %}
{%- endif %}
{{- "Today is " + date_string + "\n" }}
{%- for message in messages %}
    {{- message.role + ": " + message.content | trim + eos_token }}
{%- endfor %}
"""
FRIDAY, MONDAY = "2026-11-27", "2026-12-14"
TWO_STEPS = {"max_steps": 2, "save_interval": 1, "global_batch_size": 4, "micro_batch_size": 2}


@pytest.fixture
def student(student_dir, tmp_path) -> Path:
    directory = shutil.copytree(student_dir, tmp_path / "dated" / student_dir.name)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    materials.write_json(directory / "tokenizer_config.json", config | {"chat_template": DATED})
    return directory


@pytest.fixture
def chats(alice_records, tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    records = [{"messages": talk(record["instruction"], record["output"][:60])} for record in alice_records[:24]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def on(monkeypatch):
    """Sets the clock."""
    return lambda date: monkeypatch.setattr(chat_template, "today", lambda: date)


def stream(path: Path, **options) -> StreamingSFT:
    return StreamingSFT(str(path), mask_prompt=True, val_split_fraction=0.2, num_proc=1, num_workers=0, **options)


def run(student: Path, teacher: Path, chats: Path, out_dir: Path, **changes) -> dict[str, torch.Tensor]:
    options = {"train": TWO_STEPS, **changes}
    return distil(student, teacher, stream(chats), out_dir, **options)


def interrupted(out_dir: Path) -> None:
    """As a run leaves it that was killed in its second step."""
    shutil.rmtree(out_dir / "final")
    shutil.rmtree(out_dir / "step-000002", ignore_errors=True)


@pytest.mark.parametrize("changes", [{}, {"distill": {"on_policy": 0.5, "on_policy_tokens": 4}}])
def test_a_run_goes_on_with_the_day_that_it_began_on(student, teacher_dir, chats, tmp_path, on, capfd, changes):
    on(FRIDAY)
    expected = run(student, teacher_dir, chats, tmp_path / "run", **changes)
    assert f"writes a date into the prompts: {FRIDAY}, the day of this call" in capfd.readouterr().out
    template = json.loads((tmp_path / "run" / "final" / "tokenizer_config.json").read_text())["chat_template"]
    # where it writes nothing for a generation, that is added; the date is not written into it
    assert template.removeprefix(DATED) == '{%- if add_generation_prompt %}{{- "assistant: " }}{%- endif %}'
    on(MONDAY)
    # finished, as it was on Friday
    distil(student, teacher_dir, stream(chats), tmp_path / "run", train=TWO_STEPS, resume="auto", **changes)
    assert f"{FRIDAY}, as {tmp_path / 'run' / 'step-000002'} was made with" in capfd.readouterr().out
    interrupted(tmp_path / "run")
    found = run(student, teacher_dir, chats, tmp_path / "run", resume="auto", **changes)
    assert f"{FRIDAY}, as {tmp_path / 'run' / 'step-000001'} was made with" in capfd.readouterr().out
    assert_equal(expected, found)
    fresh = run(student, teacher_dir, chats, tmp_path / "fresh", **changes)
    assert f"{MONDAY}, the day of this call" in capfd.readouterr().out
    assert any((fresh[name] != expected[name]).any() for name in fresh)


def test_only_the_final_student_tells_the_day(student, teacher_dir, chats, tmp_path, on, capfd):
    on(FRIDAY)
    run(student, teacher_dir, chats, tmp_path / "run", train=TWO_STEPS | {"save_interval": None})
    on(MONDAY)
    shutil.rmtree(tmp_path / "run" / "step-000002", ignore_errors=True)
    run(student, teacher_dir, chats, tmp_path / "run", train=TWO_STEPS | {"save_interval": None}, resume="auto")
    assert "is already finished" in capfd.readouterr().out


def test_a_cache_is_opened_with_its_own_day(student, teacher_dir, chats, tmp_path, on, capfd):
    cache = tmp_path / "cache"

    def cached(mode: str, name: str, **changes) -> dict[str, torch.Tensor]:
        options = {"train": TWO_STEPS, "teacher": TeacherArgs(cache_dir=str(cache), cache_mode=mode), **changes}
        return distil(student, teacher_dir, stream(chats), tmp_path / name, **options)

    on(MONDAY)
    run(student, teacher_dir, chats, tmp_path / "of Monday")
    on(FRIDAY)
    expected = cached("auto", "first")
    assert read_identity(str(cache))["date"] == FRIDAY
    on(MONDAY)
    capfd.readouterr()
    assert_equal(expected, cached("auto", "second"))
    assert f"{FRIDAY}, as {cache} was made with" in capfd.readouterr().out
    # of a run that is of another day the right reason is told
    interrupted(tmp_path / "of Monday")
    with pytest.raises(UserError, match=f"was filled for something else: date '{FRIDAY}' -> '{MONDAY}'"):
        cached("auto", "of Monday", resume="auto")
    # caches of before do not tell
    content = read_identity(str(cache))
    del content["date"]
    (cache / IDENTITY).write_text(json.dumps(with_checksum(content)))
    on(FRIDAY)
    assert_equal(expected, cached("read", "third"))


def at_midnight(rank_zero: str, *arguments, **options) -> None:
    """A run during which each look at the clock finds another day, in each process another one."""
    days = count(1)
    first = rank_zero if os.environ["RANK"] == "0" else "2001-01-01"
    chat_template.today = lambda: first if (number := next(days)) == 1 else f"2002-{number:02}-01"
    os.environ["TZ"] = "Pacific/Kiritimati" if os.environ["RANK"] == "0" else "Pacific/Niue"
    time.tzset()
    run(*arguments, **options)


def test_processes_and_midnights_make_no_difference(student, teacher_dir, chats, tmp_path, on):
    on(FRIDAY)
    expected = run(student, teacher_dir, chats, tmp_path / "one")
    for processes in (1, 2):
        out_dir = tmp_path / f"of {processes}"
        work = partial(at_midnight, FRIDAY, devices=processes)
        in_processes(processes, work, student, teacher_dir, chats, out_dir)
        assert_equal(expected, torch.load(out_dir / "final" / "lit_model.pth"), within=1e-6)


def test_a_student_is_evaluated_with_the_day_of_its_training(student, teacher_dir, chats, tmp_path, on, capfd):
    on(FRIDAY)
    run(student, teacher_dir, chats, tmp_path / "run")
    found = []
    for date in (FRIDAY, MONDAY):
        on(date)
        evaluate_akl(
            tmp_path / "run" / "final",
            teacher_checkpoint_dir=teacher_dir,
            data=stream(chats),
            out_dir=tmp_path / date,
            generation=GenerationArgs(seeds=[]),
        )
        found.append(json.loads((tmp_path / date / RESULTS).read_text()))
        assert f"{FRIDAY}, as {tmp_path / 'run' / 'final'} was made with" in capfd.readouterr().out
    assert found[0]["student"] == found[1]["student"] and found[1]["data"]["date"] == FRIDAY


def test_templates_without_a_date_do_not_change_with_it(student_dir, student, teacher_dir, chats, tmp_path, on):
    def fingerprint(directory: Path, date: str) -> str:
        on(date)
        data = stream(chats, prompt_style=Default())
        data.connect(read_tokenizer(directory), 1, None)
        return data.prepare(directory, 128)[0].fingerprint

    assert fingerprint(student, FRIDAY) != fingerprint(student, MONDAY)
    assert fingerprint(student_dir, FRIDAY) == fingerprint(student_dir, MONDAY)
