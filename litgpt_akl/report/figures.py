"""The figures of the report, by Bokeh: panels of a run's metrics, and distributions at a position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from bokeh import models
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
class Panel:
    """What one figure is to show."""

    title: str
    unit: str
    lines: dict[str, str]
    """Columns of the training log, whose ``val_`` columns are the validation's, and what they are called."""
    numbers: Literal["real", "log", "share", "whole", "tiny"] = "real"
    """How values are written, and whether the axis is logarithmic."""
    spread: str | None = None
    """The column of the squares' mean, if a band of one standard deviation is drawn around the line."""


NATS, SHARE = "nats per token", "share"
ROLES = {"accuracy": "student's accuracy", "confidence": "student's confidence"}
ROLES |= {"teacher_accuracy": "teacher's accuracy", "teacher_confidence": "teacher's confidence"}
SPEEDS = {"tokens_per_second": "all tokens", "response_tokens_per_second": "response tokens"}

PANELS = (
    Panel("Loss", NATS, {"loss": "loss"}),
    Panel("Divergence", NATS, {"divergence": "divergence"}),
    Panel("Cross-entropy", NATS, {"cross_entropy": "student", "teacher_cross_entropy": "teacher"}),
    Panel("Forward and reverse KL", NATS, {"forward_kl": "forward", "reverse_kl": "reverse"}),
    Panel("Weight of forward KL, h", SHARE, {"h": "h"}, "share", spread="h_squared"),
    Panel("Head gap and tail gap", "sum of |p - q|", {"head_gap": "head", "tail_gap": "tail"}),
    Panel("Agreement and gap closed", SHARE, {"agreement": "same top token", "gap_closed": "gap closed"}, "share"),
    Panel("Accuracy and confidence", SHARE, ROLES, "share"),
    Panel("Learning rate", "learning rate", {"learning_rate": "learning rate"}, "tiny"),
    Panel("Gradient norm", "norm", {"gradient_norm": "gradient norm"}, "log"),
    Panel("Throughput", "tokens/s", SPEEDS, "whole"),
    Panel("Memory", "GB", {"memory_gb": "memory", "memory_reserved_gb": "reserved by the allocator"}),
)
ABOUT = {
    "Loss": "What is minimised.",
    "Divergence": "From the teacher to the student.",
    "Cross-entropy": "Of the recorded responses.",
    "Forward and reverse KL": "KL(teacher, student) and KL(student, teacher).",
    "Weight of forward KL, h": "Head gap / (head gap + tail gap); the band is one standard deviation over tokens.",
    "Head gap and tail gap": "Where the student still differs from its teacher.",
    "Agreement and gap closed": "Gap closed: of the cross-entropy's distance to the teacher at step 0.",
    "Accuracy and confidence": "How often the top token is the recorded one, and the probability it has.",
    "Gradient norm": "Before clipping.",
    "Throughput": "While it trains; validating and saving do not count.",
    "Memory": "Peak on a GPU, of the process on a CPU.",
}
"""What the page says of a panel."""

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
        **dict.fromkeys(("active_drag", "background_fill_color", "border_fill_color", "outline_line_color")),
        **options,
    )
    plot.toolbar.logo, plot.toolbar.autohide, plot.toolbar_inner = None, True, True
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_color, plot.xgrid.visible = None, False
    return plot


# figure.line and the like make three glyphs of one, for selections that there are none of
def add_line(plot: figure, x: np.ndarray, y: np.ndarray, name: str | None, **style) -> None:
    """A line; with a name, its values are told at the pointer."""
    plot.add_glyph(models.ColumnDataSource({"x": x, "y": y}), models.Line(x="x", y="y", **style), name=name)


def add_dots(plot: figure, x: np.ndarray, y: np.ndarray, name: str, colour: str, **columns: list[str]) -> None:
    """A dot for each value, told at the pointer together with ``columns``."""
    dots = models.Scatter(x="x", y="y", size=6, fill_color=colour, line_color=None)
    plot.add_glyph(models.ColumnDataSource({"x": x, "y": y, **columns}), dots, name=name)


def _draw(panel: Panel, runs: Sequence[History]) -> Drawing | None:
    logs = [log for run in runs for log in (run.training, run.validation)]
    values = np.concatenate([np.empty(0), *(log[name] for log in logs for name in panel.lines if name in log)])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    logarithmic = panel.numbers == "log" and (values > 0).all()
    plot = empty_figure(panel.unit, "log" if logarithmic else "linear")
    if logarithmic:
        plot.yaxis.ticker = models.FixedTicker(ticks=_log_ticks(values))
        plot.yaxis.formatter = models.BasicTickFormatter()
    plot.xaxis.formatter, plot.xaxis.axis_label = models.NumeralTickFormatter(format="0,0"), "step"
    if panel.numbers == "tiny":
        plot.yaxis.formatter = models.PrintfTickFormatter(format="%.1e")
    elif panel.numbers in TICKS:
        plot.yaxis.formatter = models.NumeralTickFormatter(format=TICKS[panel.numbers])
    drawing, alone = Drawing(panel.title, ABOUT.get(panel.title, ""), plot), len(runs) == 1
    for number, run in enumerate(runs):
        for place, (column, label) in enumerate(panel.lines.items()):
            colour = COLOURS[(place if alone else number) % len(COLOURS)]
            label = label if alone else f"{run.name}: {label}"
            key = Key(label, colour, DASHES[0 if alone else place % len(DASHES)])
            _draw_training(drawing, run.training, column, panel.spread, key, behind=alone)
            key = Key(f"{label}, validation", colour, "dashed", marker=True)
            _draw_validation(drawing, run.validation, column, key)
    add_hover(plot, VALUES.get(panel.numbers, "@y{0,0.0000}"))
    return drawing


def _log_ticks(values: np.ndarray) -> list[float]:
    """1, 2, 5, 10 and so on around the values, or powers of ten: within two decades Bokeh's own are evenly spaced."""
    low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
    steps = (1, 2, 5) if high - low <= 4 else (1,)
    return [step * 10.0**power for power in np.arange(low, high + 1) for step in steps]


def _draw_training(
    drawing: Drawing, columns: dict[str, np.ndarray], column: str, spread: str | None, key: Key, behind: bool
) -> None:
    x, y = _points(columns, column)
    if len(x) == 0:
        return
    if spread in columns:
        _draw_band(drawing.figure, *finite(columns["step"], columns[column], columns[spread]), key.colour)
    if len(x) >= NOISY:
        if behind:
            add_line(drawing.figure, *thin(x, y), None, line_color=key.colour, line_alpha=0.3)
        x, y = x[_evenly(len(x))], running_mean(y)[_evenly(len(x))]
    add_line(drawing.figure, x, y, key.label, line_color=key.colour, line_dash=key.dash, line_width=2)
    drawing.keys.append(key)


def _draw_validation(drawing: Drawing, columns: dict[str, np.ndarray], column: str, key: Key) -> None:
    x, y = thin(*_points(columns, column), POINTS // 5)
    if len(x) == 0:
        return
    add_line(drawing.figure, x, y, None, line_color=key.colour, line_dash=key.dash, line_width=1.5)
    add_dots(drawing.figure, x, y, key.label, key.colour)
    drawing.keys.append(key)


def _draw_band(plot: figure, x: np.ndarray, mean: np.ndarray, square: np.ndarray, colour: str) -> None:
    if len(x) >= NOISY:
        mean, square = running_mean(mean), running_mean(square)
    kept = _evenly(len(x))
    mean, deviation = mean[kept], np.sqrt(np.maximum(square - mean**2, 0))[kept]
    low, high = np.float32(mean - deviation), np.float32(mean + deviation)
    source = models.ColumnDataSource({"x": np.int32(x[kept]), "low": low, "high": high})
    plot.add_glyph(source, models.VArea(x="x", y1="low", y2="high", fill_color=colour, fill_alpha=0.18))


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
    plot.add_tools(models.HoverTool(renderers=named, tooltips=row, mode="vline", point_policy="snap_to_data"))


LOWEST = 1e-9
"""Probabilities below are drawn as if they were this."""


def draw_distribution(
    position: dict[str, Any], students: Sequence[tuple[Key, dict[str, Any]]], teacher_colour: str
) -> Drawing:
    """Probabilities of the tokens that the teacher holds most probable, and of all others together; its head is shaded.

    ``position``, from ``examples.json``, is asked about the teacher, and what stands beside a student's key about it.
    """
    curves = [(Key("teacher", teacher_colour, marker=True), [*position["p"], position["p_others"]])]
    curves += [(key, [*of["q"], of["q_others"]]) for key, of in students]
    names = [*position["tokens"], f"{position['others']:,} others"]
    places = np.append(np.arange(len(names) - 1), len(names) - 0.5)
    lowest = max(LOWEST, min(min(values) for _, values in curves))
    y_range = float(10 ** np.floor(np.log10(lowest))), 1.5
    plot = empty_figure("probability", "log", height=330, y_range=y_range)
    _name_tokens(plot, names, places)
    head = min(position["head"], len(names) - 1)
    plot.add_layout(
        models.BoxAnnotation(left=-0.5, right=head - 0.5, fill_color=COLOURS[5], fill_alpha=0.3, line_color=None)
    )
    context = printable(position["context"]).replace("\n", " \u21b5 ")
    title = f"\u2026 {context} [{one_line(position['next'], 40)}]"
    drawing = Drawing(title, _about(position, students), plot)
    tokens = [*(one_line(token, 40) for token in position["tokens"]), names[-1]]
    for key, values in curves:
        y = np.maximum(values, LOWEST).astype(np.float32)
        add_line(plot, places[:-1], y[:-1], None, line_color=key.colour, line_dash=key.dash, line_width=1.5)
        add_dots(plot, places, y, key.label, key.colour, token=tokens)
        drawing.keys.append(key)
    add_hover(plot, "@y{0.000000}", "@token")
    return drawing


def _name_tokens(plot: figure, names: list[str], places: np.ndarray) -> None:
    plot.xaxis.ticker = places.tolist()
    texts = [*(one_line(name, 14) for name in names[:-1]), names[-1]]
    # as they are: text between dollars would be taken for a formula
    labels = (models.PlainText(text=text) for text in texts)
    plot.xaxis.major_label_overrides = dict(zip(places.tolist(), labels, strict=True))
    plot.xaxis.major_label_orientation = "vertical"
    plot.x_range.range_padding = 0.02


def _about(position: dict[str, Any], students: Sequence[tuple[Key, dict[str, Any]]]) -> str:
    tokens = "1 token" if position["head"] == 1 else f"{position['head']:,} tokens"
    gaps = (f"{key.label}: head gap {of['head_gap']:.3f}, tail gap {of['tail_gap']:.3f}" for key, of in students)
    return f"Head (shaded): {tokens} with {position['head_mass']:.1%} of the teacher's mass. {'; '.join(gaps)}."
