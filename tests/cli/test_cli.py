"""What a user reads when a command line is wrong. Each command line runs in a copy of this process."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import pytest
from helpers.commands import call, complete, complete_here
from helpers.options import make_parser

from litgpt_akl.cli.main import names_our_command, without_traceback
from litgpt_akl.cli.parser import Parser
from litgpt_akl.messages import UserError

FILES = {
    "unknown_key.yaml": "train:\n  epoch: 3\n",
    "unknown_group.yaml": "trian:\n  epochs: 3\n",
    "wrong_value.yaml": "seed: many\n",
    "broken.yaml": "train: [\n  epochs: 3\n",
    "unknown_data_key.yaml": "data:\n  class_path: litgpt.data.JSON\n  init_args:\n    jsonpath: x\n",
    "records.json": '[{"instruction": "a", "output": "b"}]\n',
}

AKL = "finetune_akl student --teacher_checkpoint_dir teacher"
NO_OPTION = "error: there is no option "

WRONG = {
    # misspelt names
    f"{AKL} --distill.temprature 2": f"{NO_OPTION}--distill.temprature; did you mean --distill.temperature?",
    f"{AKL} --trian.epochs 1": f"{NO_OPTION}--trian.epochs; did you mean --train.epochs?",
    f"{AKL} --epochs=1": f"{NO_OPTION}--epochs; did you mean --train.epochs?",
    "finetune_akl student --teacher_checkpiont_dir x": (
        f"{NO_OPTION}--teacher_checkpiont_dir; did you mean --teacher_checkpoint_dir?"
    ),
    "finetune_akl --teacher_checkpoint_dir teacher --checkpoint_dir student": (
        f"{NO_OPTION}--checkpoint_dir; give checkpoint_dir without a name, right after the command"
    ),
    f"{AKL} --data JSON --data.json_pth x": f"{NO_OPTION}--data.json_pth; did you mean --data.json_path?",
    f"{AKL} --data.json_path x": "error: --data.json_path is an option of JSON: give --data JSON before it",
    f"{AKL} --data.jsn_path x": (
        f"{NO_OPTION}--data.jsn_path for litgpt.data.DataModule; choose the class with --data first"
    ),
    f"{AKL} --config unknown_key.yaml": f"{NO_OPTION}--train.epoch; did you mean --train.epochs?",
    f"{AKL} --config unknown_group.yaml": f"{NO_OPTION}--trian.epochs; did you mean --train.epochs?",
    f"{AKL} --config unknown_data_key.yaml": f"{NO_OPTION}--data.jsonpath; did you mean --data.json_path?",
    "finetune_alk student": "error: there is no command finetune_alk; did you mean finetune_akl?",
    # missing or too many
    "finetune_akl --teacher_checkpoint_dir teacher": (
        "error: checkpoint_dir is missing; give it right after the command"
    ),
    "make_student teacher": "error: out_dir is missing; give it right after the command",
    "generate_responses teacher": "error: --out is missing",
    "export_hf final": "error: out_dir is missing; give it right after the command",
    f"{AKL} --data JSON": "error: --data.json_path is missing",
    f"{AKL} other": "error: unexpected argument: other",
    f"{AKL} --seed": "error: --seed: expected one argument",
    # wrong values
    f"{AKL} --seed many": "error: --seed takes a whole number, not 'many'",
    f"{AKL} --config wrong_value.yaml": "error: --seed takes a whole number, not 'many'",
    f"{AKL} --distill.temperature hot": "error: --distill.temperature takes a number, not 'hot'",
    f"{AKL} --train.epochs two": "error: --train.epochs takes a whole number, not 'two'",
    f"{AKL} --data JSON --data.json_path . --data.val_split_fraction x": (
        "error: --data.val_split_fraction takes a number, not 'x'"
    ),
    # refused by the objects that the values make
    f"{AKL} --data JSON --data.json_path missing.json": (
        "error: --data.json_path must be a file or a directory containing 'train.json' and 'val.json' files, "
        "but 'missing.json' does not exist."
    ),
    f"{AKL} --data JSON --data.json_path . --data.prompt_style nostyle": "error: unknown prompt_style 'nostyle'",
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, Ended]:
    """How each command line ended."""
    directory = tmp_path_factory.mktemp("command_lines")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    lines = [
        f"{AKL} --data JSN",
        f"{AKL} --config missing.yaml",
        f"{AKL} --config broken.yaml",
        "make_student missing student --layers 2",
        "make_student missing student",
        f"{AKL} --data JSON --data.json_path records.json --print_config",
        "finetune_akl student",
        "finetune_lora student --trian.epochs 1",
        "finetune_fulll student",
    ]
    ends = {}
    for line in lines:
        done = complete(line.split(), directory=directory)
        ends[line] = Ended(done.returncode, done.stdout, done.stderr)
    return ends


@pytest.fixture(scope="module")
def parser() -> Parser:
    return make_parser()


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_gets_one_line(parser, tmp_path, line):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    done = complete_here(partial(call, parser, line.split(), tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", WRONG[line] + "\n")


def test_a_misspelt_data_module_gets_the_list(ended):
    code, out, err = ended[f"{AKL} --data JSN"]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --data takes a DataModule (Alpaca, ")
    assert err.endswith("not 'JSN'; did you mean JSON?\n")


def test_configuration_files_that_cannot_be_read_are_named(ended):
    code, out, err = ended[f"{AKL} --config missing.yaml"]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --config: ") and "missing.yaml" in err

    code, out, err = ended[f"{AKL} --config broken.yaml"]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "line 3" in err


def test_a_users_mistake_found_by_the_command_exits_1(ended):
    code, out, err = ended["make_student missing student --layers 2"]
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and "missing" in err and "Traceback" not in err
    code, out, err = ended["make_student missing student"]
    assert (code, out) == (1, "")
    assert err.startswith("error: How much of the teacher to keep is not told.")
    code, out, err = ended["finetune_akl student"]
    assert (code, out) == (1, "")
    assert err.startswith("error: --teacher_checkpoint_dir is missing. ") and err.count("\n") == 1


def test_a_right_command_line_is_left_alone(ended):
    code, out, err = ended[f"{AKL} --data JSON --data.json_path records.json --print_config"]
    assert (code, err) == (0, "")
    assert "json_path: records.json" in out


def test_litgpts_commands_keep_their_messages(ended):
    code, _, err = ended["finetune_lora student --trian.epochs 1"]
    assert code == 2
    assert err.startswith("usage: ") and err.endswith("error: Unrecognized arguments: --trian.epochs 1\n")
    assert ended["finetune_fulll student"].err.startswith("usage: ")


def test_only_our_commands_are_taken_for_ours():
    litgpt = ["finetune", "finetune_full", "generate", "serve"]
    assert names_our_command(["finetune_akl", "serve"], litgpt)
    assert names_our_command(["--config", "recipe.yaml", "finetune_akl"], litgpt)
    assert names_our_command(["finetune-akl"], litgpt)
    assert not names_our_command(["serve", "finetune_akl"], litgpt)
    assert not names_our_command(["finetune_fulll"], litgpt)
    assert not names_our_command(["--help"], litgpt)
    assert not names_our_command([], litgpt)


def test_interruption_and_user_errors_end_a_command_without_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    def mistaken():
        raise UserError("out_dir is taken.")

    with pytest.raises(SystemExit) as end:
        without_traceback(interrupted)()
    assert (end.value.code, capsys.readouterr().err) == (130, "Interrupted.\n")
    with pytest.raises(SystemExit) as end:
        without_traceback(mistaken)()
    assert (end.value.code, capsys.readouterr().err) == (1, "error: out_dir is taken.\n")
    with pytest.raises(ZeroDivisionError):
        without_traceback(lambda: 1 // 0)()


@dataclass
class PickyArgs:
    temperature: float = 1.0
    divergence: Literal["forward_kl", "adaptive_kl"] = "adaptive_kl"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError("--picky.temperature must be above 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--picky.temperature", "0"], "--picky.temperature must be above 0."),
        (
            ["--picky.divergence", "adaptve_kl"],
            "--picky.divergence takes forward_kl or adaptive_kl, not 'adaptve_kl'; did you mean adaptive_kl?",
        ),
        (["--picky.divergence=x"], "--picky.divergence takes forward_kl or adaptive_kl, not 'x'"),
    ],
)
def test_dataclass_options_are_checked_without_traceback(capsys, words, message):
    parser = Parser()
    parser.add_argument("--picky", type=PickyArgs)
    with pytest.raises(SystemExit) as end:
        parser.instantiate_classes(parser.parse_args(words))
    assert (end.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")
