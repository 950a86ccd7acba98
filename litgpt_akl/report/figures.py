"""The figures of the report, by Bokeh: panels of a run's metrics, and distributions at a position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from bokeh.models import (
    BasicTickFormatter,
    BoxAnnotation,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PlainText,
    PrintfTickFormatter,
)
from bokeh.models.glyphs import Glyph, Scatter, VArea
from bokeh.models.glyphs import Line as LineGlyph
from bokeh.plotting import figure

from litgpt_akl.messages import CONTROL, masked
from litgpt_akl.report.history import POINTS, History, finite, running_mean, thin

VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


def printable(text: str) -> str:
    """The same text without credentials; what controls a writing direction or a terminal as replacement signs."""
    return masked(CONTROL.sub("\ufffd", text.replace("\r\n", "\n")))


def one_line(text: str, length: int) -> str:
    """A token's text, at most ``length`` characters, with its white space visible."""
    text = "".join(VISIBLE.get(character, character) for character in printable(text))
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


@dataclass
class Line:
    """One quantity of a panel."""

    column: str
    """Of the training log; ``val_column`` is the validation's."""
    label: str
    spread: str | None = None
    """The column of the squares' mean, if a band of one standard deviation is drawn."""


@dataclass
class Panel:
    """What one figure is to show."""

    title: str
    unit: str
    lines: Sequence[Line]
    numbers: Literal["real", "log", "share", "whole", "tiny"] = "real"
    """How values are written, and whether the axis is logarithmic."""
    about: str = ""


PANELS = (
    Panel("Loss", "nats per token", [Line("loss", "loss")], about="What is minimised."),
    Panel("Divergence", "nats per token", [Line("divergence", "divergence")], about="From the teacher to the student."),
    Panel(
        "Cross-entropy",
        "nats per token",
        [Line("cross_entropy", "student"), Line("teacher_cross_entropy", "teacher")],
        about="Of the recorded responses.",
    ),
    Panel(
        "Forward and reverse KL",
        "nats per token",
        [Line("forward_kl", "forward"), Line("reverse_kl", "reverse")],
        about="KL(teacher, student) and KL(student, teacher).",
    ),
    Panel(
        "Weight of forward KL, h",
        "share",
        [Line("h", "h", spread="h_squared")],
        "share",
        "Head gap / (head gap + tail gap); the band is one standard deviation over tokens.",
    ),
    Panel(
        "Head gap and tail gap",
        "sum of |p - q|",
        [Line("head_gap", "head"), Line("tail_gap", "tail")],
        about="Where the student still differs from its teacher.",
    ),
    Panel(
        "Agreement and gap closed",
        "share",
        [Line("agreement", "same top token"), Line("gap_closed", "gap closed")],
        "share",
        "Gap closed: of the cross-entropy's distance to the teacher at step 0.",
    ),
    Panel(
        "Accuracy and confidence",
        "share",
        [
            Line("accuracy", "student's accuracy"),
            Line("confidence", "student's confidence"),
            Line("teacher_accuracy", "teacher's accuracy"),
            Line("teacher_confidence", "teacher's confidence"),
        ],
        "share",
        "How often the top token is the recorded one, and the probability it has.",
    ),
    Panel("Learning rate", "learning rate", [Line("learning_rate", "learning rate")], "tiny"),
    Panel("Gradient norm", "norm", [Line("gradient_norm", "gradient norm")], "log", "Before clipping."),
    Panel(
        "Throughput",
        "tokens/s",
        [Line("tokens_per_second", "all tokens"), Line("response_tokens_per_second", "response tokens")],
        "whole",
        "While it trains; validating and saving do not count.",
    ),
    Panel(
        "Memory",
        "GB",
        [Line("memory_gb", "memory"), Line("memory_reserved_gb", "reserved by the allocator")],
        about="Peak on a GPU, of the process on a CPU.",
    ),
)


COLOURS = ("#0072b2", "#d55e00", "#009170", "#b85c94", "#9a7400", "#6c7a89")
"""After Okabe and Ito, told apart by the colour-blind; at least 3 : 1 on white and on nearly black."""
DASHES = ("solid", "dashed", "dotted", "dotdash")
NOISY = 100
"""From so many points on a line is drawn as its running mean, with the points themselves behind it."""
TICKS = {"share": "0%", "whole": "0,0"}
VALUES = {"share": "@y{0.0%}", "whole": "@y{0,0}", "tiny": "@y"}
"""How Bokeh writes numbers on axes and at the pointer, where it is not as usual."""


@dataclass
class Key:
    """An entry of a figure's legend, which is part of the page."""

    label: str
    colour: str
    dash: str = "solid"
    marker: bool = False


@dataclass
class Drawing:
    """A figure and what the page says of it."""

    title: str
    about: str
    figure: figure
    keys: list[Key] = field(default_factory=list)


def draw_panels(runs: Sequence[History]) -> list[Drawing]:
    """A drawing for each of ``PANELS`` of which anything was logged; of several runs each has one colour."""
    return [drawing for panel in PANELS if (drawing := _draw(panel, runs)) is not None]


def empty_figure(unit: str, scale: Literal["linear", "log"] = "linear", height: int = 260, **options) -> figure:
    """A figure as wide as its place, which leaves scrolling to the page."""
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        y_axis_type=scale,
        y_axis_label=unit,
        tools="box_zoom,reset",
        active_drag=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )
    plot.toolbar.logo, plot.toolbar.autohide, plot.toolbar_inner = None, True, True
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_color, plot.xgrid.visible = None, False
    return plot


def add_line(plot: figure, x: np.ndarray, y: np.ndarray, name: str | None, **style) -> None:
    """A line; with a name, its values are told at the pointer."""
    _add(plot, ColumnDataSource({"x": x, "y": y}), LineGlyph(x="x", y="y", **style), name)


def add_dots(plot: figure, x: np.ndarray, y: np.ndarray, name: str, colour: str, **columns: list[str]) -> None:
    """A dot for each value, told at the pointer together with ``columns``."""
    dots = Scatter(x="x", y="y", size=6, fill_color=colour, line_color=None)
    _add(plot, ColumnDataSource({"x": x, "y": y, **columns}), dots, name)


def _add(plot: figure, source: ColumnDataSource, glyph: Glyph, name: str | None) -> None:
    # figure.line and the like make three glyphs of one, for selections that there are none of
    plot.add_glyph(source, glyph, name=name)


def _draw(panel: Panel, runs: Sequence[History]) -> Drawing | None:
    columns = [(run, line, of) for run in runs for line in panel.lines for of in ("training", "validation")]
    values = [getattr(run, of).get(line.column, np.empty(0)) for run, line, of in columns]
    values = np.concatenate([column[np.isfinite(column)] for column in values])
    if len(values) == 0:
        return None
    logarithmic = panel.numbers == "log" and (values > 0).all()
    plot = empty_figure(panel.unit, "log" if logarithmic else "linear")
    if logarithmic:
        plot.yaxis.ticker, plot.yaxis.formatter = FixedTicker(ticks=_log_ticks(values)), BasicTickFormatter()
    plot.xaxis.formatter, plot.xaxis.axis_label = NumeralTickFormatter(format="0,0"), "step"
    if panel.numbers == "tiny":
        plot.yaxis.formatter = PrintfTickFormatter(format="%.1e")
    elif panel.numbers in TICKS:
        plot.yaxis.formatter = NumeralTickFormatter(format=TICKS[panel.numbers])
    drawing, alone = Drawing(panel.title, panel.about, plot), len(runs) == 1
    for run, line, of in columns:
        place = panel.lines.index(line)
        colour = COLOURS[(place if alone else runs.index(run)) % len(COLOURS)]
        label = line.label if alone else f"{run.name}: {line.label}"
        if of == "training":
            key = Key(label, colour, DASHES[0 if alone else place % len(DASHES)])
            _draw_training(drawing, run.training, line, key, behind=alone)
        else:
            _draw_validation(drawing, run.validation, line, Key(f"{label}, validation", colour, "dashed", marker=True))
    add_hover(plot, VALUES.get(panel.numbers, "@y{0,0.0000}"))
    return drawing


def _log_ticks(values: np.ndarray) -> list[float]:
    """1, 2, 5, 10 and so on around the values, or powers of ten: within two decades Bokeh's own are evenly spaced."""
    low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
    steps = (1, 2, 5) if high - low <= 4 else (1,)
    return [step * 10.0**power for power in np.arange(low, high + 1) for step in steps]


def _draw_training(drawing: Drawing, columns: dict[str, np.ndarray], line: Line, key: Key, behind: bool) -> None:
    x, y = _points(columns, line.column)
    if len(x) == 0:
        return
    if line.spread in columns:
        _draw_band(drawing.figure, columns, line, key.colour)
    if len(x) >= NOISY:
        if behind:
            add_line(drawing.figure, *thin(x, y), None, line_color=key.colour, line_alpha=0.3)
        x, y = x[_evenly(len(x))], running_mean(y)[_evenly(len(x))]
    add_line(drawing.figure, x, y, key.label, line_color=key.colour, line_dash=key.dash, line_width=2)
    drawing.keys.append(key)


def _draw_validation(drawing: Drawing, columns: dict[str, np.ndarray], line: Line, key: Key) -> None:
    x, y = thin(*_points(columns, line.column), POINTS // 5)
    if len(x) == 0:
        return
    add_line(drawing.figure, x, y, None, line_color=key.colour, line_dash=key.dash, line_width=1.5)
    add_dots(drawing.figure, x, y, key.label, key.colour)
    drawing.keys.append(key)


def _draw_band(plot: figure, columns: dict[str, np.ndarray], line: Line, colour: str) -> None:
    x, mean, square = finite(columns["step"], columns[line.column], columns[line.spread])
    if len(x) >= NOISY:
        mean, square = running_mean(mean), running_mean(square)
    kept = _evenly(len(x))
    mean, deviation = mean[kept], np.sqrt(np.maximum(square - mean**2, 0))[kept]
    low, high = np.float32(mean - deviation), np.float32(mean + deviation)
    source = ColumnDataSource({"x": np.int32(x[kept]), "low": low, "high": high})
    plot.add_glyph(source, VArea(x="x", y1="low", y2="high", fill_color=colour, fill_alpha=0.18))


def _points(columns: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """What is finite of a column, and its steps, in half of the bytes that they were read in."""
    x, y = finite(columns["step"], columns.get(name, np.full(len(columns["step"]), np.nan)))
    return x.astype(np.int32), y.astype(np.float32)


def _evenly(count: int) -> np.ndarray:
    """Indices of at most ``POINTS // 2`` of ``count`` points, evenly spread."""
    return np.linspace(0, count - 1, min(count, POINTS // 2)).round().astype(np.int64)


def add_hover(plot: figure, value: str, place: str = "step @x{0,0}") -> None:
    """Names and values of what has a name, at the pointer."""
    named = [renderer for renderer in plot.renderers if renderer.name]
    row = f"<div>$name, {place}: <b>{value}</b></div>"
    plot.add_tools(HoverTool(renderers=named, tooltips=row, mode="vline", point_policy="snap_to_data"))


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
