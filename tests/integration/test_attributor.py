"""From artifacts to an attributor and to the table of an evaluation, by the jobs that users start."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from manifpt.artifacts import to_numpy
from manifpt.attributor.bundle import Attributor
from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import select_examples
from manifpt.attributor.splits import TEST
from manifpt.config import ArtifactsConfig
from manifpt.reader import ArtifactReader
from manifpt.runs import compute_artifacts
from tests.helpers.cluster import ROOT, job, must
from tests.helpers.runs import rewritten, sample_reference, without_ray

pytestmark = pytest.mark.timeout(600)  # workers take long to start where cores are few
SOURCES = {"gan": 90, "vae": 90, "flow": 90, "real": 60}
EPOCHS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on images of the sample: `nearest`, `none`, and `other` on a smaller reference."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        reference = sample_reference(folder, 300, SOURCES)
        for estimate in ("nearest", "none"):
            compute_artifacts(
                ArtifactsConfig(
                    manifest=str(folder / "queries.parquet"), reference=reference, output=str(folder / estimate),
                    estimate=estimate, shard_rows=64,
                )
            )  # fmt: skip
    return folder


def training(runs: Path, *arguments: object) -> tuple[object, ...]:
    return ("--artifacts", runs / "nearest", "--space", "frequency", "--network", "head", *arguments)


@pytest.fixture(scope="module")
def attributor(runs: Path, cluster: dict[str, str]) -> Path:
    """Trained by two workers."""
    output = runs / "attributor"
    said = must(
        job("train_attributor", *training(runs, "--epochs", EPOCHS, "--workers", 2, "--output", output), env=cluster)
    )
    assert "Trained for 3 epochs" in said
    return output


def test_an_attributor_is_trained_and_tells_sources_apart(runs: Path, attributor: Path) -> None:
    lines = [json.loads(line) for line in (attributor / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    examples = select_examples(str(runs / "nearest"), "frequency", Choice(labels={}))
    reader, right, count = ArtifactReader(str(runs / "nearest"), "frequency"), 0, 0
    loaded = Attributor.load(str(attributor))
    for part in examples.parts(TEST):
        found = loaded.predict(to_numpy(reader.read(part.shard, part.place_n)["artifact"]))
        right += int((loaded.label_numbers(found.source) == part.label_n).sum())
        count += len(part.label_n)
    metrics = json.loads((attributor / "metrics.json").read_text())
    assert right / count == pytest.approx(metrics["accuracy"]), "what was measured is what was published"
    assert right / count > 2 / len(SOURCES)
    assert sum(metrics["test_images"]) == count == (examples.side_n == TEST).sum()


def test_the_same_command_again_finds_it_and_another_is_refused(runs: Path, attributor: Path) -> None:
    """Without Ray, which costs seconds."""
    begin = time.monotonic()
    said = must(job("train_attributor", *training(runs, "--epochs", EPOCHS, "--output", attributor)))
    assert "Was trained before" in said
    assert time.monotonic() - begin < 30
    result = job("train_attributor", *training(runs, "--epochs", EPOCHS + 1, "--output", attributor))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: {attributor} holds another training: recipe differs. Choose another --output, or delete it."
    ]


def test_an_evaluation_compares_runs_and_computes_nothing_twice(
    runs: Path, attributor: Path, cluster: dict[str, str]
) -> None:
    output = runs / "evaluation"
    arguments = (
        "--artifacts", runs / "nearest", runs / "none", "--spaces", "frequency", "--networks", "head", "--epochs", 3,
        "--seeds", 2, "--baselines", "durall20", "--attributor", attributor, "--output", output,
    )  # fmt: skip
    result = job("evaluate_attributor", *arguments, env=cluster)
    said = must(result)
    assert result.stderr.count("fit_done") == 4 and result.stderr.count("test_done") == 6
    table = json.loads((output / "table.json").read_text())
    fields = {"dataset", "method", "space", "accuracy_mean", "accuracy_std", "fd_ratio", "seeds", "codec_separable"}
    assert all(fields <= row.keys() for row in table)
    by_method = {row["method"]: row for row in table}
    named = f"attributor {attributor}"
    assert set(by_method) == {
        "ManiFPT, nearest real",
        "control: raw embedding",
        "Durall20",
        "fusion with artifacts",
        named,
    }
    for method, row in by_method.items():
        assert row["dataset"] == "nearest" and row["seeds"] == (1 if method == named else 2)
        assert row["accuracy_mean"] > (35 if method == "Durall20" else 50)
        assert (row["fd_ratio"] is None) == (method in ("fusion with artifacts", named))
    details = json.loads((output / "details.json").read_text())
    weights = details["fusion_weights"]["fusion with artifacts"]
    assert len(weights) == 2 and all(len(of_seed) == 2 and min(of_seed.values()) >= 0 for of_seed in weights)
    assert (output / "table.md").read_text().strip() == said.strip()
    before = {path: path.stat().st_mtime_ns for path in (output / "methods").rglob("*") if path.is_file()}
    again = job("evaluate_attributor", *arguments, env=cluster)
    must(again)
    assert "_done" not in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (output / "methods").rglob("*") if path.is_file()}
    measured_again = {named: {"predict_s": by_method[named]["predict_s"]}}  # a bundle's time is taken each time
    found = json.loads((output / "table.json").read_text())
    assert [row | measured_again.get(row["method"], {}) for row in found] == table


def said_in_this_process(
    name: str, arguments: tuple[object, ...], patch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> str:
    """The one line of a job that must end with 2 before it needs Ray."""
    patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_input_is_told_in_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.yaml").write_text("vae: null\nflow: null\nreal: null\n")
    arguments = training(runs, "--labels", tmp_path / "one.yaml", "--output", tmp_path / "t")
    assert "1 label(s) (gan)" in said_in_this_process("train_attributor", arguments, monkeypatch, capfd)

    mixed = shutil.copytree(runs / "nearest", tmp_path / "mixed")
    shutil.copy(mixed / "artifacts/rgb/part-00001.parquet", mixed / "artifacts/frequency/part-00001.parquet")
    arguments = ("--artifacts", mixed, "--space", "frequency", "--output", tmp_path / "t")
    assert "two spaces are mixed" in said_in_this_process("train_attributor", arguments, monkeypatch, capfd)

    other = shutil.copytree(runs / "nearest", tmp_path / "other")
    rewritten(other / "artifacts/frequency/part-00002.parquet", metadata={"reference_digest": "0" * 64})
    arguments = ("--artifacts", other, "--space", "frequency", "--output", tmp_path / "t")
    assert "another reference" in said_in_this_process("train_attributor", arguments, monkeypatch, capfd)
    assert not (tmp_path / "t").exists()


def test_labels_that_an_attributor_does_not_know_are_told_before_anything_is_fitted(
    runs: Path, attributor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "renamed.yaml").write_text("gan: dalle\n")
    arguments = ("--artifacts", runs / "nearest", "--attributor", attributor, "--labels", tmp_path / "renamed.yaml",
                 "--output", tmp_path / "e")  # fmt: skip
    line = said_in_this_process("evaluate_attributor", arguments, monkeypatch, capfd)
    assert "does not know dalle; it knows flow, gan, real, vae" in line
    elsewhere = ("--artifacts", runs / "none", "--attributor", attributor, "--output", tmp_path / "e")
    line = said_in_this_process("evaluate_attributor", elsewhere, monkeypatch, capfd)
    assert "none of the runs has them" in line


def test_artifacts_that_are_no_numbers_end_the_job_at_once(runs: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    """A worker finds them, and is not started again 16 times."""
    bad = shutil.copytree(runs / "nearest", tmp_path / "bad")
    part = bad / "artifacts/frequency/part-00000.parquet"
    artifacts = to_numpy(pq.read_table(part)["artifact"]).copy()
    artifacts[:, 1, 2, 3] = np.nan
    rewritten(part, artifacts)
    arguments = ("--artifacts", bad, "--space", "frequency", "--network", "head", "--workers", 1, "--epochs", 2)
    result = job("train_attributor", *arguments, "--output", tmp_path / "t", env=cluster)
    assert result.returncode == 2
    line = "error: Artifacts hold numbers that are not finite: compute them again."
    told = result.stderr.splitlines()
    assert told[-1] == line and len(told) == 2 and " training run=" in told[0]
