"""What a user reads when a command line cannot be run: the option, its value and what it takes, in a line or two."""

import inspect
import os
import re
import sys
import textwrap
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from litgpt_akl.cli.command_line import translate_text, translate_words
from litgpt_akl.cli.hints import close_to, suggestion
from litgpt_akl.messages import UserError, shown

USER_ERRORS = (UserError, ValueError, TypeError, KeyError, OSError)
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}

WIDTH = 78
"""Columns of a description."""

KEY = re.compile(r'Parser key "([^"]+)":')
CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)'")
NO_COMMAND = re.compile(r"invalid choice: '([^']+)'")
REQUIRED = re.compile(r'Key "([^"]+)" is required')
UNKNOWN = re.compile(r"(?:Key '|does not accept nested key ')([^']+)'")
BAD_CONFIG = re.compile(r"(Problems parsing config|Unexpected config): (.*)", re.DOTALL)
NO_CONFIG = re.compile(r"Unable to load config")
VALUE = re.compile(r"(?:Got|Given) value: (.*)")
# the last one is what jsonargparse 4.41 says of a value that is not among the choices
BAD_VALUE = re.compile(r"Expected an? |Does not validate|Not a valid subclass|Cannot take a Union of no types")


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, with the lines of a description as they are."""


class Parser(ArgumentParser):
    """A parser with short messages; with ``JSONARGPARSE_DEBUG`` set, errors keep their whole text and traceback."""

    def __init__(self, *args, **kwargs) -> None:
        # --teach is not --teacher, whatever else begins so in the next release
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})

    def add_function_arguments(self, function, *args, **kwargs):
        """The help of a command begins with what its docstring says before the arguments, an example above all."""
        added = super().add_function_arguments(function, *args, **kwargs)
        self.description = description(function)
        words = [action.dest for action in self._actions if not action.option_strings]
        self.usage = " ".join(["litgpt", self.prog.split()[-1], *words, "[options]"])
        return added

    def add_argument_group(self, *args, **kwargs):
        """The first sentence of what a group is said to be becomes its title."""
        if len(args) == 1 and "description" not in kwargs:
            title, _, rest = re.sub(r" ?See ``[\w.]+`` for details\.?", "", args[0]).partition(". ")
            kwargs["description"] = textwrap.fill(" ".join(rest.split()), WIDTH).rstrip(".") + "." if rest else None
            args = (title.rstrip("."),)
        return super().add_argument_group(*args, **kwargs)

    def add_argument(self, *args, **kwargs):
        """A list without a name takes as many words as there are, where jsonargparse wants one word in brackets."""
        accepted = getattr(kwargs.get("action"), "_typehint", None)
        if not args[0].startswith("-") and get_origin(accepted) is list:
            del kwargs["action"]
            (kwargs["type"],) = get_args(accepted)
            kwargs["nargs"] = "+"
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self._leaves_errors_alone():
            super().error(message, ex)
        self.exit(2, f"error: {shown(explain(message, self))}\n")

    def parse_args(self, args=None, *others, **kwargs):
        try:
            self.args = words = sys.argv[1:] if args is None else [*args]
            # the words of a command are translated by its own parser
            return super().parse_args(words if _commands(self) else translate_words(words), *others, **kwargs)
        except USER_ERRORS as error:
            self._exit_with(error)

    def parse_string(self, cfg_str, *args, **kwargs):
        """What a configuration file holds."""
        return super().parse_string(translate_text(cfg_str, getattr(self, "args", [])), *args, **kwargs)

    def instantiate_classes(self, *args, **kwargs):
        try:
            return super().instantiate_classes(*args, **kwargs)
        except USER_ERRORS as error:
            self._exit_with(error)

    def _exit_with(self, error: Exception) -> NoReturn:
        if self._leaves_errors_alone():
            raise error
        self.exit(2, f"error: {shown(_with_value(explain_exception(error), self.args))}\n")

    def _leaves_errors_alone(self) -> bool:
        # jsonargparse makes parsers for its own use whose errors belong to the parser that called them
        return not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ


def description(function: Callable) -> str:
    """What a command's docstring says before its arguments, to be shown in 80 columns."""
    text = re.split(r"\n\n(?:Arguments|Args):\n", inspect.getdoc(function) or "")[0].replace("``", "")
    parts = (part if "\n  " in part else textwrap.fill(part, WIDTH) for part in text.split("\n\n"))
    return "\n\n".join(parts)


def explain(message: str, parser: Parser) -> str:
    """Cuts one of jsonargparse's messages down to what helps to mend the command line."""
    options, command = _options_in_use(parser)
    key = ".".join(dict.fromkeys(KEY.findall(message)))
    class_path = CLASS_PATH.findall(message)[-1:]
    entries = _entries_of(KEY.findall(message)[:1], options)
    if entries and (told := _explain_entry(message, entries, *KEY.findall(message))):
        return told
    if match := NO_COMMAND.search(message):
        return f"there is no command {match[1]}{_did_you_mean(match[1], _commands(parser))}"
    if words := message.partition("Unrecognized arguments: ")[2].split():
        return _explain_unrecognized(words, options)
    if match := REQUIRED.search(message):
        return _explain_required(_join(key, match[1].removeprefix(f"{command}.")), options)
    if match := UNKNOWN.search(message):
        return _explain_unknown(match[1], key, class_path, options)
    if match := BAD_CONFIG.search(message):
        return _explain_config(*match.groups(), _given_value("config", parser.args))
    if NO_CONFIG.search(message) and (value := _given_value(key, parser.args)) is not None:
        meant = suggestion(key, {name: of for name, of in options.items() if name != key}, value)
        return f"--{key} takes a YAML file with options, not '{_one_line(value, 80)}'{meant}"
    if key in options or class_path:
        if BAD_VALUE.search(message):
            return _explain_value(message, key, class_path, options, parser.args)
        return f"--{key}: {_one_line(KEY.split(message)[-1])}"
    return _one_line(message)


def explain_exception(error: Exception) -> str:
    """The message of an error raised by a data module or a dataclass, freed from jsonargparse's wrapping."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    causes = re.findall(r"^ +- (.*(?:\n {4,}.*)*)", text, flags=re.MULTILINE)
    causes = [cause for cause in causes if "NoneType" not in cause]
    cause = _one_line(causes[-1] if causes else text)
    if re.fullmatch(r"'[^']*'", cause):
        # all that a KeyError says is the name that was looked up
        option = re.search(rf"(\w+)={re.escape(cause)}", text)
        return f"unknown {option[1] if option else 'name'} {cause}"
    # LitGPT's JSON names its field, and no option
    return re.sub("(The )?`json_path`", "--data.json_path", cause)


def _with_value(message: str, words: list[str]) -> str:
    """The message, with the value of the first option that it names, which those of LitGPT's own arguments lack."""
    option = re.match(r"`--([\w.]+)`", message)
    value = option and _given_value(option[1], words)
    return message if not value or value in message else f"{message.rstrip('.')}, got {value}."


def _explain_unrecognized(words: list[str], options: dict[str, Action]) -> str:
    places = [place for place, word in enumerate(words) if re.match(r"--?[A-Za-z]", word)]
    if not places:
        return f"unexpected argument: {' '.join(words)}"
    name, _, value = words[places[0]].lstrip("-").partition("=")
    following = "".join(words[places[0] + 1 : places[0] + 2])
    return _no_option(name, options, value or ("" if following.startswith("-") else following))


def _explain_config(problem: str, text: str, file: str | None) -> str:
    name, text = f"--config {file or ''}".rstrip(), _one_line(text)
    if problem == "Unexpected config":
        return f"{name} must hold options, such as 'train: {{epochs: 3}}', not '{text}'"
    tabs = "; YAML is indented by spaces, not by tabs" if "cannot start any token" in text else ""
    return f"{name} is no YAML: {text}{tabs}"


def _explain_unknown(name: str, key: str, class_path: list[str], options: dict[str, Action]) -> str:
    if not class_path:
        return _no_option(name, options)
    parameters = [_join(key, parameter) for parameter in _parameters(class_path[0])]
    if parameters:
        name = _join(key, name)
        return f"there is no option --{name}{_did_you_mean(name, parameters, '--')}"
    accepted = _members(getattr(options.get(key), "_typehint", None))
    takers = [of.__name__ for each in accepted for of in _subclasses(each) if name in _parameters(_path(of))]
    if not takers:
        return f"there is no option --{_join(key, name)} for {class_path[0]}; choose the class with --{key} first"
    return f"--{_join(key, name)} is an option of {' and '.join(takers)}: give --{key} {takers[0]} before it"


def _no_option(name: str, options: dict[str, Action], value: str = "") -> str:
    return f"there is no option --{name}{suggestion(name, options, value)}"


def _explain_entry(message: str, entries: dict[str, Any], option: str, name: str = "") -> str | None:
    """What is wrong with an entry of a list, each of which has these; None if it is not about one of them."""
    if match := UNKNOWN.search(message):
        return f"--{option} has no {match[1]}{_did_you_mean(match[1], entries)}; it has {', '.join(entries)}"
    if name in entries and (found := VALUE.search(message)):
        value = _one_line(found[1].strip("'\""), 80)
        return f"--{option}: {name} takes {_describe(entries[name])}, not '{value}'"
    return None


def _entries_of(option: list[str], options: dict[str, Action]) -> dict[str, Any]:
    """The names and types of what each entry of an option's value has, if that is a list of such."""
    accepted = getattr(options.get(*option), "_typehint", None) if option else None
    return next((found for found in map(_entries, _members(accepted)) if found), {})


def _entries(accepted: Any) -> dict[str, Any]:
    """The same of what is accepted."""
    if get_origin(accepted) is not list or not is_dataclass(get_args(accepted)[0]):
        return {}
    return {field.name: field.type for field in fields(get_args(accepted)[0])}


def _explain_required(name: str, options: dict[str, Action]) -> str:
    positional = name in options and not options[name].option_strings
    return f"{name} is missing; give it right after the command" if positional else f"--{name} is missing"


def _explain_value(message: str, key: str, class_path: list[str], options: dict[str, Action], words: list[str]) -> str:
    if key in options:
        accepted = getattr(options[key], "_typehint", options[key].type)
    else:
        accepted = _parameters(class_path[0]).get(key.rpartition(".")[2])
    given, found = _given_value(key, words), VALUE.search(message)
    if given is not None and key == "data" and (re.search(r"[/\\~]|\.\w+$", given) or os.path.exists(given)):
        return f"--data takes the name of a class, not '{given}'; give --data StreamingSFT --data.path {given}"
    value = found[1].strip("'\"") if found else given
    text = f"--{key} takes {_describe(accepted)}"
    if value is None:
        return text
    return f"{text}, not '{_one_line(value, 80)}'{_did_you_mean(value, _choices(accepted))}"


def _given_value(key: str, words: list[str]) -> str | None:
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{key}=")]
    values += [value for word, value in zip(words, words[1:], strict=False) if word == f"--{key}"]
    return values[-1] if values else None


def _did_you_mean(name: str, known: Iterable[str], dashes: str = "") -> str:
    return "".join(f"; did you mean {dashes}{near}?" for near in close_to(name, known))


def _options_in_use(parser: Parser) -> tuple[dict[str, Action], str]:
    command = getattr(parser, "subcommand", None)
    if command is None:
        commands = _commands(parser)
        command = next((word for word in parser.args if word in commands), "")
        parser = commands.get(command, parser)
    options = {}
    for action in parser._actions:
        long_names = [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
        options.update(dict.fromkeys(long_names or [action.dest], action))
    return options, command


def _commands(parser: Parser) -> dict[str, Parser]:
    return next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})


def _parameters(class_path: str) -> dict[str, Any]:
    try:
        signature = inspect.signature(resolve_name(class_path))
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}
    named = [parameter for parameter in signature.parameters.values() if "VAR_" not in parameter.kind.name]
    return {parameter.name: parameter.annotation for parameter in named}


def _members(accepted: Any) -> list[Any]:
    members = get_args(accepted) if get_origin(accepted) in (Union, UnionType) else [accepted]
    return [member for member in members if member is not type(None)]


def _choices(accepted: Any) -> list[str]:
    choices = []
    for member in _members(accepted):
        if get_origin(member) is Literal:
            choices += map(str, get_args(member))
        elif inspect.isclass(member) and member not in (*TYPE_NAMES, object):
            choices += _subclass_names(member)
    return choices


def _describe(accepted: Any) -> str:
    names = []
    for member in _members(accepted):
        if get_origin(member) is Literal:
            names += map(str, get_args(member))
        elif get_origin(member) is tuple:
            names.append(f"a list of {len(get_args(member))} values, such as {list(range(len(get_args(member))))}")
        elif entries := _entries(member):
            names.append(f"a list with {', '.join(entries)} of each, such as '[{{{next(iter(entries))}: A}}]'")
        elif member in TYPE_NAMES:
            names.append(TYPE_NAMES[member])
        elif inspect.isclass(member):
            subclasses = ", ".join(_subclass_names(member))
            names.append(f"a {member.__name__}" + (f" ({subclasses})" if subclasses else ""))
        else:
            names.append(str(member).replace("typing.", ""))
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _subclasses(cls: type) -> list[type]:
    return [each for of in cls.__subclasses__() for each in (of, *_subclasses(of))]


def _subclass_names(cls: type) -> list[str]:
    return [of.__name__ for of in _subclasses(cls)]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _one_line(text: str, length: int = 300) -> str:
    text = re.sub(r"^Validation failed: |^argument |\[Errno \d+\] ", "", text.strip())
    text = " ".join(text.replace('in "<unicode string>", ', "at ").split())
    return text if len(text) <= length else f"{text[:length]}..."
