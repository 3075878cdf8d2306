"""The page of a report: strangers' text stays text, nothing is fetched, and no script runs that isn't its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import warnings
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.report import scan
from manifpt.report.designs import same_divisions
from manifpt.report.drawing import distinct, grid, literal, png
from manifpt.report.page import Figure, Section, Table, render_page
from manifpt.report.scatter import scatter_script

PNG = b"\x89PNG"


class Page(HTMLParser):
    """Elements, attributes and text, by tag."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append((self.elements[-1][0] if self.elements else "", data))


def page(label: str) -> bytes:
    table = Table(label, ("label", label), ((label, 1.5), (label, None)), (label,))
    figure = Figure("f", label, label, PNG, {"label": label})
    return render_page(label, [(label, label)], [Section(label, (label,), (table, figure))], "let Bokeh;")


@settings(deadline=None, max_examples=50)
@given(
    st.one_of(
        st.text(), st.sampled_from(["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", '"><b>'])
    )
)
def test_any_label_is_shown_as_text(label: str) -> None:
    plain, found = Page(page("plain")), Page(page(label))
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
    assert [list(attributes) for _, attributes in found.elements] == [list(a) for _, a in plain.elements]
    [data] = [text for (tag, text) in found.text if text.startswith('{"label"')]
    assert json.loads(data) == {"label": label}


def test_only_the_scripts_of_the_page_may_run_and_nothing_is_fetched() -> None:
    found = Page(page("a"))
    [policy] = [a["content"] or "" for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    scripts = re.findall(r"<script>(.*?)</script>", page("a").decode(), flags=re.DOTALL)
    assert {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts} == allowed
    assert len(scripts) == 2
    assert policy.startswith("default-src 'none'")
    assert all((a.get("src") or "data:").startswith("data:") for _, a in found.elements)
    library = scatter_script()
    assert "</script" not in library and "\r" not in library, "it can stand in a page, and its hash holds there"
    assert not [a for tag, a in found.elements if tag == "link"]


def test_numbers_sort_as_numbers_and_what_is_missing_is_shown_so() -> None:
    found = page("a").decode()
    assert '<td class="number" data-value="1.5">1.5</td>' in found
    assert '<td data-value="">\N{EN DASH}</td>' in found


def test_a_page_without_maps_does_not_carry_their_library() -> None:
    section = Section("s", (), (Figure("f", "t", "x", PNG),))
    assert b"let Bokeh" not in render_page("t", [], [section], "let Bokeh;")


def test_a_label_that_looks_like_mathematics_is_drawn_as_it_is() -> None:
    figure, axes = grid(1, 1, 1, 1)
    axes[0, 0].set_title(literal("$\\frac{$ \n"))
    assert png(figure).startswith(b"\x89PNG")


def test_a_legend_shows_every_label_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a legend would leave out begins with a zero-width space, which must not be drawn as a question mark."""
    legends: list[list[str]] = []

    def drawn(figure: Any) -> bytes:
        legends.append([text.get_text() for text in figure.axes[0].get_legend().get_texts()])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a glyph that the font lacks
            return png(figure)

    monkeypatch.setattr(scan, "png", drawn)
    results = [{"window": 1, "attributed": {"_gan": 3, "real": 5, "$x": 1}, "images": 9, "unknown": 0,
                "inconclusive": 0, "rejected": 0, "alerts": []}]  # fmt: skip
    scan._shares_figure(results)
    assert legends == [["real", "\u200b_gan", r"\$x", "unknown", "inconclusive", "rejected"]]


def test_labels_that_look_alike_when_cut_stay_apart() -> None:
    names = distinct(["latent_diffusion_cifar10_v1", "latent_diffusion_cifar10_v2", "gan"])
    assert len(set(names)) == 3 and names[2] == "gan"


def test_choices_that_divide_the_generators_alike_are_found() -> None:
    generators = {
        "a": {"up": "x", "norm": "p", "loss": "1", "skip": None},
        "b": {"up": "x", "norm": "p", "loss": "2", "skip": "s"},
        "c": {"up": "y", "norm": "q", "loss": "2", "skip": "t"},
    }
    assert same_divisions(generators, ["up", "norm", "loss", "skip"]) == [["up", "norm"]]
