"""Files for ``torch.load``: read, and written one tensor at a time, so that sharded ones are never whole at once."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

import torch
import xxhash
from litgpt.utils import SavingProxyForTensor, incremental_save
from torch import Tensor

from litgpt_akl.files.changed_files import watch
from litgpt_akl.files.manifest import know_checksum
from litgpt_akl.files.reading import COPY_AGAIN, explain_damage
from litgpt_akl.models.parallel import gather_full, wait_for_all

BLOCK = 2**20
"""Bytes that are read together."""
READERS = 4
"""Threads that compute checksums; one does 2 GB/s."""


def read_tensors(path: Path, what: str, way_out: str = COPY_AGAIN) -> Any:
    """What ``torch.save`` has written; its tensors are memory-mapped.

    Raises:
        UserError: the file cannot be read as ``what`` it should be; ``way_out`` is the second line.
    """
    with explain_damage(path, what, way_out):
        watch([path])
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def check_tensors(path: Path, what: str, way_out: str = COPY_AGAIN) -> None:
    """Hold a file against its own checksums, which ``torch.load`` does not look at; raises as :func:`read_tensors`."""

    def check(reader: int) -> None:
        # a ZipFile of its own: threads that share one move each other's position, in Python 3.12 at least
        with ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) leaves zeros
            for entry in [entry for entry in archive.infolist() if entry.CRC][reader::READERS]:
                with archive.open(entry) as file:
                    # zipfile compares what it has read to the end
                    while file.read(BLOCK):
                        pass

    with explain_damage(path, what, way_out), ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(check, range(READERS)):
            pass


class TensorFile:
    """Takes tensors, then the object that holds them. In a process that has no file it takes part in gathering them."""

    def __init__(self, writer: "_Writer | None"):
        self._writer = writer
        self._stored: dict[int, tuple[Tensor, SavingProxyForTensor | None]] = {}

    def store(self, tensor: Tensor) -> SavingProxyForTensor | None:
        """Write a tensor, of which a process may hold a part only, once; what stands for it in what is saved."""
        if id(tensor) not in self._stored:
            # the process that writes may still be busy with the tensor before
            wait_for_all()
            # the tensor is kept, for its id to stay its own
            self._stored[id(tensor)] = tensor, self.write(gather_full(tensor))
        return self._stored[id(tensor)][1]

    def write(self, complete: Tensor) -> SavingProxyForTensor | None:
        """Write a whole tensor, and keep nothing of it; what :meth:`store` returns."""
        return self._writer.store_early(complete) if self._writer else None

    def save(self, content: Any) -> None:
        """Write the object, which may hold tensors, too; once."""
        if self._writer:
            self._writer.save(content)


@contextmanager
def tensor_file(path: Path | None) -> Iterator[TensorFile]:
    """A file to be written; None in processes other than the one that writes.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        yield TensorFile(None)
        return
    with path.open("wb") as opened:
        file = _File(opened)
        writer = _Writer(file)
        try:
            yield TensorFile(writer)
            writer.finish()
            # on some network disks a file's time changes when its bytes arrive
            opened.flush()
            os.fsync(opened.fileno())
        except RuntimeError:
            if file.error is None:
                raise
            raise file.error from None
        finally:
            # what torch leaves open it would end itself, with an error that nobody can catch
            with suppress(RuntimeError):
                writer.finish()
    know_checksum(path, file.checksum.hexdigest())


def save_tensors(content: Any, path: Path) -> None:
    """``torch.save`` that tells why it failed.

    Raises:
        OSError: the file cannot be written.
    """
    with tensor_file(path) as file:
        file.save(content)


class _Writer(incremental_save):
    """LitGPT's, with an open file in place of a name."""

    def __init__(self, file: "_File"):
        self.zipfile = torch._C.PyTorchFileWriter(file)
        self.has_saved, self.next_key, self.protocol_version = False, 0, 2
        self._finished = False

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            self.zipfile.write_end_of_file()


class _File:
    """Hands on what torch writes, and keeps its checksum, and the error of a failed write, which torch hides."""

    def __init__(self, file: BinaryIO):
        self.file, self.checksum = file, xxhash.xxh3_128()
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        self.checksum.update(data)
        try:
            return self.file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
