"""The figures of the report, by Bokeh; colours of text, axes and grids are the page's CSS, which knows dark mode."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PrintfTickFormatter,
)
from bokeh.models.glyphs import Glyph, Scatter, VArea
from bokeh.models.glyphs import Line as LineGlyph
from bokeh.plotting import figure

from litgpt_akl.report.history import POINTS, History, finite, running_mean, thin
from litgpt_akl.report.panels import PANELS, Line, Panel

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
    drawings = [_draw(panel, runs) for panel in PANELS]
    return [drawing for drawing in drawings if drawing.figure.renderers]


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


def _draw(panel: Panel, runs: Sequence[History]) -> Drawing:
    columns = [(run, line, of) for run in runs for line in panel.lines for of in ("training", "validation")]
    values = [getattr(run, of).get(line.column, np.empty(0)) for run, line, of in columns]
    values = np.concatenate([column[np.isfinite(column)] for column in values])
    logarithmic = panel.numbers == "log" and (values > 0).all()
    plot = empty_figure(panel.unit, "log" if logarithmic else "linear")
    if logarithmic and len(values):
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
