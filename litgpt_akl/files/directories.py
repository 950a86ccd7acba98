"""Directories that appear and disappear whole or not at all, whatever ends the process meanwhile."""

import errno
import glob
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from litgpt_akl.messages import UserError

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}
"""What a file system without hard links answers to who makes one."""
WAY_OUT = "Make room, or give another directory."
PARTIAL, PREVIOUS, REMOVED = ".partial", ".previous", ".removed"
"""Endings of hidden names: not yet written, about to be replaced, about to be deleted."""


@contextmanager
def write_directory(out_dir: Path, way_out: str = WAY_OUT) -> Iterator[Path]:
    """Yields an empty directory that takes the place of ``out_dir`` when the block ends without an error.

    Until then an existing ``out_dir`` stays as it is; after an error (or an interrupt) it is still as it was and the
    temporary directory is gone. What a killed process left behind is cleared by the next call for the same path.
    One process at a time may write to a path. The yielded directory lies on the same disk and has the same name,
    because LitGPT reads rules from a folder's name. Raises UserError, with ``way_out``, if the system refuses.
    """
    out_dir = out_dir.resolve()
    partial = _hidden(out_dir, PARTIAL)
    try:
        with explain_failure(out_dir, way_out):
            clear_leftovers(out_dir.parent, glob.escape(out_dir.name))
            (partial / out_dir.name).mkdir(parents=True)
        yield partial / out_dir.name
        with explain_failure(out_dir, way_out):
            _flush_tree(partial / out_dir.name)
            _swap_in(partial / out_dir.name, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_directory(out_dir: Path) -> None:
    """Refuse to write where something is: raises UserError for a file, or a directory that is not empty."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir {out_dir} is a file. Give a directory that does not exist yet.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise UserError(f"out_dir {out_dir} is not empty. Remove it, or give a directory that does not exist yet.")


def check_name(path: Path, what: str, way_out: str) -> None:
    """Raises UserError, with ``way_out``, for a path that is not UTF-8, as libraries need it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        told = f"{what} {path} is not UTF-8, and tokenizers and Arrow take no other names."
        raise UserError(f"{told}\n{way_out}") from None


def make_writable(out_dir: Path) -> None:
    """Make a command's ``--out_dir``, if need be; raises UserError if it cannot be made or written to."""
    check_name(out_dir.absolute(), "--out_dir", "Give another directory.")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir} cannot be made ({error.strerror}). Give another directory.") from error
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {out_dir} is not writable. Give another directory.")


@contextmanager
def explain_failure(out_dir: Path, way_out: str = WAY_OUT) -> Iterator[None]:
    """For a block that writes ``out_dir``: what the system refuses becomes one clear message.

    Raises UserError in place of an OSError: the directory, the reason and how much room there is.
    """
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename
        reason = f"{error.strerror or error}" + (f": {place}" if place else "")
        raise UserError(
            f"{out_dir} cannot be written ({reason}); {free_bytes(out_dir):,} bytes are free on its disk."
            f"\nWhat was saved before is as it was. {way_out}"
        ) from error


def free_bytes(path: Path) -> int:
    """Of the disk that a file or directory lies on, or would lie on."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if os.path.exists(place))).free


def default_cache_dir() -> Path:
    """Where prepared data, and what else can be made again, is kept if nothing else is told."""
    from datasets import config  # slow to import, and not every command has imported it

    return Path(config.HF_DATASETS_CACHE) / "litgpt_akl"


def write_file(path: Path, data: bytes | Iterable[bytes], replace: bool = True) -> None:
    """Write a file that appears whole or not at all; what was there is replaced, or stays. Raises OSError."""
    partial = path.with_name(f".{uuid4().hex}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.rename(path)
        else:
            _rename_if_free(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rename_if_free(partial: Path, path: Path) -> None:
    """Give a file its name, unless another one has it; of several processes that try, one succeeds."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # such a file system has nothing that renames only if the name is free
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not os.path.lexists(path):
                partial.rename(path)


def set_aside(path: Path) -> Path:
    """Rename what is not of this run to ``NAME.other``, or another free name, and return that; raises OSError."""
    names = (f"{path.name}.other{number or ''}" for number in count())
    free = next(other for other in map(path.with_name, names) if not os.path.lexists(other))
    return path.rename(free)


def remove_directory(directory: Path) -> None:
    """Deletes a directory under a hidden name, so that no part of it is ever found under its own.

    What cannot be deleted, and what a killed process left, goes with the next :func:`clear_leftovers`. Raises OSError
    if the directory cannot be renamed; it is then as it was.
    """
    removed = _hidden(directory, REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    directory.rename(removed)
    # on the disk, too, the name goes before the content
    _flush(directory.parent)
    shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(parent: Path, pattern: str) -> None:
    """Deletes what killed processes left of directories of such names in ``parent``; none may be written just now."""
    restore_previous(parent, pattern)
    for ending in (PARTIAL, PREVIOUS, REMOVED):
        for leftover in parent.glob(f".{pattern}{ending}"):
            shutil.rmtree(leftover, ignore_errors=True)


def clear_unfinished_files(directory: Path, age: float = -math.inf) -> None:
    """Deletes what a killed process left of files that it was writing there by :func:`write_file`.

    No other process may have been writing there for less than ``age`` seconds.
    """
    for leftover in directory.glob(f".*{PARTIAL}"):
        # another process may do the same at this moment
        with suppress(OSError):
            if leftover.is_file() and time.time() - leftover.stat().st_mtime > age:
                leftover.unlink()


def restore_previous(parent: Path, pattern: str) -> None:
    """Gives back their names to directories that a killed process was about to replace; deletes nothing."""
    for previous in parent.glob(f".{pattern}{PREVIOUS}"):
        directory = parent / previous.name.removeprefix(".").removesuffix(PREVIOUS)
        if not directory.exists():
            # another process may do the same at this moment
            with suppress(FileNotFoundError):
                previous.rename(directory)


def _hidden(directory: Path, ending: str) -> Path:
    return directory.with_name(f".{directory.name}{ending}")


def _swap_in(new_dir: Path, out_dir: Path) -> None:
    previous = _hidden(out_dir, PREVIOUS)
    try:
        if out_dir.exists():
            out_dir.rename(previous)
        new_dir.rename(out_dir)
    finally:
        if previous.exists() and not out_dir.exists():
            previous.rename(out_dir)
    _flush(out_dir.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _flush(path)


def _flush(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # not every network file system can flush a directory
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
