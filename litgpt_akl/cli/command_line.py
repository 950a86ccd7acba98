"""Command lines and configuration files as people write them, made into what jsonargparse takes."""

import re
import sys
from typing import Any

import yaml
from jsonargparse import get_loader
from lightning.fabric.utilities.rank_zero import rank_zero_only

from litgpt_akl.config.old_names import OLD_NAMES, new_name, two_values, with_new_names
from litgpt_akl.config.recipe import Dumper
from litgpt_akl.messages import say

OPTIMIZER, DISTILL = "--optimizer", "--distill."


def translate_words(words: list[str]) -> list[str]:
    """The words of a command line with the options' names of today, and the class of an optimizer before its options.

    Raises UserError: an option has two values, under its old name and its new one.
    """
    return _class_before_options(_with_new_names(_with_negative_numbers(words)))


def translate_text(text: str, words: list[str]) -> str:
    """The same for the YAML of a configuration file, which is named among the words of a command line.

    A file that cannot be read stays as it is: the parser says what is wrong with it.
    """
    try:
        settings = get_loader("yaml")(text)
    except yaml.YAMLError:
        return text
    translated, found = with_new_names(settings)
    _tell(found)
    if isinstance(translated, dict) and "optimizer" in translated:
        options = any(word.startswith(f"{OPTIMIZER}.") for word in words)
        translated = {**translated, "optimizer": _one_mapping(translated["optimizer"], options)}
    return text if translated == settings else yaml.dump(translated, Dumper=Dumper, sort_keys=False)


def _one_mapping(optimizer: Any, options: bool) -> Any:
    """A class beside its options, if there are or follow any: of a name jsonargparse would keep nothing beside one."""
    if isinstance(optimizer, str) and options:
        return {"class_path": optimizer}
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("init_args", {}), dict):
        return optimizer
    flat = {**optimizer, **optimizer.get("init_args", {})}
    flat.pop("init_args", None)
    return flat["class_path"] if [*flat] == ["class_path"] and not options else flat


def _with_negative_numbers(words: list[str]) -> list[str]:
    """Joins ``--option -1e-5``: for argparse -1e-5 is no number, and so the option would be without a value."""
    joined: list[str] = []
    for word in words:
        if re.fullmatch(r"-(\d+\.?\d*|\.\d+)[eE][-+]?\d+|-\.?inf", word) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _with_new_names(words: list[str]) -> list[str]:
    translated, found = [*words], {}
    for place, word in enumerate(words):
        option, equals, _ = word.partition("=")
        old = option.removeprefix(DISTILL)
        if option.startswith(DISTILL) and old in OLD_NAMES:
            found[old] = new = new_name(old, _last_value(words, f"{DISTILL}divergence"))
            value, other = _last_value(words, option), _last_value(words, DISTILL + new)
            if other not in (None, value):
                raise two_values(old, value, new, other)
            translated[place] = word.replace(option + equals, DISTILL + new + equals, 1)
    _tell(found)
    return translated


def _class_before_options(words: list[str]) -> list[str]:
    """Puts ``--optimizer NAME`` before ``--optimizer.lr`` and so on: jsonargparse would lose what comes first of both.

    A class begins anew, with its own defaults. What stands before the last configuration file stays there.
    """
    start = max((place + 1 for place, word in enumerate(words) if re.match(r"--config(=|$)", word)), default=0)
    # the file's own name follows
    start += start > 0 and words[start - 1] == "--config"
    name, options, others = None, False, []
    rest = iter(words[start:])
    for word in rest:
        option, equals, value = word.partition("=")
        if option in (OPTIMIZER, f"{OPTIMIZER}.class_path") and (equals or (value := next(rest, ""))):
            name = value
            continue
        options = options or option.startswith(f"{OPTIMIZER}.")
        others.append(word.replace(f"{OPTIMIZER}.init_args.", f"{OPTIMIZER}.", 1))
    if name is None:
        return [*words[:start], *others]
    named = [OPTIMIZER, name]
    if name.startswith("{"):
        # jsonargparse cannot replace one mapping by another one
        named = [OPTIMIZER, "none", *named]
    elif options:
        named += [f"{OPTIMIZER}.class_path", name]
    return [*words[:start], *named, *others]


def _last_value(words: list[str], option: str) -> str | None:
    values = [
        word.partition("=")[2] if "=" in word else following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == option
    ]
    return values[-1] if values else None


@rank_zero_only
def _tell(found: dict[str, str]) -> None:
    """Say which old names were used."""
    if found:
        names = ", ".join(f"{DISTILL}{old} is now {DISTILL}{new}" for old, new in found.items())
        say(f"{names}; the next release knows the new names only.", file=sys.stderr)
