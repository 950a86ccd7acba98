"""The resolved configuration of a run as YAML that ``--config`` takes again."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import yaml
from litgpt.prompts import PromptStyle, prompt_styles


def recipe_as_yaml(arguments: dict[str, Any]) -> str:
    """The arguments of a ``setup()`` as YAML: dataclasses as mappings, other objects by class_path and init_args."""
    return yaml.safe_dump({name: _plain(value) for name, value in arguments.items()}, sort_keys=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, PromptStyle):
        names = [name for name, style in prompt_styles.items() if style is type(value)]
        return names[0] if names else {"class_path": _class_path(value)}
    if dataclasses.is_dataclass(value) and type(value).__module__ in ("litgpt.args", "litgpt_akl.args"):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"class_path": _class_path(value), "init_args": _init_args(value)}


def _class_path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _init_args(value: Any) -> dict[str, Any]:
    """Constructor arguments of an object that keeps each under its own name, as LitGPT's data modules do."""
    names = [name for name in inspect.signature(type(value)).parameters if hasattr(value, name)]
    return {name: _plain(getattr(value, name)) for name in names}
