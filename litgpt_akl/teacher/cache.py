"""The teacher cache: hidden states of training and validation samples on disk, read and added to by many processes."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import fsspec
import lightning as L
import numpy as np
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from litgpt_akl.data.dataset import TokenizedDataset, sample_keys
from litgpt_akl.files.directories import clear_unfinished_files, explain_failure, write_file
from litgpt_akl.files.manifest import Damaged
from litgpt_akl.loss.top_k import TopK
from litgpt_akl.messages import UserError, progress_bar, say
from litgpt_akl.teacher.cache_identity import Identity, check_identity
from litgpt_akl.teacher.cache_size import bytes_of_token
from litgpt_akl.teacher.chunk_file import Chunk, Record, list_chunks, open_chunks, read_records, write_chunk

CHUNK_BYTES = 32 * 2**20
"""Of hidden states that are kept in memory until they are written together: what a killed process loses at most."""
LEFT_BEHIND = 600
"""Seconds after which a file that is not finished has been left by a killed process; writing one takes a few."""
NONE = -1


class TeacherCache:
    """A teacher's hidden states of the samples of a dataset, by their numbers; or with ``top_k`` its distributions.

    The directory is a folder of chunks, or the URL of one, which is only read. ``dtype`` and ``width`` are those of a
    token on disk. If it is ``writable``, records may be added, and damaged chunks deleted.
    """

    def __init__(
        self, directory: str, samples: int, dtype: torch.dtype, width: int, writable: bool, top_k: TopK | None = None
    ) -> None:
        self.directory, self.dtype, self.width, self.writable = directory, dtype, width, writable
        self.top_k = top_k
        self._chunks: list[Chunk] = []
        self._known: set[str] = set()
        self._chunk_of, self._row_of = (np.full(samples, NONE, dtype=np.int32) for _ in range(2))
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._stamp: int | None = None
        self.bytes_of_token = bytes_of_token(width, dtype)
        self._dtype_in_memory = torch.float32 if dtype == torch.float8_e4m3fn else dtype
        self.bytes_of_token_in_memory = width * self._dtype_in_memory.itemsize
        if writable:
            clear_unfinished_files(Path(directory), LEFT_BEHIND)
        self.refresh()

    def refresh(self) -> None:
        """Find what was written since the last time, by this process or by others."""
        sizes = {path: size for path, size in list_chunks(self.directory).items() if path not in self._known}
        for found in open_chunks(self.directory, sizes):
            if not isinstance(found, Chunk):
                # a disk or a network may fail once
                found = next(open_chunks(self.directory, {found[0]: sizes[found[0]]}))
            if isinstance(found, Chunk) and (found.dtype, found.width) != (self.dtype, self.width):
                found = found.path, f"it holds {found.width} numbers of {found.dtype} for a token"
            if isinstance(found, Chunk):
                self._add_chunk(found)
            else:
                self._discard(*found)

    def absent(self, numbers: np.ndarray) -> np.ndarray:
        """Those of the samples of which nothing is on disk."""
        return numbers[self._chunk_of[numbers] == NONE]

    def present(self) -> np.ndarray:
        """The numbers of the samples that are on disk."""
        return np.flatnonzero(self._chunk_of != NONE)

    def check(self, keys: np.ndarray) -> None:
        """See that samples on disk are those that are meant; arguments and error are :meth:`read`'s."""
        for number, expected in keys:
            if self._chunks[self._chunk_of[number]].index["digest"][self._row_of[number]] != expected:
                raise UserError(
                    f"The teacher cache {self.directory} was filled for another sample {number}: its ids, or which of"
                    " them count, have changed.\nGive the data and the prompt style that it was filled with, or"
                    " another --teacher.cache_dir."
                )

    def read(self, keys: np.ndarray) -> Tensor | None:
        """The hidden states of samples, one after the other, ``[tokens, width]``; None if not all are there.

        ``keys``, ``[samples, 2]``, are the number and digest of each. Raises UserError if a sample is another one than
        when it was written, or what was written is damaged and nobody may mend it.
        """
        if len(keys) == 0:
            return torch.empty(0, self.width, dtype=self._dtype_in_memory)
        if len(self.absent(keys[:, 0])):
            self._refresh_if_changed()
        if len(self.absent(keys[:, 0])):
            return None
        self.check(keys)
        places = [(self._chunks[self._chunk_of[number]], int(self._row_of[number])) for number in keys[:, 0]]
        # a disk or a network may fail once
        for _ in range(2):
            found = read_records(self.directory, places)
            damaged = [at for at, record in enumerate(found) if isinstance(record, Damaged)]
            if not damaged:
                return torch.cat(found)
        self._salvage(places[damaged[0]][0], str(found[damaged[0]]))
        return None

    def add(self, records: Sequence[Record]) -> None:
        """Keep records that are not there, and write them when they are many; those of one call come into one chunk."""
        records = [record for record in records if self._chunk_of[record.number] == NONE]
        self._pending += records
        self._pending_bytes += sum(record.hidden.nbytes for record in records)
        if self._pending_bytes >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added; raises UserError if the disk does not take it."""
        if self._pending:
            self._add_chunk(write_chunk(Path(self.directory), self._pending, self.dtype))
            self._pending, self._pending_bytes = [], 0

    def verify(self) -> None:
        """Read everything; what is damaged is deleted, or raises UserError if it may not be."""
        for chunk in progress_bar(list(self._chunks), desc="checking the teacher cache", leave=False, delay=2):
            rows = [(chunk, row) for row in range(len(chunk.index))]
            damage = [record for record in read_records(self.directory, rows) if isinstance(record, Damaged)]
            if damage:
                self._salvage(chunk, str(damage[0]))

    def _refresh_if_changed(self) -> None:
        # a listing takes long where there are many chunks, and most questions come while the first epoch fills them
        with suppress(OSError):
            stamp = os.stat(self.directory).st_mtime_ns
            if stamp != self._stamp:
                self._stamp = stamp
                self.refresh()

    def _add_chunk(self, chunk: Chunk) -> None:
        numbers = chunk.index["number"]
        self._known.add(chunk.path)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self._chunk_of):
            self._discard(chunk.path, f"it has sample {numbers.max()} of {len(self._chunk_of)}")
            return
        new = self._chunk_of[numbers] == NONE
        self._chunk_of[numbers[new]], self._row_of[numbers[new]] = len(self._chunks), np.flatnonzero(new)
        self._chunks.append(chunk)

    def _salvage(self, chunk: Chunk, damage: str) -> None:
        """Put those records of a chunk that are whole into another one, and forget the rest; keep it if all are."""
        rows = [(chunk, row) for row in range(len(chunk.index))]
        keys = zip(chunk.index["number"].tolist(), chunk.index["digest"].tolist(), strict=True)
        found = zip(keys, read_records(self.directory, rows), strict=True)
        whole = [Record(*key, hidden) for key, hidden in found if isinstance(hidden, Tensor)]
        if len(whole) == len(rows):
            say(f"The teacher cache: {chunk.path} is whole when it is read again ({damage}).", file=sys.stderr)
            return
        self._discard(chunk.path, damage, whole)

    def _discard(self, path: str, damage: str, whole: Sequence[Record] = ()) -> None:
        """Forget a chunk, and delete it once those of its records that are ``whole`` are in another one."""
        if not self.writable:
            raise UserError(
                f"{path} is damaged: {damage}.\nFill it again with --teacher.cache_mode auto or fill, or copy it again."
            )
        self._known.add(path)
        for number, chunk in enumerate(self._chunks):
            if chunk.path == path:
                self._chunk_of[self._chunk_of == number] = NONE
        say(f"The teacher cache: {path} is damaged ({damage}); what is lost is computed again.", file=sys.stderr)
        if whole:
            self._add_chunk(write_chunk(Path(self.directory), whole, self.dtype))
        # another process that found the damage may have been first
        Path(path).unlink(missing_ok=True)


HEAD = "head-"
"""How the name of the file with the teacher's LM head begins; its checksum follows."""
PROBES = 16
"""Samples of each dataset that are compared with a cache before a run begins."""


class Caches(NamedTuple):
    """The teacher caches of a run; none, if it has no cache."""

    training: TeacherCache | None = None
    validation: TeacherCache | None = None
    directory: str | None = None
    writable: bool = False
    teacher_weights: str | None = None
    """The fingerprint of those that it was filled with."""

    def flush(self) -> None:
        """Write what was added; raises UserError if the disk does not take it."""
        for cache in filter(None, self[:2]):
            cache.flush()

    def share(self, fabric: L.Fabric) -> None:
        """From now on all processes know what each has added; all must call this together."""
        if self.writable:
            self.flush()
            fabric.barrier()
            self.training.refresh()
            self.validation.refresh()


def open_caches(
    directory: str, identity: Identity, splits: tuple[TokenizedDataset, TokenizedDataset], writable: bool
) -> Caches:
    """The cache in ``directory``, if it is of ``identity`` and of the datasets' samples; begun if it may be.

    Raises UserError if it is of something else, cannot be read or written, or is not there.
    """
    if "://" not in directory:
        directory = os.path.abspath(directory)
    teacher_weights = check_identity(directory, identity, create=writable)
    found = []
    for name, dataset in zip(("training", "validation"), splits, strict=True):
        cache = TeacherCache(f"{directory.rstrip('/')}/{name}", len(dataset), *identity.row, writable, identity.top_k)
        _compare(cache, dataset)
        found.append(cache)
    return Caches(*found, directory, writable, teacher_weights)


def _compare(cache: TeacherCache, dataset: TokenizedDataset) -> None:
    """A cache of other data is refused at once, not in the middle of an epoch."""
    there = cache.present()
    some = there[:: max(1, len(there) // PROBES)]
    if len(some):
        cache.check(sample_keys(some, dataset.read(some)))


def write_head(directory: str, tensors: dict[str, Tensor]) -> None:
    """Keep a teacher's LM head, by its parameters' names, so that the teacher itself is not needed any more; once.

    Raises UserError if the disk does not take it.
    """
    if read_head(directory) is not None:
        return
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with explain_failure(Path(directory)):
        write_file(Path(directory) / f"{HEAD}{xxhash.xxh3_128_hexdigest(data)}.safetensors", data)


def head_bytes(directory: str) -> int:
    """What LM heads take in a cache; 0 if there is none yet."""
    system, root = fsspec.core.url_to_fs(directory)
    files = system.ls(root, detail=True)
    return sum(file["size"] for file in files if Path(file["name"]).name.startswith(HEAD))


def read_head(directory: str) -> dict[str, Tensor] | None:
    """What :func:`write_head` kept; None if there is nothing, or nothing that is whole."""
    system, root = fsspec.core.url_to_fs(directory)
    for path in sorted(system.ls(root, detail=False)):
        if not Path(path).name.startswith(HEAD):
            continue
        # one that cannot be read is as good as damaged: whoever may write here writes it anew
        with suppress(OSError, SafetensorError):
            data = system.cat_file(path)
            if xxhash.xxh3_128_hexdigest(data) == Path(path).stem.removeprefix(HEAD):
                return safetensors.torch.load(data)
    return None
