from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from manifpt.report.preview import _label


def test_long_labels_that_begin_alike_are_told_apart() -> None:
    names = [f"corefrank_fgan_modeseeking_{n}" for n in range(3)]
    labels = [_label(name) for name in names]
    assert [label.replace("\n", "") for label in labels] == names
    assert max(len(line) for label in labels for line in label.split("\n")) <= 18
    assert _label("x" * 500).count("\n") == 2 and _label("x" * 500).endswith("…")


def test_a_label_is_never_read_as_mathematics() -> None:
    """Half of a formula would be an error, and cost a run its preview."""
    figure = Figure()
    figure.text(0, 0, _label(r"$\frac{"))
    FigureCanvasAgg(figure).draw()
