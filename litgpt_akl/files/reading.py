"""Files that others wrote, or a disk has spoilt: what is wrong with one is told in two lines that name it."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
import yaml

from litgpt_akl.messages import UserError, not_permitted, reason

COPY_AGAIN = "Copy or download it again."
BLOCK = 2**20
"""Bytes that are read together."""
CHECKSUM = "xxh3_128"
"""The entry of a JSON file that holds the checksum of its other entries."""


@contextmanager
def explain_damage(path: Path | str, what: str, way_out: str = COPY_AGAIN) -> Iterator[None]:
    """For a block that reads a file which should be ``what``: whatever a library raises becomes one clear message.

    The path is that of the directory if it cannot be told which file of it is meant. Raises UserError: the file, its
    size, the reason and the way out.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # a panic of tokenizers or safetensors, which are written in Rust, is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, PermissionError):
            raise not_permitted(error, path) from error
        size = f" ({Path(path).stat().st_size:,} bytes)" if Path(path).is_file() else ""
        raise UserError(
            f"{path}{size} cannot be read as {what}: truncated, changed, or something else"
            f" ({type(error).__name__}: {reason(error)}).\n{way_out}"
        ) from error


def read_json(path: Path, way_out: str = COPY_AGAIN) -> dict[str, Any]:
    """The entries of a JSON file; raises UserError if it has none."""
    with explain_damage(path, "JSON", way_out):
        return _mapping(json.loads(path.read_text(encoding="utf-8")))


def read_yaml(path: Path, way_out: str = COPY_AGAIN) -> dict[str, Any]:
    """The entries of a YAML file; raises UserError if it has none."""
    with explain_damage(path, "YAML", way_out):
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds {'nothing' if content is None else type(content).__name__} in place of entries")
    return content


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The entries of a JSON file to be, and their checksum."""
    return {**content, CHECKSUM: _own_checksum(content)}


def without_checksum(content: dict[str, Any], required: bool = False) -> dict[str, Any]:
    """What :func:`with_checksum` was given; raises ValueError if the checksum is wrong, or missing and required."""
    content = dict(content)
    checksum = content.pop(CHECKSUM, None)
    if checksum != _own_checksum(content) and (required or checksum is not None):
        raise ValueError("its checksum is wrong")
    return content


def _own_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """Of all of a file; ``advance`` is told of the bytes of each block, once they are read. Raises OSError."""
    digest, block = xxhash.xxh3_128(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            advance(count)
    return digest.hexdigest()


def plain_names(names: Iterable[Any], source: Path | str) -> list[str]:
    """The same names, known to be those of different files in one directory, whatever the system.

    Whoever wrote ``source`` chose them, and a path in place of a name would be read, overwritten or deleted elsewhere.
    Raises UserError if one is empty, no text, a path, or there twice.
    """
    found: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise UserError(f"{source} names a file {name!r}, which is no plain file name.\n{COPY_AGAIN}")
        if name in found:
            raise UserError(f"{source} names the file {name!r} twice.\n{COPY_AGAIN}")
        found[name] = None
    return [*found]
