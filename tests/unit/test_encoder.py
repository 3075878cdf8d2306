from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manifpt import cluster, distributed
from manifpt.config import EncoderConfig, ReferenceConfig
from manifpt.distributed import Worker
from manifpt.encoder import pretrain as command
from manifpt.encoder import worker as module
from manifpt.encoder.augment import make_policy
from manifpt.encoder.loss import LAMBDA, barlow_twins, cross_correlation
from manifpt.encoder.network import TwinNetwork, architecture_of
from manifpt.encoder.normalization import GlobalBatchNorm, globalized
from manifpt.encoder.probe import Probe, knn_accuracy, standardized
from manifpt.encoder.worker import Job, pretrain
from manifpt.errors import ConfigError, PlanMismatch, TooManyRejected
from manifpt.indexing import IndexOptions, index
from manifpt.manifest import Manifest, write_manifest
from manifpt.planning import plan_reference
from manifpt.spaces import SpaceSpec, make_space, spec_of
from manifpt.spaces.architectures import make_architecture
from manifpt.stages import decode_rows
from tests.helpers.images import encoded, picture
from tests.helpers.workers import LoneWorker

SIZE_PX = 16
PIXELS = SpaceSpec(name="rgb", kind="rgb", size_px=SIZE_PX, height_px=SIZE_PX, width_px=SIZE_PX)


# --- loss ---


def formula(one_bd: np.ndarray, other_bd: np.ndarray) -> float:
    """Equations 1 and 2 of Zbontar et al. 2021, sum by sum."""
    one_bd, other_bd = one_bd - one_bd.mean(0), other_bd - other_bd.mean(0)
    dimensions, loss = one_bd.shape[1], 0.0
    for i in range(dimensions):
        for j in range(dimensions):
            product = (one_bd[:, i] * other_bd[:, j]).sum()
            correlation = product / (np.sqrt((one_bd[:, i] ** 2).sum()) * np.sqrt((other_bd[:, j] ** 2).sum()))
            loss += (1 - correlation) ** 2 if i == j else LAMBDA * correlation**2
    return loss


@given(batch=st.integers(3, 12), dimensions=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_loss_is_the_papers_formula(batch: int, dimensions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Large numbers, beside which the epsilon of the released code's normalisation is nothing.
    one_bd, other_bd = 1e4 * rng.standard_normal((2, batch, dimensions)) + 3e4
    found = barlow_twins(torch.from_numpy(one_bd), torch.from_numpy(other_bd))
    assert float(found) == pytest.approx(formula(one_bd, other_bd), rel=1e-9)


def test_equal_views_with_independent_dimensions_cost_nothing() -> None:
    one_bd = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(cross_correlation(one_bd, one_bd), torch.eye(2, dtype=torch.float64), atol=2e-5, rtol=0)
    assert float(barlow_twins(one_bd, one_bd)) < 1e-8
    assert float(barlow_twins(one_bd, -one_bd)) == pytest.approx(8, rel=1e-4)


# --- workers that share a batch ---


class Small(nn.Module):
    """Both kinds of batch normalisation, and a dependence of every image on all others."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
            nn.BatchNorm1d(5), nn.Linear(5, 6),
        )  # fmt: skip

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.backbone(one), self.backbone(other)


def step_of(rank: int, count: int, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss, gradients and running statistics of one step on this worker's images."""
    torch.manual_seed(0)
    network: nn.Module = Small().double()
    worker = Worker(rank, count, "cpu", 1 << 30)
    if count > 1:
        globalized(network, worker.total)
    parallel = nn.parallel.DistributedDataParallel(network) if count > 1 else network
    own = images[:, rank::count]
    loss = barlow_twins(*parallel(own[0], own[1]), worker.total)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return found | {name: b for name, b in network.named_buffers() if "running" in name} | {"loss": loss.detach()}


def summed_twice(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sums", rank=rank, world_size=2)
    own = np.array([1.0 + rank])
    assert Worker(rank, 2, "cpu", 0).summed(own) == [3.0]
    assert own == [1.0 + rank], "what a worker sums up stays its own"
    torch.distributed.destroy_process_group()


def test_a_sum_over_workers_leaves_what_was_summed(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(summed_twice, (str(tmp_path),), 2)  # type: ignore[no-untyped-call]


def as_worker(rank: int, count: int, folder: str, images: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.save(step_of(rank, count, images), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_compute_what_one_does_with_the_whole_batch(tmp_path: Path) -> None:
    images = torch.randn(2, 12, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = step_of(0, 1, images)
    torch.multiprocessing.spawn(as_worker, (2, str(tmp_path), images), 2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == whole.keys() and len(found) > 10
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("shape", [(8, 4), (5, 4, 3, 2)])
def test_a_global_normalisation_alone_is_pytorchs(shape: tuple[int, ...]) -> None:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    torch.manual_seed(0)
    plain, x = kind(4), torch.randn(shape) * 3 + 1
    nn.init.normal_(plain.weight)
    ours = globalized(nn.Sequential(plain), lambda value: value)[0]
    assert isinstance(ours, GlobalBatchNorm)
    plain = kind(4)
    plain.load_state_dict(ours.state_dict())
    for _ in range(2):
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


# --- views ---


@given(size_px=st.integers(8, 40), seed=st.integers(0, 2**32 - 1))
def test_the_fingerprint_policy_moves_mirrors_and_changes_frequency_zero_alone(size_px: int, seed: int) -> None:
    images = torch.randint(
        0, 256, (3, 3, size_px, size_px), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for view_bchw in make_policy("fingerprint", size_px)(images, seed):
        kept_px = view_bchw.shape[2]
        assert kept_px == size_px - max(1, round(size_px / 8)) and view_bchw.shape == (3, 3, kept_px, kept_px)
        for image, view in zip(images.double() / 255, view_bchw.double(), strict=True):
            ways = [way.unfold(1, kept_px, 1).unfold(2, kept_px, 1).flatten(1, 2) for way in (image, image.flip(2))]
            added = view[:, None] - torch.cat(ways, 1)  # to every crop
            is_constant = (added - added.mean((2, 3), keepdim=True)).abs().amax((0, 2, 3)) < 1e-6
            assert is_constant.sum() == 1, "the view is one of the crops but for a colour"
            assert 1e-4 < added[:, is_constant, 0, 0].std() < 3, "each channel has a constant of its own"


@pytest.mark.parametrize("policy", ["fingerprint", "standard"])
def test_views_follow_from_the_seed_and_differ_between_images(policy: str) -> None:
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, make = image.expand(16, -1, -1, -1), make_policy(policy, 32)
    before = torch.random.get_rng_state()
    first, again, other = make(images, 1), make(images, 1), make(images, 2)
    assert (torch.random.get_rng_state() == before).all()
    for n, view_bchw in enumerate(first):
        assert view_bchw.dtype == torch.float32
        assert policy == "fingerprint" or (float(view_bchw.min()) >= 0 and float(view_bchw.max()) <= 1)
        assert torch.equal(view_bchw, again[n]) and not torch.equal(view_bchw, other[n])
        assert len({view.numpy().tobytes() for view in view_bchw}) > 8
    assert not torch.equal(*first)


# --- networks ---


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_small_stem_keeps_names_and_sees_every_pixel(backbone: str) -> None:
    small, usual = make_architecture(architecture_of(backbone, 32)), make_architecture(architecture_of(backbone, 64))
    assert small.state_dict().keys() == usual.state_dict().keys()
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert small.conv1(x).shape[2:] == (32, 32)  # type: ignore[operator]
    features = small.eval()(x)
    assert features.shape == (1, {"resnet18": 512, "resnet50": 2048}[backbone])


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_every_block_begins_as_the_identity(backbone: str) -> None:
    state = TwinNetwork(backbone, 32).backbone.state_dict()
    zeros = {name for name, value in state.items() if name.endswith("weight") and not value.any()}
    assert len(zeros) == {"resnet18": 8, "resnet50": 16}[backbone]


def test_an_unknown_small_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: manifpt:resnet18_small"):
        make_architecture("manifpt:vgg_small")
    with pytest.raises(ConfigError, match="architecture is torchvision:NAME, timm:NAME, manifpt:NAME, not 'x:y'"):
        make_architecture("x:y")


# --- probe ---


def test_the_probe_is_a_weighted_vote_of_the_nearest_directions() -> None:
    bank = np.array([[1, 0], [5, 0.1], [0, 1], [0, 2]], np.float32)
    query = np.array([[9, 1], [0.1, 0.2]], np.float32)
    assert knn_accuracy(bank, np.array([0, 0, 1, 1]), query, np.array([0, 1])) == 1.0
    assert knn_accuracy(bank, np.array([0, 0, 1, 1]), query, np.array([1, 1]), neighbors=1) == 0.5
    # Two near ones outvote three far ones.
    bank = np.array([[1, 0], [1, 0.1], [-1, 0], [-1, 0.1], [-1, 0.2]], np.float32)
    assert knn_accuracy(bank, np.array([0, 0, 1, 1, 1]), np.array([[1, 0.0]], np.float32), np.array([0])) == 1.0


# --- training ---


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """48 images of two classes, one of them damaged."""
    folder = tmp_path / "images"
    for n in range(48):
        target = folder / f"{'ab'[n % 2]}" / f"{n:02}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encoded(picture(SIZE_PX, n), "PNG") if n != 7 else b"no image")
    write_manifest(index([str(folder)], IndexOptions(), Counter()), str(tmp_path / "m.parquet"))
    table = Manifest(str(tmp_path / "m.parquet")).read(0, 48)
    table = table.append_column("class", table["source"]).append_column("same", pa.repeat("x", 48))
    write_manifest(table.to_batches(), str(tmp_path / "m.parquet"))
    return str(tmp_path / "m.parquet")


class Alone(LoneWorker):
    """Its images come from a plan."""

    def __init__(self, manifest: str, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.plan, _ = plan_reference(ReferenceConfig(manifest=manifest, output="o", spaces=("rgb",), shard_rows=10))

    def columns(self) -> dict[str, np.ndarray]:
        key = f"view:{self.plan.spaces[0].view.key}"
        views = np.concatenate([decode_rows(self.plan, shard)[key] for shard in range(self.plan.shards)])
        return {"view": views, "row": np.arange(len(views))}


def tiny(backbone: str, size_px: int) -> nn.Module:
    return Small()


def trained(manifest: str, output: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[dict[str, Any]]:
    monkeypatch.setattr(module, "TwinNetwork", tiny)
    records = Manifest(manifest).read(0, 48).to_pylist()
    probe = Probe(records, np.array([record["class"] == "b" for record in records], np.int64), 40)
    job = Job(output=str(output), backbone="resnet18", policy="fingerprint", epochs=3, batch_size=8, seed=0,
              pixels=PIXELS, size_px=SIZE_PX, images=48, most_rejected=1, probe=probe)  # fmt: skip
    worker = Alone(manifest, output.parent / f"{output.name}-checkpoint", **settings)
    pretrain(cast(Worker, worker), job)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_pretraining_that_died_goes_on_to_the_same_bits(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(manifest, tmp_path / "whole", monkeypatch)
    with pytest.raises(InterruptedError):
        trained(manifest, tmp_path / "killed", monkeypatch, stop_after=2)
    torch.randn(99)
    resumed = trained(manifest, tmp_path / "killed", monkeypatch)
    assert [line["epoch"] for line in resumed] == [0, 1, 2, 3], "every pass once"
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    assert [line["knn_accuracy"] for line in resumed] == [line["knn_accuracy"] for line in whole]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert whole[1]["images"] == 40, "47 can be decoded, in batches of 8"


def test_a_share_that_is_too_large_to_keep_is_streamed_in_every_pass(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifpt.streaming._BLOCK_ROWS", 8)
    lines = trained(manifest, tmp_path / "out", monkeypatch, memory_bytes=1)
    assert [line["images"] for line in lines[1:]] == [40, 40, 40]


def test_the_loss_falls(manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEARNING_RATE", 0.03)
    monkeypatch.setattr("manifpt.encoder.augment._COLOR", 0.0)  # colours are all that so small a network can tell
    lines = trained(manifest, tmp_path / "out", monkeypatch)
    assert lines[3]["loss"] < 0.9 * lines[1]["loss"]


def test_the_space_computes_what_the_trained_backbone_does(tmp_path: Path, manifest: str) -> None:
    network = TwinNetwork("resnet18", SIZE_PX)
    with torch.no_grad():
        for buffer in (b for n, b in network.backbone.named_buffers() if "running_mean" in n):
            buffer.normal_()
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(module.save(network.backbone.state_dict()))
    facts = {
        "architecture": architecture_of("resnet18", SIZE_PX), "size_px": SIZE_PX,
        "mean": list(PIXELS.mean), "std": list(PIXELS.std), "policy": "fingerprint", "epochs": 1, "batch_size": 8,
        "seed": 0, "manifest_digest": "m" * 64, "label_column": None,
    }  # fmt: skip
    lines = [{"epoch": 0, "loss": None, "images": 47, "knn_accuracy": None},
             {"epoch": 1, "loss": 3.5, "images": 40, "knn_accuracy": 0.5}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = command._publish(str(folder), facts, 1.0)
    assert (
        document["loss"] == [3.5]
        and document["images"] == 47
        and "from 3.5 in the first epoch" in (folder / "README.md").read_text()
    )
    plan, _ = plan_reference(
        ReferenceConfig(manifest=manifest, output="o", spaces=("selfsupervised",), encoder=str(folder))
    )
    spec = plan.spaces[0]
    assert (spec.architecture, spec.size_px, spec.weights_sha256) == (
        "manifpt:resnet18_small", SIZE_PX, document["weights_sha256"],
    )  # fmt: skip
    views = np.random.default_rng(0).integers(0, 256, (3, 3, SIZE_PX, SIZE_PX), dtype=np.uint8)
    images = standardized(torch.from_numpy(views).float() / 255, PIXELS)
    with torch.no_grad():
        expected = network.eval().backbone(images).numpy()
    np.testing.assert_allclose(make_space(spec).encode(views), expected, rtol=1e-3, atol=1e-4)


def test_two_encoders_are_two_spaces(tmp_path: Path) -> None:
    for name, size_px in (("one", 16), ("two", 32)):
        (tmp_path / name).mkdir()
        fields = {"format": 1, "architecture": "manifpt:resnet18_small", "size_px": size_px, "weights_sha256": "a" * 64,
                  "mean": [0.5] * 3, "std": [0.5] * 3}  # fmt: skip
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    own = {name: {"encoder": str(tmp_path / name)} for name in ("one", "two")}
    assert [spec_of(name, own).size_px for name in own] == [16, 32]
    assert spec_of("one", own).weights == str(tmp_path / "one" / "model.safetensors")
    (tmp_path / "two" / "config.json").write_text(json.dumps(fields | {"format": 9}))
    for damaged, message in (("two", "has format 9"), ("three", "There is no finished encoder")):
        with pytest.raises(ConfigError, match=message):
            spec_of("own", {"own": {"encoder": str(tmp_path / damaged)}})
    (tmp_path / "two" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"is damaged \(no object\)"):
        spec_of("two", own)


# --- what can't be done ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2, not 1"),
        ({"batch_size": 49}, "has 48 images, fewer than a batch of 49"),
        ({"workers": 5, "batch_size": 8}, "5 workers need a --batch-size of 10 or more"),
        ({"size_px": 8}, "needs images of 16 px or more, not of 8 px"),
        ({"label_column": "nothing"}, "has no kept column 'nothing'; keep it: index_images.py --keep-columns nothing"),
        ({"label_column": "same"}, r"--label-column same has 1 value\(s\)"),
        ({"manifest": "/nowhere.parquet"}, "There is no manifest /nowhere.parquet"),
    ],
)
def test_what_a_pretraining_can_not_do_is_told_before_it_begins(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "cluster", lambda: (64.0, 0.0, 1))
    monkeypatch.setattr(distributed, "run_workers", lambda *arguments: pytest.fail("it began"))
    config = EncoderConfig(manifest=manifest, output=str(tmp_path / "out"), batch_size=8)
    with pytest.raises(ConfigError, match=message):
        command.pretrain_encoder(dataclasses.replace(config, **changes))


def test_images_that_are_all_too_small_are_told_in_a_sentence(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TwinNetwork", tiny)
    worker = Alone(manifest, tmp_path / "checkpoint")
    worker.plan = dataclasses.replace(
        worker.plan, spaces=(dataclasses.replace(PIXELS, size_px=32, height_px=32, width_px=32),)
    )
    job = Job(output=str(tmp_path / "out"), backbone="resnet18", policy="fingerprint", epochs=1, batch_size=8, seed=0,
              pixels=PIXELS, size_px=32, images=48, most_rejected=48, probe=None)  # fmt: skip
    with pytest.raises(ConfigError, match="0 of 48 images can be used: the others are damaged, or not of 32 px"):
        pretrain(cast(Worker, worker), job)


def test_more_rejected_images_than_are_allowed_end_it(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TwinNetwork", tiny)
    job = Job(output=str(tmp_path / "out"), backbone="resnet18", policy="fingerprint", epochs=1, batch_size=8, seed=0,
              pixels=PIXELS, size_px=SIZE_PX, images=48, most_rejected=0, probe=None)  # fmt: skip
    with pytest.raises(TooManyRejected, match="47 of 48 images can be used.*--max-rejected"):
        pretrain(cast(Worker, Alone(manifest, tmp_path / "checkpoint")), job)
    # A share that isn't kept is counted as it passes.
    monkeypatch.setattr("manifpt.streaming._BLOCK_ROWS", 8)
    few = dataclasses.replace(job, images=80, most_rejected=8)
    with pytest.raises(TooManyRejected, match="48 of 80 images can be used"):
        pretrain(cast(Worker, Alone(manifest, tmp_path / "checkpoint", memory_bytes=1)), few)


def test_another_encoder_in_the_same_folder_is_refused(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "cluster", lambda: (2.0, 0.0, 1))
    monkeypatch.setattr(distributed, "run_workers", lambda *arguments: pytest.fail("stopped here"))
    monkeypatch.setattr("manifpt.pipeline.view_rows", lambda *arguments: None)
    config = EncoderConfig(manifest=manifest, output=str(tmp_path / "out"), batch_size=8, label_column="class")
    with pytest.raises(pytest.fail.Exception, match="stopped here"):
        command.pretrain_encoder(config)
    with pytest.raises(PlanMismatch, match="holds another encoder: policy differs"):
        command.pretrain_encoder(dataclasses.replace(config, policy="standard"))


def test_an_encoder_is_of_one_space(manifest: str) -> None:
    with pytest.raises(ConfigError, match="--encoder is of the space selfsupervised"):
        plan_reference(ReferenceConfig(manifest=manifest, output="o", encoder="e"))


def test_the_probes_images_are_chosen_by_chance_and_keep_their_labels(manifest: str) -> None:
    plan, _ = plan_reference(ReferenceConfig(manifest=manifest, output="o", spaces=("rgb",)))
    probe = command._probe(plan, "class", 0)
    rows = Manifest(manifest).read(0, 48).select(["image_id", "class"]).to_pylist()
    class_of = {row["image_id"]: row["class"] for row in rows}
    assert [class_of[record["image_id"]] for record in probe.records] == ["ab"[label] for label in probe.label_n]
    assert len(probe.records) == 48 and probe.bank == 40
    assert len(set(probe.label_n[probe.bank :])) == 2
