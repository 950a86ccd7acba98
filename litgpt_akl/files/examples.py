"""The examples that a run keeps beside its weights: snapshots of what both models say, at first and last."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from litgpt_akl.files.directories import set_aside, write_file
from litgpt_akl.files.manifest import EXAMPLES
from litgpt_akl.files.reading import explain_damage, with_checksum, without_checksum
from litgpt_akl.messages import UserError, first_line, reason

HIGHEST = 1e6
"""Above any probability, mass, gap or divergence."""


def read_examples(run_dir: Path) -> dict[str, Any] | None:
    """The snapshots ``first`` and ``latest`` of a run; None if there are none. Raises UserError if they are damaged."""
    path = run_dir / EXAMPLES
    if not os.path.lexists(path):
        return None
    with explain_damage(path, "examples of a run", "Delete it: the page is then without examples."):
        if not path.is_file():
            raise ValueError("it is no file")
        examples = without_checksum(json.loads(path.read_text(encoding="utf-8")))
        return {moment: _checked(examples[moment]) for moment in ("first", "latest")}


def write_examples(run_dir: Path, first: dict[str, Any], latest: dict[str, Any]) -> None:
    """Replace the snapshots of a run; raises OSError if the disk does not take them."""
    content = with_checksum({"first": first, "latest": latest})
    write_file(run_dir / EXAMPLES, json.dumps(content).encode("utf-8"))


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


TEXT = {"tokens": [[str, float, [[str, float]], [[str, float]]]], "rest": str}
POSITION = {"context": str, "next": str, "tokens": [str], "p": [float], "q": [float], "head": int, "others": int}
POSITION |= dict.fromkeys(("p_others", "q_others", "head_mass", "head_gap", "tail_gap"), float)
SNAPSHOT = {
    "step": int,
    "note": str,
    "answers": [{"prompt": str, "recorded?": TEXT, "teacher?": {**TEXT, "ids?": [int]}, "student?": TEXT}],
    "positions": [{**POSITION, "next_rank?": int, "next_p?": float, "next_q?": float}],
    # earlier versions kept none of these
    "sample?": {"texts": str, "labels": str, "place": str, "parts": [[bool, str]]},
    "run?": {"steps": int, "facts": {}},
}
"""The shape of a snapshot: a list of one is of any length, what ends in a question mark may be missing or null."""


def _as_today(snapshot: dict[str, Any]) -> dict[str, Any]:
    """A snapshot of an earlier version, whose answers were texts alone; raises one of Python's own errors."""
    if "prompts" not in snapshot:
        return snapshot
    prompts, by_role = snapshot["prompts"], {"teacher": snapshot["teacher_answers"], "student": snapshot["answers"]}
    _check(by_role | {"prompts": prompts}, {"prompts": [str], "student": [str], "teacher?": [str]}, "it")
    answers = [{"prompt": prompt} for prompt in prompts]
    for role, texts in by_role.items():
        for answer, text in zip(answers, texts or (), strict=texts is not None):
            answer[role] = {"tokens": [], "rest": text}
    kept = {name: value for name, value in snapshot.items() if name not in ("prompts", "teacher_answers")}
    return {**kept, "answers": answers}


def _checked(snapshot: Any) -> dict[str, Any]:
    snapshot = _as_today(snapshot)
    _check(snapshot, SNAPSHOT, "a snapshot")
    for of in snapshot["positions"]:
        if len({len(of[name]) for name in ("tokens", "p", "q")}) != 1 or not of["p"]:
            raise ValueError("a position has more tokens than probabilities, or none")
    return snapshot


def _check(value: Any, shape: Any, name: str) -> None:
    """See that a page can show it; raises TypeError, KeyError or ValueError."""
    kind = shape if isinstance(shape, type) else type(shape)
    if not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{name} is {type(value).__name__} in place of {kind.__name__}")
    if kind is float and (value < 0 or value > HIGHEST):
        raise ValueError(f"{name} is {value:g}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            optional = key.endswith("?")
            if not optional or value.get(key[:-1]) is not None:
                _check(value[key.removesuffix("?")], inner, key)
    elif isinstance(shape, list):
        if len(shape) > 1 and len(value) != len(shape):
            raise ValueError(f"{name} has {len(value)} entries in place of {len(shape)}")
        for inner, item in zip(shape * len(value) if len(shape) == 1 else shape, value, strict=True):
            _check(item, inner, name)
