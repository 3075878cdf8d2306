"""What flags make of a run, before anything is written: plans without Ray."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manifpt import planning
from manifpt.config import ArtifactsConfig, DenoiserConfig, ReferenceConfig
from manifpt.errors import ConfigError, PlanMismatch
from manifpt.estimates import Estimate
from manifpt.estimates.denoiser import Denoiser, save_denoiser
from manifpt.estimates.denoising import train_denoiser
from manifpt.indexing import IndexOptions, index
from manifpt.manifest import write_manifest
from manifpt.plan import Plan, publish_plan
from manifpt.planning import describe_plan, plan_artifacts, plan_reference
from manifpt.reader import read_plan
from manifpt.reference import finish_bundle, open_bundle
from manifpt.spaces import SpaceSpec
from manifpt.stages import Encoder, commit_codes, decode_rows
from tests.helpers.images import encoded, picture
from tests.unit.test_stages import put


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests, and a reference of eight images in `rgb`, `frequency`, `ycbcr`."""
    folder = tmp_path_factory.mktemp("planning")
    for name, first in (("reals", 0), ("queries", 50)):
        for n in range(8):
            put(
                folder / f"{name}/{'real' if name == 'reals' else 'a'}/{n}.png", encoded(picture(seed=first + n), "PNG")
            )
        write_manifest(index([str(folder / name)], IndexOptions(), Counter()), str(folder / f"{name}.parquet"))
    built(folder, "reference", spaces=("rgb", "frequency", "ycbcr"))
    save_denoiser(Denoiser(width=4, depth=2), str(folder / "denoiser"), {
        "color": "rgb", "reference_digest": open_bundle(str(folder / "reference")).digest,
    })  # fmt: skip
    return folder


def built(folder: Path, name: str, **flags: Any) -> Plan:
    config = ReferenceConfig(manifest=str(folder / "reals.parquet"), output=str(folder / name), **flags)
    plan, output = plan_reference(config)
    for shard in range(plan.shards):
        commit_codes(plan, output, Encoder(plan.spaces)(decode_rows(plan, shard)))
    finish_bundle(plan, output)
    return plan


def planned(folder: Path, reference: str = "reference", **flags: Any) -> Plan:
    places = {"manifest": folder / "queries.parquet", "reference": folder / reference, "output": folder / "run"}
    return plan_artifacts(ArtifactsConfig(**{name: str(place) for name, place in places.items()}, **flags))[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sigma": 1.0}, "--sigma is for soft and blur, not for --estimate nearest"),
        ({"estimate": "mean", "sigma": 0.1}, "--sigma is for soft and blur, not for --estimate mean"),
        ({"estimate": "soft", "sigma": 0.0}, "needs a --sigma above 0"),
        ({"estimate": "mean", "neighbors": 65}, "--neighbors is 1 to 64"),
        ({"estimate": "hull", "ridge": -1.0}, "--ridge is 1e-09 to"),
        ({"denoiser": "{folder}/denoiser"}, "--denoiser needs --estimate denoiser"),
        ({"estimate": "soft", "denoiser": "{folder}/denoiser"}, "--denoiser needs --estimate denoiser"),
        ({"estimate": "denoiser"}, "--estimate denoiser needs --denoiser"),
        ({"estimate": "denoiser", "denoiser": "{folder}/none"}, "There is no finished denoiser at"),
        ({"estimate": "denoiser", "denoiser": "{folder}/denoiser"}, "not on the space 'frequency'"),
        ({"estimate": "denoiser", "denoiser": "{folder}/denoiser", "spaces": ("ycbcr",)}, "rgb pixels, not on ycbcr"),
        ({"estimate": "soft", "store": "lazy"}, "--store lazy keeps a neighbour"),
        ({"estimate": "mean", "neighbors": 1, "store": "lazy"}, "--estimate mean has none"),
        ({"estimate": "soft", "projection": "approximate"}, "are for --estimate nearest, not soft"),
        ({"estimate": "random", "projection": "approximate"}, "are for --estimate nearest, not random"),
        ({"estimate": "hull", "reference_shards": 2}, "are for --estimate nearest, not hull"),
        ({"estimate": "blur"}, "--estimate blur works on pixels, not on the space 'frequency'"),
        ({"residual_first": True, "spaces": ("rgb", "ycbcr")}, "--residual-first is for frequency spaces"),
        ({"alter": "jpeg-80"}, "Unknown --alter 'jpeg-80'; known: none, jpeg-95"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_one_sentence(folder: Path, flags: dict[str, Any], words: str) -> None:
    flags = {name: value.format(folder=folder) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(ConfigError) as caught:
        planned(folder, **flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not (folder / "run").exists()


def test_what_a_space_can_not_have_shows_in_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker would find out too, but then a plan lies in the output that the corrected command does not match."""
    network = SpaceSpec(name="net", kind="network", architecture="timm:x", size_px=32)
    monkeypatch.setattr("manifpt.planning._of_bundle", lambda name, bundle, config: network)
    monkeypatch.setattr("manifpt.planning.open_bundle", lambda uri: replace(bundle, dims={"net": 20_000}))
    from manifpt.reference import open_bundle

    bundle = open_bundle(str(folder / "reference"))
    with pytest.raises(ConfigError, match="--estimate blur works on pixels, not on the space 'net'"):
        planned(folder, estimate="blur", spaces=("net",))
    with pytest.raises(ConfigError, match="a matrix of 20,000 x 20,000 numbers"):
        planned(folder, estimate="soft", spaces=("net",))


def test_defaults_of_sigma(folder: Path) -> None:
    assert planned(folder, estimate="soft").estimate == Estimate(name="soft", sigma=0.01)
    assert planned(folder, estimate="blur", residual_first=True).estimate.sigma == 1.0
    assert planned(folder, estimate="soft", sigma=0.5).estimate.sigma == 0.5


def test_flags_that_fit(folder: Path) -> None:
    found = planned(folder, estimate="denoiser", denoiser=str(folder / "denoiser"), spaces=("rgb",))
    assert found.estimate.weights == str(folder / "denoiser")
    assert len(found.estimate.weights_sha256) == 64
    assert planned(folder, estimate="hull", neighbors=4, ridge=0.5).estimate.label == "hull neighbors=4 ridge=0.5"
    planned(folder, estimate="none", projection="flat")
    planned(folder, estimate="random", store="lazy")
    assert planned(folder, residual_first=True, projection="approximate").estimate.residual_first


def test_artifacts_without_a_neighbor_are_always_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifpt.planning.INLINE_LIMIT_BYTES", 1)
    names = ("rgb", "frequency", "ycbcr")
    for name in ("mean", "hull", "soft", "none"):
        assert planned(folder, estimate=name).inline == names
    assert planned(folder).inline == planned(folder, estimate="random").inline == ()


def test_another_estimate_is_another_plan(folder: Path) -> None:
    flags: list[dict[str, Any]] = [
        {}, {"residual_first": True}, {"estimate": "mean"}, {"estimate": "mean", "neighbors": 4},
        {"estimate": "hull"}, {"estimate": "hull", "ridge": 0.2}, {"estimate": "soft"},
        {"estimate": "soft", "sigma": 0.02}, {"estimate": "none"}, {"estimate": "random"},
    ]  # fmt: skip
    assert len({planned(folder, **of_run).digest for of_run in flags}) == len(flags)
    assert planned(folder, neighbors=3, ridge=9.0).digest == planned(folder).digest, "the nearest takes no notice"


def test_the_plan_of_the_paper_is_the_one_from_before_there_was_a_choice(folder: Path) -> None:
    plan = planned(folder, spaces=("rgb",))
    assert set(plan.semantic()) == {
        "task", "manifest_digest", "rows", "shard_rows", "spaces", "reference_digest", "dtype", "inline", "decoder"
    }  # fmt: skip
    old = Plan(
        task="artifacts", manifest_uri="m", manifest_digest="d", rows=3, shard_rows=2, reference_uri="r",
        spaces=(SpaceSpec(name="rgb", kind="rgb", height_px=32, width_px=32),), reference_digest="e", inline=("rgb",),
        decoder="pillow/1",
    )  # fmt: skip
    document = {
        "task": "artifacts", "manifest_digest": "d", "rows": 3, "shard_rows": 2,
        "spaces": [{"name": "rgb", "kind": "rgb", "size_px": None, "height_px": 32, "width_px": 32, "min_px": 0,
                    "architecture": None, "weights_sha256": None, "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225]}],
        "reference_digest": "e", "dtype": "float16", "inline": ["rgb"], "decoder": "pillow/1",
    }  # fmt: skip
    assert old.digest == hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    "flags",
    [{}, {"estimate": "soft"}, {"estimate": "hull", "neighbors": 3}, {"estimate": "none", "residual_first": True}],
)
def test_a_plan_comes_back_from_its_folder(folder: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    plan = planned(folder, **flags)
    publish_plan(plan, str(tmp_path))
    found = read_plan(str(tmp_path))
    assert found.estimate.identity() == plan.estimate.identity()
    assert found.digest == plan.digest
    publish_plan(plan, str(tmp_path))
    with pytest.raises(PlanMismatch, match=r"the estimate of the projection \(--estimate and its parameters\)"):
        publish_plan(planned(folder, estimate="mean"), str(tmp_path))


def test_a_dry_run_with_an_estimate(folder: Path) -> None:
    described = describe_plan(planned(folder, estimate="soft"), str(folder / "run"))
    assert described["spaces"]["rgb"]["store"] == "inline"


def test_an_equalized_reference_passes_its_codec_on(folder: Path) -> None:
    plan = built(folder, "equalized", spaces=("rgb", "frequency"), equalize_codec=True)
    assert {spec.view.key for spec in plan.spaces} == {"native-32x32-min8-jpeg"}
    found = planned(folder, reference="equalized")
    assert [spec.codec for spec in found.spaces] == ["jpeg", "jpeg"]
    assert found.reference_digest != planned(folder).reference_digest
    denoiser = str(folder / "denoiser")
    with pytest.raises(ConfigError, match="codec '', and the space has 'jpeg'"):
        planned(folder, reference="equalized", estimate="denoiser", denoiser=denoiser, spaces=("rgb",))


def test_a_denoiser_of_fewer_reals_than_it_can_be_measured_on_is_refused(folder: Path, tmp_path: Path) -> None:
    config = DenoiserConfig(reference=str(folder / "reference"), space="rgb", output=str(tmp_path / "denoiser"))
    with pytest.raises(ConfigError, match="needs 10 real images or more, and .* has 8"):
        train_denoiser(config)
    assert not (tmp_path / "denoiser").exists()


def test_the_encoder_of_the_flag_wins_over_that_of_the_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def spec_of(name: str, own: dict[str, Any], size_px: int | None) -> None:
        asked.append(own)
        raise ConfigError("enough")

    monkeypatch.setattr(planning, "spec_of", spec_of)
    config = ReferenceConfig(
        manifest=str(folder / "reals.parquet"), output="o", spaces=("selfsupervised",), encoder="new",
        own_spaces={"selfsupervised": {"encoder": "old", "weights_sha256": "0" * 64, "size_px": 64}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="enough"):
        plan_reference(config)
    assert asked == [{"selfsupervised": {"encoder": "new", "size_px": 64}}]
