"""The curves of the report, by Bokeh: panels of what a run, or several over each other, have logged."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from bokeh import models
from bokeh.plotting import figure

from litgpt_akl.report.history import POINTS, History, finite, running_mean, thin


@dataclass
class Panel:
    """What one figure is to show."""

    title: str
    unit: str
    lines: dict[str, str]
    """Columns of the training log, whose ``val_`` columns are the validation's, and what they are called."""
    about: str = ""
    numbers: Literal["real", "log", "share", "whole", "tiny"] = "real"
    """How values are written, and whether the axis is logarithmic in any case."""
    is_folded: bool = False
    """Whether it is of those that are opened when something goes wrong."""


NATS, SHARE = "nats per token", "share"
ROLES = {"accuracy": "student's accuracy", "confidence": "student's confidence"}
ROLES |= {"teacher_accuracy": "teacher's accuracy", "teacher_confidence": "teacher's confidence"}
SPEEDS = {"tokens_per_second": "all tokens", "response_tokens_per_second": "response tokens"}
MEMORY = {"memory_gb": "memory", "memory_reserved_gb": "reserved by the allocator"}
GAPS = "Sum of |p - q| where the student still differs from its teacher: in the teacher's head, and outside."
WEIGHT = "Head gap / (head gap + tail gap), akl's weight of forward KL. The band is one standard deviation over tokens."
CLOSED = (
    "Agreement: the same most probable token. Gap closed: of the cross-entropy's distance to the teacher at step 0."
)
CORRECT = "How often the most probable token is the recorded one, and the probability that it has."
OWN = "The peak; on a CPU beyond what Python, its packages and mapped files take."
EACH = "Of several teachers, whose average the student learns: from each by itself to the student, in their order."
BACK = "From the teacher's distribution to the student's, and back."

PANELS = (
    Panel("Forward and reverse KL", NATS, {"forward_kl": "forward", "reverse_kl": "reverse"}, BACK),
    Panel("Forward KL to each teacher", NATS, {f"forward_kl_{n}": f"teacher {n}" for n in range(1, 10)}, EACH),
    Panel("Agreement and gap closed", SHARE, {"agreement": "agreement", "gap_closed": "gap closed"}, CLOSED, "share"),
    Panel("Cross-entropy", NATS, {"cross_entropy": "student", "teacher_cross_entropy": "teacher"}, "Of the records."),
    Panel("Loss", NATS, {"loss": "loss"}, "What is minimised."),
    Panel("Divergence", NATS, {"divergence": "divergence"}, "The part of the loss in which the teacher is."),
    Panel("Accuracy and confidence", SHARE, ROLES, CORRECT, "share", True),
    Panel("Head gap and tail gap", "sum of |p - q|", {"head_gap": "head", "tail_gap": "tail"}, GAPS),
    Panel("Weight of forward KL, h", SHARE, {"h": "h"}, WEIGHT, "share"),
    Panel("Learning rate", "learning rate", {"learning_rate": "learning rate"}, "", "tiny", True),
    Panel("Gradient norm", "norm", {"gradient_norm": "gradient norm"}, "Before clipping.", "log", True),
    Panel("Throughput", "tokens/s", SPEEDS, "While it trains; validating and saving do not count.", "whole", True),
    Panel("Memory", "GB", MEMORY, OWN, "real", True),
)
SPREAD = {"h": "h_squared"}
"""Columns of a square's mean, with which a band of one standard deviation is drawn around a line."""

COLOURS = ("#0072b2", "#d55e00", "#009170", "#b85c94", "#9a7400", "#6c7a89")
"""After Okabe and Ito, told apart by the colour-blind; at least 3 : 1 on white and on nearly black."""
DASHES = ("solid", "dashed", "dotted", "dotdash")
NOISY = 100
"""From so many points on a line is drawn as its running mean, with the points themselves behind it."""
STEEP = 8.0
"""Values that differ by more than this factor are shown on a logarithmic axis."""
TICKS = {"share": "0%", "whole": "0,0"}
VALUES = {"share": "@y{0.0%}", "whole": "@y{0,0}", "tiny": "@y"}
"""How Bokeh writes numbers on axes and at the pointer, where it is not as usual."""


@dataclass
class Key:
    """An entry of a figure's legend, which is part of the page."""

    label: str
    colour: str
    dash: str
    run: int


@dataclass
class Drawing:
    """A figure and what the page says of it."""

    panel: Panel
    about: str
    figure: figure
    keys: list[Key] = field(default_factory=list)


def draw_panels(runs: Sequence[History]) -> list[Drawing]:
    """A drawing for each of ``PANELS`` of which anything was logged; of several runs each has one colour.

    What is the same as a line before is not drawn again, and h is drawn of runs that weigh by it.
    """
    drawn: list[tuple[Drawing, str, list[np.ndarray]]] = []
    for panel in PANELS:
        shown = runs if panel.lines.keys() != {"h"} else [run for run in runs if run.divergence in (None, "akl")]
        lines = {}
        for column, label in panel.lines.items():
            values = [log[column] for run in shown for log in (run.training, run.validation) if column in log]
            if not any(np.isfinite(each).any() for each in values):
                continue
            same = next((of for of in drawn if panel is not of[0].panel and _are_equal(of[2], values)), None)
            if same is None:
                lines[column] = label, values
            else:
                of = f" as {same[1]}" if len(same[0].panel.lines) > 1 else ""
                same[0].about += f" {panel.title if len(panel.lines) == 1 else label.capitalize()} is the same{of}."
        if lines:
            drawing = _draw(panel, {column: label for column, (label, _) in lines.items()}, runs, shown)
            drawn += [(drawing, label, values) for label, values in lines.values()]
    return list({id(drawing): drawing for drawing, _, _ in drawn}.values())


def _are_equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(
        len(a) == len(b) and np.allclose(a, b, rtol=1e-4, equal_nan=True) for a, b in zip(one, other, strict=True)
    )


def _draw(panel: Panel, lines: dict[str, str], runs: Sequence[History], shown: Sequence[History]) -> Drawing:
    logs = [log for run in shown for log in (run.training, run.validation)]
    values = np.concatenate([np.empty(0), *(log[name] for log in logs for name in lines if name in log)])
    values = values[np.isfinite(values)]
    is_steep = panel.numbers == "log" or (panel.unit == NATS and values.max() > STEEP * values.min())
    plot = _empty_figure(panel, "log" if is_steep and values.min() > 0 else "linear", values)
    drawing, alone = Drawing(panel, panel.about, plot), len(runs) == 1
    for number, run in enumerate(runs):
        for place, (column, label) in enumerate(lines.items() if run in shown else ()):
            colour = COLOURS[(place if alone else number) % len(COLOURS)]
            label = label if alone else f"{run.name}: {label}"
            key = Key(label, colour, DASHES[0 if alone else place % len(DASHES)], number)
            if alone or (run is shown[0] and len(lines) > 1):
                # colours of several runs stand beside their names, once for all figures
                drawing.keys.append(key if alone else replace(key, label=lines[column], colour=COLOURS[-1]))
            _draw_training(drawing, run.training, column, key, behind=alone)
            _draw_validation(drawing, run.validation, column, key)
    named = [renderer for renderer in plot.renderers if renderer.name]
    row = f"<div>$name, step @x{{0,0}}: <b>{VALUES.get(panel.numbers, '@y{0,0.0000}')}</b></div>"
    plot.add_tools(models.HoverTool(renderers=named, tooltips=row, mode="vline", point_policy="snap_to_data"))
    return drawing


def _empty_figure(panel: Panel, scale: Literal["linear", "log"], values: np.ndarray) -> figure:
    """A figure as wide as its place, which leaves scrolling to the page."""
    plot = figure(
        height=260,
        sizing_mode="stretch_width",
        y_axis_type=scale,
        y_axis_label=panel.unit,
        x_axis_label="step",
        tools="box_zoom,reset",
        **dict.fromkeys(("active_drag", "background_fill_color", "border_fill_color", "outline_line_color")),
    )
    plot.toolbar.logo, plot.toolbar.autohide, plot.toolbar_inner = None, True, True
    plot.axis.axis_label_text_font_style, plot.axis.minor_tick_line_color, plot.xgrid.visible = "normal", None, False
    plot.y_range.only_visible, plot.xaxis.formatter = True, models.NumeralTickFormatter(format="0,0")
    if scale == "log":
        # 1, 2, 5, 10 and so on, or powers of ten: within two decades Bokeh's own are evenly spaced
        low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
        steps = (1, 2, 5) if high - low <= 4 else (1,)
        ticks = [step * 10.0**power for power in np.arange(low, high + 1) for step in steps]
        plot.yaxis.ticker, plot.yaxis.formatter = models.FixedTicker(ticks=ticks), models.BasicTickFormatter()
    elif panel.numbers == "tiny":
        plot.yaxis.formatter = models.PrintfTickFormatter(format="%.1e")
    elif panel.numbers in TICKS:
        plot.yaxis.formatter = models.NumeralTickFormatter(format=TICKS[panel.numbers])
    return plot


# figure.line and the like make three glyphs of one, for selections that there are none of
def _add(plot: figure, glyph: models.Glyph, run: int, name: str | None = None, **columns: np.ndarray) -> None:
    """Draw columns; with a name, their values are told at the pointer. The page finds a run's by its number."""
    plot.add_glyph(models.ColumnDataSource(columns), glyph, name=name, tags=[run])


def _draw_training(drawing: Drawing, columns: dict[str, np.ndarray], column: str, key: Key, behind: bool) -> None:
    x, y = _points(columns, column)
    if len(x) == 0:
        return
    if (square := columns.get(SPREAD.get(column))) is not None:
        _draw_band(drawing.figure, *finite(columns["step"], columns[column], square), key)
    if len(x) >= NOISY:
        if behind:
            faint = models.Line(x="x", y="y", line_color=key.colour, line_alpha=0.3)
            _add(drawing.figure, faint, key.run, **dict(zip("xy", thin(x, y), strict=True)))
        x, y = x[_evenly(len(x))], running_mean(y)[_evenly(len(x))]
    line = models.Line(x="x", y="y", line_color=key.colour, line_dash=key.dash, line_width=2)
    _add(drawing.figure, line, key.run, key.label, x=x, y=y)


def _draw_validation(drawing: Drawing, columns: dict[str, np.ndarray], column: str, key: Key) -> None:
    x, y = thin(*_points(columns, column), POINTS // 5)
    if len(x) == 0:
        return
    # what lies between the untrained student and the first validation is no straight line
    line = models.Line(x="x", y="y", line_color=key.colour, line_dash="dotted", line_width=1.5)
    _add(drawing.figure, line, key.run, x=x[x > 0], y=y[x > 0])
    dots = models.Scatter(x="x", y="y", size=7, fill_color=key.colour, line_color=None)
    _add(drawing.figure, dots, key.run, f"{key.label}, validation", x=x, y=y)


def _draw_band(plot: figure, x: np.ndarray, mean: np.ndarray, square: np.ndarray, key: Key) -> None:
    if len(x) >= NOISY:
        mean, square = running_mean(mean), running_mean(square)
    kept = _evenly(len(x))
    mean, deviation = mean[kept], np.sqrt(np.maximum(square - mean**2, 0))[kept]
    band = models.VArea(x="x", y1="low", y2="high", fill_color=key.colour, fill_alpha=0.18)
    low, high = np.float32(mean - deviation), np.float32(mean + deviation)
    _add(plot, band, key.run, x=np.int32(x[kept]), low=low, high=high)


def _points(columns: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """What is finite of a column, and its steps, in half of the bytes that they were read in."""
    x, y = finite(columns["step"], columns.get(name, np.full(len(columns["step"]), np.nan)))
    return x.astype(np.int32), y.astype(np.float32)


def _evenly(count: int) -> np.ndarray:
    """Indices of at most ``POINTS // 2`` of ``count`` points, evenly spread."""
    return np.linspace(0, count - 1, min(count, POINTS // 2)).round().astype(np.int64)
