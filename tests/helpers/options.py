"""The options of this package's commands."""

import functools
import inspect
import re
from pkgutil import resolve_name

import litgpt.data

from litgpt_akl.cli.main import COMMANDS
from litgpt_akl.cli.parser import Parser
from litgpt_akl.data.streaming import StreamingSFT


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
