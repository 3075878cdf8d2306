"""Fusion, tables, and what an evaluation compares: the same images, whatever runs they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.special import log_softmax

from manifpt import cluster, pipeline
from manifpt.artifacts import parquet_bytes
from manifpt.attributor.bundle import SEEN, Attributor, save_bundle
from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import Examples, select_examples
from manifpt.attributor.networks import NETWORKS, make_network
from manifpt.attributor.outputs import read_outputs
from manifpt.attributor.splits import TEST
from manifpt.attributor.training import RECIPES, Diverged, Trainer, mean_and_std
from manifpt.baselines import BASELINES, make_baseline
from manifpt.baselines.network import LearnedBaseline
from manifpt.config import EvaluateConfig
from manifpt.decode import content_hash, decode
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.evaluation import evaluate as evaluate_module
from manifpt.evaluation import methods, tasks
from manifpt.evaluation.baseline_task import fit_baseline
from manifpt.evaluation.bundles import row_of_bundle
from manifpt.evaluation.evaluate import evaluate_attributor
from manifpt.evaluation.fusion import fit_weights, fused
from manifpt.evaluation.methods import candidates_of
from manifpt.evaluation.results import merged_notes, of_candidate
from manifpt.evaluation.running import run_works
from manifpt.evaluation.tables import Comparison, Row, table_json, table_markdown
from manifpt.evaluation.tasks import Work, batches_of, fit_attributor, outputs_uri
from manifpt.evaluation.tasks import test_attributor as read_test_images
from manifpt.metrics.frechet import fd_ratio, fd_ratio_or_none
from manifpt.reader import image_of_run, read_artifacts
from manifpt.spaces import SpaceSpec, View
from tests.helpers.images import encoded, picture
from tests.helpers.runs import artifacts_of, make_run, openset_of, resealed, rows_of
from tests.helpers.tasks import tasks_here

SOURCES = {"gan": 40, "vae": 36, "real": 36}


def said(rng: np.random.Generator, label_n: np.ndarray, skill: float) -> np.ndarray:
    """Logits of a method that knows as much; 0: nothing."""
    logits_ns = rng.standard_normal((len(label_n), 4))
    logits_ns[np.arange(len(label_n)), label_n] += skill
    return logits_ns


# --- fusion ---


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), skills=st.lists(st.floats(0, 4), min_size=1, max_size=5))
def test_fusion_never_has_a_negative_weight_and_is_no_worse_than_its_parts(seed: int, skills: list[float]) -> None:
    rng = np.random.default_rng(seed)
    label_n = rng.integers(0, 4, 300)
    label_n[:4] = range(4)
    logits = [said(rng, label_n, skill) for skill in skills]
    weight_m = fit_weights(logits, label_n)
    assert (weight_m >= 0).all()
    weight_n = 1 / np.bincount(label_n)[label_n]

    def cross_entropy(logits_ns: np.ndarray) -> float:
        return float(-np.average(log_softmax(logits_ns, axis=1)[np.arange(300), label_n], weights=weight_n))

    together = cross_entropy(fused(logits, weight_m))
    for logits_ns in logits:
        assert together <= cross_entropy(logits_ns) + 1e-4


def test_a_method_that_knows_nothing_gets_a_weight_near_zero() -> None:
    rng = np.random.default_rng(0)
    label_n = np.arange(4000) % 4
    good, bad = said(rng, label_n, 3.0), said(rng, label_n, 0.0)
    weight_m = fit_weights([good, bad], label_n)
    assert weight_m[0] > 0.5 and weight_m[1] < 0.1
    other = fit_weights([bad, good], label_n)
    np.testing.assert_allclose(other, weight_m[::-1], atol=1e-3)


def test_two_methods_that_err_apart_are_better_together() -> None:
    rng = np.random.default_rng(1)
    label_n = np.arange(4000) % 4
    one, other = said(rng, label_n, 2.0), said(rng, label_n, 2.0)
    together = fused([one, other], fit_weights([one, other], label_n)).argmax(1) == label_n
    assert together.mean() > max((x.argmax(1) == label_n).mean() for x in (one, other)) + 0.03


def test_a_method_fused_with_itself_says_the_same() -> None:
    rng = np.random.default_rng(2)
    label_n = np.arange(500) % 4
    logits_ns = said(rng, label_n, 1.5)
    alone, twice = (fit_weights([logits_ns] * count, label_n) for count in (1, 2))
    assert twice.sum() == pytest.approx(alone[0], rel=1e-3)
    np.testing.assert_array_equal(fused([logits_ns] * 2, twice).argmax(1), logits_ns.argmax(1))


# --- tables ---

ROW = Row(kind="artifact", method="ManiFPT, nearest real", space="rgb", chosen="small; nearest", accuracies=(0.5, 0.7),
          balanced=(0.4, 0.6), validation=0.55, fd_ratios=(10.0, 20.0), train_s=12.3, predict_s=0.5,
          paper="ManiFPT_RGB")  # fmt: skip
FUSED = Row(kind="fusion", method="fusion", space="several", chosen="2 methods", accuracies=(0.8,), balanced=(0.8,),
            validation=0.8, notes=("Read this.",))  # fmt: skip
AUDIT = {"separable": {"gan": True, "vae": False}, "why": {"gan": "format"}, "accuracy": 0.6, "chance": 0.5,
         "equalized": False}  # fmt: skip
FACTS = {"images": 1234, "labels": ["gan", "vae"], "seeds": 2, "train": 700, "validation": 200, "test": 334,
         "tested_on": None, "own_splits": True}  # fmt: skip


def test_a_note_names_the_seeds_of_which_alone_it_is_true() -> None:
    found = merged_notes({0: ["from scratch", "linear"], 1: ["from scratch", "rbf"], 2: ["from scratch", "linear"]})
    assert found == ("from scratch", "linear (seeds 0, 2)", "rbf (seed 1)")


def test_the_table_for_programs() -> None:
    one, other = table_json("set", [ROW, FUSED], ["gan"])
    assert (one["dataset"], one["method"], one["space"], one["seeds"]) == ("set", "ManiFPT, nearest real", "rgb", 2)
    assert one["accuracy_mean"] == pytest.approx(60) and one["accuracy_std"] == pytest.approx(100 * 0.02**0.5)
    assert one["fd_ratio"] == 15 and one["codec_separable"] == ["gan"]
    assert (other["accuracy_std"], other["fd_ratio"], other["seeds"]) == (0, None, 1)
    json.loads(json.dumps([one, other], allow_nan=False))


@pytest.mark.parametrize(("paper_column", "printed"), [(None, ""), ("cifar10", "69.5 ± 1.1"), ("chq->ffhq", "66.3")])
def test_the_table_for_people(paper_column: str | None, printed: str) -> None:
    control = replace(ROW, kind="control", method="control: raw embedding", paper=None)
    comparison = Comparison("a", "b", 0.05, ((0.01, 0.09), (-0.02, 0.1)))
    text = table_markdown("set", [FUSED, ROW, control], [comparison], {"": AUDIT}, FACTS, paper_column)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = 8 + (paper_column is not None)
    assert {line.count("|") for line in lines} == {columns + 1}
    assert ("paper |" in lines[0]) == (paper_column is not None)
    titles = [line for line in lines if "**" in line]
    assert [line.split("**")[1] for line in titles] == ["Controls", "Artifacts", "Late fusion"]
    (row,) = [line for line in lines if "ManiFPT, nearest real" in line]
    assert "| 60.0 ± 14.1 | 50.0 | 15.0 | 12 s | 0.5 s | small; nearest |" in row
    if paper_column:
        assert row.endswith(f"| {printed} |")
        assert next(line for line in lines if "raw embedding" in line).endswith("| - |")
    assert "- a less b: **+5.0** (+1.0 to +9.0, -2.0 to +10.0)" in text and not comparison.is_clear
    assert "**Told apart by their files: gan (format).**" in text and "- fusion (several): Read this." in text
    assert "1,234 images of 2 sources, 2 seeds" in text


def test_an_equalized_set_without_separable_sources_says_so() -> None:
    audit = AUDIT | {"separable": {"gan": False}, "why": {}, "equalized": True}
    text = table_markdown("set", [ROW], [], {"": audit}, FACTS)
    assert "No source is told apart by its files." in text and "re-encoded alike" in text


# --- candidates ---


def test_candidates_are_grouped_by_space_and_estimate(tmp_path: Path) -> None:
    rows = rows_of(SOURCES)
    runs = [
        str(make_run(tmp_path / f"{n}", rows, spaces=("rgb", "frequency"), estimate=estimate))
        for n, estimate in enumerate(
            (Estimate(), Estimate(name="hull", neighbors=4), Estimate(name="hull", neighbors=8))
        )
    ]
    found = candidates_of(runs, [], [], ["small", "head"], 5)
    assert len(found) == 12 and len({candidate.group for candidate in found}) == 4
    assert {candidate.recipe.epochs for candidate in found} == {5}
    assert len(candidates_of(runs, [], ["rgb"], ["head"], None)) == 3
    assert candidates_of(runs, [], ["rgb"], ["head"], 999)[0].recipe == RECIPES["head"]
    assert found[0].title == "ManiFPT, nearest real"


def test_reals_of_another_kind_are_a_group_of_their_own_and_a_control(tmp_path: Path) -> None:
    rows, soft = rows_of(SOURCES), Estimate(name="soft", sigma=0.01)
    runs = [
        str(make_run(tmp_path / f"{n}", rows, reference_digest=64 * name[0], reference_uri=name, estimate=estimate))
        for n, (name, estimate) in enumerate(
            [("own", soft), ("nowhere", soft), ("nowhere", Estimate(name="blur", sigma=1.0))]
        )
    ]
    own, other, blur = candidates_of(runs, [], [], ["head"], None)
    assert (own.title, other.title, blur.title) == (
        "soft projection", "soft projection, onto `nowhere`", "control: high-pass",
    )  # fmt: skip
    assert len({own.group, other.group, blur.group}) == 3, "validation does not choose among references"
    assert [candidate.is_control for candidate in (own, other, blur)] == [False, False, True]
    own, control = candidates_of(runs[:1], [], [], ["head"], None, runs[1:2])
    assert control.is_control and not own.is_control
    assert control.title == "control: soft projection, onto `nowhere`"
    with pytest.raises(ConfigError, match="names 1 runs and there are 2"):
        candidates_of(runs[:1], ["a"], [], ["head"], None, runs[1:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_column": "label"}, "--group-column label: examples have a column of this name already"),
        ({"networks": ("large",)}, "Unknown network 'large' in --networks; known: resnet50, small, released, head"),
        ({"artifacts": ()}, "one run or more"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"epochs": -3}, "--epochs must be at least 1, not -3"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"spaces": ("supervised",)}, "None of the runs has a space 'supervised'"),
        ({"baselines": ("nobody20",)}, "Unknown baseline 'nobody20'"),
        ({"test_artifacts": ("a", "b")}, "--test-artifacts names 2 runs and there are 1"),
        ({"equalize_codec": True}, "--equalize-codec: .* was computed on images as they are"),
        ({"attributor": ("/nowhere",)}, "There is no finished attributor at /nowhere"),
    ],
)
def test_what_an_evaluation_can_not_do_is_told_first(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = str(make_run(tmp_path / "run", rows_of(SOURCES)))
    fields: dict[str, Any] = {"artifacts": (run,), "output": str(tmp_path / "out"), **changes}
    with pytest.raises(ConfigError, match=message):
        evaluate_attributor(EvaluateConfig(**fields))
    assert not (tmp_path / "out").exists()


def test_one_run_twice_is_told(tmp_path: Path) -> None:
    run = str(make_run(tmp_path / "run", rows_of(SOURCES)))
    with pytest.raises(ConfigError, match="hold the same artifacts"):
        candidates_of([run, run], [], [], ["head"], None)


# --- tasks ---


def work_of(tmp_path: Path, examples: Examples, **changes: Any) -> Work:
    recipe = replace(RECIPES["head"], epochs=6, batch_size=16)
    fields = {"folder": str(tmp_path / "work"), "key": {"a": 1}, "name": "head", "recipe": recipe, "seed": 3} | changes
    return Work(examples=examples, test_examples=fields.pop("test_examples", examples), **fields)


def test_a_task_leaves_its_result_and_finds_it_again(tmp_path: Path) -> None:
    examples = select_examples(str(make_run(tmp_path / "run", rows_of(SOURCES))), "rgb", Choice(labels={}))
    work = work_of(tmp_path, examples)
    fitted, tested = fit_attributor(work), read_test_images(work)
    assert fitted["validation_accuracy"] > 0.5 and tested["accuracy"] > 0.5
    outputs = read_outputs([outputs_uri(work.folder, "test")])
    assert outputs.row_b.tolist() == np.flatnonzero(examples.side_n == TEST).tolist()
    np.testing.assert_array_equal(outputs.label_b, examples.label_n[outputs.row_b])
    assert tested["accuracy"] == pytest.approx((outputs.logits_bs.argmax(1) == outputs.label_b).mean())
    (Path(work.folder) / "model.safetensors").unlink()
    assert fit_attributor(work) == fitted and read_test_images(work) == tested
    again = work_of(tmp_path, examples, folder=str(tmp_path / "again"))
    assert fit_attributor(again)["validation_accuracy"] == fitted["validation_accuracy"], (
        "the same seed, the same numbers"
    )


def test_what_memory_does_not_hold_is_refused_and_the_rest_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = select_examples(str(make_run(tmp_path / "run", rows_of(SOURCES))), "rgb", Choice(labels={}))
    attributor = work_of(tmp_path, examples)
    baseline = replace(attributor, name="durall20", recipe=None, view=View(32, 32, resized=True, min_px=8))
    assert attributor.memory_bytes == 2 * 2 * 112 * 3 * 4 * 4, "float16, twice"
    assert baseline.memory_bytes == 2 * 112 * 3 * 32 * 32
    assert replace(attributor, test_examples=replace(examples)).memory_bytes == 2 * attributor.memory_bytes
    monkeypatch.setattr(tasks, "memory_bytes", lambda: 1000)
    for fit, work in ((fit_attributor, attributor), (fit_baseline, baseline)):
        with pytest.raises(ConfigError, match=f"{work.name} takes 0 GiB for 112 images"):
            fit(work)


def test_small_fits_share_a_gpu_and_those_without_a_network_take_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = select_examples(str(make_run(tmp_path / "run", rows_of(SOURCES))), "rgb", Choice(labels={}))
    works = [replace(work_of(tmp_path, examples), name=name) for name in (*NETWORKS, *BASELINES)]
    asked: list[Any] = []

    def run_tasks(task: Any, items: Any, gpus: list[float], **_: Any) -> list[dict[str, Any]]:
        asked.append([(work.name, share, work.device) for (work,), share in zip(items, gpus, strict=True)])
        return []

    monkeypatch.setattr(pipeline, "run_tasks", run_tasks)
    for there in (2.0, 0.0):
        monkeypatch.setattr(cluster, "cluster", lambda gpus=there: (16.0, gpus, 1))
        run_works(fit_attributor, works, "fit", lambda found: found)
    learned = [name for name in BASELINES if isinstance(make_baseline(name, 2, (32, 32), 0), LearnedBaseline)]
    for name, share, device in asked[0]:
        assert share == {"resnet50": 1.0}.get(name, 0.25 if name in NETWORKS else float(name in learned))
        assert device == ("cuda" if share else "cpu")
    assert asked[1] == [(work.name, 0.0, "cpu") for work in works]


@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_a_number_that_is_none_is_told_on_every_side(tmp_path: Path, side: str) -> None:
    rows = rows_of(SOURCES, split=[("train", "validation", "test")[n % 3] for n in range(112)])
    bad = rows["image_id"].to_pylist()[("train", "validation", "test").index(side)]

    def artifacts(of_shard: pa.Table) -> np.ndarray:
        found = artifacts_of(of_shard)
        found[[image_id == bad for image_id in of_shard["image_id"].to_pylist()]] = np.inf
        return found

    run = str(make_run(tmp_path / "run", rows, artifacts=artifacts))
    work = work_of(tmp_path, select_examples(run, "rgb", Choice(labels={})))
    if side == "test":
        fit_attributor(work)
    with pytest.raises(ConfigError, match="not finite: compute them again"):
        (read_test_images if side == "test" else fit_attributor)(work)


def test_a_training_that_diverges_is_done_again_more_slowly_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same fit would diverge whenever the command is said again: an evaluation could never end."""
    examples = select_examples(str(make_run(tmp_path / "run", rows_of(SOURCES))), "rgb", Choice(labels={}))
    good = work_of(tmp_path, examples, folder=str(tmp_path / "good"))
    assert fit_attributor(good)["notes"] == []
    train_epoch, limit = Trainer.train_epoch, RECIPES["head"].learning_rate

    def diverging(self: Trainer, batches: Any, epoch: int) -> Any:
        found = train_epoch(self, batches, epoch)
        if epoch == 2 and self.recipe.learning_rate > limit:
            raise Diverged("The loss is nan in epoch 2")
        return found

    monkeypatch.setattr(Trainer, "train_epoch", diverging)
    assert good.recipe is not None
    fast = replace(good, folder=str(tmp_path / "fast"), recipe=replace(good.recipe, learning_rate=10 * limit))
    fitted = fit_attributor(fast)
    assert fitted["notes"] == ["diverged; trained again at a tenth of the learning rate"]
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("fast", "good"))
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    candidate = candidates_of([examples.run], [], ["rgb"], ["head"], None)[0]
    read_test_images(fast)
    assert of_candidate(candidate, [fast]).row.notes == tuple(fitted["notes"])
    with pytest.raises(ConfigError, match="The loss is nan"):
        fit_attributor(replace(fast, folder=str(tmp_path / "faster"), recipe=replace(good.recipe, learning_rate=1.0)))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 700), offset=st.sampled_from([0.0, 100.0]), seed=st.integers(0, 99))
def test_mean_and_deviation_of_float16_are_those_of_float64(count: int, offset: float, seed: int) -> None:
    artifacts = (offset + np.random.default_rng(seed).standard_normal((count, 3, 2))).astype(np.float16)
    blocks = [artifacts[start : start + 256] for start in range(0, count, 256)]
    mean, std = mean_and_std(blocks, (3, 2))
    np.testing.assert_allclose(mean, artifacts.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, artifacts.astype(np.float64).std(0), rtol=1e-5, atol=1e-7)


def test_a_ratio_that_is_none_is_null() -> None:
    rng = np.random.default_rng(0)
    features_nf, label_n = rng.standard_normal((40, 6)), np.arange(40) % 2
    assert fd_ratio_or_none(features_nf, label_n, 1) == fd_ratio(features_nf, label_n, 1).ratio
    assert fd_ratio_or_none(features_nf[:7], label_n[:7], 1) is None, "3 images of a source"
    assert fd_ratio_or_none(features_nf, 0 * label_n, 1) is None
    assert fd_ratio_or_none(np.ones((40, 6)), label_n, 1) is None
    assert fd_ratio_or_none(np.repeat(label_n[:, None], 6, 1), label_n, 1) is None, "infinite is no JSON"


# --- the whole, without Ray ---


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    ran = tasks_here(monkeypatch)
    monkeypatch.setattr(evaluate_module, "audit_codecs", lambda examples, equalized, is_whole=True: AUDIT)

    def run(*runs: Path, **changes: Any) -> dict[str, Any]:
        ran.clear()
        fields: dict[str, Any] = {"networks": ("head",), "epochs": 2, "seeds": 1, "output": str(tmp_path / "out")}
        found = evaluate_attributor(EvaluateConfig(artifacts=tuple(map(str, runs)), **(fields | changes)))
        details = json.loads((tmp_path / "out" / "details.json").read_text())
        return {"ran": len(ran), "details": details, **found}

    return run


NONE = Estimate(name="none")


def test_a_split_of_the_manifest_is_one_for_all_seeds(tmp_path: Path, evaluate: Callable[..., dict[str, Any]]) -> None:
    sides = ["train", "train", "validation", "test"] * (sum(SOURCES.values()) // 4)
    given = make_run(tmp_path / "given", rows_of(SOURCES, split=sides))
    assert "2 seeds; one split for all (" in evaluate(given, seeds=2)["text"]
    drawn = make_run(tmp_path / "drawn", rows_of(SOURCES))
    assert "2 seeds; every seed has its own split (" in evaluate(drawn, seeds=2)["text"]


def test_a_resnet50_starts_from_the_weights_that_trainings_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, started = str(make_run(tmp_path / "run", rows_of({"gan": 12, "vae": 12}))), []
    start = SpaceSpec(name="supervised", kind="network", weights="w.pth", weights_sha256="ab")
    monkeypatch.setattr(methods, "imagenet_start", lambda name: start if name == "resnet50" else None)
    monkeypatch.setattr(tasks, "start_from", lambda network, weights: started.append(weights))
    recipe = replace(RECIPES["resnet50"], epochs=1)
    notes, keys = [], []
    for found in (candidates_of([run], [], [], ["resnet50"], 1)[0], None):
        key = {} if found is None else found.key()
        work = Work(folder=str(tmp_path / f"{found is None}"), key=key, name="resnet50", recipe=recipe,
                    examples=select_examples(run, "rgb", Choice(labels={})), start=found and found.start,
                    test_examples=select_examples(run, "rgb", Choice(labels={})))  # fmt: skip
        notes.append(fit_attributor(work)["notes"])
        keys.append(key.get("start"))
    assert (started, notes, keys) == ([start], [[], ["from scratch"]], ["ab", None])


def test_images_that_one_run_lacks_are_left_out_of_all(tmp_path: Path, evaluate: Callable[..., dict[str, Any]]) -> None:
    """Also where the other's manifest had another order: methods are paired image by image."""
    rows = rows_of(SOURCES)
    mixed = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))[:100]))
    one = make_run(tmp_path / "one", rows)
    other = make_run(tmp_path / "other", mixed, shard_rows=30, estimate=NONE, artifacts=lambda t: 2 * artifacts_of(t))
    found = evaluate(one, other)
    assert found["details"]["facts"]["images"] == 100
    tests = [read_outputs([outputs_uri(str(path), "test")]) for path in (tmp_path / "out" / "methods").iterdir()]
    np.testing.assert_array_equal(tests[0].label_b, tests[1].label_b)
    agree = np.mean(tests[0].logits_bs.argmax(1) == tests[1].logits_bs.argmax(1))
    assert agree > 0.75, "the same images in the same order"
    assert {row["method"] for row in found["table"]} >= {"fusion with artifacts", "ManiFPT, nearest real"}
    assert evaluate(one, other)["ran"] == 0, "the second time, everything is there"


def test_another_set_is_tested_on_the_images_that_all_its_runs_have(
    tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    """With groups, and with a label of which it has three images only."""
    rows = rows_of(SOURCES, latent=[f"{n // 2}" for n in range(112)])
    runs = [make_run(tmp_path / f"{e.name}", rows, estimate=e) for e in (Estimate(), NONE)]
    hashes = [f"{n}" for n in range(31)] + rows["content_hash"].to_pylist()[-2:]
    news = rows_of({"biggan": 30, "real": 3}, latent=[f"{n // 3}" for n in range(33)], content_hash=hashes)
    twin = pa.array([None] * 32 + ["near_copy"])  # a control knows no copies
    of_nearest = news.set_column(news.column_names.index("twin"), "twin", twin)
    tests = [
        make_run(tmp_path / "test-nearest", of_nearest), make_run(tmp_path / "test-none", news, estimate=NONE),
    ]  # fmt: skip
    (tmp_path / "map.yaml").write_text("biggan: gan\n")
    found = evaluate(
        *runs, test_artifacts=tuple(map(str, tests)), test_labels=str(tmp_path / "map.yaml"), group_column="latent"
    )
    by_method = {row["method"]: row for row in found["table"]}
    assert by_method["fusion with artifacts"]["accuracy_mean"] > 20
    assert by_method["ManiFPT, nearest real"]["fd_ratio"] is None
    per_source = found["details"]["per_source"]["ManiFPT, nearest real | rgb"]
    assert np.sum(per_source["confusion"]) == 31 and per_source["recall"]["vae"] is None
    assert found["details"]["facts"]["test"] == 31 and found["details"]["facts"]["left_out_of_test"]["in training"] == 1
    assert "**Tested on 31 images of test-nearest**, none of which training has" in found["text"]
    assert {row["tested_on"] for row in found["table"]} == {"test-nearest"}
    assert found["details"]["comparisons"], "with intervals over groups of the test images"
    with pytest.raises(ConfigError, match=r"labels that training has not \(biggan\)"):
        evaluate(*runs, test_artifacts=tuple(map(str, tests)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"latent_group": [f"{n // 8}" for n in range(112)]}, "on other sides .* from one manifest"),
        ({"split": [("train", "train", "validation", "test")[n % 4] for n in range(112)]}, "on other sides"),
        ({"content_hash": [f"{n}" for n in range(112)]}, "other pixels under the same image ids"),
    ],
)
def test_runs_that_disagree_on_an_image_are_refused(
    tmp_path: Path, evaluate: Callable[..., dict[str, Any]], columns: dict[str, list[str]], message: str
) -> None:
    """Else one method would train on what another is tested on, and a fusion would join two images' predictions."""
    one = make_run(tmp_path / "one", rows_of(SOURCES))
    other = make_run(tmp_path / "other", rows_of(SOURCES, **columns), estimate=NONE)
    with pytest.raises(ConfigError, match=message):
        evaluate(one, other)


def test_a_test_set_of_another_codec_or_of_training_alone_is_refused(
    tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    run = make_run(tmp_path / "run", rows_of(SOURCES))
    same = make_run(tmp_path / "same", rows_of(SOURCES), shard_rows=50)
    with pytest.raises(ConfigError, match="Training has every image"):
        evaluate(run, test_artifacts=(str(same),))
    news = rows_of(SOURCES, content_hash=[f"{n}" for n in range(112)])
    larger = make_run(tmp_path / "larger", news, artifacts=lambda rows: artifacts_of(rows, (3, 5, 5)))
    with pytest.raises(ConfigError, match="another space or projection"):
        evaluate(run, test_artifacts=(str(larger),))


@pytest.mark.parametrize(("shape", "sizes"), [((3, 256, 256), [42, 42, 16]), ((3, 32, 32), [100])])
def test_large_artifacts_pass_a_network_in_small_batches(shape: tuple[int, ...], sizes: list[int]) -> None:
    """256 at 256 px took gigabytes a layer."""
    artifacts, row_n = np.zeros((100, *shape), np.float16), np.arange(100)
    batches = list(batches_of(artifacts, row_n, row_n))
    assert [len(found) for found, _, _ in batches] == sizes
    np.testing.assert_array_equal(np.concatenate([found for _, _, found in batches]), row_n)


def test_each_set_has_a_denoiser_of_its_own_reals(tmp_path: Path, evaluate: Callable[..., dict[str, Any]]) -> None:
    ours, theirs = (Estimate(name="denoiser", weights_sha256=digit * 64) for digit in "ab")
    news = rows_of(SOURCES, content_hash=[f"{n}" for n in range(112)])
    run = make_run(tmp_path / "run", rows_of(SOURCES), estimate=ours)
    found = evaluate(run, test_artifacts=(str(make_run(tmp_path / "test", news, estimate=theirs)),))
    assert found["details"]["facts"]["test"] == 112
    soft = make_run(tmp_path / "soft", news, estimate=Estimate(name="soft", sigma=0.1))
    with pytest.raises(ConfigError, match="another space or projection"):
        evaluate(run, test_artifacts=(str(soft),))


def test_a_column_that_the_paper_has_not(tmp_path: Path, evaluate: Callable[..., dict[str, Any]]) -> None:
    run = make_run(tmp_path / "run", rows_of(SOURCES))
    with pytest.raises(ConfigError, match=r"no column 'lsun'; its Tables 2 and 4 have cifar10, .*, ffhq->chq"):
        evaluate(run, paper_column="lsun")


def test_a_bundle_is_measured_on_its_own_test_images_or_on_another_run(
    tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    run = str(make_run(tmp_path / "run", rows_of(SOURCES)))
    other = make_run(tmp_path / "other", rows_of({"gan": 9, "real": 5}, content_hash=[f"{n}" for n in range(14)]))
    choice = Choice(labels={}, seed=4)
    examples = select_examples(run, "rgb", choice)
    network = make_network("head", examples.shape, 3)
    config = {
        "space": examples.spec.identity(), "estimate": examples.estimate.identity(), "network": "head", "seed": 4,
        "reference_digest": examples.reference_digest, "shape": list(examples.shape), "altered": None,
        "examples_digest": examples.digest, "choice": choice.facts(),
    }  # fmt: skip
    bundle = str(tmp_path / "bundle")
    seen = parquet_bytes(examples.table.select(["content_hash"]).filter(pa.array(examples.side_n != TEST)))
    save_bundle(bundle, network.state_dict(), examples.labels, config, {"unknown": {"rate": 0.05, "measured_rate": 0}},
                openset_of(3, shape=examples.shape), {}, "", {SEEN: seen})  # fmt: skip
    found = evaluate(Path(run), attributor=(bundle,))
    (row,) = [row for row in found["table"] if row["method"].startswith("attributor")]
    test_n = np.flatnonzero(examples.side_n == TEST)
    assert row["notes"] == [f"on its own {len(test_n)} test images, by the split of its training"]
    artifacts = np.concatenate([table["artifact"].combine_chunks().to_numpy_ndarray() for table in
                                read_artifacts(run, "rgb")])  # fmt: skip
    order = np.argsort([i for table in read_artifacts(run, "rgb") for i in table["image_id"].to_pylist()])
    answer_n = Attributor.load(bundle).predict(artifacts[order][test_n]).probability_bs.argmax(1)
    assert row["accuracy_mean"] == pytest.approx(100 * (answer_n == examples.label_n[test_n]).mean())
    assert f"| {row['accuracy_mean']:.1f} |" in found["text"], "one number has no deviation"
    row = row_of_bundle(bundle, [str(other)], None)
    assert row.notes == (f"on all 14 images of {other} that its training has not seen",)
    # A run that has grown is another one, and still has the images that were trained on.
    grown = make_run(tmp_path / "grown", rows_of(SOURCES | {"vae": SOURCES["vae"] + 1}))
    row = row_of_bundle(bundle, [str(grown)], None)
    assert row.notes == (f"on all {len(test_n) + 1} images of {grown} that its training has not seen",)
    (Path(bundle) / SEEN).write_bytes(parquet_bytes(examples.table.select(["content_hash"])))
    resealed(Path(bundle))
    some = make_run(tmp_path / "some", rows_of({"gan": 5}))
    with pytest.raises(ConfigError, match="was trained on every image of"):
        row_of_bundle(bundle, [str(some)], None)


def test_references_of_one_folder_name_stay_apart(tmp_path: Path) -> None:
    runs = []
    for n, place in enumerate(("a/celeba/reference", "a/half/reference", "a/phases/reference/", "a/half/reference")):
        folder = make_run(tmp_path / str(n), rows_of(SOURCES), reference_digest=f"{n}" * 64, reference_uri=place)
        runs.append(str(folder))
    found = candidates_of([*runs[:2], runs[3]], [], [], ["head"], None, runs[2:3])
    assert len({candidate.group for candidate in found}) == 4
    assert [candidate.onto for candidate in found] == [
        "", "reference 11111111", "reference 33333333", "phases/reference",
    ]  # fmt: skip
    assert [candidate.is_control for candidate in found] == [False, False, False, True]


def test_a_baseline_refuses_an_image_that_was_changed(tmp_path: Path) -> None:
    """A tar or a Parquet file that was written again, whose ids are the old ones."""
    row = {"uri": "a.png", "content_hash": content_hash(decode(encoded(picture(seed=1), "PNG")))}
    assert image_of_run(row, encoded(picture(seed=1), "BMP")).shape == (32, 32, 3), "the same pixels"
    with pytest.raises(ConfigError, match=r"a\.png was changed since the run"):
        image_of_run(row, encoded(picture(seed=2), "PNG"))
