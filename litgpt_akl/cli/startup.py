"""What the start-up file ``litgpt_akl.pth`` runs: ``litgpt`` gets this package's commands, other programs nothing."""

import os
import sys


def watch() -> None:
    """Waits for the import of LitGPT's table of commands if this process is LitGPT's command line; once.

    In a virtual environment Python runs each ``.pth`` file twice.
    """
    if any(isinstance(finder, ParserConfigFinder) for finder in sys.meta_path):
        return
    # `litgpt`, `bin/litgpt`, `litgpt.exe`, `-m litgpt.__main__`; the .pth file asks the same before it imports this
    if "litgpt" in [os.path.basename(word).partition(".")[0] for word in sys.orig_argv]:
        sys.meta_path.insert(0, ParserConfigFinder())
        _prepare_terminal()


def _prepare_terminal() -> None:
    """For this package's commands only: LitGPT's own are as LitGPT has them."""
    try:
        from litgpt_akl.cli.main import COMMANDS
        from litgpt_akl.cli.terminal import prepare_terminal
    except Exception:
        # _extend imports the same, and tells what is wrong
        return
    if not COMMANDS.keys().isdisjoint(sys.orig_argv):
        prepare_terminal()


class ParserConfigFinder:
    """Finds ``litgpt.parser_config`` as Python would, once, and extends it right after it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != "litgpt.parser_config":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            run_module = spec.loader.exec_module

            def run_and_extend(module):
                run_module(module)
                _extend(module)

            spec.loader.exec_module = run_and_extend
        return spec


def _extend(parser_config) -> None:
    try:
        from litgpt_akl.cli.main import extend
    except Exception as error:
        # an upgrade gone wrong must not take LitGPT down with it
        print(f"The litgpt-akl commands are missing: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        extend(parser_config)
