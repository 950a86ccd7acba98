"""A store on memory-mapped Arrow files: what is not being read is not in memory."""

from collections.abc import Callable, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
import xxhash
from torch import Tensor

from litgpt_akl.head_loss import IGNORE_INDEX


class ArrowStore:
    """Rows of a prepared dataset; see ``preparation.COLUMNS``."""

    chunk_ends = None

    def __init__(
        self, dataset: datasets.Dataset, *, mask_prompt: bool, settings: str, place: Callable[[int, int], str]
    ) -> None:
        dataset = dataset.with_format("arrow")
        # a choice of columns is made once, as it copies the dataset's description
        columns = {"lengths": ["length"], "counts": ["response_tokens"], "samples": ["input_ids", "responses"]}
        columns |= {"places": ["file", "line"], "summary": ["length", "draw"]}
        self._views = {name: dataset.select_columns(chosen) for name, chosen in columns.items()}
        self._mask_prompt = mask_prompt
        self._place = place
        self.tokens = self.longest = 0
        digest = xxhash.xxh3_128(f"{settings} {mask_prompt}".encode())
        for table in self._views["summary"].iter(100_000):
            self.tokens += pa.compute.sum(table["length"]).as_py()
            self.longest = max(self.longest, pa.compute.max(table["length"]).as_py())
            # a draw comes from the hash of its record
            for name in table.column_names:
                digest.update(table[name].to_numpy())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._views["lengths"])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return self._views["lengths"][numbers]["length"].to_numpy()

    def response_tokens(self, numbers: np.ndarray) -> np.ndarray:
        if not self._mask_prompt:
            return self.lengths(numbers) - 1
        return self._views["counts"][numbers]["response_tokens"].to_numpy()

    def read(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        rows = self._views["samples"][numbers]
        columns = (_split(rows["input_ids"]), _split(rows["responses"]))
        return [self._sample(ids, responses) for ids, responses in zip(*columns, strict=True)]

    def _sample(self, input_ids: np.ndarray, responses: np.ndarray) -> dict[str, Tensor]:
        input_ids = torch.from_numpy(input_ids.astype(np.int64))
        labels = input_ids
        if self._mask_prompt:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
            for begin, end in responses.reshape(-1, 2):
                labels[begin:end] = input_ids[begin:end]
        return {"input_ids": input_ids, "labels": labels}

    def prompt(self, number: int) -> Tensor:
        """The ids of a sample before its first response."""
        row = self._views["samples"][[number]]
        return torch.from_numpy(_split(row["input_ids"])[0][: _split(row["responses"])[0][0]].astype(np.int64))

    def place(self, number: int) -> str:
        row = self._views["places"][[number]]
        return self._place(row["file"][0].as_py(), row["line"][0].as_py())


def _split(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    return np.split(values[: offsets[-1]], offsets[:-1])[1:]
