"""What drivers tell Prometheus: bounded labels whatever names strangers give, nothing without Ray, and the tally."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from typing import Any

import pytest
import ray.util.metrics
from hypothesis import given
from hypothesis import strategies as st

from manifpt.shards import tally
from manifpt.telemetry import METRICS, Telemetry, exported
from tests.helpers.cluster import ROOT

TALLY = {"images": {"done": {"dcgan": 3}, "rejected": {"": 1}}, "reasons": {"empty": 1}, "seconds": {"decode": 0.5}}
PROMETHEUS = ROOT / "cluster" / "prometheus"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What Ray would be told."""
    told: list[tuple[str, float, dict[str, str]]] = []

    class Recorded:
        def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
            self._name = name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray refuses such"
            told.append((self._name, value, tags))

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append((self._name, value, tags))

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(ray.util.metrics, kind, Recorded)
    return told


def test_a_shard_is_images_rejects_seconds_and_what_is_left(told: list[Any]) -> None:
    Telemetry().shard(TALLY, 7)
    assert told == [
        ("manifpt_images_total", 3, {"status": "done", "source": "dcgan"}),
        ("manifpt_images_total", 1, {"status": "rejected", "source": "none"}),
        ("manifpt_rejects_total", 1, {"reason": "empty"}),
        ("manifpt_stage_seconds", 0.5, {"stage": "decode"}),
        ("manifpt_shards_committed_total", 1, {}),
        ("manifpt_shards_pending", 7, {}),
    ]


def test_p_values_become_scores_also_the_smallest(told: list[Any]) -> None:
    Telemetry().drift({"norms": 0.01, "shares": 1.0, "unknown": 0.0})
    scores = {tags["test"]: value for _, value, tags in told}
    assert scores["norms"] == pytest.approx(2)
    assert scores["shares"] == 0
    assert math.isfinite(scores["unknown"]) and scores["unknown"] > 300


def test_every_metric_gets_the_labels_it_is_known_with(told: list[Any]) -> None:
    telemetry = Telemetry()
    telemetry.shard(TALLY, 0)
    telemetry.drift({"norms": 0.01})
    telemetry.alert("unknown-rose", "warning")
    telemetry.watermark(1.7e9, "bucket")
    assert {name: tuple(tags) for name, _, tags in told} == {m.name: m.labels for m in METRICS.values()}


@given(names=st.lists(st.text(max_size=90), max_size=8))
def test_labels_are_short_and_of_harmless_characters(names: list[str]) -> None:
    telemetry = Telemetry()
    for name in names:
        label = telemetry._bounded("manifpt_images_total", "source", name)
        assert 1 <= len(label) <= 64
        assert label.isascii() and all(c.isalnum() or c in "._:/-" for c in label)


def test_while_no_shard_gets_done_what_is_pending_is_told_again(
    told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifpt.telemetry._BEAT_S", 0.01)
    with Telemetry() as telemetry:
        telemetry.pending(5)
        until = time.monotonic() + 10
        while len(told) < 4 and time.monotonic() < until:
            time.sleep(0.01)
    assert told[:4] == [("manifpt_shards_pending", 5, {})] * 4
    count = len(told)
    time.sleep(0.05)
    assert len(told) == count, "it ended"


def test_of_a_flood_of_sources_a_hundred_get_a_series_and_the_rest_are_one(told: list[Any]) -> None:
    telemetry = Telemetry()
    telemetry.shard({**TALLY, "images": {"done": {f"s{n}": 2 for n in range(5000)}}}, 0)
    telemetry.shard({**TALLY, "images": {"done": {"s0": 1, "late": 1}}}, 0)
    sources = [tags["source"] for name, _, tags in told if name == "manifpt_images_total"]
    assert len(set(sources)) == 101
    assert sources[-2:] == ["s0", "other"]
    assert sum(value for name, value, _ in told if name == "manifpt_images_total") == 10_002


def test_without_a_cluster_nothing_is_told_and_nothing_fails() -> None:
    assert not ray.is_initialized()
    telemetry = Telemetry()
    telemetry.shard(TALLY, 0)
    telemetry.watermark(1.0, "bucket")
    assert not telemetry._made


def test_scraped_names_have_rays_prefix_and_counters_end_in_total() -> None:
    names = {exported(metric) for metric in METRICS.values()}
    assert {"ray_manifpt_images_total", "ray_manifpt_stage_seconds_total", "ray_manifpt_drift_score"} <= names


def commit(**changed: Any) -> dict[str, Any]:
    return {"statistics": {}, "parts": {}, "rejected": [], "seconds": {"decode": 0.5}} | changed


def test_an_image_with_rows_in_two_spaces_is_one_image_and_so_is_one_that_both_reject() -> None:
    statistics = {"rgb": {"a": {"images": 3}, "b": {"images": 1}}, "frequency": {"a": {"images": 2}}}
    rejected = [["x", "uri", "a", space, "too_small", ""] for space in ("rgb", "frequency")]
    found = tally(commit(statistics=statistics, rejected=rejected), "artifacts")
    assert found["images"] == {"done": {"a": 3, "b": 1}, "rejected": {"a": 1}}
    assert found["reasons"] == {"too_small": 1}
    assert found["seconds"] == {"decode": 0.5}


def test_images_of_a_reference_are_real_and_those_of_a_scan_have_verdicts() -> None:
    parts = {"embeddings/rgb/part-00000.parquet": {"rows": 4}, "embeddings/frequency/part-00000.parquet": {"rows": 5}}
    assert tally(commit(parts=parts), "reference")["images"]["done"] == {"real": 5}
    assert tally(commit(), "reference")["images"]["done"] == {"real": 0}
    verdicts = {"attributed": {"dcgan": {"images": 6}}, "unknown": {"": {"images": 2}}}
    found = tally(commit(statistics=verdicts), "attributions")["images"]
    assert found == {"attributed": {"dcgan": 6}, "unknown": {"": 2}, "rejected": {}}


@pytest.mark.parametrize("what", [["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]])
def test_promtool_accepts_the_alert_rules_and_they_do_what_their_tests_say(what: list[str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    result = subprocess.run(["promtool", *what], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_accepts_how_to_scrape() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    command = ["promtool", "check", "config", "prometheus.yml"]
    result = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
