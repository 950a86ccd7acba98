"""The page itself: one HTML file with all that it needs in it."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from bokeh.core.serialization import Serializer
from bokeh.document import Document
from bokeh.plotting import figure
from bokeh.resources import INLINE
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from litgpt_akl.config.recipe import options_of
from litgpt_akl.files.directories import write_file
from litgpt_akl.messages import CONTROL, masked
from litgpt_akl.report.comparison import comparison
from litgpt_akl.report.figures import COLOURS, draw_panels
from litgpt_akl.report.history import History
from litgpt_akl.report.summary import cards, last_step, verdict

VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
LIGHTEST, HEATS = 0.05, 8
"""A token's KL in nats from which it is marked, and the shades of marks; each stands for twice as much."""
BARS = 10
"""Tokens of a distribution that are shown, and the recorded one."""
PATIENCE = 600.0
"""Seconds without a new page after which one that reloads itself gives up, if validations are not rarer still."""


@dataclass
class Shown:
    """A run as the page shows it."""

    history: History
    examples: dict[str, Any] | None = None
    """What :mod:`litgpt_akl.training.examples` has kept."""


def printable(text: str) -> str:
    """The same text without credentials; what controls a writing direction or a terminal as replacement signs."""
    return masked(CONTROL.sub("\ufffd", text.replace("\r\n", "\n")))


def one_line(text: str, length: int) -> str:
    """A token's text, at most ``length`` characters, with its white space visible."""
    text = "".join(VISIBLE.get(character, character) for character in printable(text))
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def write_page(path: Path, runs: Sequence[Shown], goes_on: bool = False, stopped: str | None = None) -> None:
    """Write the page of a run, or of several over each other; it appears whole or not at all.

    While a run ``goes_on`` its page reloads itself; ``stopped`` says how one has ended that was not finished.

    Raises:
        OSError: the disk does not take it.
    """
    write_file(path, make_page(runs, goes_on, stopped).encode("utf-8"))


def make_page(runs: Sequence[Shown], goes_on: bool = False, stopped: str | None = None) -> str:
    """The page's HTML, with the plotting library and all data inside."""
    began, histories = time.perf_counter(), [run.history for run in runs]
    environment = Environment(loader=PackageLoader("litgpt_akl", "report"), autoescape=True, trim_blocks=True)
    # whatever text is put in; what is markup already has been through this
    environment.finalize = lambda item: printable(item) if type(item) is str else item
    tips: list[Any] = []
    drawings, answers = draw_panels(histories), _answers(runs, tips)
    figures = [_item(drawing.figure, number) for number, drawing in enumerate(drawings)]
    alone = len(runs) == 1
    return environment.get_template("page.html").render(
        **_heading(runs),
        alone=alone,
        verdict=verdict(histories[0]) if alone else None,
        cards=cards(histories[0]) if alone else [],
        comparison=None if alone else comparison(histories),
        goes_on=goes_on,
        stopped=stopped,
        patience=_patience(histories[0]),
        refreshed=datetime.now().astimezone(),
        names=[history.name for history in histories],
        colours=COLOURS,
        drawings=drawings,
        distributions=distributions(runs),
        answers=answers,
        heats=[LIGHTEST * 2**heat for heat in range(HEATS)],
        samples=_samples(runs),
        notes=sorted(
            {run.examples["latest"]["note"] for run in runs if run.examples and run.examples["latest"]["note"]}
        ),
        settings=[_settings(run) for run in runs],
        figures=_as_script(figures),
        tips=_as_script(tips),
        bokeh=Markup(INLINE.js_raw[0]),
        seconds=time.perf_counter() - began,
    )


def _as_script(data: Any) -> Markup:
    """JSON within a script, which nothing but a < can end."""
    return Markup(CONTROL.sub("\ufffd", json.dumps(data, ensure_ascii=False)).replace("<", "\\u003c"))


def _item(plot: figure, number: int) -> dict[str, Any]:
    """What ``Bokeh.embed.embed_item`` draws into the place with that number.

    It is what Bokeh's ``json_item`` makes, without its walks through all of a figure, which took longer than this.
    """
    document = Document(title="").to_json(deferred=False)
    document["roots"] = [Serializer(deferred=False).encode(plot)]
    version = document["version"]
    return {"target_id": f"figure-{number}", "root_id": plot.id, "doc": document, "version": version}


def _patience(history: History) -> float:
    seconds = history.training.get("seconds_per_step", ())
    interval = (history.recipe.get("eval") or {}).get("interval")
    if len(seconds) == 0 or not isinstance(interval, int) or not math.isfinite(seconds[-1]):
        return PATIENCE
    return max(PATIENCE, 3 * interval * float(seconds[-1]))


def _heading(runs: Sequence[Shown]) -> dict[str, Any]:
    """Student, teacher, data, day and how far it has come."""
    history, examples = runs[0].history, runs[0].examples
    recipe = history.recipe
    data = recipe.get("data") or {}
    source = data.get("init_args") or {}
    paths = (source.get(name) for name in ("json_path", "path", "data_path", "download_dir"))
    planned = ((examples or {}).get("latest", {}).get("run") or {}).get("steps")
    teacher = recipe.get("teacher_checkpoint_dir") or recipe.get("checkpoint_dir")
    facts = [
        _name(next(filter(None, paths), None) or str(data.get("class_path") or "").rpartition(".")[2]),
        _objective(recipe.get("distill") or {}) if recipe else None,
        f"KL on the teacher's {history.kept_ids:,} most probable ids and all others as one"
        if history.kept_ids
        else None,
        f"step {last_step(history):,}" + (f" of {planned:,}" if planned else ""),
        f"{history.logged.day} {history.logged:%B %Y}" if history.logged else None,
    ]
    if len(runs) > 1:
        return {"student": f"{len(runs)} runs", "teacher": None, "facts": [run.history.name for run in runs]}
    return {
        "student": _name(recipe.get("checkpoint_dir")) or history.name,
        "teacher": _name(teacher),
        "facts": [fact for fact in facts if fact],
    }


def _name(path: Any) -> str:
    """A path's last part."""
    return Path(str(path)).name or str(path) if path else ""


def _objective(distill: dict[str, Any]) -> str:
    share = distill.get("kd_ratio", 0.5)
    parts = {str(distill.get("divergence")): share, "cross-entropy": 1 - share}
    return " + ".join(f"{weight:.3g} {name}" if weight < 1 else name for name, weight in parts.items() if weight > 0)


def _settings(run: Shown) -> dict[str, Any]:
    """Sizes, device and versions, and all options by their groups."""
    latest = run.examples["latest"] if run.examples else {}
    groups: dict[str, dict[str, str]] = {}
    for name, given in options_of(run.history.recipe).items():
        group, _, rest = name.replace(".init_args", "").rpartition(".") if "." in name else ("", "", name)
        groups.setdefault(group, {})[rest] = "-" if given is None else str(given)
    facts = (latest.get("run") or {}).get("facts", {})
    return {"name": run.history.name, "facts": {name: str(fact) for name, fact in facts.items()}, "groups": groups}


def _snapshots(runs: Sequence[Shown]) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Moments with examples, with label, colour and run of each: of one run its first and latest, else the latest."""
    if len(runs) > 1:
        keys = [(run.history.name, colour, n) for n, (run, colour) in enumerate(zip(runs, cycle(COLOURS)))]
        return [(*key, run.examples["latest"]) for key, run in zip(keys, runs, strict=True) if run.examples]
    if not runs[0].examples:
        return []
    first, latest = (runs[0].examples[when] for when in ("first", "latest"))
    if first["step"] == latest["step"]:
        return [(f"student, step {latest['step']:,}", COLOURS[0], 0, latest)]
    return [
        (f"student before, step {first['step']:,}", COLOURS[2], 0, first),
        (f"student now, step {latest['step']:,}", COLOURS[0], 0, latest),
    ]


def distributions(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """The last snapshot's positions: the teacher's most probable tokens, and what it and each student give them."""
    snapshots, shown = _snapshots(runs), []
    for position in snapshots[-1][3]["positions"] if snapshots else ():
        what = position["context"], position["tokens"]
        of_all = [(key, of) for *key, snapshot in snapshots for of in snapshot["positions"]]
        same = [(key, of) for key, of in of_all if (of["context"], of["tokens"]) == what]
        teacher = ["teacher", COLOURS[1] if len(runs) == 1 else "var(--faint)", None]
        # earlier versions did not keep which token was recorded, only what it says
        rank = position.get("next_rank")
        if rank is None and position["next"] in position["tokens"]:
            rank = position["tokens"].index(position["next"])
        rows = []
        for place, token in enumerate(position["tokens"]):
            if place < BARS or place == rank:
                rows.append((place, token, [position["p"][place], *(of["q"][place] for _, of in same)]))
        if rank is not None and rank >= len(position["tokens"]):
            rows.append((rank, position["next"], [position["next_p"], *(of.get("next_q", math.nan) for _, of in same)]))
        highest = max(max(values) for *_, values in rows) or 1.0
        shown.append(
            {
                "context": position["context"].replace("\n", " \u21b5 "),
                "next": one_line(position["next"], 40),
                "keys": [teacher, *(key for key, _ in same)],
                "rows": [
                    {
                        "token": one_line(token, 16),
                        "is_recorded": place == rank,
                        "is_in_head": place < position["head"],
                        "rank": place + 1,
                        "values": values,
                        "widths": [100 * max(0.0, min(each / highest, 1.0)) if each == each else 0 for each in values],
                    }
                    for place, token, values in rows
                ],
                "about": _about(position, same if len(runs) == 1 else ()),
            }
        )
    return shown


def _about(position: dict[str, Any], students: Sequence[tuple[Sequence[Any], dict[str, Any]]]) -> str:
    tokens = "1 token" if position["head"] == 1 else f"{position['head']:,} tokens"
    gaps = (f"{key[0]}: head gap {of['head_gap']:.3f}, tail gap {of['tail_gap']:.3f}" for key, of in students)
    head = f"Head (shaded): {tokens} with {position['head_mass']:.1%} of the teacher's mass."
    return " ".join((head, *(f"{gap.capitalize()}." for gap in gaps)))


def _answers(runs: Sequence[Shown], tips: list[Any]) -> list[dict[str, Any]]:
    """Prompts of the last snapshot, each with the texts that there are to it; what tokens tell goes to ``tips``."""
    snapshots, shown = _snapshots(runs), []
    for place, answer in enumerate(snapshots[-1][3]["answers"] if snapshots else ()):
        same = []
        for name, _, run, snapshot in snapshots:
            # two records may have one prompt
            others = [*snapshot["answers"][place : place + 1], *snapshot["answers"]]
            other = next((other for other in others if other["prompt"] == answer["prompt"]), {})
            same.append((name, run, other))
        texts = [_text(name, run, of["student"], [of["student"]], tips) for name, run, of in same if of.get("student")]
        for role in ("teacher", "recorded"):
            if answer.get(role):
                views = [of[role] for *_, of in same if of.get(role) and _plain(of[role]) == _plain(answer[role])]
                text = answer[role] if len(runs) == 1 else {"tokens": [], "rest": _plain(answer[role])}
                texts.append(_text(role, None, text, views, tips))
        shown.append({"prompt": answer["prompt"], "texts": texts})
    return shown


def _plain(text: dict[str, Any]) -> str:
    return "".join(token[0] for token in text["tokens"]) + text["rest"]


def _text(
    name: str, run: int | None, text: dict[str, Any], views: Sequence[dict[str, Any]], tips: list[Any]
) -> dict[str, Any]:
    """A text as the page shows it: its tokens with the shade of their KL, what follows them, and mean KLs of views."""
    kls = [sum(token[1] for token in view["tokens"]) / len(view["tokens"]) for view in views if view["tokens"]]
    found = {"name": name, "run": run, "kls": kls, "tokens": [], "rest": text["rest"]}
    if masked(_plain(text)) != _plain(text):
        # the parts of a credential do not look like one
        return {**found, "rest": _plain(text)}
    for piece, value, *likely in text["tokens"]:
        heat = 0 if not value >= LIGHTEST else min(1 + int(math.log2(value / LIGHTEST)), HEATS)
        if not piece.strip():
            # what cannot be seen is no less of a token
            piece = "".join(VISIBLE.get(character, character) for character in piece) + "\n" * piece.count("\n")
        found["tokens"].append((piece or "\u00b7", heat))
        tips.append([_finite(value), *([[one_line(t, 24), _finite(p)] for t, p in of] for of in likely)])
    return found


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _samples(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """The first training sample of each run, and the names of the runs that share it."""
    shown: list[dict[str, Any]] = []
    for run in runs:
        sample = run.examples["latest"].get("sample") if run.examples else None
        if sample is None:
            continue
        same = next((other for other in shown if other["sample"] == sample), None)
        if same is None:
            shown.append({"names": [run.history.name], "sample": sample})
        else:
            same["names"].append(run.history.name)
    return shown
