"""A recipe of one's own, from folders of images to the table, as one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.cluster import job, must
from tests.helpers.images import sample_files

SOURCES = {"vae": 90, "diffusion": 90}
REALS = 150


def recipe(path: Path, vae: str = "vae", **more: Any) -> Path:
    """Two sources of the shipped sample, and its reals: every third one is a query. `vae`: the first one's name."""
    known = {"provenance": {"listed": "repo"}}
    path.write_text(
        yaml.safe_dump(
            {
                "name": path.stem,
                "title": "Two generators of digits",
                "size_px": 28,
                "resolution": "Native 28 px.",
                "images": {"layout": "folders"},
                "real": {
                    "reference": [{"path": "real", "except_every": 3}],
                    "queries": [{"path": "real", "every": 3}],
                    "licence": "BSD",
                },
                "spaces": ["rgb"],
                "min_images": 40,
                "paper_column": "cifar10",
                "sources": [
                    {"name": vae, "family": "vae", **known},
                    {"name": "diffusion", "family": "score", **known},
                ],
                **more,
            }
        )
    )
    return path


@pytest.mark.slow
def test_one_command_makes_the_table_and_the_same_again_finds_it(cluster: dict[str, str], tmp_path: Path) -> None:
    for split, sources in (("query", SOURCES), ("reference", {"real": REALS})):
        for name, data in sample_files(split, sources):
            target = tmp_path / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    arguments = ("--recipe", recipe(tmp_path / "tiny.yaml"), "--images", tmp_path / "images", "--output",
                 tmp_path / "out", "--runs", "nearest", "none", "soft-0.01", "phases-0.01", "--networks", "head",
                 "--epochs", "3", "--seeds", "2", "--baselines", "dzanic20")  # fmt: skip
    first = must(job("reproduce_tables", *arguments, env=cluster))
    table = json.loads((tmp_path / "out" / "evaluation" / "table.json").read_text())
    rows = {(row["method"], row["space"]) for row in table}
    assert ("ManiFPT, nearest real", "rgb") in rows and ("soft projection", "ycbcr") in rows
    assert ("Dzanic20", "pixels") in rows and ("control: raw embedding", "frequency_ycbcr") in rows
    assert ("fusion with artifacts", "several") in rows
    assert ("control: soft projection, onto `random-phases`", "ycbcr") in rows
    for row in table:
        assert row["dataset"] == "tiny" and row["seeds"] == 2 and 0 <= row["accuracy_mean"] <= 100
        assert row["codec_separable"] == [] and (row["fd_ratio"] is None) == (row["kind"] == "fusion")
    assert max(row["accuracy_mean"] for row in table) > 60  # of three sources
    assert "| ManiFPT, nearest real | rgb |" in first and "69.5 ± 1.1" in first  # the paper's, beside
    again = job("reproduce_tables", *arguments, env=cluster)
    assert must(again) == first and "fit_done" not in again.stderr


@pytest.mark.slow
def test_a_table_4_of_two_recipes(cluster: dict[str, str], tmp_path: Path) -> None:
    for split, sources in (("query", SOURCES), ("reference", {"real": REALS})):
        for n, (name, data) in enumerate(sample_files(split, sources)):
            folder = name.replace("vae/", "autoencoder/") if n % 2 else name
            target = tmp_path / ("there" if n % 2 else "here") / folder
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    cross = {"recipe": "there", "table4": "chq->ffhq", "labels": {"real": "real", "vae": "autoencoder"}}
    few = {"min_images": 20}
    here = recipe(tmp_path / "here.yaml", cross=[cross], **few)
    there = recipe(tmp_path / "there.yaml", vae="autoencoder", **few)

    def arguments(of: Path) -> tuple[object, ...]:
        return ("--recipe", of, "--images", tmp_path / of.stem, "--output", tmp_path / f"out-{of.stem}", "--runs",
                "nearest", "phases-0.01", "--networks", "head", "--epochs", "3", "--seeds", "1", "--baselines",
                "dzanic20", "--size-px", "20")  # fmt: skip

    must(job("reproduce_tables", *arguments(there), env=cluster))
    printed = must(job("reproduce_tables", *arguments(here), "--across", tmp_path / "out-there", env=cluster))
    table = json.loads((tmp_path / "out-here" / "evaluation-on-there" / "table.json").read_text())
    assert {row["tested_on"] for row in table} == {"there"} and {row["dataset"] for row in table} == {"here"}
    assert "# here\n" in printed and "# here, tested on there" in printed and "| 66.3 |" in printed
    details = json.loads((tmp_path / "out-here" / "evaluation-on-there" / "details.json").read_text())
    assert details["facts"]["left_out_of_test"]["sources left out by the label map"] == SOURCES["diffusion"] // 2
    assert list(details["facts"]["labels"]) == ["diffusion", "real", "vae"]
