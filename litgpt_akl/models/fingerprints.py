"""Which weights a checkpoint has, as a short text: when one number of them changes it is another one."""

import json
import os
import time
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import xxhash

from litgpt_akl.files.directories import default_cache_dir, write_file
from litgpt_akl.files.reading import explain_damage, file_checksum, with_checksum, without_checksum
from litgpt_akl.files.stamps import Stamp, stamp_of, unchanged_meanwhile
from litgpt_akl.messages import progress_bar
from litgpt_akl.models.weights import CONVERT_AGAIN, read_config, weights_files

MARK = "2-"
"""How fingerprints begin. Those of before have no mark: they are of samples of the files, and miss most changes."""
CLOCK_STEP = 2 * 10**9
"""Nanoseconds between two times that every file system tells apart; FAT's are the farthest."""


def fingerprint(checkpoint_dir: Path, like: str | None = None) -> str:
    """Tells two checkpoints apart, wherever they lie: by their configuration, and by all of each weights file.

    What ``torch.save`` has written says so itself, by a checksum of each tensor. Other files are read once, and it is
    remembered beside prepared data what was found; they are read again when they have changed.

    Args:
        checkpoint_dir: with weights.
        like: a fingerprint that this one is to be compared with. One of before is made for one of before.

    Raises:
        UserError: a file cannot be read, or changes meanwhile.
    """
    paths, start = weights_files(checkpoint_dir), repr(read_config(checkpoint_dir)).encode()
    if like is not None and not like.startswith(MARK):
        return _fingerprint_of_samples(paths, start)
    digest = xxhash.xxh3_128(start)
    for path in paths:
        with explain_damage(path, "weights", CONVERT_AGAIN):
            digest.update((_checksums_within(path) or _checksum(path)).encode())
    return MARK + digest.hexdigest()


def is_of(recorded: str, checkpoint_dir: Path) -> bool:
    """Whether a fingerprint, of whichever form, is that of a checkpoint; one without weights has none."""
    return bool(weights_files(checkpoint_dir)) and fingerprint(checkpoint_dir, like=recorded) == recorded


def _fingerprint_of_samples(paths: list[Path], start: bytes) -> str:
    """By the size of each file and 64 samples of its bytes."""
    digest, block = xxhash.xxh3_128(start), 2**16
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for position in range(0, size, max(block, size // 64)):
                file.seek(position)
                digest.update(file.read(block))
    return digest.hexdigest()


def _checksums_within(path: Path) -> str | None:
    """The checksums that a file of ``torch.save`` keeps of its tensors, by their names; None if it keeps none."""
    if not is_zipfile(path):
        return None
    with ZipFile(path) as archive:
        entries = archive.infolist()
    # torch.serialization.set_crc32_options(False) leaves zeros
    if any(entry.file_size and not entry.CRC for entry in entries):
        return None
    return json.dumps([[entry.filename, entry.file_size, entry.CRC] for entry in entries])


_known: dict[Stamp, str] = {}
"""Checksums that this process has computed: where it cannot keep them on the disk, it asks more than once, too."""


def _checksum(path: Path) -> str:
    """Of all of a file; from memory, if it has not changed since."""
    stamp = stamp_of(path)
    found = _known.get(stamp) or _recall(stamp)
    if found is None:
        began = time.time_ns()
        with unchanged_meanwhile([path]):
            found = _read_checksum(path, stamp.size)
        # a change right after the one before leaves a file's times as they are
        if began - max(stamp.modified, stamp.changed) > CLOCK_STEP:
            _known[stamp] = found
            _remember(stamp, found)
    return found


def _read_checksum(path: Path, size: int) -> str:
    options = {"unit": "B", "unit_scale": True, "leave": False, "delay": 2}
    with progress_bar(total=size, desc=f"reading {path.name}", **options) as bar:
        return file_checksum(path, bar.update)


def _memory_of(path: Path) -> Path:
    place = xxhash.xxh3_128_hexdigest(os.fsencode(path.resolve()))
    return default_cache_dir() / "weights" / f"{place}.json"


def _recall(stamp: Stamp) -> str | None:
    """What :func:`_remember` kept of a file that has not changed; of a memory that is damaged nothing is taken."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        kept = without_checksum(json.loads(_memory_of(stamp.path).read_text(encoding="utf-8")), required=True)
        if kept.get("stamp") == _plain(stamp):
            return kept.get("content")
    return None


def _remember(stamp: Stamp, checksum: str) -> None:
    memory = _memory_of(stamp.path)
    content = {"path": str(stamp.path.resolve()), "stamp": _plain(stamp), "content": checksum}
    # where nothing can be kept, the file is read anew the next time
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_file(memory, json.dumps(with_checksum(content)).encode())


def _plain(stamp: Stamp) -> list[int]:
    return [*astuple(stamp)[1:]]
