"""The help of each command: what one needs first, in 80 columns, with an example that can be followed."""

import shlex
import shutil
from pathlib import Path

import pytest
from helpers.commands import complete
from helpers.options import make_parser

from litgpt_akl.cli.main import COMMANDS
from litgpt_akl.cli.parser import Parser
from litgpt_akl.training.out_dir import default_out_dir

COLUMNS = 80
NEEDED = ("checkpoint_dir", "--teacher_checkpoint_dir", "--data, --data.path", "--optimizer.lr", "--out_dir")


@pytest.fixture(scope="module")
def parser() -> Parser:
    return make_parser()


@pytest.fixture
def of_command(parser, monkeypatch):
    """The help of a command as a terminal of 80 columns shows it."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    return lambda command: commands[command].format_help()


def example(text: str) -> list[list[str]]:
    """The words of each command line of the example."""
    lines = text[text.index("Example") :].partition("\n\n")[0].replace("\\\n", " ").splitlines()[1:]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_is_of_80_columns_and_begins_with_an_example(parser, of_command, tmp_path, monkeypatch, command):
    text = of_command(command)
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []
    assert text.startswith(f"usage: litgpt {command} ")
    lines = example(text)
    assert lines and text.index("Example") < text.index("positional arguments:")
    monkeypatch.chdir(tmp_path)
    for words in lines:
        assert words[:2] == ["litgpt", command]
        parser.parse_args(words[1:])


def test_the_help_of_a_run_begins_with_what_it_needs(of_command):
    text = of_command("finetune_akl")
    first = text[text.index("What a run needs:") : text.index("Example:")].splitlines()
    assert [line.strip().split("  ")[0] for line in first[1:] if line[2:3].strip()] == [*NEEDED]
    rest = text[text.index("positional arguments:") :]
    places = [rest.index(f"\n  {option} ") for option in ("checkpoint_dir", NEEDED[1], "--data", "--optimizer")]
    assert places == sorted(places) and rest.index("--out_dir") < rest.index("--precision")
    titles = [line for line in text.splitlines() if line.endswith("arguments:")]
    assert titles[:2] == ["positional arguments:", "Teacher-related arguments:"]


def test_the_example_of_a_run_runs(of_command, student_dir, teacher_dir, alice_json, tmp_path):
    """As it stands, but for the places and for how long it trains."""
    (words,) = example(of_command("finetune_akl"))
    places = {
        "checkpoints/Qwen/Qwen3-0.6B": student_dir,
        "checkpoints/Qwen/Qwen3-8B": teacher_dir,
        "records.jsonl": alice_json / "val.json",
        "out/qwen3": tmp_path / "out",
    }
    assert places.keys() <= set(words)
    short = (
        "--train.max_steps 1 --train.max_seq_length 128 --eval.max_iters 1 --eval.max_new_tokens 2 --data.num_proc 1"
    )
    ended = complete([places.get(word, word) for word in words[1:]] + short.split())
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()


def test_a_run_without_a_place_is_named_after_its_pair(student_dir, teacher_dir, alice_json, tmp_path):
    """And goes on where it was, whichever way it is asked to."""
    data = f"--data JSON --data.json_path {alice_json} --data.mask_prompt true --data.num_workers 0"
    short = "--train.global_batch_size 4 --train.max_seq_length 128 --eval.max_iters 1 --eval.max_new_tokens null"
    words = f"finetune_akl {student_dir} --teacher_checkpoint_dir {teacher_dir} {data} {short}".split()
    place = Path("out/akl", f"{student_dir.name}-from-{teacher_dir.name}")
    words += ["--train.max_steps", "2", "--train.save_interval", "1"]
    ended = complete(words, directory=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"Everything is written to {place}; --out_dir names another place.\n" in ended.stdout
    assert (tmp_path / place / "final").is_dir()
    for resume in ("true", "auto"):
        shutil.rmtree(tmp_path / place / "final")
        ended = complete([*words, "--resume", resume], directory=tmp_path)
        assert ended.returncode == 0 and f"Resuming from {place}/step-000002" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("student", "teacher", "place"),
    [
        ("Qwen/Qwen3-0.6B", "checkpoints/Qwen/Qwen3-8B", "Qwen3-0.6B-from-Qwen3-8B"),
        ("small", None, "small-from-itself"),
        ("big", "big", "big-from-itself"),
        ("out/akl/small-from-big/final", "huge", "small-from-big-from-huge"),
        ("out/mine/step-000020", "huge", "mine-from-huge"),
    ],
)
def test_places_are_named_after_pairs(student, teacher, place):
    assert default_out_dir(Path(student), teacher and Path(teacher)) == Path("out/akl", place)


@pytest.mark.parametrize("resume", ["false", "true"])
def test_runs_need_data(student_dir, teacher_dir, tmp_path, resume):
    words = f"finetune_akl {student_dir} --teacher_checkpoint_dir {teacher_dir} --resume {resume}"
    for line in (words, f"evaluate_akl {student_dir} --teacher_checkpoint_dir {teacher_dir}"):
        ended = complete(line.split(), directory=tmp_path)
        assert (ended.returncode, ended.stdout) == (1, "")
        first, second = ended.stderr.splitlines()
        assert first.startswith("error: --data is missing. ") and "--data StreamingSFT --data.path" in first
        assert second.startswith("--data Alpaca downloads the 52,000 records")
    assert not list(tmp_path.iterdir())
