"""A map of images that answers to the pointer: Bokeh's, as JSON for its script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifpt.report.drawing import color_of, distinct

__all__ = ["scatter_item", "scatter_script"]

_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "x")


def scatter_item(found: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """One map: an image's label and id under the pointer, labels hidden and shown by the legend.

    Args:
        found: `x`, `y`, `label` and `image_id` of the images.
        labels: names by number.
    """
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.plotting import figure

    hover = HoverTool(tooltips=[("source", "@label"), ("image", "@image_id")])
    plot = figure(
        height=480, sizing_mode="stretch_width", tools=["pan", "wheel_zoom", "box_zoom", "reset", hover],
        x_axis_location=None, y_axis_location=None,
    )  # fmt: skip
    plot.grid.visible = False
    plot.toolbar.logo = None
    names = distinct(labels)
    for number, label in enumerate(labels):
        rows = [row for row, of_row in enumerate(found["label"]) if of_row == number]
        if not rows:
            continue
        columns = {name: [found[name][row] for row in rows] for name in ("x", "y", "image_id")}
        plot.scatter(
            "x", "y", source=ColumnDataSource({**columns, "label": [label] * len(rows)}), size=5, line_color=None,
            fill_color=color_of(number, len(labels)), fill_alpha=0.8, marker=_MARKERS[number % len(_MARKERS)],
            legend_label=names[number],
        )  # fmt: skip
    plot.legend.click_policy = "hide"
    plot.legend.label_text_font_size = "8pt"
    plot.legend.spacing = 0
    plot.add_layout(plot.legend[0], "right")
    return dict(json_item(plot))


def scatter_script() -> str:
    """Bokeh's script, all of it: nothing is fetched."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
