"""A run's cache: one folder for its teacher, with the hidden states of its training and of its validation samples."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import fsspec
import lightning as L
import numpy as np
import safetensors.torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from litgpt_akl.data.dataset import Store, digest
from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.teacher.cache import TeacherCache
from litgpt_akl.teacher.chunk_file import DTYPES
from litgpt_akl.teacher.identity import Identity, check_identity

HEAD = "head-"
"""How the name of the file with the teacher's LM head begins; its checksum follows."""
PROBES = 16
"""Samples of each store that are compared with a cache before a run begins."""


class Caches(NamedTuple):
    """Where hidden states are remembered; nowhere, if there is no cache."""

    training: TeacherCache | None = None
    validation: TeacherCache | None = None
    directory: str | None = None
    writable: bool = False
    teacher_weights: str | None = None
    """The fingerprint of those that it was filled with."""

    def flush(self) -> None:
        """Write what was added; raises UserError if the disk does not take it."""
        for cache in (self.training, self.validation):
            if cache is not None:
                cache.flush()

    def share(self, fabric: L.Fabric) -> None:
        """From now on all processes know what each has added; all must call this together."""
        if self.writable:
            self.flush()
            fabric.barrier()
            for cache in (self.training, self.validation):
                cache.refresh()


def open_caches(directory: str, identity: Identity, stores: tuple[Store, Store], writable: bool) -> Caches:
    """The cache in ``directory``, if it is of ``identity`` and of the stores' samples; begun if it may be.

    Raises:
        UserError: it is of something else, cannot be read or written, or is not there.
    """
    if "://" not in directory:
        directory = os.path.abspath(directory)
    teacher_weights = check_identity(directory, identity, create=writable)
    dtype, found = DTYPES[identity.stored_as], []
    for name, store in zip(("training", "validation"), stores, strict=True):
        cache = TeacherCache(f"{directory.rstrip('/')}/{name}", len(store), dtype, identity.width, writable)
        _compare(cache, store)
        found.append(cache)
    return Caches(*found, directory, writable, teacher_weights)


def _compare(cache: TeacherCache, store: Store) -> None:
    """A cache of other data is refused at once, not in the middle of an epoch."""
    there = cache.present()
    some = there[:: max(1, len(there) // PROBES)]
    if len(some):
        keys = [(number, digest(sample)) for number, sample in zip(some, store.read(some), strict=True)]
        cache.check(np.array(keys, dtype=np.int64))


def write_head(directory: str, tensors: dict[str, Tensor]) -> None:
    """Keep a teacher's LM head, by its parameters' names, so that the teacher itself is not needed any more; once.

    Raises:
        UserError: the disk does not take it.
    """
    if read_head(directory) is not None:
        return
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with explain_failure(Path(directory)):
        write_file(Path(directory) / f"{HEAD}{xxhash.xxh3_128_hexdigest(data)}.safetensors", data)


def read_head(directory: str) -> dict[str, Tensor] | None:
    """What :func:`write_head` kept; None if there is nothing, or nothing that is whole."""
    system, _ = fsspec.core.url_to_fs(directory)
    for path in _heads(directory):
        data = system.cat_file(path)
        if xxhash.xxh3_128_hexdigest(data) == Path(path).stem.removeprefix(HEAD):
            try:
                return safetensors.torch.load(data)
            except SafetensorError:
                continue
    return None


def _heads(directory: str) -> Iterable[str]:
    system, root = fsspec.core.url_to_fs(directory)
    return [path for path in sorted(system.ls(root, detail=False)) if Path(path).name.startswith(HEAD)]
