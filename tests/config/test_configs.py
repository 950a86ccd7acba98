"""The recipes in configs/: the command's parser takes them, what they say is what arrives, and it fits together."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.options import make_parser
from jsonargparse import Namespace
from litgpt.utils import instantiate_torch_optimizer
from test_recipe import run_litgpt

from litgpt_akl.cli.parser import Parser
from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.checks import check_training_args, choose_precision, optimizer_config
from litgpt_akl.messages import UserError
from litgpt_akl.training.optimizer import make_scheduler
from litgpt_akl.training.run import total_steps, warmup_steps

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PATHS = ["student", "--teacher_checkpoint_dir", "teacher", "--out_dir", "out"]
SAMPLES = 14_000

DEPENDS_ON_DEFAULT = {
    "gpt2-paper.yaml": {
        "distill.divergence",
        "distill.akl",
        "distill.kd_ratio",
        "train.max_norm",
    },
    "llama-3.1-8b-to-3.2-1b.yaml": {"train.micro_batch_size", "train.max_norm"},
    "llama-70b-to-8b-2-nodes.yaml": {"train.max_norm"},
    "llama-70b-to-8b-8x80gb.yaml": {"train.max_norm"},
    "llama-8b-to-1b-2x24gb.yaml": {"train.max_norm"},
    "qwen2.5-7b-to-0.5b.yaml": {"train.max_norm"},
}
"""Options that a recipe sets although the command's default has the same value: the schedule it follows has them."""

ON_GPUS = {
    "llama-3.1-8b-to-3.2-1b.yaml": ("Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct", 80),
    "llama-3.2-1b-lora.yaml": ("Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct", 40),
    "llama-70b-to-8b-2-nodes.yaml": ("Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct", 80),
    "llama-70b-to-8b-8x80gb.yaml": ("Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct", 80),
    "llama-8b-to-1b-2x24gb.yaml": ("Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct", 24),
    "qwen2.5-7b-to-0.5b.yaml": ("Qwen2.5-0.5B-Instruct", "Qwen2.5-7B-Instruct", 80),
}
"""Student, teacher, and GB of a GPU that a recipe is for."""

pytestmark = pytest.mark.filterwarnings("ignore:The `json_path` points to a single file")
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def parser() -> Parser:
    return make_parser()


@pytest.fixture
def dolly(tmp_path) -> Path:
    path = tmp_path / "dolly.json"
    path.write_text('[{"instruction": "a", "output": "b"}]')
    return path


def parse(parser: Parser, *words: str | Path) -> Namespace:
    """The options of the command, not yet made into objects."""
    return parser.parse_args(["finetune_akl", *map(str, words)]).finetune_akl


def options_in(recipe: Path) -> dict[str, Any]:
    """What a recipe says by option; an optimizer is one option."""
    options = {}
    for name, value in yaml.safe_load(recipe.read_text(encoding="utf-8")).items():
        if isinstance(value, dict) and name != "optimizer":
            options |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            options[name] = value
    return options


def test_the_recipes_are_there():
    assert {path.name for path in RECIPES} == {
        "cpu-smoke.yaml",
        "gpt2-paper.yaml",
        "llama-3.1-8b-to-3.2-1b.yaml",
        "llama-3.2-1b-lora.yaml",
        "llama-70b-to-8b-2-nodes.yaml",
        "llama-70b-to-8b-8x80gb.yaml",
        "llama-8b-to-1b-2x24gb.yaml",
        "qwen2.5-7b-to-0.5b.yaml",
        "smollm2.yaml",
    }


@each_recipe
def test_what_a_recipe_says_arrives(parser, recipe):
    options, defaults = options_in(recipe), parse(parser, *PATHS)
    given = parse(parser, "--config", recipe, *PATHS)
    assert optimizer_config(given.pop("optimizer")) == optimizer_config(options.pop("optimizer"))
    found = {name: given[name] for name in options}
    plain = {name: value.as_dict() if isinstance(value, Namespace) else value for name, value in found.items()}
    assert plain == options
    changed = {name for name, value in given.as_flat().__dict__.items() if defaults.get(name) != value}
    assert {name for name in changed if not name.startswith(("config", "optimizer"))} <= options.keys()
    unchanged = {name for name in options if defaults[name] == given[name]}
    assert unchanged == DEPENDS_ON_DEFAULT.get(recipe.name, set())


@each_recipe
def test_what_a_recipe_says_fits_together(parser, recipe):
    given = parser.instantiate_classes(parser.parse_args(["finetune_akl", "--config", str(recipe), *PATHS]))
    given = given.finetune_akl
    train = given.train
    check_training_args(train, given.eval)
    choose_precision(given.precision, cuda=True)
    assert train.global_batch_size % train.micro_batch_size == 0
    steps, warmup = total_steps(train, SAMPLES), warmup_steps(train, SAMPLES)
    assert 0 <= warmup < steps
    assert given.eval.interval < steps

    optimizer = instantiate_torch_optimizer(optimizer_config(given.optimizer), [torch.nn.Parameter(torch.ones(1))])
    highest = options_in(recipe)["optimizer"]["lr"]
    scheduler = make_scheduler(optimizer, warmup, steps, train.min_lr)
    rates = [highest * scheduler.lr_lambdas[0](step) for step in range(steps + 1)]
    assert max(rates) == highest
    assert rates[-1] == pytest.approx(train.min_lr, abs=1e-12)
    assert train.min_lr < highest


@each_recipe
def test_a_recipe_names_no_place_and_no_data(recipe):
    options = options_in(recipe)
    names = [name for option in options for name in option.split(".")] + list(options["optimizer"])
    assert not [name for name in names if name.endswith(("_dir", "_path")) or name in ("data", "access_token")]
    text = yaml.dump(list(options.values()))
    assert "/" not in text and "\\" not in text


@each_recipe
def test_a_recipe_says_where_its_numbers_come_from(recipe):
    text = recipe.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.splitlines()[: len(header)] == header
    assert "# Where the numbers come from:" in "\n".join(header)
    assert (
        f"litgpt finetune_akl --config configs/{recipe.name} STUDENT_DIR --teacher_checkpoint_dir TEACHER_DIR" in text
    )
    assert max(map(len, text.splitlines())) <= 120


@each_recipe
def test_the_command_in_a_recipes_header_can_be_parsed(parser, recipe, dolly):
    lines = [line.removeprefix("#").strip() for line in recipe.read_text(encoding="utf-8").splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("litgpt finetune_akl"))
    assert lines[start].endswith("\\")
    words = f"{lines[start][:-1]} {lines[start + 1]}".split()[2:]
    replaced = {f"configs/{recipe.name}": str(recipe), "my.json": str(dolly), "dolly": str(dolly)}
    words = ["finetune_akl", *(replaced.get(word, word) for word in words)]
    given = parser.instantiate_classes(parser.parse_args(words)).finetune_akl
    assert given.data.mask_prompt
    assert given.data.json_path == dolly
    assert given.train.max_seq_length == options_in(recipe)["train.max_seq_length"]


@each_recipe
def test_values_after_the_recipe_win(parser, recipe):
    words = ["--train.max_seq_length", "77", "--distill.kd_ratio", "0.875", "--optimizer.lr", "3e-3"]
    given = parse(parser, "--config", recipe, *PATHS, *words)
    assert (given.train.max_seq_length, given.distill.kd_ratio) == (77, 0.875)
    init_args = options_in(recipe)["optimizer"] | {"lr": 3e-3}
    assert optimizer_config(given.optimizer) == {"class_path": "torch.optim.AdamW", "init_args": init_args}


def test_values_before_the_recipe_lose(parser):
    recipe = RECIPES[0]
    given = parse(parser, *PATHS, "--train.max_seq_length", "77", "--config", recipe)
    assert given.train.max_seq_length == options_in(recipe)["train.max_seq_length"]


@pytest.fixture
def dry_run(parser, capsys, monkeypatch, tmp_path) -> Callable[..., str]:
    """From a recipe, a student, a teacher and options to what a dry run prints: the GB of each device."""
    monkeypatch.chdir(tmp_path)

    def run(recipe: Path, student: str, teacher: str, memory: int | str, *options: str) -> str:
        words = ["--config", recipe, student, "--teacher_checkpoint_dir", teacher, "--device_memory", memory, *options]
        given = parser.parse_args(["finetune_akl", *map(str, words), "--dry_run", "true"])
        given = vars(parser.instantiate_classes(given).finetune_akl)
        setup(**{option: value for option, value in given.items() if option != "config"})
        assert not list(tmp_path.iterdir())
        return re.search(rf"together +(\d+\.\d) of {memory}\.0\n", capsys.readouterr().out)[1]

    return run


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_recipe_fits_into_the_gpus_that_it_is_for(dry_run, name):
    student, teacher, memory = ON_GPUS[name]
    recipe = next(path for path in RECIPES if path.name == name)
    needed = dry_run(recipe, student, teacher, memory)
    # room for what the libraries take, and for what an allocator cannot use
    assert float(needed) < 0.92 * memory
    assert f"# - --dry_run: {needed} GB" in recipe.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=f"This run needs {needed} GB .* there are 3.0 GB"):
        dry_run(recipe, student, teacher, 3)


def test_what_fits_where_says_what_the_tool_says(dry_run):
    page = (RECIPES[0].parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\S+?)(?:, LoRA)? \| (\S+) \| ([\dx ]+) GB \| `(\S+\.yaml)(.*)` \| (.+) \|$", page, re.MULTILINE
    )
    assert len(rows) >= 10
    for student, teacher, gpus, name, options, needed in rows:
        *counts, memory = map(int, gpus.split(" x "))
        recipe = next(path for path in RECIPES if path.name == name)
        assert dry_run(recipe, student, teacher, memory, *options.split()) == needed
        given = options_in(recipe)
        named = dict(zip(*[iter(options.split())] * 2, strict=True))
        found = [int(named.get(f"--{option}", given.get(option, 1))) for option in ("num_nodes", "devices")]
        assert found == [1, *counts][-2:]


def test_the_papers_numbers():
    options = options_in(next(path for path in RECIPES if path.name == "gpt2-paper.yaml"))
    assert (options["train.epochs"], options["train.global_batch_size"], options["train.max_seq_length"]) == (
        20,
        32,
        512,
    )
    assert options["optimizer"] == {"lr": 5e-4, "weight_decay": 0.01}
    assert (options["train.max_norm"], options["distill.kd_ratio"]) == (1.0, 0.5)
    assert options["distill.akl"] == {"mu": 0.5, "head_rule": "paper"}


def test_the_real_command_takes_a_recipe():
    recipe = next(path for path in RECIPES if path.name == "gpt2-paper.yaml")
    printed = yaml.safe_load(run_litgpt("finetune_akl", "--config", recipe, *PATHS, "--print_config"))
    options = options_in(recipe)
    assert optimizer_config(printed["optimizer"]) == optimizer_config(options.pop("optimizer"))
    assert {name: printed[name.split(".")[0]][name.split(".")[1]] for name in options} == options
    assert (printed["checkpoint_dir"], printed["out_dir"]) == ("student", "out")
