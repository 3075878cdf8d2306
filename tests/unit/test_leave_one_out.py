"""Sources that were left out of training: what is measured of them, and on which images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import Examples, select_examples
from manifpt.attributor.outputs import read_outputs
from manifpt.attributor.splits import TEST, TRAIN
from manifpt.config import EvaluateConfig
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.evaluation.leave_one_out import measure_leave_one_out
from manifpt.evaluation.unseen import hold_out
from tests.helpers.runs import SHAPE, artifacts_of, make_run, rows_of
from tests.helpers.tasks import tasks_here

SOURCES = {"gan": 170, "noise": 40, "real": 170, "vae": 170}  # with few on validation there is no threshold
CHEAP: dict[str, Any] = {"networks": ("head",), "epochs": 8, "seeds": 1}


def odd_artifacts_of(rows: pa.Table) -> np.ndarray:
    """As always; those of one source are of ten times the size in all coordinates, unlike anything known."""
    found = artifacts_of(rows).astype(np.float32)
    is_odd_b = np.array(rows["source"].to_pylist()) == "noise"
    found[is_odd_b] *= 10
    return found.astype(np.float16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("run") / "set", rows_of(SOURCES), artifacts=odd_artifacts_of))


@pytest.fixture(scope="module")
def examples(run: str) -> Examples:
    return select_examples(run, "rgb", Choice(labels={}))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tasks that ran, without Ray."""
    return tasks_here(monkeypatch)


@pytest.mark.parametrize("label", ["gan", "noise", "vae"])
def test_a_held_out_label_is_nowhere_but_in_its_own_test_images(examples: Examples, label: str) -> None:
    known, held = hold_out(examples, label)
    assert label not in known.labels and set(known.labels) | {label} == set(examples.labels)
    assert [known.labels[n] for n in known.label_n] == known.table["source"].to_pylist()
    assert held.labels == (label,) and set(held.table["source"].to_pylist()) == {label}
    assert len(held.label_n) == SOURCES[label] and (held.side_n == TEST).all() and not held.label_n.any()
    side_of = dict(zip(examples.table["image_id"].to_pylist(), examples.side_n.tolist(), strict=True))
    assert [side_of[name] for name in known.table["image_id"].to_pylist()] == known.side_n.tolist()
    assert not held.parts(TRAIN) and sum(len(part.row_n) for part in held.parts(TEST)) == SOURCES[label]
    assert len({known.digest, held.digest, examples.digest}) == 3


def test_each_generator_is_left_out_and_what_is_unlike_all_is_found(run: str, tmp_path: Path, ran: list[Any]) -> None:
    config = EvaluateConfig(artifacts=(run,), output=str(tmp_path / "out"), **CHEAP)
    found = measure_leave_one_out(config)
    document = json.loads((tmp_path / "out" / "leave_one_out.json").read_text())
    by_label = {row["left_out"]: row for row in document["rows"]}
    assert set(by_label) == {"gan", "noise", "vae"}, "real images are never the unknown ones"
    for label, row in by_label.items():
        of_network = {"softmax", "energy", "distance", "relative_distance"}
        with_spectrum = {f"{name}+spectrum" for name in of_network}
        assert row["images"] == SOURCES[label] and row["chosen"][0] in with_spectrum
        assert set(row["scores"]) == {"chosen", "spectrum"} | of_network | with_spectrum
        assert row["scores"]["chosen"] == row["scores"][row["chosen"][0]]
        for measured in row["scores"].values():
            assert 0 <= measured["oscr"] <= min(measured["auroc"], row["closed_accuracy"]) + 1e-9
            assert measured["accuracy"] <= row["closed_accuracy"] and measured["false_alarms"] < 0.35
    assert by_label["noise"]["scores"]["distance"]["auroc"] > 0.95, "what lies apart from everything"
    assert by_label["noise"]["scores"]["distance"]["found"] > 0.8
    assert document == json.loads(json.dumps(found["document"])) and document["false_alarms"] == 0.05
    text = (tmp_path / "out" / "leave_one_out.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert text == found["text"] and len(lines) == 2 + 10 + 2 + 3 and len({line.count("|") for line in lines}) == 2

    tests = [read_outputs([str(path)]) for path in (tmp_path / "out").rglob("validation.parquet")]
    assert {outputs.logits_bs.shape[1] for outputs in tests} == {3}, "no output for what is left out"
    assert len(ran) == 3
    measure_leave_one_out(config)
    assert len(ran) == 3, "the second time, everything is there"
    more = EvaluateConfig(artifacts=(run,), output=str(tmp_path / "out"), **(CHEAP | {"seeds": 2}))
    assert len(measure_leave_one_out(more)["document"]["rows"]) == 3 and len(ran) == 6


def test_a_control_stands_beside(run: str, tmp_path: Path, ran: list[Any]) -> None:
    raw = make_run(
        tmp_path / "raw",
        rows_of(SOURCES),
        estimate=Estimate(name="none"),
        artifacts=lambda t: np.ones((len(t), *SHAPE)),
    )
    found = measure_leave_one_out(
        EvaluateConfig(artifacts=(run, str(raw)), output=str(tmp_path / "out"), **(CHEAP | {"epochs": 1}))
    )
    methods = {row["method"] for row in found["document"]["rows"]}
    assert methods == {"ManiFPT, nearest real", "control: raw embedding"}
    of_raw = [row for row in found["document"]["rows"] if row["method"].startswith("control")]
    assert {score["auroc"] for row in of_raw for score in row["scores"].values()} == {0.5}, "they are all alike"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ("all",)}, "no --attributor, --baselines, --test-artifacts"),
        ({"attributor": ("somewhere",)}, "trains its own attributors"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"most_images": 0}, "--most-images must be at least 1"),
    ],
)
def test_what_it_can_not_do_is_told_first(
    run: str, tmp_path: Path, ran: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_leave_one_out(EvaluateConfig(artifacts=(run,), output=str(tmp_path / "out"), **(CHEAP | changes)))
    assert not ran


def test_two_labels_are_too_few(tmp_path: Path, ran: list[Any]) -> None:
    two = str(make_run(tmp_path / "two", rows_of({"gan": 40, "real": 40})))
    with pytest.raises(ConfigError, match="Without one of gan, real nothing is left to tell apart"):
        measure_leave_one_out(EvaluateConfig(artifacts=(two,), output=str(tmp_path / "out"), **CHEAP))
