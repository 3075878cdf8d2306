"""One image, a run and an attributor: evidence that says what it rests on, or why there is none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from manifpt.analysis.explain import explain_image
from manifpt.attributor.bundle import Attributor, save_bundle
from manifpt.attributor.networks import make_network
from manifpt.config import ArtifactsConfig, ExplainConfig, IndexConfig, ReferenceConfig
from manifpt.decode import content_hash, decode
from manifpt.errors import ConfigError
from manifpt.estimates.denoiser import Denoiser, save_denoiser
from manifpt.reader import read_artifacts, read_plan
from manifpt.runs import build_reference, compute_artifacts, index_images
from tests.helpers.cluster import ROOT, job, must
from tests.helpers.images import bad_files, encoded, picture, sample_files, write_files
from tests.helpers.runs import openset_of, resealed, without_ray

SOURCES = {"gan": 60, "vae": 60, "real": 40}
LABELS = sorted(SOURCES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on images of the sample by two estimates, `nearest` and `mean`, and an attributor of each."""
    folder = tmp_path_factory.mktemp("explain")
    write_files(sample_files("reference", {"real": 150}), folder / "reals")
    write_files(sample_files("query", SOURCES), folder / "queries")
    unseen = dict(sample_files("query", {"vae": 61}))
    (folder / "unseen.png").write_bytes(list(unseen.values())[-1])
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        for name in ("reals", "queries"):
            index_images(IndexConfig(input=(str(folder / name),), output=str(folder / f"{name}.parquet")))
        reference = str(folder / "reference")
        build_reference(ReferenceConfig(manifest=str(folder / "reals.parquet"), output=reference, spaces=("rgb",)))
        for estimate in ("nearest", "mean"):
            output = folder / estimate
            manifest = str(folder / "queries.parquet")
            compute_artifacts(
                ArtifactsConfig(
                    manifest=manifest, reference=reference, output=str(output), estimate=estimate, shard_rows=64
                )
            )
            write_attributor(folder / f"attributor_{estimate}", output)
    return folder


def write_attributor(output: Path, run: Path, **changes: Any) -> Path:
    """A bundle that always says `vae` with 90%, of good test results: what is tested here is what becomes of that."""
    plan = read_plan(str(run))
    network = make_network("head", (3, 32, 32), len(LABELS))
    *_, bias = [parameter for parameter in network.parameters() if parameter.shape == (len(LABELS),)]
    *_, weight = [p for p in network.parameters() if p.ndim == 2 and p.shape[0] == len(LABELS)]
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.log(torch.tensor([0.04, 0.06, 0.9])))
    config = {
        "space": plan.spaces[0].identity(), "estimate": plan.estimate.identity(), "network": "head",
        "reference_digest": plan.reference_digest, "shape": [3, 32, 32],
    }  # fmt: skip
    metrics = {"accuracy": 0.8, "calibration_error": 0.05, "precision": [0.9, None, 0.7], "test_images": [50, 50, 50],
               "confusion": [[45, 0, 5], [5, 0, 45], [0, 0, 50]]}  # fmt: skip
    openset = openset_of(len(LABELS), shape=(3, 32, 32))
    save_bundle(str(output), network.state_dict(), LABELS, config | changes, {}, openset, metrics, "")
    return output


def config_of(made: Path, output: Path, image: Path, estimate: str = "nearest", **changes: Any) -> ExplainConfig:
    fields = {"image": image, "attributor": made / f"attributor_{estimate}", "artifacts": made / estimate,
              "output": output} | changes  # fmt: skip
    return ExplainConfig(**{name: str(value) for name, value in fields.items()})


def explained(made: Path, output: Path, image: Path, estimate: str = "nearest", **changes: Any) -> dict[str, Any]:
    """The evidence, as it was written."""
    explain_image(config_of(made, output, image, estimate, **changes))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads((output / "evidence.json").read_text(), parse_constant=refuse)
    return found


def test_a_new_image_is_explained_by_the_job_without_ray(made: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no Ray here')\n")
    arguments = config_of(made, tmp_path / "out", made / "unseen.png")
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("image", "attributor", "artifacts", "output")]
    said = must(job("explain_image", *flags, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}))
    assert said.startswith("Conclusive by all rules: vae") and "vae, 90.0% (55.0% needed)" in said
    found = json.loads((tmp_path / "out" / "evidence.json").read_text())
    data, plan = (made / "unseen.png").read_bytes(), read_plan(str(made / "nearest"))
    assert found["verdict"] == {"source": "vae", "conclusive": True, "reasons": []}
    assert found["image"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["image"]["content_hash"] == content_hash(decode(data)) and found["image"]["format"] == "PNG"
    assert found["reference"]["digest"] == plan.reference_digest and found["run"]["plan_digest"] == plan.digest
    weights = (made / "attributor_nearest" / "model.safetensors").read_bytes()
    assert found["attributor"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    panel = (tmp_path / "out" / "evidence.png").read_bytes()
    assert found["panel"]["sha256"] == hashlib.sha256(panel).hexdigest()
    assert {name: source["images"] for name, source in found["sources"].items()} == SOURCES
    assert found["tool"]["code"]["value"] and found["created"].endswith("+00:00")


@pytest.mark.parametrize("estimate", ["nearest", "mean"])
def test_an_image_of_the_run_gets_the_runs_own_numbers(made: Path, tmp_path: Path, estimate: str) -> None:
    *_, last = read_artifacts(str(made / estimate), "rgb")
    row = last.select(["uri", "distance"]).to_pylist()[-1]
    found = explained(made, tmp_path, Path(row["uri"]), estimate)
    assert found["artifact"]["norm"] == pytest.approx(row["distance"], rel=1e-6)
    reals = {path: decode(path.read_bytes()) / 255 for path in sorted((made / "reals").rglob("*.png"))}
    image = decode(Path(row["uri"]).read_bytes()) / 255
    distances = sorted((float(np.linalg.norm(image - real)), str(path)) for path, real in reals.items())[:5]
    assert [near["uri"] for near in found["nearest_reals"]] == [path for _, path in distances]
    np.testing.assert_allclose([near["distance"] for near in found["nearest_reals"]], [d for d, _ in distances], 1e-5)
    assert found["image"]["in_run"] and found["verdict"]["source"] is None
    assert "one of the run's images" in " ".join(found["verdict"]["reasons"])


def test_an_image_of_the_reference_is_not_projected_on_itself_under_any_name(made: Path, tmp_path: Path) -> None:
    original = sorted((made / "reals").rglob("*.png"))[0]
    copy = tmp_path / "copy.bmp"
    Image.open(original).save(copy)
    for image in (original, copy):
        found = explained(made, tmp_path / image.suffix[1:], image)
        assert found["image"]["in_reference"] and found["artifact"]["norm"] > 1
        assert str(original) not in [near["uri"] for near in found["nearest_reals"]]
        assert any("holds this very image" in reason for reason in found["verdict"]["reasons"])


def test_a_retouched_real_is_told_as_a_near_copy(made: Path, tmp_path: Path) -> None:
    image_hwc = decode(sorted((made / "reals").rglob("*.png"))[0].read_bytes())
    image_hwc[3, 4] ^= 5
    Image.fromarray(image_hwc).save(tmp_path / "retouched.png")
    found = explained(made, tmp_path / "out", tmp_path / "retouched.png")
    assert found["image"]["near_copy"] and not found["image"]["in_reference"]
    assert any("nearly a copy" in reason for reason in found["verdict"]["reasons"])


def test_a_real_that_was_changed_since_is_not_shown_as_evidence(made: Path, tmp_path: Path) -> None:
    uri = Path(explained(made, tmp_path, made / "unseen.png")["nearest_reals"][0]["uri"])
    data = uri.read_bytes()
    try:
        uri.write_bytes(encoded(picture(32), "PNG"))
        nearest = explained(made, tmp_path, made / "unseen.png")["nearest_reals"]
    finally:
        uri.write_bytes(data)
    assert [near["unchanged"] for near in nearest] == [False, True, True, True, True]


def test_a_run_by_a_denoiser_needs_it_and_refuses_what_it_has_learned(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    denoiser, run = tmp_path / "denoiser", tmp_path / "run"
    facts = {"color": "rgb", "reference_digest": read_plan(str(made / "nearest")).reference_digest}
    save_denoiser(Denoiser(width=6, depth=3), str(denoiser), facts)
    compute_artifacts(
        ArtifactsConfig(
            manifest=str(made / "queries.parquet"), reference=str(made / "reference"), output=str(run),
            estimate="denoiser", denoiser=str(denoiser),
        )
    )  # fmt: skip
    parts: dict[str, Any] = {"artifacts": run, "attributor": write_attributor(tmp_path / "attributor", run)}
    (row,) = [t.select(["uri", "distance"]).to_pylist()[0] for t in read_artifacts(str(run), "rgb")]
    found = explained(made, tmp_path / "out", Path(row["uri"]), denoiser=denoiser, **parts)
    assert found["artifact"]["norm"] == pytest.approx(row["distance"], rel=1e-4)
    assert len(found["nearest_reals"]) == 5
    with pytest.raises(ConfigError, match="say where it is with --denoiser"):
        explain_image(config_of(made, tmp_path / "out", made / "unseen.png", **parts))
    original = sorted((made / "reals").rglob("*.png"))[0]
    with pytest.raises(ConfigError, match="is in the reference, from which the denoiser has learned it"):
        explain_image(config_of(made, tmp_path / "out", original, denoiser=denoiser, **parts))


def test_sources_are_called_as_the_label_map_says(made: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.yaml").write_text("vae: other\ngan: vae\n")
    found = explained(made, tmp_path, made / "unseen.png", labels=tmp_path / "labels.yaml")
    assert found["sources"]["gan"]["label"] == "vae" and found["sources"]["vae"]["label"] == "other"
    kept = write_attributor(tmp_path / "kept", made / "nearest", choice={"labels": {"vae": "other", "gan": "vae"}})
    assert explained(made, tmp_path, made / "unseen.png", attributor=kept)["sources"] == found["sources"]
    (tmp_path / "labels.yaml").write_text("vae: other\n")
    found = explained(made, tmp_path, made / "unseen.png", labels=tmp_path / "labels.yaml")
    assert any("no images of vae" in reason for reason in found["verdict"]["reasons"])


def test_without_test_results_nothing_is_conclusive(made: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(made / "attributor_nearest", tmp_path / "bundle")
    (bundle / "metrics.json").write_text("{}")
    resealed(bundle)
    found = explained(made, tmp_path / "out", made / "unseen.png", attributor=bundle)
    assert found["attributor"]["precision"] is None and found["attributor"]["test_images"] == 0
    assert {"calibration was not measured", "never named vae", "tested on 0 images of vae"} == {
        said
        for said in ("calibration was not measured", "never named vae", "tested on 0 images of vae")
        if any(said in reason for reason in found["verdict"]["reasons"])
    }


@pytest.mark.parametrize("name", sorted(bad_files()))
def test_a_bad_image_ends_in_one_sentence_and_writes_nothing(made: Path, tmp_path: Path, name: str) -> None:
    data, reason = bad_files()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as error:
        explain_image(config_of(made, tmp_path / "out", tmp_path / name))
    assert reason in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_wrong_command_ends_with_code_two_and_one_line(made: Path, tmp_path: Path) -> None:
    result = job(
        "explain_image", "--image", made / "nothing.png", "--attributor", made / "attributor_nearest",
        "--artifacts", made / "nearest", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == f"error: There is no file at {made}/nothing.png; --image is one image file.\n"


def test_what_does_not_belong_together_is_refused(made: Path, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            explain_image(config_of(made, tmp_path / "out", made / "unseen.png", **changes))
        return str(error.value)

    other = write_attributor(tmp_path / "other", made / "nearest", reference_digest="0" * 64)
    assert "its reference_digest differs" in refused(attributor=other)
    assert "its estimate differs" in refused(attributor=made / "attributor_mean")
    size = Attributor.load(str(made / "attributor_nearest")).config["space"] | {"height_px": 64}
    assert "its space differs" in refused(attributor=write_attributor(tmp_path / "size", made / "nearest", space=size))
    moved = shutil.copytree(made / "reference", tmp_path / "moved")
    document = json.loads((moved / "bundle.json").read_text())
    (moved / "bundle.json").write_text(json.dumps(document | {"digest": "1" * 64}))
    assert "is not the one of" in refused(reference=moved)
    assert "--denoiser is for runs" in refused(denoiser=tmp_path)
    assert "There is no run" in refused(artifacts=tmp_path / "nothing")
    (moved / "reference.parquet").unlink()
    shutil.copy(made / "reference" / "bundle.json", moved / "bundle.json")
    assert "lost its list of images" in refused(reference=moved)
    damaged = shutil.copytree(made / "attributor_nearest", tmp_path / "damaged")
    (damaged / "metrics.json").write_text('{"accuracy": 1.0}')
    assert "metrics.json is not the one that its config names" in refused(attributor=damaged)
    resealed(damaged)
    assert f"metrics of {damaged} are damaged" in refused(attributor=damaged)
    assert not (tmp_path / "out").exists()


def test_an_output_that_can_not_be_written_is_said(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --output"):
        explain_image(config_of(made, tmp_path / "file" / "out", made / "unseen.png"))
