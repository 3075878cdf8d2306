"""What all figures of a report share: a canvas without a display, colours for many labels, and text that is only text.

Legend: S labels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from manifpt.report.text import plain

__all__ = ["MARKERS", "color_of", "distinct", "grid", "in_legend", "literal", "png"]

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # with a colour each: what can't tell colours apart has shapes


def literal(text: str, most: int = 40) -> str:
    """Somebody else's text as matplotlib must draw it: plain, and without its mathematics."""
    return plain(text, most).replace("$", r"\$")


def in_legend(text: str, most: int = 40) -> str:
    """The same for a legend, which would leave out what begins with an underscore."""
    drawn = literal(text, most)
    return f"\u200b{drawn}" if drawn.startswith("_") else drawn


def distinct(labels: Sequence[str], most: int = 24) -> list[str]:
    """Labels cut to so many characters; those that are then alike get their numbers, to be told apart in a legend."""
    cut = [plain(label, most) for label in labels]
    return [f"{name} #{number}" if cut.count(name) > 1 else name for number, name in enumerate(cut, start=1)]


def shown(labels: Sequence[str], most: int) -> list[str]:
    """Labels as matplotlib must draw them, about so long, and each unlike all others."""
    return [literal(name, most + 6) for name in distinct(labels, most)]


def color_of(number: int, count: int) -> str:
    """A label's colour, as `#rrggbb`."""
    name = "tab10" if count <= 10 else "tab20"
    red, green, blue, _ = colormaps[name](number % (10 if count <= 10 else 20))
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def grid(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of axes [rows, columns], each so many inches large."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The picture, the same bytes for the same figure."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=dpi, metadata={"Software": None})
    return sink.getvalue()
