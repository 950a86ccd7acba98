"""A run as its directory tells it: what is left of its log, its recipe and its examples."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_akl.files.directories import set_aside, write_file
from litgpt_akl.files.manifest import EXAMPLES, RECIPE
from litgpt_akl.files.reading import explain_damage, with_checksum, without_checksum
from litgpt_akl.messages import UserError, first_line, reason
from litgpt_akl.report.history import History, read_history, read_recipe
from litgpt_akl.report.page import Shown

HIGHEST = 3.0
"""Above any probability, mass or gap."""


def read_examples(run_dir: Path) -> dict[str, Any] | None:
    """The snapshots ``first`` and ``latest`` of a run; None if there are none. Raises UserError if they are damaged."""
    path = run_dir / EXAMPLES
    if not os.path.lexists(path):
        return None
    with explain_damage(path, "examples of a run", "Delete it: the page is then without examples."):
        if not path.is_file():
            raise ValueError("it is no file")
        examples = without_checksum(json.loads(path.read_text(encoding="utf-8")))
        for moment in ("first", "latest"):
            _check_snapshot(examples[moment])
        return examples


def write_examples(run_dir: Path, first: dict[str, Any], latest: dict[str, Any]) -> None:
    """Replace the snapshots of a run; raises OSError if the disk does not take them."""
    content = with_checksum({"first": first, "latest": latest})
    write_file(run_dir / EXAMPLES, json.dumps(content, indent=1).encode("utf-8"))


def take_examples(run_dir: Path, are_expected: bool, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """What :func:`read_examples` gives; something else of that name is set aside, so that it is not replaced.

    ``tell`` is told in one line what becomes of it, and if examples ``are_expected``, that there are none.
    """
    path = run_dir / EXAMPLES
    try:
        examples = read_examples(run_dir)
        if examples is None and are_expected:
            tell(f"{path} is gone: new examples begin.")
        return examples
    except UserError as error:
        what = first_line(error)
    try:
        tell(f"{what} It is renamed to {set_aside(path).name}, and new examples begin.")
    except OSError as failure:
        tell(f"{what} It cannot be renamed ({reason(failure)}).")
    return None


def forget(run_dir: Path) -> None:
    """Delete what a run before this one has left."""
    # what cannot be deleted is set aside when new examples come
    with suppress(OSError):
        (run_dir / EXAMPLES).unlink()


def _check_snapshot(snapshot: dict[str, Any]) -> None:
    """See that a page can show it; raises one of Python's own errors."""
    prompts, answers, taught = (snapshot[name] for name in ("prompts", "answers", "teacher_answers"))
    for texts in (prompts, answers, taught) if taught is not None else (prompts, answers):
        _expect(list, [texts])
        _expect(str, texts)
        if len(texts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts have {len(texts)} answers")
    _expect(int, [snapshot["step"]])
    _expect(str, [snapshot["note"]])
    _expect(list, [snapshot["positions"]])
    for position in snapshot["positions"]:
        _check_position(position)
    # earlier versions kept none
    if (sample := snapshot.get("sample")) is not None:
        _expect(str, [sample[name] for name in ("texts", "labels", "place")])
        for counts, text in sample["parts"]:
            _expect(bool, [counts])
            _expect(str, [text])


def _check_position(position: dict[str, Any]) -> None:
    lists = [position[name] for name in ("tokens", "p", "q")]
    _expect(list, lists)
    _expect(str, (position["context"], position["next"], *position["tokens"]))
    _expect(int, (position["head"], position["others"]))
    others = [position[name] for name in ("p_others", "q_others", "head_mass", "head_gap", "tail_gap")]
    numbers = [*position["p"], *position["q"], *others]
    _expect(int | float, numbers)
    # those of a model with weights that are not finite are written, too
    wrong = [number for number in numbers if number < 0 or number > HIGHEST]
    if wrong or len({len(values) for values in lists}) != 1 or not position["p"]:
        raise ValueError("its numbers are no probabilities")


def _expect(kind: Any, values: Iterable[Any]) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{type(value).__name__} is in the place of {getattr(kind, '__name__', 'number')}")


def read_run(run_dir: Path, tell: Callable[[str], None]) -> Shown:
    """What a page can show of a run; ``tell`` is told, in one line for each file, what cannot be shown.

    Raises:
        UserError: there is neither a row of metrics nor an example.
    """
    examples = None
    try:
        examples = read_examples(run_dir)
    except UserError as error:
        tell(f"{first_line(error)} The page is without these examples.")
    try:
        return Shown(read_history(run_dir, tell), examples)
    except UserError as error:
        if examples is None:
            raise
        tell(f"{first_line(error)} The page is without metrics of this run.")
    nothing = {"step": np.empty(0)}
    return Shown(History(run_dir.resolve().name, read_recipe(run_dir, tell), nothing, nothing), examples)


def read_runs(runs: Sequence[Path], tell: Callable[[str], None]) -> dict[Path, Shown]:
    """What there is to show of each run; one that is damaged is told of and left out if there is another.

    Raises:
        UserError: one is no run, or nothing of any can be shown.
    """
    found, failed = {}, []
    for run in runs:
        try:
            found[run] = read_run(run, tell)
        except UserError as error:
            # whoever names what never was a run means another directory
            if not any(os.path.lexists(run / name) for name in ("logs", RECIPE, EXAMPLES)):
                raise
            failed.append(error)
    if not found:
        raise failed[0]
    for error in failed:
        tell(f"{first_line(error)} This run is left out.")
    return found
