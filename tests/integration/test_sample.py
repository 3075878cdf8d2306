"""The shipped sample is what it says: scikit-learn's digits, and what models trained on them drew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from manifpt.decode import decode
from manifpt.sample import SAMPLE_PATH
from manifpt.sample.train_generators import quantise, real_digits
from tests.helpers.cluster import ROOT

FAMILIES = ("diffusion", "flow", "gan", "vae")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return pq.read_table(SAMPLE_PATH).to_pylist()


def pixels(rows: list[dict[str, object]], source: str, split: str) -> np.ndarray:
    found = [row for row in rows if (row["source"], row["split"]) == (source, split)]
    return np.stack([decode(row["image"]["bytes"]) for row in found])  # type: ignore[index]


def test_size_and_counts(rows: list[dict[str, object]]) -> None:
    assert SAMPLE_PATH.stat().st_size < 2_000_000
    assert pixels(rows, "real", "reference").shape == (1497, 32, 32, 3)
    assert pixels(rows, "real", "query").shape == (300, 32, 32, 3)
    for family in FAMILIES:
        assert pixels(rows, family, "query").shape == (500, 32, 32, 3)


def test_the_reals_are_scikit_learns_digits(rows: list[dict[str, object]]) -> None:
    reals = [row for row in rows if row["source"] == "real"]
    stored = np.stack([decode(row["image"]["bytes"])[:, :, 0] for row in reals])  # type: ignore[index]
    enlarged, digits = real_digits()
    np.testing.assert_array_equal(stored, quantise(enlarged))
    assert [row["digit"] for row in reals] == digits.tolist() == load_digits().target.tolist()


def test_no_generator_copied_and_none_collapsed(rows: list[dict[str, object]]) -> None:
    reference = pixels(rows, "real", "reference")[..., 0].reshape(1497, -1).astype(np.float32)
    spread = reference.std(axis=0).mean()
    for family in FAMILIES:
        drawn = pixels(rows, family, "query")[..., 0].reshape(500, -1).astype(np.float32)
        squared = (drawn**2).sum(1)[:, None] + (reference**2).sum(1) - 2 * drawn @ reference.T
        assert np.sqrt(squared.min()) > 255, f"{family} has an image that is nearly a reference image"
        assert len(np.unique(drawn, axis=0)) == 500
        assert drawn.std(axis=0).mean() > 0.6 * spread


@pytest.mark.slow
def test_the_script_makes_such_a_file_again(tmp_path: Path) -> None:
    """With a few steps a model: the same code from end to end."""
    output = tmp_path / "digits.parquet"
    command = [
        sys.executable,
        "-m",
        "manifpt.sample.train_generators",
        "--output",
        str(output),
        "--steps-scale",
        "0.001",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=280)
    table, shipped = pq.read_table(output), pq.read_table(SAMPLE_PATH)
    assert table.schema.equals(shipped.schema)
    reals = table.filter(np.array(table["source"].to_pylist()) == "real")
    assert reals.equals(shipped.filter(np.array(shipped["source"].to_pylist()) == "real"))
    facts = json.loads(shipped.schema.metadata[b"manifpt.sample"])
    assert set(FAMILIES) <= set(facts)
    assert all(facts[family]["steps"] >= 1000 and facts[family]["losses"] for family in FAMILIES)
