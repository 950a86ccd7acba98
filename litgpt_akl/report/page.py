"""The page itself: one HTML file with all that it needs in it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.core.serialization import Serializer
from bokeh.document import Document
from bokeh.plotting import figure
from bokeh.resources import INLINE
from jinja2 import Environment, PackageLoader

from litgpt_akl.files.directories import write_file
from litgpt_akl.report.figures import COLOURS, Drawing, Key, draw_distribution, draw_panels, printable
from litgpt_akl.report.history import History, finite

VALUES = (
    ("loss", "Loss", "nats per token", "{:.3f}"),
    ("divergence", "Divergence", "nats per token", "{:.3f}"),
    ("cross_entropy", "Cross-entropy", "nats per token", "{:.3f}"),
    ("teacher_cross_entropy", "Teacher's cross-entropy", "nats per token", "{:.3f}"),
    ("ppl", "Perplexity", "", "{:,.2f}"),
    ("forward_kl", "Forward KL", "nats per token", "{:.3f}"),
    ("reverse_kl", "Reverse KL", "nats per token", "{:.3f}"),
    ("agreement", "Agreement on the top token", "", "{:.1%}"),
    ("gap_closed", "Gap closed", "", "{:.1%}"),
)
"""Rows of the table of validations: name in the log, name on the page, unit, how it is written."""


@dataclass
class Shown:
    """A run as the page shows it."""

    history: History
    examples: dict[str, Any] | None = None
    """What :mod:`litgpt_akl.training.reporting` has kept."""


def write_page(path: Path, runs: Sequence[Shown]) -> None:
    """Write the page of a run, or of several over each other; it appears whole or not at all.

    Raises:
        OSError: the disk does not take it.
    """
    write_file(path, make_page(runs).encode("utf-8"))


def make_page(runs: Sequence[Shown]) -> str:
    """The page's HTML, with the plotting library and all data inside."""
    histories = [run.history for run in runs]
    environment = Environment(loader=PackageLoader("litgpt_akl", "report"), autoescape=True, trim_blocks=True)
    environment.filters["printable"] = printable
    panels, distributions = draw_panels(histories), draw_distributions(runs)
    figures = [_item(drawing.figure, number) for number, drawing in enumerate((*panels, *distributions))]
    return environment.get_template("page.html").render(
        title=", ".join(history.name for history in histories),
        facts=[_facts(history) for history in histories],
        names=[history.name for history in histories],
        colours=COLOURS,
        refreshed=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        table=_table(histories),
        panels=panels,
        distributions=distributions,
        answers=_answers(runs),
        samples=_samples(runs),
        notes=_notes(runs),
        # within a script only these end it, or its JSON
        figures=[json.dumps(item).replace("<", "\\u003c") for item in figures],
        bokeh=INLINE.js_raw[0],
    )


def _item(plot: figure, number: int) -> dict[str, Any]:
    """What ``Bokeh.embed.embed_item`` draws into the place with that number.

    It is what Bokeh's ``json_item`` makes, without its walks through all of a figure, which took longer than this.
    """
    document = Document(title="").to_json(deferred=False)
    document["roots"] = [Serializer(deferred=False).encode(plot)]
    version = document["version"]
    return {"target_id": f"figure-{number}", "root_id": plot.id, "doc": document, "version": version}


def _facts(history: History) -> dict[str, str]:
    """What a run is, from its recipe and how far it has come."""
    recipe = history.recipe
    distill, train, data = (recipe.get(name) or {} for name in ("distill", "train", "data"))
    source = data.get("init_args") or {}
    path = next((source[name] for name in ("json_path", "path", "data_path", "download_dir") if source.get(name)), "")
    steps = np.concatenate([history.training["step"], history.validation["step"]])
    facts = {
        "Student": recipe.get("checkpoint_dir"),
        "Teacher": recipe.get("teacher_checkpoint_dir") or recipe.get("checkpoint_dir"),
        "Objective": _objective(distill),
        "Data": f"{str(data.get('class_path', '')).rpartition('.')[2]} {path}",
        "Steps": f"{int(steps.max()):,}, {train.get('global_batch_size')} records each" if len(steps) else None,
    }
    (tokens,) = finite(history.training.get("tokens", np.empty(0)))
    if len(tokens):
        facts["Tokens"] = f"{int(tokens[-1]):,}"
    return {name: str(value) for name, value in facts.items() if value} if recipe else {}


def _objective(distill: dict[str, Any]) -> str:
    share = distill.get("kd_ratio", 0.5)
    parts = {str(distill.get("divergence")): share, "cross-entropy": 1 - share}
    terms = (f"{weight:.3g} {name}" if weight < 1 else name for name, weight in parts.items() if weight > 0)
    return f"{' + '.join(terms)} (--distill.kd_ratio {share:g})"


def _table(histories: Sequence[History]) -> dict[str, Any] | None:
    """Validations: of one run its first and its last, of several the last of each."""
    columns = [(history, -1) for history in histories if len(history.validation["step"])]
    if len(histories) == 1 and columns and len(histories[0].validation["step"]) > 1:
        columns = [(histories[0], 0), *columns]
    if not columns:
        return None
    steps = [f"step {int(history.validation['step'][place]):,}" for history, place in columns]
    names = [step if len(histories) == 1 else f"{h.name}, {step}" for (h, _), step in zip(columns, steps, strict=True)]
    rows = []
    for name, title, unit, written in VALUES:
        values = [history.validation.get(name, np.full(1, np.nan))[place] for history, place in columns]
        if np.isfinite(values).any():
            cells = [written.format(value) if np.isfinite(value) else "-" for value in values]
            rows.append((title, unit, cells))
    return {"columns": names, "rows": rows}


def _snapshots(runs: Sequence[Shown]) -> list[tuple[Key, dict[str, Any]]]:
    """Moments with examples, and their keys: of one run its first and its latest, of several the latest of each.

    Colours are those of the other figures: of several runs each has its own.
    """
    if len(runs) > 1:
        keys = [Key(run.history.name, colour, marker=True) for run, colour in zip(runs, cycle(COLOURS))]
        return [(key, run.examples["latest"]) for key, run in zip(keys, runs, strict=True) if run.examples]
    if not runs[0].examples:
        return []
    first, latest = (runs[0].examples[when] for when in ("first", "latest"))
    snapshots = [(Key(f"student, step {latest['step']:,}", COLOURS[0], marker=True), latest)]
    if first["step"] < latest["step"]:
        snapshots.insert(0, (Key(f"student, step {first['step']:,}", COLOURS[2], "dotted", marker=True), first))
    return snapshots


def draw_distributions(runs: Sequence[Shown]) -> list[Drawing]:
    """A drawing for each position of the last snapshot, with those that have the same position."""
    snapshots = _snapshots(runs)
    if not snapshots:
        return []
    of_all = [(key, of) for key, snapshot in snapshots for of in snapshot["positions"]]
    drawings = []
    for position in snapshots[-1][1]["positions"]:
        what = position["context"], position["tokens"]
        same = [(key, of) for key, of in of_all if (of["context"], of["tokens"]) == what]
        drawings.append(draw_distribution(position, same, COLOURS[1] if len(runs) == 1 else COLOURS[-1]))
    return drawings


def _answers(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """Prompts of the last snapshot, each with the answers that there are to it, the teacher's first."""
    snapshots = _snapshots(runs)
    if not snapshots:
        return []
    shown = []
    for answer in snapshots[-1][1]["answers"]:
        texts = [("teacher", answer.get("teacher"))]
        texts += [
            (key.label, other.get("student"))
            for key, snapshot in snapshots
            for other in snapshot["answers"]
            if other["prompt"] == answer["prompt"]
        ]
        texts = [(name, "".join(token[0] for token in text["tokens"]) + text["rest"]) for name, text in texts if text]
        shown.append({"prompt": answer["prompt"], "answers": texts})
    return shown


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


def _notes(runs: Sequence[Shown]) -> list[str]:
    return sorted({run.examples["latest"]["note"] for run in runs if run.examples and run.examples["latest"]["note"]})
