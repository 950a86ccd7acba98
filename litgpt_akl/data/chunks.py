"""A store on LitData's chunks of tokens, local or remote: LitGPT's `LitData` module."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from litgpt.data import LitData
from torch import Tensor

from litgpt_akl.errors import UserError

if TYPE_CHECKING:
    from litdata.streaming import StreamingDataset


class ChunkStore:
    """Blocks of as many tokens each, every one of which counts; reading one fetches its chunk if it is not there."""

    def __init__(self, input_dir: str, block_size: int) -> None:
        self._place, self._block_size = input_dir, block_size
        dataset = self._open(input_dir)
        self._folder = dataset.input_dir
        index = (Path(self._folder.path) / "index.json").read_bytes()
        self.fingerprint = xxhash.xxh3_128_hexdigest(index + str(block_size).encode())
        self.chunk_ends = np.cumsum([end - start for start, end in dataset.region_of_interest])
        self.tokens = len(self) * block_size
        self._reader: tuple[int, StreamingDataset] | None = None

    def _open(self, folder) -> "StreamingDataset":
        from litdata.streaming import StreamingDataset, TokensLoader

        return StreamingDataset(folder, item_loader=TokensLoader(block_size=self._block_size))

    def __len__(self) -> int:
        return int(self.chunk_ends[-1])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), self._block_size)

    def response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        return self.lengths(numbers) - 1

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        # a reader's thread and locks do not live on in the worker processes of a loader
        if self._reader is None or self._reader[0] != os.getpid():
            self._reader = os.getpid(), self._open(self._folder)
        blocks = [torch.as_tensor(np.asarray(self._reader[1][int(number)], dtype=np.int64)) for number in numbers]
        return [{"input_ids": block, "labels": block} for block in blocks]

    def place(self, number: int) -> str:
        return f"{self._place}, block {number}"


def open_chunks(data: LitData, block_size: int) -> tuple[ChunkStore, ChunkStore]:
    path = str(data.data_path)
    folders = [os.path.join(path, name) for name in data.split_names] if data.split_names else [path]
    stores = [ChunkStore(folder, block_size) for folder in folders]
    return stores[0], stores[-1]
