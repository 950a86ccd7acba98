"""What of the records is not trained on, or otherwise than it stands there: counted, and said once."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from litgpt_akl.messages import UserError, say

if TYPE_CHECKING:
    import datasets

MAX_BAD_SHARE = 0.01
"""Of all records; with more bad ones than this, something is wrong with the data or with how it is read."""
SHOWN = 10
"""Bad records that are named."""


def tell_what_is_left_out(
    rows: "datasets.Dataset", name: str, place: Callable[[int, int, int], str], cut_by: str, may_be_bad: bool
) -> int:
    """Say how many records are dropped, bad, or read otherwise than a user may think.

    Args:
        rows: as ``preparation.prepare`` gives them.
        name: of the data, for messages.
        place: tells of a file, a line and a row.
        cut_by: the command's option for the longest record.
        may_be_bad: whether bad records are left out; otherwise there are none.

    Returns:
        How many records a chat template wrote; a prompt style wrote the others.

    Raises:
        UserError: More than ``MAX_BAD_SHARE`` of the records are bad.
    """
    bad, dropped, notes, said, lost, losing, by_template = [], 0, Counter(), 0, 0, 0, 0
    names = ["length", "dropped", "notes", "said", "lost", "by_template"]
    columns = rows.select_columns(names).with_format("arrow")
    for first, table in zip(range(0, len(rows), 100_000), columns.iter(100_000), strict=True):
        length, is_dropped = table["length"].to_numpy(), table["dropped"].to_numpy()
        bad.append(first + np.flatnonzero((length == 0) & ~is_dropped))
        dropped += int(is_dropped.sum())
        by_template += int(table["by_template"].drop_null().to_numpy().sum())
        losses = table["lost"].to_numpy()
        said += int(table["said"].to_numpy().sum())
        lost += int(losses.sum())
        losing += int((losses > 0).sum())
        for entry in table["notes"].value_counts().to_pylist():
            for note in filter(None, (entry["values"] or "").splitlines()):
                notes[note] += entry["counts"]
    for note, count in notes.most_common():
        _say(f"{name}: {note} ({_share(count, len(rows))} records).")
    if lost:
        _say(
            f"{name}: {lost:,} of {said:,} characters that the assistant says ({lost / said:.1%}) are not learnt, in"
            f" {_share(losing, len(rows))} records: the chat template leaves them out."
        )
    if dropped:
        too_long = f"{_share(dropped, len(rows))} records ({dropped / len(rows):.1%}), which are too long"
        _say(f"{name}: dropped {too_long}; {cut_by} and --data.too_long decide.")
    if may_be_bad:
        _tell_bad(rows, np.concatenate([*bad, np.empty(0, dtype=np.int64)]), name, place, cut_by)
    return by_template


def tell_what_occurs_twice(training: "datasets.Dataset", validation: "datasets.Dataset") -> None:
    """Say how many of the validation records are training records, too: what they measure is no promise then."""
    held_out = _hashes(validation)
    both = np.zeros(len(held_out), dtype=bool)
    for table in training.select_columns(["draw", "length"]).with_format("arrow").iter(100_000):
        both |= np.isin(held_out, table["draw"].to_numpy()[table["length"].to_numpy() > 0])
    if both.any():
        _say(f"{_share(int(both.sum()), len(held_out))} validation records are in the training data, too.")


def _hashes(rows: "datasets.Dataset") -> np.ndarray:
    table = rows.select_columns(["draw", "length"]).with_format("arrow")[:]
    return table["draw"].to_numpy()[table["length"].to_numpy() > 0]


def _tell_bad(
    rows: "datasets.Dataset", bad: np.ndarray, name: str, place: Callable[[int, int, int], str], cut_by: str
) -> None:
    if len(bad) == 0:
        return
    for row, number in zip(rows.select(bad[:SHOWN]), bad, strict=False):
        _say(f"Left out: {place(row['file'], row['line'], number)}: {row['error']}.")
    share = len(bad) / len(rows)
    if share > MAX_BAD_SHARE:
        raise UserError(
            f"{len(bad):,} of {len(rows):,} records in {name} are bad ({share:.1%}), more than 1 %.\n"
            f"The first ones are named above; see whether the fields and {cut_by} are as meant."
        )
    _say(f"Left out {len(bad):,} bad records of {len(rows):,}.")


def _share(count: int, total: int) -> str:
    return f"all {total:,}" if count == total else f"{count:,} of {total:,}"


def _say(text: str) -> None:
    say(text, file=sys.stderr)
