"""The options of this package's commands."""

import functools
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import litgpt.data
import pytest
import torch
from jsonargparse import capture_parser

from litgpt_akl.cli.main import COMMANDS, extend
from litgpt_akl.cli.parser import Parser
from litgpt_akl.config.checks import optimizer_config
from litgpt_akl.data.streaming import StreamingSFT

MODELS = ["student", "--teacher_checkpoint_dir", "teacher"]


@functools.cache
def options_of(command: str) -> set[str]:
    """Names of a command's options, those of all data modules among them."""
    parser = Parser()
    parser.add_function_arguments(resolve_name(COMMANDS[command]))
    names = {name.removeprefix("--") for action in parser._actions for name in action.option_strings}
    if "data" in names:
        modules = [getattr(litgpt.data, name) for name in litgpt.data.__all__ if name != "DataModule"]
        modules = [
            of for of in (*modules, StreamingSFT) if inspect.isclass(of) and issubclass(of, litgpt.data.DataModule)
        ]
        names |= {f"data.{name}" for module in modules for name in inspect.signature(module).parameters}
    if "optimizer" in names:
        names |= {"optimizer.class_path", "optimizer.lr", "optimizer.init_args.lr"}
    return names | {name[: match.end()] for name in names for match in re.finditer(r"\.", name)}


def make_parser() -> Parser:
    """The parser of LitGPT's command line, as its main function builds it."""
    extend(import_module("litgpt.parser_config"))
    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["litgpt", "finetune_akl"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LitGPT's own
        parser = capture_parser(import_module("litgpt.__main__").main)
    torch.set_float32_matmul_precision(precision)
    assert isinstance(parser, Parser)
    return parser


def arguments_of(parser: Parser, words: list[str | Path]) -> dict[str, Any]:
    """What the command's function is called with."""
    given = parser.instantiate_classes(parser.parse_args(["finetune_akl", *map(str, words)])).finetune_akl
    given = {name: value for name, value in vars(given).items() if name != "config"}
    return {**given, "optimizer": optimizer_config(given["optimizer"])}
