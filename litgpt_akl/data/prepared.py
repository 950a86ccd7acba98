"""Prepared data on disk: made once, by one process at a time, checked whenever it is opened, made anew if damaged."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import xxhash
from filelock import FileLock, Timeout

from litgpt_akl.data.preparation import COLUMNS, Preparation, Settings, Source
from litgpt_akl.files.directories import check_name, explain_failure, write_directory
from litgpt_akl.files.manifest import damage, read_manifest, write_manifest
from litgpt_akl.files.mapped_files import watch
from litgpt_akl.messages import UserError, say

LARGE = 2**30
"""Bytes of prepared data that take more than a second to read."""


def prepare(source: Source, settings: Settings, cache_dir: Path, num_proc: int) -> datasets.Dataset:
    """One row for each record, in their order, memory-mapped; what was prepared before is found again.

    Args:
        source: the records.
        settings: what to make of them.
        cache_dir: where prepared data is kept, in a folder for each fingerprint of records and settings.
        num_proc: processes that encode; with 0 this one does.

    Raises:
        UserError: a bad record, unless they are to be skipped; unreadable files, or such as change meanwhile; a full
            disk.
    """
    # preparation has a progress line of its own, with an end in sight
    datasets.disable_progress_bars()
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([settings.fingerprint, source.identity]).encode())
    folder = cache_dir / fingerprint
    check_name(folder.absolute(), "The directory for prepared data", settings.other_cache)
    if "::" in str(folder.absolute()):
        raise UserError(
            f"Data cannot be prepared in {folder}: fsspec, which writes it, takes '::' for a chain of URLs.\n"
            f"{settings.other_cache}"
        )
    with explain_failure(folder, settings.other_cache):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _in_turn(folder):
            flaw = _flaw(folder)
            if flaw is not None:
                say(f"The prepared data in {folder} is damaged ({flaw}): preparing it again.", file=sys.stderr)
            if flaw is not None or not folder.exists():
                _write(folder, source, settings, num_proc)
        return _open(folder)


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """While entered, no other process prepares what belongs into the folder."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"Waiting for another process, which prepares the same data in {folder.parent}.", file=sys.stderr)
        lock.acquire()
    except OSError:
        # where nobody can write, as in a cache that is shared for reading, nobody prepares
        if not folder.exists():
            raise
    try:
        yield
    finally:
        lock.release()


def _flaw(folder: Path) -> str | None:
    """What is wrong with prepared data, None if nothing is, or if there is none."""
    if not folder.exists():
        return None
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    if size > LARGE:
        say(f"Checking {size / 1e9:,.1f} GB of prepared data in {folder}.", file=sys.stderr)
    return damage(folder)


def _write(folder: Path, source: Source, settings: Settings, num_proc: int) -> None:
    with write_directory(folder, settings.other_cache) as partial:
        place = partial / "being-written"
        # without an id, the package would make one by pickling all records that lie in memory
        options = {"config_id": "rows", "source": source, "settings": settings, "num_proc": num_proc}
        builder = Preparation(cache_dir=str(place), **options)
        try:
            builder.download_and_prepare()
        except datasets.exceptions.DatasetGenerationError as error:
            raise _cause(error) from error
        source.check_unchanged()
        # what else the package writes it would read only if it were to look for the data itself
        for path in place.rglob("*.arrow"):
            path.rename(partial / path.name)
        shutil.rmtree(place)
        write_manifest(partial, 0, None, rows=builder.info.splits["train"].num_examples)


def _cause(error: BaseException) -> BaseException:
    """What a user is to be told about: the package that prepares the data wraps what went wrong."""
    while not isinstance(error, (UserError, OSError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _open(folder: Path) -> datasets.Dataset:
    # of no rows at all the package writes no file
    rows, paths = read_manifest(folder)["rows"], sorted(folder.glob("*.arrow"))
    if rows == 0:
        return datasets.Dataset.from_dict({name: [] for name in COLUMNS}, features=COLUMNS)
    watch(paths, read_to_the_end=True)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
