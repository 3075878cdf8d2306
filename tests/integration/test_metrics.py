"""What Prometheus sees of a scan, on a Ray node of the test's own, and whether dashboard and rules ask for that."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from manifpt.telemetry import METRICS, exported
from tests.helpers.cluster import ROOT, job, must, ray_head
from tests.helpers.scans import HIDDEN, TRAINED, make_attributor, new_files

SERIES = re.compile(r"\b(?:ray_|manifpt:)[A-Za-z0-9_:]+")
Samples = dict[str, list[tuple[Mapping[str, str], float]]]


def samples(env: Mapping[str, str]) -> Samples:
    with urllib.request.urlopen(env["TEST_METRICS"], timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: Samples = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def scan(folder: Path, env: Mapping[str, str]) -> dict[str, Any]:
    result = job("scan", "--config", folder / "scan.yaml", env=env)
    must(result)
    return json.loads((folder / "scans" / "scan.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An attributor, and a bucket with a generator that it doesn't know and a file that is no image."""
    folder = tmp_path_factory.mktemp("metrics")
    make_attributor(folder)
    (folder / "bucket").mkdir()
    for name, data in new_files(12, sources=(*TRAINED, HIDDEN)):
        (folder / "bucket" / name).write_bytes(data)
    (folder / "bucket" / "bad.png").write_bytes(b"no image")
    rules = [{"name": "any-unknown", "when": "unknown_share >= 0", "severity": "info"}]
    config = {"input": [str(folder / "bucket")], "output": str(folder / "scans"), "alerts": {"rules": rules}}
    config |= {name: str(folder / name) for name in ("attributor", "reference")}
    (folder / "scan.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[dict[str, str]]:
    with ray_head() as env:
        yield env


@pytest.fixture(scope="module")
def scanned(folder: Path, head: Mapping[str, str]) -> tuple[dict[str, Any], Samples]:
    """A scan's state, and a scrape after it."""
    state = scan(folder, head)
    return state, samples(head)


def test_a_scrape_after_a_scan_shows_every_metric_with_its_labels(scanned: tuple[dict[str, Any], Samples]) -> None:
    _, seen = scanned
    for metric in METRICS.values():
        assert exported(metric) in seen, f"{metric.name} is not exported"
        assert all(set(metric.labels) <= set(labels) for labels, _ in seen[exported(metric)])


def test_what_is_counted_is_what_the_scan_says(folder: Path, scanned: tuple[dict[str, Any], Samples]) -> None:
    state, seen = scanned
    images: dict[str, float] = {}
    for labels, value in seen["ray_manifpt_images_total"]:
        images[labels["status"]] = images.get(labels["status"], 0) + value
    assert sum(images.values()) == state["images"] == 12 * (len(TRAINED) + 1) + 1
    assert images.get("unknown", 0) == state["unknown"]
    assert images["rejected"] == state["rejected"] == 1
    assert [(labels["reason"], value) for labels, value in seen["ray_manifpt_rejects_total"]] == [("not_an_image", 1)]
    assert {"decode", "project", "attribute"} <= {
        labels["stage"] for labels, _ in seen["ray_manifpt_stage_seconds_total"]
    }
    ((labels, value),) = seen["ray_manifpt_alerts_total"]
    assert (labels["rule"], labels["severity"], value) == ("any-unknown", "info", 1)
    ((_, pending),) = seen["ray_manifpt_shards_pending"]
    assert pending == 0
    ((labels, watermark),) = seen["ray_manifpt_scan_watermark_seconds"]
    assert len(labels["scan"]) > 6, "scans of other buckets may end in scans/ too"
    assert str(folder / "scans").endswith(labels["scan"])
    assert watermark == pytest.approx(state["watermark_s"])


def test_dashboard_and_rules_name_only_what_is_scraped_or_recorded(scanned: tuple[dict[str, Any], Samples]) -> None:
    rules = yaml.safe_load((ROOT / "cluster/prometheus/rules.yml").read_text())["groups"][0]["rules"]
    known = {*scanned[1], *(rule["record"] for rule in rules if "record" in rule)}
    dashboard = json.loads((ROOT / "cluster/grafana/manifpt.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in dashboard["templating"]["list"]]
    asked += [rule["expr"] for rule in rules]
    named = {name for text in asked for name in SERIES.findall(text)}
    assert named <= known, named - known
    assert {exported(metric) for metric in METRICS.values()} <= named, "a metric that nobody looks at"


def test_a_scan_of_nothing_new_moves_the_watermark(
    folder: Path, head: Mapping[str, str], scanned: tuple[dict[str, Any], Samples]
) -> None:
    state = scan(folder, head)
    assert state["images"] == 0
    until = time.monotonic() + 10
    while time.monotonic() < until:
        latest = max(value for _, value in samples(head)["ray_manifpt_scan_watermark_seconds"])
        if latest > scanned[0]["watermark_s"]:
            break
        time.sleep(0.5)
    assert latest == pytest.approx(state["watermark_s"])
