"""One self-contained HTML page: text, tables that sort, pictures, and maps that answer to the pointer.

Labels and file names come from strangers. Jinja escapes all text; data for scripts is JSON without `<`; and the page's
own policy lets no other script run than the ones that it was made with, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Figure", "Section", "Table", "render_page"]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head. Numbers are right-aligned and sort as numbers.

    Attributes:
        caption: what it shows.
        head: names of the columns.
        rows: text, numbers, or None where there is none.
        notes: what a reader must know of it.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, with what it shows in words.

    Attributes:
        name: of its file, without `.png`.
        title: above it.
        text: what a reader who can't see it needs.
        png: the picture.
        item: Bokeh's JSON of the same, if it has an interactive twin.
    """

    name: str
    title: str
    text: str
    png: bytes
    item: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Some paragraphs, then tables and figures.

    Attributes:
        title: its heading.
        paragraphs: plain text.
        parts: tables and figures, in their order.
    """

    title: str
    paragraphs: tuple[str, ...]
    parts: tuple[Table | Figure, ...] = field(default_factory=tuple)


def render_page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], library: str) -> bytes:
    """The page.

    Args:
        title: of the page.
        facts: what was looked at, by name.
        sections: in their order.
        library: the script of the figures with an item; not used where there are none.
    """
    figures = [part for section in sections for part in section.parts if isinstance(part, Figure)]
    has_items = any(figure.item is not None for figure in figures)
    scripts = [*([library] if has_items else []), _own_script()]
    allowed = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    page = _environment().get_template("report.html").render(
        title=title, facts=facts, sections=sections, scripts=[Markup(script) for script in scripts],  # noqa: S704  # our own
        allowed=Markup(allowed),  # noqa: S704  # sums of our own scripts
        is_table=lambda part: isinstance(part, Table), is_number=lambda value: isinstance(value, int | float),
        shown=_shown, picture=lambda data: base64.b64encode(data).decode(), data=_script_data,
    )  # fmt: skip
    return page.encode()


@cache
def _environment() -> Environment:
    loader = PackageLoader("manifpt.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _own_script() -> str:
    return (resources.files("manifpt.report") / "templates" / "report.js").read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _script_data(value: Any) -> Markup:
    """JSON that can stand in a script element."""
    text = json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(text)  # noqa: S704  # no character of it ends the element


def _shown(value: str | float | int | None) -> str:
    """A cell. Numbers have four digits, and a plain minus."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
