"""A dataset on LitData's chunks of tokens, local or remote: LitGPT's `LitData` module.

LitData finds the chunks and fetches remote ones. They are read here, because its reader is made for orders of its own:
asked for numbers, it hangs in forked processes and wherever the data is larger than the cache for remote chunks.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from filelock import FileLock
from litgpt.data import LitData
from torch import Tensor

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.files.reading import explain_damage, plain_names
from litgpt_akl.messages import UserError, quoted, reason

LEAST_CACHED = 4
"""Remote chunks that are kept, however little room there is."""


class ChunkStore(TokenizedDataset):
    """Blocks of as many tokens each, every one of which counts; reading one fetches its chunk if it is not there."""

    def __init__(
        self, input_dir: str, block_size: int, cut_by: str = "--train.max_seq_length", vocab_size: int | None = None
    ) -> None:
        from litdata.streaming import StreamingDataset
        from litdata.utilities.format import _resolve_max_cache_size

        # LitData would make an index if it found Parquet files, or chunks that are not complete
        if os.path.isdir(input_dir) and not os.path.exists(os.path.join(input_dir, "index.json")):
            raise UserError(f"{input_dir} has no index.json. Give the folder that litdata.optimize wrote.")
        folder = StreamingDataset(input_dir).input_dir
        self._place, self._folder, self._url, self._block_size = input_dir, Path(folder.path), folder.url, block_size
        self._vocab_size = vocab_size
        content = (self._folder / "index.json").read_bytes()
        with explain_damage(f"{input_dir}/index.json", "an index of LitData's chunks"):
            index = json.loads(content)
            self._chunks, config = index.get("chunks", []), index.get("config", {})
            whole = [chunk for chunk in self._chunks if chunk["dim"]]
            token_sizes = {(chunk["chunk_bytes"] - _header_size(chunk)) / chunk["dim"] for chunk in whole}
            names = plain_names((chunk["filename"] for chunk in self._chunks), f"{input_dir}/index.json")
            if not all(name.endswith(".bin") for name in names):
                # in the cache for remote chunks there are other files, too
                raise ValueError("a chunk's name does not end with .bin")
        if config.get("compression") or config.get("encryption") or token_sizes not in ({1}, {2}, {4}, {8}):
            raise UserError(
                f"{input_dir} has other chunks than plain ones of tokens.\n"
                "Make them with litdata.optimize(..., item_loader=TokensLoader()), neither compressed nor encrypted."
            )
        # no id is negative, so it does not matter whether the type has a sign
        self._dtype = np.dtype(f"u{int(*token_sizes)}")
        self.chunk_ends = np.cumsum([chunk["dim"] // block_size for chunk in self._chunks])
        self.tokens, self.longest = len(self) * block_size, block_size
        self.all_response_tokens = self.tokens - len(self)
        if len(self) == 0:
            raise UserError(f"{input_dir} has no chunk of {block_size} tokens. Lower {cut_by}.")
        self.fingerprint = xxhash.xxh3_128_hexdigest(content + str(block_size).encode())
        if self._url is None:
            for chunk in self._chunks:
                self._check(chunk)
        least = LEAST_CACHED * max(chunk["chunk_bytes"] for chunk in self._chunks)
        self._cache_size = max(least, _resolve_max_cache_size(None, folder.path))

    def __len__(self) -> int:
        return int(self.chunk_ends[-1])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), self._block_size)

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        blocks = [self._read(int(number)) for number in numbers]
        return [{"input_ids": block, "labels": block} for block in blocks]

    def _read(self, number: int) -> Tensor:
        turn = int(np.searchsorted(self.chunk_ends, number, side="right"))
        chunk, before = self._chunks[turn], int(self.chunk_ends[turn - 1]) if turn else 0
        offset = _header_size(chunk) + (number - before) * self._block_size * self._dtype.itemsize
        while True:
            try:
                block = np.fromfile(self._path(chunk), self._dtype, self._block_size, offset=offset)
            except FileNotFoundError:
                self._fetch(chunk)
                continue
            if len(block) < self._block_size:
                self._check(chunk)
            highest = int(block.max(initial=0))
            if self._vocab_size is not None and highest >= self._vocab_size:
                raise UserError(
                    f"{self._path(chunk)} holds the id {highest:,}, and the tokenizer has {self._vocab_size:,} ids: the"
                    " chunk is damaged, or another tokenizer's.\nCopy it again, or make it with this tokenizer."
                )
            return torch.from_numpy(block.astype(np.int64))

    def _path(self, chunk: dict) -> Path:
        return self._folder / chunk["filename"]

    def _check(self, chunk: dict, path: Path | None = None) -> None:
        path = path or self._path(chunk)
        if not path.exists() or path.stat().st_size < chunk["chunk_bytes"]:
            raise UserError(f"{path} is missing or breaks off. Copy it again, or delete it if it is a copy.")

    def _fetch(self, chunk: dict) -> None:
        from litdata.streaming.downloader import get_downloader

        if self._url is None:
            self._check(chunk)
            return
        remote_path, path = os.path.join(self._url, chunk["filename"]), self._path(chunk)
        try:
            # one process at a time, because all want the same chunk; that of a killed one opens by itself
            with FileLock(self._folder / "fetch.lock"):
                if not path.exists():
                    self._make_room(chunk["chunk_bytes"])
                    part = f"{path}.part"
                    get_downloader(self._url, str(self._folder), self._chunks).download_file(remote_path, part)
                    self._check(chunk, Path(part))
                    os.replace(part, path)
        except FileNotFoundError as error:
            raise UserError(
                f"{remote_path} is gone, or the cache {self._folder} was deleted while it was in use.\n"
                "Mend the data, and go on with the command that was running."
            ) from error
        except UserError:
            raise
        # every kind of remote storage has exceptions of its own
        except Exception as error:
            raise UserError(f"{remote_path} cannot be fetched: {reason(error)}") from error

    def _make_room(self, size: int) -> None:
        """Deletes what killed processes left, and the chunks that were fetched longest ago if the cache is full."""
        for leftover in self._folder.glob("*.part*"):
            leftover.unlink()
        cached = [(path.stat(), path) for path in map(self._path, self._chunks) if path.exists()]
        excess = sum(status.st_size for status, _ in cached) + size - self._cache_size
        for status, path in sorted(cached, key=lambda entry: entry[0].st_mtime_ns):
            if excess > 0:
                path.unlink()
                excess -= status.st_size

    def place(self, number: int) -> str:
        return f"{quoted(self._place)}, block {number}"


def _header_size(chunk: dict) -> int:
    """Bytes before the tokens of a chunk: how many items it was made of, and where each begins and the last ends."""
    return 4 * (1 + chunk["chunk_size"] + 1)


def open_chunks(
    data: LitData, block_size: int, cut_by: str = "--train.max_seq_length", vocab_size: int | None = None
) -> tuple[ChunkStore, ChunkStore]:
    """Training and validation blocks of so many tokens; as in LitGPT the same, if ``split_names`` names no folders.

    ``cut_by`` is the command's option that says how long a block is, for messages. A chunk with other ids than the
    tokenizer's ``vocab_size`` is refused when it is read. Raises UserError if no chunks of tokens are there, or litdata
    is not installed.
    """
    path = str(data.data_path)
    folders = [os.path.join(path, name) for name in data.split_names] if data.split_names else [path]
    try:
        splits = [ChunkStore(folder, block_size, cut_by, vocab_size) for folder in folders]
    except UserError:
        raise
    # every kind of remote storage has exceptions of its own
    except Exception as error:
        if (getattr(error, "name", None) or "").partition(".")[0] == "litdata":
            raise UserError(
                f"--data LitData needs litdata, which cannot be imported: {error}.\npip install litdata"
            ) from error
        raise UserError(f"--data.data_path {path} cannot be read: {reason(error)}") from error
    return splits[0], splits[-1]
