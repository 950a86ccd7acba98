"""A store on LitData's chunks of tokens, local or remote: LitGPT's `LitData` module."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from litgpt.data import LitData
from torch import Tensor

from litgpt_akl.errors import UserError

if TYPE_CHECKING:
    from litdata.streaming import StreamingDataset


class ChunkStore:
    """Blocks of as many tokens each, every one of which counts; reading one fetches its chunk if it is not there."""

    def __init__(self, input_dir: str, block_size: int) -> None:
        self._input_dir, self._block_size = input_dir, block_size
        self._reader: tuple[int, StreamingDataset] | None = None
        dataset = self._dataset()
        if len(dataset) == 0:
            raise UserError(f"{input_dir} has no block of {block_size} tokens. Lower --train.max_seq_length.")
        # reading sets up the index
        dataset[0]
        self.chunk_ends = np.array([interval[-1] for interval in dataset.cache.get_chunk_intervals()])
        self.tokens = len(self) * block_size
        index = (Path(dataset.input_dir.path) / "index.json").read_bytes()
        self.fingerprint = xxhash.xxh3_128_hexdigest(index + str(block_size).encode())

    def _dataset(self) -> "StreamingDataset":
        # a reader's threads and locks do not live on in the worker processes of a loader
        if self._reader is None or self._reader[0] != os.getpid():
            from litdata.streaming import StreamingDataset, TokensLoader

            loader = TokensLoader(block_size=self._block_size)
            self._reader = os.getpid(), StreamingDataset(self._input_dir, item_loader=loader, shuffle=False)
        return self._reader[1]

    def __len__(self) -> int:
        return int(self.chunk_ends[-1])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), self._block_size)

    def response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        return self.lengths(numbers) - 1

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        blocks = [self._dataset()[int(number)].long() for number in numbers]
        return [{"input_ids": block, "labels": block} for block in blocks]

    def place(self, number: int) -> str:
        return f"{self._input_dir}, block {number}"


def open_chunks(data: LitData, block_size: int) -> tuple[ChunkStore, ChunkStore]:
    """Training and validation blocks; as in LitGPT the same ones, if ``split_names`` names no folders.

    Raises:
        UserError: no chunks of tokens are there, or litdata is not installed.
    """
    path = str(data.data_path)
    folders = [os.path.join(path, name) for name in data.split_names] if data.split_names else [path]
    try:
        stores = [ChunkStore(folder, block_size) for folder in folders]
    except ModuleNotFoundError as error:
        raise UserError(f"--data LitData: {error}. Install it with `pip install litdata`.") from error
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data.data_path {path} holds no LitData chunks of tokens: {reason}") from error
    return stores[0], stores[-1]
