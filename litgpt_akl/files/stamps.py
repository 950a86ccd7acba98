"""Has a file changed since it was looked at? What the file system keeps of it tells, and nothing is read."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """See that files are as they were when their stamps were taken.

    Raises:
        UserError: one is gone, or was changed or replaced.
    """
    for stamp in stamps:
        try:
            what = "changed or replaced" if stamp_of(stamp.path) != stamp else None
        except OSError:
            what = "removed"
        if what is not None:
            raise changed_meanwhile(stamp.path, what)


@contextmanager
def unchanged_meanwhile(paths: Iterable[Path]) -> Iterator[None]:
    """For a block that reads files: what it has read is of one version of each.

    Raises:
        UserError: one was changed, replaced or removed; as :func:`check_unchanged`.
    """
    stamps = [stamp_of(path) for path in paths]
    yield
    check_unchanged(stamps)
