"""The commands of this package, put into LitGPT's command line. Importing this module imports nothing heavy."""

import functools
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import resolve_name
from types import ModuleType

from litgpt_akl.cli.terminal import interrupt_as_usual, prepare_terminal, warn_of_load
from litgpt_akl.messages import UserError, not_permitted, say

COMMANDS = {
    "finetune_akl": "litgpt_akl.commands.finetune_akl:setup",
    "evaluate_akl": "litgpt_akl.commands.evaluate_akl:evaluate_akl",
    "generate_responses": "litgpt_akl.commands.generate_responses:generate_responses",
    "export_prompts": "litgpt_akl.commands.export_prompts:export_prompts",
    "import_hidden_states": "litgpt_akl.commands.import_hidden_states:import_hidden_states",
    "make_student": "litgpt_akl.commands.make_student:make_student",
    "export_hf": "litgpt_akl.commands.export_hf:export_hf",
    "report_akl": "litgpt_akl.commands.report_akl:report_akl",
}
WITHOUT_MODELS = ("export_prompts", "export_hf", "report_akl")
"""Those that run none."""


def main() -> None:
    """LitGPT's command line with this package's commands in it; works without the start-up file."""
    prepare_terminal()
    extend(import_module("litgpt.parser_config"))
    import_module("litgpt.__main__").main()


def extend(parser_config: ModuleType) -> None:
    """Makes ``parser_commands()`` list this package's commands too, and keep LitGPT's main module in step with that."""
    litgpt_commands = parser_config.parser_commands
    if hasattr(litgpt_commands, "__wrapped__"):
        return

    @functools.wraps(litgpt_commands)
    def parser_commands() -> list[str]:
        names = litgpt_commands()
        try:
            for main_module in _litgpt_main_modules():
                _fill(main_module, names)
        except Exception as error:
            parser_config.parser_commands = litgpt_commands
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"The litgpt-akl commands are missing: {reason}", file=sys.stderr)
            return names
        return [*names, *COMMANDS]

    parser_config.parser_commands = parser_commands


def names_our_command(words: list[str], litgpt_commands: list[str]) -> bool:
    """Whether a command line runs one of ``COMMANDS`` or something that looks like one misspelt."""
    words = [word for word in words if not word.startswith("-")]
    every_command = [*litgpt_commands, *COMMANDS]
    command = next((word for word in words if word in every_command), words[0] if words else "")
    return any(match in COMMANDS for match in get_close_matches(command, every_command, n=1))


def without_traceback(command: Callable, runs_models: bool = True) -> Callable:
    """The same command, except that a mistake of the user ends it with a message and not with a traceback.

    One that ``runs_models`` says at its start if other programs keep the cores busy.
    """

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            interrupt_as_usual()
            if runs_models and os.environ.get("LOCAL_RANK", "0") == "0":
                warn_of_load()
            return command(*args, **kwargs)
        except (UserError, PermissionError) as error:
            told = error if isinstance(error, UserError) else not_permitted(error, "")
            say(f"error: {told}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _litgpt_main_modules() -> list[ModuleType]:
    # `python -m litgpt` runs it under the name __main__, the `litgpt` script under its own
    modules = [sys.modules.get(name) for name in ("__main__", "litgpt.__main__")]
    return [module for module in modules if hasattr(module, "PARSER_DATA")]


def _fill(main_module: ModuleType, litgpt_commands: list[str]) -> None:
    commands = {
        name: without_traceback(resolve_name(target), name not in WITHOUT_MODELS) for name, target in COMMANDS.items()
    }
    if names_our_command(sys.argv[1:], litgpt_commands):
        from litgpt_akl.cli.parser import Parser

        main_module.CLI = functools.partial(main_module.CLI, parser_class=Parser)
    main_module.PARSER_DATA.update(commands)
