"""The robustness ladder: what it measures is what a run of altered images would give, and nothing is measured twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from manifpt.alterations import LADDER, NONE
from manifpt.attributor.bundle import Attributor, save_bundle
from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import select_examples
from manifpt.attributor.networks import make_network
from manifpt.attributor.splits import TEST
from manifpt.config import EvaluateConfig
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.evaluation import ladder, rungs
from manifpt.evaluation.ladder import measure_ladder
from manifpt.manifest import Manifest
from manifpt.plan import Plan, publish_plan
from manifpt.reader import read_plan
from manifpt.reference import finish_bundle
from manifpt.report.ladder import draw_ladder, ladder_markdown
from manifpt.spaces import SpaceSpec
from manifpt.stages import Encoder, commit_codes, decode_rows
from tests.helpers.images import encoded, picture
from tests.helpers.runs import openset_of
from tests.helpers.tasks import tasks_here
from tests.unit.test_stages import planned, put, run, travelled

RGB = SpaceSpec(name="rgb", kind="rgb", height_px=32, width_px=32)
LABELS = ("one", "other")
CHOICE = Choice(labels={"a": "one", "b": "one", "c": "other", "d": None}, most_images=15, seed=3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run on four sources, onto eight reals."""
    folder = tmp_path_factory.mktemp("ladder")
    for n in range(8):
        put(folder / f"reals/real/{n}.png", encoded(picture(seed=n), "PNG"))
    for number, source in enumerate("abcd"):
        for n in range(10):
            put(folder / f"queries/{source}/{n}.png", encoded(picture(seed=100 * number + n + 50), "PNG"))
    reals = planned(folder, "reals", (RGB,))
    for shard in range(reals.shards):
        commit_codes(reals, str(folder / "reference"), travelled(Encoder(reals.spaces)(decode_rows(reals, shard))))
    bundle = finish_bundle(reals, str(folder / "reference"))
    queries = replace(planned(folder, "queries", (RGB,), 16), task="artifacts", inline=("rgb",),
                      reference_uri=bundle.uri, reference_digest=bundle.digest)  # fmt: skip
    finished(queries, folder / "run")
    return str(folder / "run")


def finished(plan: Plan, output: Path) -> None:
    publish_plan(plan, str(output))
    run(plan, output)
    (output / "_SUCCESS").write_bytes(b"")


def attributor(plain: str, folder: Path, seed: int = 0, **changes: Any) -> str:
    """A bundle as of a training on the run; what it says hangs on its random weights."""
    torch.manual_seed(seed)
    examples = select_examples(plain, "rgb", CHOICE)
    network = make_network("head", examples.shape, 2)
    network.standardize(torch.zeros(examples.shape), torch.full(examples.shape, 0.2))
    config = {
        "space": examples.spec.identity(), "estimate": examples.estimate.identity(),
        "reference_digest": examples.reference_digest, "shape": list(examples.shape), "network": "head", "seed": 3,
        "examples_digest": examples.digest, "choice": CHOICE.facts(), "altered": None,
    } | changes  # fmt: skip
    unknown = {"rate": 0.05, "measured_rate": 0.04}
    openset = openset_of(2, threshold=22.5, shape=examples.shape)
    save_bundle(str(folder), network.state_dict(), LABELS, config, {"unknown": unknown}, openset, {}, "")
    return str(folder)


@pytest.fixture
def climbed(plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A ladder without Ray, with the steps of every task that it ran."""
    ran = tasks_here(monkeypatch)

    def measure(*bundles: str, runs: tuple[str, ...] = (plain,)) -> dict[str, Any]:
        ran.clear()
        found = measure_ladder(
            EvaluateConfig(artifacts=runs, attributor=bundles, output=str(tmp_path / "out"), ladder=True)
        )
        return found | {"ran": [(rung.plan.alter, len(rung.climbers)) for (rung,) in ran]}

    return measure


def test_a_step_is_what_a_run_of_altered_images_gives(
    plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    bundle = attributor(plain, tmp_path / "b")
    found = climbed(bundle)
    assert found["steps"] == [NONE, *LADDER]
    (of_bundle,) = found["attributors"]
    examples = select_examples(plain, "rgb", CHOICE)
    test_n = np.flatnonzero(examples.side_n == TEST)
    label_of = dict(
        zip(examples.table["image_id"].take(pa.array(test_n)).to_pylist(), examples.label_n[test_n], strict=True)
    )
    assert of_bundle["test_images"] == len(label_of) > 3
    loaded, plan = Attributor.load(bundle), read_plan(plain)
    plan = replace(plan, manifest_etag=Manifest(plan.manifest_uri).etag)
    seen = Counter()
    for step in (NONE, "jpeg-30", "crop-0.75", "noise-4"):
        artifacts, labels = artifacts_at(replace(plan, alter=step), label_of, tmp_path / step)
        verdicts = loaded.verdicts(artifacts)
        right_b = loaded.label_numbers(verdicts.label) == labels
        result = of_bundle["results"][step]
        assert (result["images"], result["rejected"]) == (len(label_of), 0)
        assert result["accuracy"] == pytest.approx(right_b.mean())
        of_label = [right_b[labels == label].mean() for label in set(labels)]
        assert result["balanced_accuracy"] == pytest.approx(np.mean(of_label))
        assert result["unknown_rate"] == pytest.approx(verdicts.is_unknown_b.mean())
        seen[result["accuracy"], result["unknown_rate"]] += 1
    assert len(seen) > 1, "else this shows nothing"
    assert json.loads((tmp_path / "out/ladder.json").read_text())["attributors"] == found["attributors"]
    assert (tmp_path / "out/ladder.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/ladder.md").read_text() == found["text"]


def artifacts_at(plan: Plan, label_of: dict[str, int], output: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of some images of an altered run, with their labels."""
    from manifpt.reader import read_artifacts

    finished(plan, output)
    artifacts, labels = [], []
    for table in read_artifacts(str(output), "rgb"):
        for image_id, artifact in zip(
            table["image_id"].to_pylist(), table["artifact"].combine_chunks().to_numpy_ndarray(), strict=True
        ):
            if image_id in label_of:
                artifacts.append(artifact)
                labels.append(label_of[image_id])
    return np.stack(artifacts), np.array(labels)


def test_nothing_is_measured_twice(plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    one, other = (attributor(plain, tmp_path / f"b{seed}", seed) for seed in range(2))
    first = climbed(one, one)
    assert first["ran"] == [(step, 1) for step in (NONE, *LADDER)]
    assert climbed(one)["ran"] == []
    second = climbed(one, other)
    assert second["ran"] == first["ran"], "of the other alone"
    assert second["attributors"][0] == first["attributors"][0] != second["attributors"][1]
    (lost,) = [path for path in (tmp_path / "out/ladder").glob("*/blur-0.5.json") if is_of(path, one)]
    lost.unlink()
    third = climbed(one, other)
    assert third["ran"] == [("blur-0.5", 1)]
    before, after = (without_seconds(found["attributors"]) for found in (second, third))
    assert before == after


def is_of(path: Path, bundle: str) -> bool:
    return json.loads(path.read_text())["key"]["attributor"] == Attributor.load(bundle).digest


def without_seconds(attributors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**of_one, "results": {step: {**of, "seconds": 0} for step, of in of_one["results"].items()}}
        for of_one in attributors
    ]


def test_attributors_of_the_same_images_climb_together(
    plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    bundles = [attributor(plain, tmp_path / f"b{seed}", seed) for seed in range(2)]
    assert climbed(*bundles)["ran"] == [(step, 2) for step in (NONE, *LADDER)]


def test_images_that_can_t_be_altered_are_counted(
    plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifpt.alterations._MOST_AREA_PX", 32 * 32)
    found = climbed(attributor(plain, tmp_path / "b"))
    (of_bundle,) = found["attributors"]
    images = of_bundle["test_images"]
    result = of_bundle["results"]["resize-2.0"] | {"seconds": 0}
    none = {"accuracy": None, "balanced_accuracy": None, "unknown_rate": None}
    assert result == {"images": 0, "rejected": images, "seconds": 0, **none}
    assert "| resize-2.0 | - |" in found["text"] and f"{images} at resize-2.0" in found["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples_digest": "0" * 64}, "None of the runs holds the images"),
        ({"reference_digest": "0" * 64}, "none of the runs has them"),
        ({"choice": CHOICE.facts() | {"seed": 4}}, "None of the runs holds the images"),
        ({"estimate": Estimate(name="denoiser", weights_sha256="0" * 64).identity()}, "residuals of a denoiser"),
    ],
)
def test_what_an_attributor_was_not_trained_on_is_refused(
    plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        climbed(attributor(plain, tmp_path / "b", **changes))


def test_an_attributor_that_does_not_say_its_choice_is_refused(
    plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    bundle = attributor(plain, tmp_path / "b")
    path = tmp_path / "b/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "choice"}))
    with pytest.raises(ConfigError, match="doesn't say by which choice"):
        climbed(bundle)


def test_a_ladder_needs_an_attributor(climbed: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="name one or more with --attributor"):
        climbed()


def test_an_attributor_that_is_replaced_meanwhile_is_refused(
    plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = attributor(plain, tmp_path / "b")
    first = rungs.climb

    def climb(rung: Any) -> dict[str, Any]:
        found = first(rung)
        attributor(plain, tmp_path / "b", seed=9)
        return found

    monkeypatch.setattr(ladder, "climb", climb)
    with pytest.raises(ConfigError, match="was replaced while it was measured"):
        climbed(bundle)


def test_a_manifest_that_was_replaced_is_refused(
    plain: str, climbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    uri = Path(read_plan(plain).manifest_uri)
    data = uri.read_bytes()
    try:
        planned(uri.parent, "queries", (RGB,))  # the same images, but one
        (uri.parent / "queries/a/9.png").rename(uri.parent / "9.png")
        planned(uri.parent, "queries", (RGB,))
        with pytest.raises(ConfigError, match="is not the one of"):
            climbed(attributor(plain, tmp_path / "b"))
    finally:
        (uri.parent / "9.png").rename(uri.parent / "queries/a/9.png")
        uri.write_bytes(data)


# --- the report ---


def document(*names: str, altered: Sequence[str] = ()) -> dict[str, Any]:
    result = {"images": 9, "rejected": 0, "accuracy": 0.5, "balanced_accuracy": 0.4, "unknown_rate": 0.125}
    steps = [NONE, *LADDER]
    return {
        "steps": steps,
        "attributors": [
            {"attributor": f"a/{name}", "space": "rgb", "estimate": {"name": "nearest"}, "network": "head",
             "altered": list(altered), "labels": 3, "test_images": 9, "results": dict.fromkeys(steps, result)}
            for name in names
        ],
    }  # fmt: skip


def test_the_table_has_a_row_a_step_and_a_column_an_attributor() -> None:
    text = ladder_markdown(document("b|c", "b|c", altered=("drawn",)))
    assert "| step | b\\|c #1 | b\\|c #2 |" in text
    assert all(f"| {step} | 50.0 / 12.5 | 50.0 / 12.5 |" in text for step in (NONE, *LADDER))
    assert text.count("trained with altered copies (drawn); 9 test images of 3 sources.") == 2


def test_attributors_of_all_lines_are_told_apart_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """By colour where their artifacts differ, dashed where altered copies were trained on."""
    one, other = document("x"), document("$y", altered=("drawn",))
    one["attributors"] += other["attributors"]
    figures: list[Any] = []
    monkeypatch.setattr("manifpt.report.ladder.png", lambda figure: figures.append(figure) or b"")
    draw_ladder(one)
    lines = figures[0].axes[0].get_lines()
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len({color for color, _ in styles}) == 1 and {style for _, style in styles} == {"-", "--"}
    assert len(lines) == 2 * 7, "a piece for none and each of six kinds"
    assert figures[0].legends[0].get_texts()[1].get_text() == r"\$y"
