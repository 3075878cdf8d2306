from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from manifpt.analysis.custody import code_digest, read_image
from manifpt.analysis.distances import read_distances
from manifpt.analysis.verdict import LEAST_TEST_IMAGES, QUANTILES, Findings, percentile, quantiles, threshold, verdict
from manifpt.errors import ConfigError
from manifpt.reader import read_plan
from manifpt.report.drawing import literal
from manifpt.report.evidence import draw_evidence
from manifpt.spaces import SpaceSpec
from tests.helpers.images import encoded, picture
from tests.helpers.runs import make_run, rows_of

GOOD = Findings(
    label="gan", probability=0.9, calibration_error=0.05, precision=0.8, test_images=100, named_images=90,
    percentile=50.0, unknown_score=3.0, unknown_threshold=3.0,
    other_size=None, in_reference=False, near_copy=False, in_run=False,
)  # fmt: skip

shares = st.none() | st.floats(0, 1)
findings = st.builds(
    Findings,
    label=st.text(max_size=9),
    probability=st.floats(0, 1),
    calibration_error=shares,
    precision=shares,
    test_images=st.integers(0, 99),
    named_images=st.integers(0, 99),
    unknown_score=st.floats(allow_nan=False, width=32),
    unknown_threshold=st.floats(0, 9) | st.just(float("inf")),
    percentile=st.none() | st.floats(0, 100),
    other_size=st.none() | st.just("64 x 64 px"),
    in_reference=st.booleans(),
    near_copy=st.booleans(),
    in_run=st.booleans(),
)


@given(findings)
def test_a_verdict_is_conclusive_only_without_a_reason_and_names_a_source_only_then(found: Findings) -> None:
    said = verdict(found)
    assert said["conclusive"] == (not said["reasons"])
    assert said["source"] == (found.label if said["conclusive"] else None)
    assert "nan" not in " ".join(said["reasons"]).replace(found.label, "")
    if said["conclusive"]:
        assert found.probability >= 0.5 + (found.calibration_error or 0) and found.test_images >= LEAST_TEST_IMAGES
        assert found.precision is not None and found.precision >= 0.5 and found.named_images >= LEAST_TEST_IMAGES
        assert found.percentile is not None and 0.5 <= found.percentile <= 99.5
        assert found.unknown_score <= found.unknown_threshold
        assert not (found.other_size or found.in_reference or found.near_copy or found.in_run)


def test_numbers_that_are_all_good_are_conclusive() -> None:
    assert verdict(GOOD) == {"source": "gan", "conclusive": True, "reasons": []}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"probability": 0.549}, "gan, has 54.9%; 55.0% are needed"),
        ({"probability": float("nan")}, "55.0% are needed"),
        ({"calibration_error": None}, "calibration was not measured"),
        ({"precision": 0.49}, "right in 49.0% of the cases in which it named gan"),
        ({"precision": None}, "never named gan"),
        ({"test_images": LEAST_TEST_IMAGES - 1}, "tested on 29 images of gan"),
        ({"named_images": LEAST_TEST_IMAGES - 1}, "named gan on 29 test images only"),
        ({"unknown_score": 3.01}, "unlike the sources that the attributor knows: its unknown score is 3.01"),
        ({"unknown_score": float("nan"), "unknown_threshold": float("inf")}, "unlike the sources"),
        ({"percentile": 0.4}, "outside the middle 99%"),
        ({"percentile": 99.6}, "outside the middle 99%"),
        ({"percentile": None}, "no images of gan"),
        ({"other_size": "64 x 48 px"}, "resized from 64 x 48 px"),
        ({"in_reference": True}, "holds this very image"),
        ({"near_copy": True}, "nearly a copy"),
        ({"in_run": True}, "may have been trained on it"),
    ],
)
def test_each_rule_alone_makes_a_verdict_inconclusive(change: dict[str, Any], said: str) -> None:
    (reason,) = verdict(dataclasses.replace(GOOD, **change))["reasons"]
    assert said in reason


def test_a_worse_calibration_needs_a_higher_probability() -> None:
    assert threshold(None) == threshold(0.0) == 0.5
    assert threshold(0.2) == pytest.approx(0.7)


numbers = st.floats(-1e6, 1e6, width=32)


@given(numbers, st.lists(numbers, min_size=1))
def test_a_percentile_counts_what_is_below_and_half_of_what_is_equal(value: float, others: list[float]) -> None:
    found = percentile(value, np.array(others))
    twice = sum(2 * (other < value) + (other == value) for other in others)
    assert found == pytest.approx(50 * twice / len(others))
    mirrored = percentile(-value, -np.array(others))
    assert found is not None and mirrored is not None and found + mirrored == pytest.approx(100)


def test_there_is_no_percentile_among_none() -> None:
    assert percentile(1.0, np.empty(0)) is None


@given(st.lists(numbers, min_size=1))
def test_quantiles_ascend_and_the_middle_one_is_the_median(values: list[float]) -> None:
    found = quantiles(np.array(values, np.float32))
    assert list(found) == ["0.5", "5", "25", "50", "75", "95", "99.5"] and len(QUANTILES) == 7
    assert list(found.values()) == sorted(found.values())
    assert found["50"] == pytest.approx(np.median(np.array(values, np.float32).astype(np.float64)))


def test_distances_are_by_source_without_reals_that_the_reference_has_a_copy_of(tmp_path: Path) -> None:
    twins = ["near_copy", "copy", "left_out", None, "near_copy", None, None]
    rows = rows_of({"real": 4, "gan": 3}, distance=np.arange(7, dtype=np.float32), twin=twins)
    run = str(make_run(tmp_path / "run", rows, shard_rows=2))
    found = read_distances(run, read_plan(run), "rgb", rows["content_hash"][3].as_py())
    assert {name: values.tolist() for name, values in found.by_source.items()} == {"gan": [4, 5, 6], "real": [2, 3]}
    assert found.holds_image and not read_distances(run, read_plan(run), "rgb", "0" * 32).holds_image
    assert found.of([]).tolist() == [] and found.of(["real", "gan"]).tolist() == [2, 3, 4, 5, 6]


def test_a_run_that_is_not_finished_has_no_distances_yet(tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "run", rows_of({"gan": 4}), shard_rows=2, shards=1))
    with pytest.raises(ConfigError, match="1 of 2 shards, or was not ended: end it first"):
        read_distances(run, read_plan(run), "rgb", "")


def test_an_image_is_identified_by_its_bytes_whatever_its_name_says(tmp_path: Path) -> None:
    data = encoded(picture(24), "JPEG")
    (tmp_path / "a.png").write_bytes(data)
    image_hwc, facts = read_image(str(tmp_path / "a.png"))
    assert facts["sha256"] == hashlib.sha256(data).hexdigest() and facts["format"] == "JPEG"
    assert (facts["width_px"], facts["height_px"]) == (24, 24) == image_hwc.shape[1::-1]


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_code_is_told_by_its_commit_only_where_it_is_what_was_committed(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    alone = code_digest(package)
    assert alone["kind"].startswith("sha256") and alone == code_digest(package)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    assert code_digest(package) == {"kind": "git commit", "value": git(tmp_path, "rev-parse", "HEAD")}
    (package / "b.py").write_text("2\n")
    changed = code_digest(package)
    assert changed["kind"].startswith("sha256") and changed["value"] != alone["value"]
    (package / "b.py").unlink()
    (package / "a.py").rename(package / "c.py")
    assert code_digest(package)["value"] not in (alone["value"], changed["value"])


HOSTILE = "$\\frac{1}{0}$\n\x1b[31m\u202e" + 500 * "W"


def test_names_of_others_are_drawn_to_the_letter_and_bounded() -> None:
    assert literal("a$b$") == r"a\$b\$"
    assert literal(HOSTILE).startswith(r"\$\frac{1}{0}\$??[31m?W") and len(literal(HOSTILE)) == 42


def evidence_of(labels: list[str], name: str) -> dict[str, Any]:
    box = quantiles(np.arange(9.0))
    source = {"images": 9, "quantiles": box, "percentile": 50.0}
    tested = {"accuracy": None, "precision": None, "calibration_error": None, "test_images": 0, "named_images": 0}
    return {
        "created": "2026-01-01T00:00:00+00:00",
        "tool": {"versions": {"manifpt": "0"}, "code": {"kind": "git commit", "value": 40 * "a"}},
        "image": {"uri": name, "sha256": 64 * "a", "content_hash": 32 * "a", "format": name, "width_px": 9,
                  "height_px": 9},
        "run": {"plan_digest": 64 * "a", "estimate": {"name": "nearest"}, "space": {"name": name}},
        "reference": {"digest": 64 * "a", "images": 9},
        "attributor": {"weights_sha256": 64 * "a", "threshold": 0.5, "label": name, **tested},
        "artifact": {"norm": 3.0},
        "nearest_reals": [{"image_id": name, "distance": float(n)} for n in range(2)],
        "sources": {label: {"label": label, **source} for label in labels},
        "probabilities": [{"label": label, "probability": 1 / len(labels)} for label in labels],
        "verdict": {"source": None, "conclusive": False, "reasons": 9 * [name]},
        "meaning": dict.fromkeys(("probability", "unknown", "distance", "nearest_reals", "verdict"), "It means this."),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 8, 8), (40,)])
def test_a_panel_is_drawn_whatever_names_and_numbers_are(shape: tuple[int, ...]) -> None:
    evidence = evidence_of([f"{n}{HOSTILE}" for n in range(12)], HOSTILE)
    before = json.dumps(evidence)
    spec = SpaceSpec(name="rgb", kind="rgb", height_px=8, width_px=8)
    image_hwc = np.zeros((700, 900, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = draw_evidence(
            evidence, image_hwc, np.zeros((3, 8, 8), np.uint8), np.zeros(shape, np.float16), [None, image_hwc], spec
        )
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and image.size[0] == 1200 and 1200 < image.size[1] < 2000
    assert json.dumps(evidence) == before
