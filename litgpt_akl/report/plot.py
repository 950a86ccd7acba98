"""Plots as BokehJS reads them: the JSON is written here, since building Bokeh's own models takes 50 ms a plot."""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import bokeh
import numpy as np


class Model:
    """One of Bokeh's models: what it is called, and the attributes that are not as they are by default."""

    def __init__(self, called: str, **attributes: Any) -> None:
        self.called = called
        vars(self).update(attributes)


def make_axis(label: str | None = None, scale: Literal["Linear", "Log"] = "Linear", **attributes: Any) -> Model:
    style = {"axis_label_text_font_style": "normal", "minor_tick_line_color": None}
    return Model(f"{scale}Axis", axis_label=label, **style, **attributes)


def fixed_ticks(places: Sequence[float]) -> Model:
    return Model("FixedTicker", ticks=list(places), minor_ticks=[])


@dataclass
class Plot:
    """A plot as wide as its place, which leaves scrolling to the page."""

    x_axis: Model
    y_axis: Model
    height: int = 260
    x_range: Model = field(default_factory=lambda: Model("DataRange1d"))
    y_range: Model = field(default_factory=lambda: Model("DataRange1d"))
    renderers: list[Model] = field(default_factory=list)
    boxes: list[Model] = field(default_factory=list)
    tools: list[Model] = field(default_factory=lambda: [Model("BoxZoomTool"), Model("ResetTool")])

    def add_line(self, x: np.ndarray, y: np.ndarray, name: str | None, **style: Any) -> None:
        """Draw a line; with a name, its values are told at the pointer."""
        self._add({"x": x, "y": y}, Model("Line", **style), name)

    def add_dots(self, x: np.ndarray, y: np.ndarray, name: str, colour: str, **columns: list[str]) -> None:
        """Draw a dot for each value, told at the pointer together with ``columns``."""
        style = {"size": 6, "fill_color": colour, "line_color": None}
        values = {key: {"type": "value", "value": value} for key, value in style.items()}
        self._add({"x": x, "y": y, **columns}, Model("Scatter", **values), name)

    def add_band(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
        """Fill what lies between two lines."""
        bounds = {"y1": {"type": "field", "field": "low"}, "y2": {"type": "field", "field": "high"}}
        self._add({"x": x, "low": low, "high": high}, Model("VArea", fill_color=colour, fill_alpha=0.18, **bounds))

    def _add(self, columns: dict[str, Any], glyph: Model, name: str | None = None) -> None:
        # a glyph reads the columns x and y if it does not say otherwise
        source = Model("ColumnDataSource", data=columns)
        self.renderers.append(Model("GlyphRenderer", name=name, data_source=source, glyph=glyph))

    def shade(self, left: float, right: float, colour: str) -> None:
        """Shade all that lies between two places of the horizontal axis."""
        style = {"fill_color": colour, "fill_alpha": 0.3, "line_color": None}
        self.boxes.append(Model("BoxAnnotation", left=left, right=right, **style))

    def add_hover(self, value: str, place: str = "step @x{0,0}") -> None:
        """Tell names and values of what has a name, at the pointer."""
        named = [renderer for renderer in self.renderers if renderer.name]
        row = f"<div>$name, {place}: <b>{value}</b></div>"
        self.tools.append(Model("HoverTool", renderers=named, tooltips=row, mode="vline"))

    def item(self, place: str) -> dict[str, Any]:
        """What ``Bokeh.embed.embed_item`` draws in the page's element of that id."""
        root = _encode(self._figure(), f"{place}-", {})
        document = {"version": bokeh.__version__, "title": "", "config": None, "roots": [root]}
        return {"target_id": place, "root_id": root["id"], "doc": document, "version": bokeh.__version__}

    def _figure(self) -> Model:
        grids = [Model("Grid", axis=self.x_axis, visible=False), Model("Grid", axis=self.y_axis, dimension=1)]
        return Model(
            "Figure",
            height=self.height,
            sizing_mode="stretch_width",
            x_range=self.x_range,
            y_range=self.y_range,
            x_scale=_scale_of(self.x_axis),
            y_scale=_scale_of(self.y_axis),
            renderers=self.renderers,
            below=[self.x_axis],
            left=[self.y_axis],
            center=[*grids, *self.boxes],
            toolbar=Model("Toolbar", tools=self.tools, logo=None, autohide=True, active_drag=None),
            toolbar_inner=True,
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
        )


def _scale_of(axis: Model) -> Model:
    return Model(axis.called.replace("Axis", "Scale"))


def _encode(value: Any, prefix: str, ids: dict[Model, str]) -> Any:
    """JSON as Bokeh's serializer has it; a model is told once, and then named by its id."""
    if isinstance(value, Model):
        if value in ids:
            return {"id": ids[value]}
        ids[value] = f"{prefix}{len(ids)}"
        attributes = {name: _encode(of, prefix, ids) for name, of in vars(value).items() if name != "called"}
        return {"type": "object", "name": value.called, "id": ids[value], "attributes": attributes}
    if isinstance(value, np.ndarray):
        data = base64.b64encode(gzip.compress(value.tobytes(), mtime=0)).decode()
        kind = {"shape": [*value.shape], "dtype": value.dtype.name, "order": "little"}
        return {"type": "ndarray", "array": {"type": "bytes", "data": data}, **kind}
    if isinstance(value, list):
        return [_encode(each, prefix, ids) for each in value]
    # but for those that are JSON already
    if isinstance(value, dict) and "type" not in value:
        return {"type": "map", "entries": [[key, _encode(of, prefix, ids)] for key, of in value.items()]}
    return value
