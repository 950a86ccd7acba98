"""What is known of a run's samples before they are prepared: lengths of some or all of them, and nothing is written."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.files import file_format
from litgpt_akl.data.preparation import (
    ROWS,
    FileRecords,
    Portion,
    Rows,
    Settings,
    check_rows,
    folder_of,
    portions,
    row_schema,
)
from litgpt_akl.data.records import Record, has_plain_lines, read_longest_lines, read_part
from litgpt_akl.data.steps import PART
from litgpt_akl.files.manifest import Damaged, read_manifest
from litgpt_akl.messages import progress_bar, say

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

WHOLE = 2**25
"""Bytes of records that are all read, though perhaps not all encoded."""
SCANNED = 2**31
"""Bytes of files whose longest lines are looked for."""
UNPACKED = {"gzip": 8, "zstd": 8, "parquet": 4}
"""How many times as many bytes a format's records may take once they are read."""
PLACES, EACH = 200, 10
"""Of more bytes, at how many places records are read, and how many at each."""
AT_ONCE = 64
"""Records that are encoded between two looks at the clock."""
LARGEST = 256
"""Records that are encoded first, since the longest is likely to be among them."""
MARGIN = 1.1
"""How much longer the longest sample may be than the largest records were."""


class Look(NamedTuple):
    """How much of some records was looked at."""

    how: Literal["prepared", "all", "largest", "spread"]
    """Rows that an earlier run prepared; all records; of all the largest and others; or some here and there."""
    records: int
    """That were looked at."""
    all: int
    """That there are, about, where not all were read."""

    @property
    def is_exact(self) -> bool:
        return self.how in ("prepared", "all")


@dataclass
class Preview:
    """In place of ``preparation.prepare``: rows of records without a file of them, of some records if they are many."""

    seconds: float = 5.0
    """After which no more records are encoded."""
    looks: list[Look] = field(default_factory=list)
    """At the records of training, and at those of validation if they are others."""

    def __call__(self, source: FileRecords, settings: Settings, cache_dir: Path, num_proc: int) -> "datasets.Dataset":
        """The rows; if all records were looked at, those that ``prepare`` would give.

        Raises UserError for files that cannot be read, and for bad records if they are not to be skipped.
        """
        import datasets  # slow to import, and only runs with records to read need it

        folder = folder_of(source, settings, cache_dir)
        if is_whole(folder):
            rows = datasets.Dataset.from_file(str(folder / ROWS))
            self.looks.append(Look("prepared", len(rows), len(rows)))
            return rows
        weights = [
            size * UNPACKED.get(_packing(file), 1) for file, size in zip(source.files, source.sizes, strict=True)
        ]
        table, look = (self._read if sum(weights) <= WHOLE else self._read_parts)(source, settings)
        self.looks.append(look)
        return datasets.Dataset(table)

    def _read(self, source: FileRecords, settings: Settings) -> tuple["pa.Table", Look]:
        records = [entry for portion in portions(source) for entry in portion]
        sizes = np.array([len(repr(record.value)) for _, record in records])
        order = np.random.default_rng(0).permutation(len(records))
        largest = np.argpartition(-sizes, min(LARGEST, len(records) - 1))[:LARGEST]
        order = np.concatenate([largest, order[~np.isin(order, largest)]])
        rows = self._encode(records, order, settings)
        looked = order[: len(rows)]
        rows = rows.take(np.argsort(looked))
        for bad in _bad(rows) if settings.on_error == "stop" else ():
            (row,) = rows.slice(bad, 1).to_batches()
            check_rows(row, int(np.sort(looked)[bad]), source, settings)
        how = "all" if len(rows) == len(records) else "largest"
        return rows, Look(how, len(rows), len(records))

    def _read_parts(self, source: FileRecords, settings: Settings) -> tuple["pa.Table", Look]:
        ends = np.cumsum(source.sizes)
        places = np.bincount(np.searchsorted(ends, np.linspace(0, ends[-1], PLACES, endpoint=False), side="right"))
        read, count, size = [], 0.0, 0
        for file in np.flatnonzero(places).tolist():
            part = read_part(source.files[file], int(places[file]), EACH)
            read += [(file, record) for record in part.records]
            count, size = count + part.all, size + source.sizes[file]
        read = [read[number] for number in np.random.default_rng(0).permutation(len(read))]
        largest = _find_largest(source)
        rows = self._encode([*largest, *read], np.arange(len(largest) + len(read)), settings)
        looked, bad = len(rows), _bad(rows)
        if len(bad):
            told = f"{len(bad):,} of {looked:,} records that were looked at cannot be used."
            say(f"{told} The first error: {rows['error'][bad[0]]}.")
        look = Look("largest" if largest else "spread", looked, round(count * ends[-1] / size))
        return rows.take(np.setdiff1d(np.arange(looked), bad)), look

    def _encode(self, records: Sequence[tuple[int, Record]], order: np.ndarray, settings: Settings) -> "pa.Table":
        """Rows of as many records as time allows, in that order."""
        import pyarrow as pa

        rows, encoded, until = Rows(settings), [], time.monotonic() + self.seconds
        with progress_bar(total=len(order), desc="looking at the data", unit=" records", leave=False, delay=1.0) as bar:
            for start in range(0, len(order), AT_ONCE):
                if start > LARGEST and time.monotonic() > until:
                    break
                portion: Portion = [records[number] for number in order[start : start + AT_ONCE]]
                encoded.append(rows[portion][2])
                bar.update(len(portion))
        return pa.Table.from_batches(encoded, row_schema())


def _find_largest(source: FileRecords) -> list[tuple[int, Record]]:
    """The largest records of files of lines, found without parsing them; none if that would take too long."""
    if sum(source.sizes) > SCANNED or not all(map(has_plain_lines, source.files)):
        return []
    found = [
        (number, record) for number, file in enumerate(source.files) for record in read_longest_lines(file, LARGEST)
    ]
    return nlargest(LARGEST, found, key=lambda entry: entry[1].size)


def _packing(file: str) -> str | None:
    form, compression = file_format(file)
    return compression or form


def _bad(rows: "pa.Table") -> np.ndarray:
    return np.flatnonzero((rows["length"].to_numpy() == 0) & ~rows["dropped"].to_numpy())


def is_whole(folder: Path) -> bool:
    """Whether prepared data is there, and has the size that was written: its checksum is the run's to compare."""
    try:
        size = read_manifest(folder)["files"][ROWS]["bytes"]
        return (folder / ROWS).stat().st_size == size
    except (Damaged, KeyError, OSError):
        return False


class Lengths(NamedTuple):
    """Of the samples of a dataset; where not all were looked at, by estimate."""

    samples: int
    tokens: int
    response_tokens: int
    longest: int
    """Tokens of the longest sample."""
    longest_prompt: int
    """Tokens of the longest prompt that the student can answer itself, 0 without any."""
    longest_recorded: int
    """Tokens of the longest sample that the student cannot answer."""


def measure(dataset: TokenizedDataset, look: Look | None = None, limit: int = 0, answerable: int = 0) -> Lengths:
    """The lengths of a dataset's samples.

    Args:
        dataset: its samples, or some of them.
        look: how much of all there is it has; None for all.
        limit: tokens that no sample exceeds, to which one is extrapolated.
        answerable: tokens of the longest prompt that a student can answer itself; 0 if it answers none.
    """
    prompt = recorded = 0
    for start in range(0, len(dataset) if answerable else 0, PART):
        numbers = np.arange(start, min(start + PART, len(dataset)))
        prompts = dataset.prompt_lengths(numbers)
        fits = (prompts > 0) & (prompts <= answerable)
        prompt = max(prompt, int(prompts[fits].max(initial=0)))
        recorded = max(recorded, int(dataset.lengths(numbers)[~fits].max(initial=0)))
    longest = max(dataset.longest, dataset.longest_of_teacher)
    found = Lengths(len(dataset), dataset.tokens, dataset.all_response_tokens, longest, prompt, recorded)
    if look is None or look.is_exact:
        return found
    numbers = np.arange(len(dataset))
    lengths, responses = dataset.lengths(numbers), dataset.response_tokens(numbers)
    weights = _weights(lengths, look)
    factor = MARGIN if look.how == "largest" else _beyond(lengths, look)
    limits = limit, answerable, limit
    longest = [min(math.ceil(length * factor), most) for length, most in zip(found[3:], limits, strict=True)]
    return Lengths(*(round(float(sum)) for sum in (weights.sum(), weights @ lengths, weights @ responses)), *longest)


def _weights(lengths: np.ndarray, look: Look) -> np.ndarray:
    """How many samples each stands for: those that were looked at because they are large, for themselves alone."""
    large = round(LARGEST * len(lengths) / look.records) if look.how == "largest" else 0
    rest = look.all * len(lengths) / look.records - large
    weights = np.full(len(lengths), rest / max(1, len(lengths) - large))
    weights[np.argsort(-lengths)[:large]] = 1
    return weights


def _beyond(lengths: np.ndarray, look: Look) -> float:
    """How many times as long the longest of all is as the longest of some, if logarithms of lengths are normal."""
    if len(lengths) < 2:
        return 1.0
    one, other = (NormalDist().inv_cdf(1 - 1 / (n + 1)) for n in (look.records, max(look.records, look.all)))
    return math.exp(float(np.log(lengths).std()) * (other - one))
