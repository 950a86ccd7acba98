"""A run's configuration as YAML: the command's parser makes the same arguments of it, and the same run."""

import inspect
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import complete
from helpers.options import MODELS, arguments_of, make_parser
from lightning import LightningDataModule
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import JSON, DataModule
from litgpt.prompts import ChatML, Default, PromptStyle

from litgpt_akl.cli.parser import Parser
from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import OPTIONS
from litgpt_akl.config.distillation import AKLArgs, DistillArgs
from litgpt_akl.config.recipe import recipe_as_yaml

pytestmark = pytest.mark.filterwarnings("ignore:The `json_path` points to a single file")
TOKEN = "hf_nobody_may_read_this"


def run_litgpt(*words: str | Path) -> str:
    """What the real command writes to standard output."""
    ended = complete(words, JSONARGPARSE_DEPRECATION_WARNINGS="off")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def parser() -> Parser:
    return make_parser()


def repeated(parser: Parser, arguments: dict[str, Any], directory: Path, *words: str) -> dict[str, Any]:
    """The arguments after a round trip through a file."""
    path = directory / "hyperparameters.yaml"
    path.write_text(recipe_as_yaml(arguments), encoding="utf-8")
    return arguments_of(parser, ["--config", path, *words])


def contents(value: Any) -> Any:
    """A value with everything that can be compared in place of objects that compare by identity."""
    if isinstance(value, dict):
        return {name: contents(item) for name, item in value.items()}
    if isinstance(value, (DataModule, PromptStyle)):
        return type(value), contents({name: item for name, item in vars(value).items() if not name.startswith("_")})
    return type(value), value


@pytest.fixture
def records(tmp_path) -> Path:
    path = tmp_path / "records.json"
    path.write_text('[{"instruction": "a", "output": "b"}]')
    return path


DEFAULT_STYLE = '{"class_path": "litgpt.prompts.Default"}'
CHAT_STYLE = '{"class_path": "litgpt.prompts.ChatML", "init_args": {"system_message": "Réponds:\\n- yes"}}'
OPTIMIZER = '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5, "betas": [0.9, 0.95], "fused": null}}'


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data", "JSON", "--data.prompt_style", "llama3"],
        ["--data", "JSON", "--data.prompt_style", DEFAULT_STYLE, "--data.mask_prompt", "true"],
        ["--data", "JSON", "--data.prompt_style", CHAT_STYLE, "--data.val_split_fraction", "0.5"],
        ["--data", "Alpaca", "--data.prompt_style", "phi-3", "--data.seed", "3"],
        ["--data", "Alpaca2k", "--data.download_dir", "elsewhere"],
        ["--data", "AlpacaGPT4"],
        ["--data", "LIMA", "--data.access_token", TOKEN, "--data.include_multiturn_conversations", "true"],
        ["--data", "Deita", "--data.mask_prompt", "true"],
        ["--data", "FLAN"],
        ["--data", "FLAN", "--data.subsets", "aeslc_10templates,quac_10templates"],
        ["--data", "LongForm", "--data.num_workers", "0"],
        ["--optimizer", "SGD"],
        ["--optimizer", OPTIMIZER],
        ["--optimizer.class_path", "torch.optim.SGD", "--optimizer.init_args.lr", "1e-3", "--optimizer.momentum", ".9"],
        ["--resume", "out/step-000012"],
        ["--resume", "12"],
        ["--resume", "1e3"],
        ["--resume", "true"],
        ["--resume", "auto"],
        ["--devices", "auto", "--precision", "bf16-mixed", "--logger_name", "tensorboard", "--seed", "0"],
        [
            "--train.save_interval",
            "null",
            "--train.max_norm",
            "null",
            "--train.epochs",
            "null",
            "--train.max_steps",
            "7",
        ],
        ["--train.max_time", ".inf", "--train.min_lr", "1e-7", "--train.tie_embeddings", "false"],
        ["--train.lr_warmup_fraction", "0.25", "--train.max_seq_length", "96"],
        ["--eval.max_new_tokens", "null", "--eval.evaluate_example", "random", "--eval.initial_validation", "false"],
        ["--log.run", "2024", "--log.project", "1e-3", "--log.group", "1e3", "--log.metadata", '{"a": [1, "x"]}'],
        ["--distill.divergence", "mix", "--distill.mix.ratio", "0.3", "--distill.temperature", "1e1"],
        ["--distill.divergence", "helpers.own_functions.forward_kl"],
        ["--distill.divergence", "jsd", "--distill.jsd.beta", "1e-1"],
        ["--distill.block_tokens", "64", "--distill.compile", "false", "--distill.akl.head_rule", "official"],
    ],
    ids=" ".join,
)
def test_a_command_line_comes_back_as_it_was(parser, records, words):
    if "JSON" in words:
        words = [*words, "--data.json_path", records]
    arguments = arguments_of(parser, [*MODELS, *words])
    again = repeated(parser, arguments, records.parent, *(["--data.access_token", TOKEN] if "LIMA" in words else []))
    assert contents(again) == contents(arguments)


def test_a_run_has_the_options_of_its_command():
    assert list(OPTIONS) == list(inspect.signature(setup).parameters)


def test_numbers_in_an_optimizers_options_stay_numbers(parser, tmp_path):
    again = repeated(parser, arguments_of(parser, [*MODELS, "--optimizer", OPTIMIZER]), tmp_path)
    assert again["optimizer"]["init_args"] == {"lr": 1e-5, "betas": [0.9, 0.95], "fused": None}


class Order(Enum):
    AS_GIVEN = 0
    BY_LENGTH = 1


@dataclass
class Window:
    size: int = 3
    share: float = 0.5


class Rows(DataModule):
    """A user's data module: no dataclass, arguments of many kinds."""

    def __init__(
        self,
        rows: list[dict[str, int]],
        order: Order = Order.AS_GIVEN,
        folder: Path | None = None,
        window: Window = Window(),  # noqa: B008
        style: PromptStyle | None = None,
        kind: type[DataModule] = DataModule,
        **options: int,
    ) -> None:
        super().__init__()
        self.rows, self.order, self.folder, self.window = rows, order, folder, window
        self.style, self.kind, self.options = style, kind, options


class Saved(DataModule):
    """A user's data module that leaves keeping its arguments to Lightning."""

    def __init__(self, rows: int, api_key: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class MoreJSON(JSON):
    """A user's data module whose arguments are its base class's, except one that it sets itself."""

    def __init__(self, extra: int = 1, **base_arguments) -> None:
        self.extra = extra
        super().__init__(seed=7, **base_arguments)


def with_data(parser: Parser, data: LightningDataModule) -> dict[str, Any]:
    return {**arguments_of(parser, MODELS), "data": data}


def test_a_users_data_module_comes_back(parser, tmp_path):
    data = Rows([{"a": 1}], Order.BY_LENGTH, Path("x"), Window(5, 1e-5), ChatML("Be kind."), JSON)
    again = repeated(parser, with_data(parser, data), tmp_path)["data"]
    assert type(again) is Rows
    assert (again.rows, again.order, again.folder, again.kind) == ([{"a": 1}], Order.BY_LENGTH, Path("x"), JSON)
    assert (again.window.size, again.window.share) == (5, 1e-5)
    assert (type(again.style), again.style.system_message) == (ChatML, "Be kind.")


def test_a_data_module_with_its_base_classs_arguments_comes_back(parser, records):
    data = MoreJSON(extra=2, json_path=records, mask_prompt=True, val_split_fraction=0.5, prompt_style=Default())
    again = repeated(parser, with_data(parser, data), records.parent)["data"]
    assert contents(again) == contents(data)


def test_hyperparameters_that_lightning_kept_come_back(parser, tmp_path):
    again = repeated(parser, with_data(parser, Saved(rows=4)), tmp_path)["data"]
    assert again.hparams == {"rows": 4, "api_key": None}


def test_what_no_configuration_can_hold_does_not_stop_a_run():
    assert yaml.safe_load(recipe_as_yaml({"rows": torch.ones(2), "share": np.float64(0.5)})) == {
        "rows": "tensor([1., 1.])",
        "share": 0.5,
    }


def test_tokens_are_never_written(parser, tmp_path):
    lima = ["--data", "LIMA", "--data.access_token", TOKEN, "--access_token", TOKEN]
    assert TOKEN not in recipe_as_yaml(arguments_of(parser, [*MODELS, *lima]))
    assert TOKEN not in recipe_as_yaml(
        {"data": Saved(rows=4, api_key=TOKEN), "log": LogArgs(metadata={"token": TOKEN})}
    )


def test_a_run_is_repeated_from_its_own_recipe(tmp_path, teacher_dir, student_dir, alice_json):
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as LitGPT's main function does
    try:
        setup(
            student_dir,
            teacher_checkpoint_dir=teacher_dir,
            out_dir=tmp_path / "first",
            data=JSON(alice_json, mask_prompt=True, prompt_style=Default()),
            distill=DistillArgs(akl=AKLArgs(mu=0.4), compile=False),
            train=TrainArgs(
                global_batch_size=6, micro_batch_size=4, max_steps=3, max_norm=0.5, min_lr=1e-5, lr_warmup_steps=1
            ),
            eval=EvalArgs(max_iters=1),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": (0.9, 0.95)}},
            seed=5,
            access_token=TOKEN,
        )
    finally:
        torch.set_float32_matmul_precision(precision)
    first, second = tmp_path / "first", tmp_path / "second"
    assert not [path for path in first.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]

    run_litgpt("finetune_akl", "--config", first / "hyperparameters.yaml", "--out_dir", second)
    recipes = [yaml.safe_load((path / "hyperparameters.yaml").read_text(encoding="utf-8")) for path in (first, second)]
    assert recipes[1] == {**recipes[0], "out_dir": str(second)}
    before, one, two = [
        torch.load(path / "lit_model.pth", weights_only=True)
        for path in (student_dir, first / "final", second / "final")
    ]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], before["lm_head.weight"])
