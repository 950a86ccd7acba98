"""The resolved configuration of a run as YAML that ``--config`` takes again."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser
from litgpt.prompts import PromptStyle, prompt_styles

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.config.distillation import KEYWORDS, DistillArgs
from litgpt_akl.config.old_names import with_new_names
from litgpt_akl.messages import UserError, is_masked, masked

NO_EFFECT = re.compile(
    r"(out_dir|resume|accept_changes|overwrite|save_minutes|keep_last|export_hf|on_nonfinite|logger_name"
    r"|devices|device_memory|num_nodes|hybrid_sharding|activation_checkpointing|compile"
    r"|(log|eval)\..*"
    r"|train\.(save_interval|log_interval|micro_batch_size|max_time)"
    r"|distill\.(block_tokens|compile)"
    r"|teacher\.(cpu_offload|min_aligned|cache_(dir|mode|part))"
    r"|(teacher_)?checkpoint_dir|data\..*)"
)
"""Arguments that may change when a run goes on: they leave its result as it is, up to rounding. Models and samples are
compared by what they are, not by where they lie."""
DEFAULTS = {f"distill.{name}": attrgetter(name)(DistillArgs()) for name in KEYWORDS}
DEFAULTS |= {f"teacher.{name}": getattr(TeacherArgs(), name) for name in ("tokenizer", "chunk_temperature")}
"""Of the options that belong to one divergence, or that have come since recipes were written."""
OF_PLACE = ("directory", "cache_dir")
"""Of one of several teachers: where it lies."""
BEFORE = {"distill.tad.weighting": "constant"}
"""What runs did that know no such option yet, where it is not the default."""


class Dumper(yaml.SafeDumper):
    """Quotes text that the parser would read as a number."""


# to PyYAML 1e3 is text, to jsonargparse a number
Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9._]+[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def recipe_as_yaml(arguments: dict[str, Any]) -> str:
    """The arguments of a ``setup()`` as YAML: dataclasses as mappings, other objects by class_path and init_args.

    Credentials are masked; a run that is repeated asks for them again, by :func:`check_masked`.
    """
    return yaml.dump(masked(plain(arguments)), Dumper=Dumper, sort_keys=False)


def check_masked(arguments: dict[str, Any]) -> None:
    """See that no argument is what a recipe has in place of a credential; raises UserError."""
    for name, value in flatten(plain(arguments)).items():
        if is_masked(value):
            option = name.replace(".init_args", "")
            raise UserError(
                f"--{option} {value}: the recipe does not hold what gives access, only a mask for it.\n"
                f"Give --{option} again, after the recipe, with the password, token or signature in it."
            )


def differences(saved: str, current: str) -> list[str]:
    """What differs between two recipes, as YAML, in arguments that change the result of a run."""
    found = (_with_later_options(options_of(yaml.safe_load(text))) for text in (saved, current))
    saved, current = map(_without_places, found)
    return [
        f"{name} {saved.get(name)} -> {current.get(name)}"
        for name in dict.fromkeys([*saved, *current])
        if saved.get(name) != current.get(name) and not NO_EFFECT.fullmatch(name)
    ]


def _without_places(options: dict[str, Any]) -> dict[str, Any]:
    """A recipe's options, and of several teachers only what each counts: they are compared by what they are."""
    teachers = options.get("teachers")
    if not isinstance(teachers, list):
        return options
    counts = [{name: value for name, value in of.items() if name not in OF_PLACE} for of in teachers]
    # a list of one is that teacher
    return options | {"teachers": counts if len(counts) > 1 else None}


def _with_later_options(options: dict[str, Any]) -> dict[str, Any]:
    """A recipe's options, and those of divergences that have come since, as they were without a name."""
    own = f"distill.{options.get('distill.divergence')}."
    return {**DEFAULTS, **{name: value for name, value in BEFORE.items() if name.startswith(own)}, **options}


def options_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The options of a recipe, flat, under their names of today; raises UserError if one has two values."""
    recipe, found = with_new_names(recipe)
    options = flatten(recipe)
    # an option that two divergences had is null in older recipes, where it is not the own one's
    return _with_later_options(options) if found else options


def given(recipe: str, function: Callable) -> dict[str, Any]:
    """The arguments in a recipe that differ from those that ``function`` has by default."""
    parameters = inspect.signature(function).parameters.values()
    usual = {of.name: None if of.default is of.empty else of.default for of in parameters}
    usual, found = (flatten(yaml.safe_load(text)) for text in (recipe_as_yaml(usual), recipe))
    return {name: value for name, value in found.items() if usual.get(name) != value}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {name: item for key in value for name, item in flatten(value[key], f"{prefix}{key}.").items()}


def plain(value: Any) -> Any:
    """An argument as YAML and JSON know it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return value.name
    for kind in (int, float, str):
        if isinstance(value, kind):
            # YAML knows no subclasses, such as NumPy's float64
            return kind(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, PromptStyle):
        names = [name for name, style in prompt_styles.items() if style is type(value)]
        if names:
            return names[0]
    if dataclasses.is_dataclass(value) and all(map(dataclasses.is_dataclass, type(value).__mro__[:-1])):
        # the parser takes these without class_path; data modules have other classes among their bases
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init})
    if inspect.isclass(value) or inspect.isroutine(value):
        return _import_path(value)
    try:
        return {"class_path": _import_path(type(value)), "init_args": plain(_init_args(value))}
    except ValueError:
        # a type written in C, such as a tensor, has no signature: its text says at least what was there
        return str(value)


def _import_path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _init_args(value: Any) -> dict[str, Any]:
    """Constructor arguments of an object that keeps each under its own name, as LitGPT's data modules do.

    What Lightning's ``save_hyperparameters`` kept counts too; an argument that was kept in neither way is left out.
    """
    # which arguments there are is for the parser to say: it looks through **kwargs into the base classes
    added = ArgumentParser().add_class_arguments(type(value), "init_args", fail_untyped=False)
    names = dict.fromkeys(name.split(".")[1] for name in added)
    kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
    kept.update({name: given for name, given in getattr(value, "hparams", {}).items() if name in names})
    parameters = inspect.signature(type(value)).parameters
    return {
        name: _as_given(kept[name], parameters[name].annotation) if name in parameters else kept[name]
        for name in names
        if name in kept
    }


def _as_given(value: Any, annotation: Any) -> Any:
    """LitGPT's FLAN takes a comma-separated text and keeps a list of its parts."""
    accepted = (annotation, *get_args(annotation))
    if isinstance(value, list) and str in accepted and not any(list in (kind, get_origin(kind)) for kind in accepted):
        return ",".join(value)
    return value
