"""Files of what a teacher has said of tokens in the safetensors format, each with its records' index and checksums.

A chunk's name is the checksum of its index, so two writers never meet, and chunks of several folders can be put into
one. Whatever is read is checked against what was written.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.manifest import Damaged
from litgpt_akl.messages import UserError, reason

NUMBER, DIGEST, START, TOKENS, CHECKSUM = range(5)
"""Columns of an index: the sample's number and digest, its first row and how many there are, their checksum."""
IN_MEMORY = np.dtype([("number", np.int32), ("digest", np.int64), ("tokens", np.uint32), ("checksum", np.int64)])
"""An index while a cache is open, of which there may be millions of rows; the first rows follow from the tokens."""
ENDING = ".safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
"""Of hidden states, and of packed distributions, by their names in safetensors."""

_FIRST_READ = 2**16
_READ_TOGETHER = 128
"""Files whose begins are in memory at a time: as many as fsspec asks a remote system for at once."""
_LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max


class Record(NamedTuple):
    """What a teacher has said of one sample."""

    number: int
    digest: int
    """Of the sample's ids and of which of them count."""
    hidden: Tensor
    """``[tokens, width]`` on the CPU: hidden states, or packed distributions."""


@dataclass(frozen=True)
class Chunk:
    """A file of records, and where in it they are."""

    path: str
    index: np.ndarray
    """``[records]`` of ``IN_MEMORY``."""
    dtype: torch.dtype
    width: int
    hidden_at: int
    """Where in the file the first hidden state begins, in bytes."""
    scales_at: int | None
    """Where the scales of float8 begin."""

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """The bytes of a record: of its hidden states, and of their scales if they have any."""
        start, tokens = int(self.index["tokens"][:row].sum()), int(self.index["tokens"][row])
        size = self.width * self.dtype.itemsize
        found = [(self.hidden_at + start * size, self.hidden_at + (start + tokens) * size)]
        if self.scales_at is not None:
            found.append((self.scales_at + start * 4, self.scales_at + (start + tokens) * 4))
        return found

    def decode(self, row: int, parts: list[bytes]) -> Tensor:
        """Hidden states ``[tokens, width]`` of a record from its bytes, float8 as float32; raises Damaged."""
        if _checksum(parts) != int(self.index["checksum"][row]):
            raise Damaged(f"the checksum of sample {self.index['number'][row]} is wrong")
        dtypes = (self.dtype, torch.float32)
        tensors = [torch.frombuffer(bytearray(part), dtype=dtype) for part, dtype in zip(parts, dtypes, strict=False)]
        tensors[0] = tensors[0].view(-1, self.width)
        return decode(tensors)


def write_chunk(directory: Path, records: list[Record], dtype: torch.dtype) -> Chunk:
    """Write a new chunk, which appears whole or not at all; raises UserError if the disk does not take it."""
    index, tensors = np.zeros((len(records), 5), dtype=np.int64), [encode(record.hidden, dtype) for record in records]
    for row, (record, parts) in enumerate(zip(records, tensors, strict=True)):
        checksum = _checksum([part.view(torch.uint8).numpy().tobytes() for part in parts])
        index[row] = record.number, record.digest, 0, len(record.hidden), checksum
    index[1:, START] = np.cumsum(index[:-1, TOKENS])
    names = ("hidden", "scales")
    content = {name: torch.cat(parts) for name, parts in zip(names, zip(*tensors, strict=True), strict=False)}
    data = save({"index": torch.from_numpy(index), **content})
    path = directory / f"{_name(index)}{ENDING}"
    with explain_failure(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    return _parse(str(path), data, len(data))


def encode(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states ``[tokens, width]`` in a type; float8 with a scale ``[tokens]`` that its largest value fits."""
    if dtype != torch.float8_e4m3fn:
        return (hidden.to(dtype).contiguous(),)
    hidden = hidden.float()
    scales = hidden.abs().amax(dim=1).clamp(min=1e-12) / _LARGEST_FLOAT8
    return (hidden / scales[:, None]).to(dtype), scales


def decode(parts: Sequence[Tensor]) -> Tensor:
    """What :func:`encode` was given, as far as the type holds it; float8 as float32."""
    return parts[0] if len(parts) == 1 else parts[0].float() * parts[1][:, None]


def list_chunks(directory: str) -> dict[str, int]:
    """The bytes of each of a folder's chunks, damaged ones too, by path; a folder may be remote or missing."""
    system, root = fsspec.core.url_to_fs(directory)
    try:
        entries = system.ls(root, detail=True, refresh=True)
    except FileNotFoundError:
        return {}
    chunks = (entry for entry in entries if entry["type"] == "file" and entry["name"].endswith(ENDING))
    return dict(sorted((entry["name"], entry["size"]) for entry in chunks))


def open_chunks(directory: str, sizes: dict[str, int]) -> Iterator[Chunk | tuple[str, str]]:
    """Chunks with their indices; of one that is damaged its path, and what is wrong.

    They are on the directory's file system, and ``sizes`` come from :func:`list_chunks`. Raises UserError if one cannot
    be read.
    """
    system, _ = fsspec.core.url_to_fs(directory)
    paths = [*sizes]
    for start in range(0, len(paths), _READ_TOGETHER):
        some = paths[start : start + _READ_TOGETHER]
        for path, head in zip(some, system.cat_ranges(some, 0, _FIRST_READ, on_error="return"), strict=True):
            try:
                needed = _bytes_of_index(_check_read(path, head))
                if len(head) < needed <= sizes[path]:
                    head = system.cat_file(path, 0, needed)
                yield _parse(path, head, sizes[path])
            except Damaged as error:
                yield path, str(error)


def read_records(directory: str, chunks: list[tuple[Chunk, int]]) -> list[Tensor | Damaged]:
    """Records, each given by its chunk and its row in the chunk's index; one that is damaged as what is wrong.

    Raises UserError if one cannot be read.
    """
    if not chunks:
        return []
    system, _ = fsspec.core.url_to_fs(directory)
    ranges = [chunk.ranges(row) for chunk, row in chunks]
    wanted = [(chunk.path, *span) for (chunk, _), spans in zip(chunks, ranges, strict=True) for span in spans]
    parts = iter(system.cat_ranges(*map(list, zip(*wanted, strict=True)), on_error="return"))
    found: list[Tensor | Damaged] = []
    for (chunk, row), spans in zip(chunks, ranges, strict=True):
        own = [next(parts) for _ in spans]
        try:
            found.append(chunk.decode(row, [_check_read(chunk.path, part) for part in own]))
        except Damaged as damaged:
            found.append(damaged)
    return found


def _check_read(path: str, found: bytes | Exception) -> bytes:
    """What was read. A file that cannot be read now may be whole, and is not to be given up."""
    if isinstance(found, FileNotFoundError):
        raise Damaged("it is gone")
    if isinstance(found, Exception):
        raise UserError(f"{path} cannot be read: {type(found).__name__}: {reason(found)}")
    return found


def _parse(path: str, head: bytes, size: int) -> Chunk:
    """A chunk from the begin of its file, checked against the file's name and size."""
    try:
        end = 8 + struct.unpack_from("<Q", head)[0]
        header = json.loads(head[8:end])
        places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        index_at, index_end = places["index"]
        dtype, (tokens, width) = DTYPES[header["hidden"]["dtype"]], header["hidden"]["shape"]
        first, last = places["hidden"]
        index = np.frombuffer(head[end + index_at : end + index_end], dtype=np.int64).reshape(-1, 5)
        written = end + max(last for _, last in places.values())
        counts = index[:, TOKENS]
        fits = last - first == tokens * width * dtype.itemsize and tokens == counts.sum()
        fits = fits and (index[:, START] == np.cumsum(counts) - counts).all() and (counts >= 0).all()
        if not fits or abs(index[:, NUMBER]).max(initial=0) >= 2**31:
            raise ValueError("its parts do not go together")
    # a header can be damaged in every way
    except Exception as error:
        raise Damaged("its header is garbled") from error
    if written != size:
        raise Damaged(f"it has {size:,} bytes, {written:,} were written")
    if Path(path).name != f"{_name(index)}{ENDING}":
        raise Damaged("the checksum of its index is wrong")
    scales_at = end + places["scales"][0] if "scales" in places else None
    in_memory = np.empty(len(index), dtype=IN_MEMORY)
    for name, column in zip(IN_MEMORY.names, (NUMBER, DIGEST, TOKENS, CHECKSUM), strict=True):
        in_memory[name] = index[:, column]
    return Chunk(path, in_memory, dtype, width, end + first, scales_at)


def _bytes_of_index(head: bytes) -> int:
    """How much of a file must be read for its index; safetensors puts the widest numbers first."""
    try:
        end = 8 + struct.unpack_from("<Q", head)[0]
        return end + int(json.loads(head[8:end])["index"]["data_offsets"][1]) if end <= len(head) else end
    # a header can be damaged in every way
    except Exception as error:
        raise Damaged("its header is garbled") from error


def _name(index: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(index).tobytes())


def _checksum(parts: Iterable[bytes]) -> int:
    digest = xxhash.xxh3_64(b"".join(parts))
    # as a signed number, which is what an index holds
    return int.from_bytes(digest.digest(), "big", signed=True)
