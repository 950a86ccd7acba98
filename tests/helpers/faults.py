"""What befalls files: before a command, while it reads them, and where it writes."""

import ctypes
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OTHER_CONTENT = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
"""Of another format than any that is read here."""
_CAPABILITIES_VERSION = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


def damage_file(path: Path, draw: random.Random, how: str) -> str:
    """Cut the file, or change one bit or one byte of it; says how."""
    content = bytearray(path.read_bytes())
    if not content:
        return "nothing, it is empty"
    place = draw.choice((draw.randrange(len(content)), draw.randrange(min(len(content), 200))))
    if how == "cut":
        # of 0 bytes, too
        del content[draw.choice((place, place, len(content) - 1 - place, 0)) :]
    elif how == "bit":
        content[place] ^= 1 << draw.randrange(8)
    else:
        content[place] ^= draw.randrange(1, 256)
    path.unlink()
    path.write_bytes(content)
    return f"{how} at {place:,}"


def _replace(path: Path, content: bytes) -> None:
    # other names of the same file keep theirs
    path.unlink()
    path.write_bytes(content)


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_unreadable(path: Path) -> None:
    content = path.read_bytes()
    _replace(path, content)
    path.chmod(0)


BEFORE: dict[str, Callable[[Path, random.Random], Any]] = {
    "gone": lambda path, draw: path.unlink(),
    "empty": lambda path, draw: _replace(path, b""),
    "cut": lambda path, draw: damage_file(path, draw, "cut"),
    "bit": lambda path, draw: damage_file(path, draw, "bit"),
    "unreadable": lambda path, draw: _make_unreadable(path),
    "directory": lambda path, draw: _make_directory(path),
    "other content": lambda path, draw: _replace(path, OTHER_CONTENT),
}
"""What may have befallen a file before a command reads it."""


def other_version(path: Path) -> bytes:
    """The content of another file of the same kind, which a reader would take."""
    content = path.read_bytes()
    if path.suffix == ".pth":
        weights = torch.load(path, weights_only=True)
        name = next(name for name, weight in weights.items() if torch.is_tensor(weight) and weight.dim() == 2)
        weights[name] = weights[name] + 1
        other = path.with_name("other")
        torch.save(weights, other)
        content = other.read_bytes()
        other.unlink()
        return content
    # numbers, and letters of texts, that stand in these files
    for before, after in ((b"10000", b"10001"), (b"the", b"teh"), (b"true", b"true "), (b"{{", b"{{ 'x' }}{{")):
        if before in content:
            return content.replace(before, after)
    return content + b"\n"


def _replace_whole(path: Path) -> None:
    other = path.with_name(f".{path.name}.new")
    other.write_bytes(other_version(path))
    other.rename(path)


def _overwrite(path: Path) -> None:
    content = other_version(path)
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def _cut_in_place(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


DURING: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: path.unlink(),
    "replaced": _replace_whole,
    "written over": _overwrite,
    "cut": _cut_in_place,
    "folder moved": lambda path: path.parent.rename(path.parent.with_name("elsewhere")),
    "folder deleted": lambda path: shutil.rmtree(path.parent),
}
"""What may befall a file while a command runs. Some of it happens to the same file, which may be open or mapped."""


def drop_privileges() -> None:
    """Let permissions of files mean something in this process, also if it is root's: it loses the right to pass them
    over (Linux's CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH).
    """
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (libc.capget, libc.capset):
        if call(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "capabilities cannot be changed")
        # the effective set comes first
        sets[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)


def written_path(event: str, arguments: tuple) -> str | None:
    """The path that a process is about to write or make, by what Python tells audit hooks; random parts as ``*``."""
    if event == "os.mkdir":
        path = arguments[0]
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = arguments[0]
    else:
        return None
    if not isinstance(path, (str, bytes, os.PathLike)):
        return None
    path = os.path.relpath(os.fsdecode(path))
    path = re.sub(r"[0-9a-f]{16,}|\btmp[\w-]{6,}|(?<=pid=)\d+", "*", path)
    return None if path.startswith(("../../../dev", "../../../proc")) or "/dev/" in path else path


def when(path: str, action: Callable[[], None]) -> None:
    """Do something once: when this process is about to write to ``path``."""
    waiting = [action]

    def hook(event: str, arguments: tuple) -> None:
        if waiting and written_path(event, arguments) == path:
            waiting.pop()()

    sys.addaudithook(hook)


REFUSALS = ("no space", "no space from then on", "not writable")


def refuse_writing(path: str, how: str) -> None:
    """From now on the system refuses this process to write to ``path``, in one of the ways of ``REFUSALS``.

    Space ends by a limit of a file's size (RLIMIT_FSIZE), for this file or from it on; code in C++, of whose files
    Python is not told, meets it when it writes after ``path`` was made.
    """
    closed: list[Path] = []

    def hook(event: str, arguments: tuple) -> None:
        while closed and event != "os.chmod":
            closed.pop().chmod(0o755)
        found, parent = written_path(event, arguments), Path(path).parent
        if found is None:
            return
        if how == "not writable":
            if found == path and parent.is_dir():
                parent.chmod(0o555)
                closed.append(parent)
        elif found == path or how == "no space":
            limit_files(0 if found == path else resource.RLIM_INFINITY)

    sys.addaudithook(hook)


def limit_files(size: int) -> None:
    """Let this process write no file beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
