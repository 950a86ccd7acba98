"""The teacher's and the student's distributions at one position, as figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import BoxAnnotation, PlainText
from bokeh.plotting import figure

from litgpt_akl.report.plots import COLOURS, Drawing, Key, add_dots, add_hover, add_line, empty_figure
from litgpt_akl.report.text import one_line, printable

LOWEST = 1e-9
"""Probabilities below are drawn as if they were this."""


def draw_distribution(
    position: dict[str, Any], students: Sequence[tuple[Key, dict[str, Any]]], teacher_colour: str
) -> Drawing:
    """Probabilities of the tokens that the teacher holds most probable, and of all others together; its head is shaded.

    Args:
        position: from ``examples.json``, for what it says of the teacher.
        students: how each is drawn, and the same position as it sees it.
        teacher_colour: of the teacher's line.
    """
    curves = [(Key("teacher", teacher_colour, marker=True), [*position["p"], position["p_others"]])]
    curves += [(key, [*of["q"], of["q_others"]]) for key, of in students]
    names = [*position["tokens"], f"{position['others']:,} others"]
    places = np.append(np.arange(len(names) - 1), len(names) - 0.5)
    plot = empty_figure("probability", "log", height=330, y_range=_range([values for _, values in curves]))
    _name_tokens(plot, names, places)
    head = min(position["head"], len(names) - 1)
    plot.add_layout(BoxAnnotation(left=-0.5, right=head - 0.5, fill_color=COLOURS[5], fill_alpha=0.3, line_color=None))
    drawing = Drawing(_title(position), _about(position, students), plot)
    tokens = [*(one_line(token, 40) for token in position["tokens"]), names[-1]]
    for key, values in curves:
        y = np.maximum(values, LOWEST).astype(np.float32)
        add_line(plot, places[:-1], y[:-1], None, line_color=key.colour, line_dash=key.dash, line_width=1.5)
        add_dots(plot, places, y, key.label, key.colour, token=tokens)
        drawing.keys.append(key)
    add_hover(plot, "@y{0.000000}", "@token")
    return drawing


def _range(curves: list[list[float]]) -> tuple[float, float]:
    lowest = max(LOWEST, min(min(values) for values in curves))
    return float(10 ** np.floor(np.log10(lowest))), 1.5


def _name_tokens(plot: figure, names: list[str], places: np.ndarray) -> None:
    plot.xaxis.ticker = places.tolist()
    texts = [*(one_line(name, 14) for name in names[:-1]), names[-1]]
    # as they are: text between dollars would be taken for a formula
    labels = {place: PlainText(text=text) for place, text in zip(places.tolist(), texts, strict=True)}
    plot.xaxis.major_label_overrides = labels
    plot.xaxis.major_label_orientation = "vertical"
    plot.x_range.range_padding = 0.02


def _title(position: dict[str, Any]) -> str:
    context = printable(position["context"]).replace("\n", " \u21b5 ")
    return f"\u2026 {context} [{one_line(position['next'], 40)}]"


def _about(position: dict[str, Any], students: Sequence[tuple[Key, dict[str, Any]]]) -> str:
    tokens = "1 token" if position["head"] == 1 else f"{position['head']:,} tokens"
    gaps = (f"{key.label}: head gap {of['head_gap']:.3f}, tail gap {of['tail_gap']:.3f}" for key, of in students)
    return f"Head (shaded): {tokens} with {position['head_mass']:.1%} of the teacher's mass. {'; '.join(gaps)}."
