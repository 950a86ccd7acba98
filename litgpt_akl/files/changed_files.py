"""Has a file changed while it was read, or while it was mapped into memory? What the file system keeps of it tells."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from litgpt_akl.messages import UserError

WAY_OUT = "Give the command again once nothing else writes there."
"""For who is told that something has changed while it was read."""


@dataclass(frozen=True)
class Stamp:
    """Of a file; the same as long as nobody writes to the file, also when its directory is renamed."""

    path: Path = field(compare=False)
    device: int
    inode: int
    size: int
    modified: int
    changed: int


def stamp_of(path: Path) -> Stamp:
    """A file's stamp as it is now; raises OSError if there is none."""
    found = path.stat()
    return Stamp(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def changed_meanwhile(path: Path, what: str) -> UserError:
    """What a user is told of a file that was ``what``, such as "removed", while a command read it."""
    return UserError(f"{path} was {what} while this command was reading it.\n{WAY_OUT}")


def check_unchanged(stamps: Iterable[Stamp]) -> None:
    """See that files are as they were when their stamps were taken; raises UserError if not."""
    for stamp in stamps:
        try:
            what = "changed or replaced" if stamp_of(stamp.path) != stamp else None
        except OSError:
            what = "removed"
        if what is not None:
            raise changed_meanwhile(stamp.path, what)


_watched: dict[Path, Stamp] = {}
_read_to_the_end: set[Path] = set()
_handlers: list[Callable] = []


def watch(paths: Iterable[Path], read_to_the_end: bool = False) -> None:
    """From now on a process that is ended by a cut one of these files, which are about to be mapped, names it.

    :func:`check_mapped_files` asks for those that are read as long as the command runs.
    """
    stamps = {path: stamp_of(path) for path in paths}
    _watched.update(stamps)
    if read_to_the_end:
        _read_to_the_end.update(stamps)
    if not _handlers and hasattr(signal, "SIGBUS"):
        _name_cut_files()


def check_mapped_files() -> None:
    """See that what the command has read is what was there when it began; raises UserError if not."""
    for path in _read_to_the_end:
        if what := _change(_watched[path]):
            raise changed_meanwhile(path, what)


def describe_cut(read_to_the_end: bool = False) -> str | None:
    """Two lines on a file that was cut, perhaps only of those ``read_to_the_end``; None if none was.

    Weights are mapped while they are loaded, and by one process: what has become of them since ends nobody.
    """
    for path in _read_to_the_end if read_to_the_end else _watched:
        if (what := _change(_watched[path])) and what.startswith("cut"):
            return str(changed_meanwhile(path, what))
    return None


def _change(before: Stamp) -> str | None:
    """What has become of a file, in a short phrase; one that has taken its place is another, and changes nothing."""
    try:
        now = stamp_of(before.path)
    except OSError:
        # removed, it stays as it is for those who have mapped it
        return None
    if (now.device, now.inode) != (before.device, before.inode):
        return None
    if now.size < before.size:
        return f"cut from {before.size:,} to {now.size:,} bytes"
    return None if now.modified == before.modified else "changed"


def _name_cut_files() -> None:
    # Python's own handlers only run once the instruction that reads the file is over, which it never is
    libc = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)

    @handler_type
    def handler(number: int) -> None:
        message = describe_cut()
        if message is None:
            # something else: it happens again at once, to the handler before this one
            libc.signal(number, previous)
            return
        sys.stdout.flush()
        os.write(2, f"{message}\n".encode(errors="backslashreplace"))
        os._exit(1)

    _handlers.append(handler)
    previous = libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
