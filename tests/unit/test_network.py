from __future__ import annotations

import hashlib
import http.server
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18, resnet50

from manifpt.errors import ConfigError
from manifpt.spaces import SpaceSpec, make_space, network, spec_of, weights
from manifpt.spaces.weights import Published, resolve_weights
from tests.helpers.weights import ARCHITECTURE, lite0_safetensors

OWN = {"mine": {"architecture": "torchvision:resnet18", "size_px": 64}}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MANIFPT_WEIGHTS", raising=False)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return resnet18().state_dict()


def spec_with(path: Path | str, sha256: str | None = None) -> SpaceSpec:
    return replace(spec_of("mine", OWN), weights=str(path), weights_sha256=sha256)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_are_the_pooled_ones_of_the_architecture(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    spec = resolve_weights(spec_with(path))
    assert spec.weights_sha256 == sha256_of(path)
    views_bchw = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    features_bd = make_space(spec).encode(views_bchw)

    network = resnet18().eval()
    network.load_state_dict(state)
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        expected = network((torch.from_numpy(views_bchw) / 255 - mean) / std)
    assert features_bd.shape == (3, 512)
    np.testing.assert_allclose(features_bd, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_imagenet_weights_from_a_package_through_timm(tmp_path: Path) -> None:
    """The published network, not a random one: its classifier knows a ship and a plane when it sees the features."""
    own = {"lite0": {"architecture": ARCHITECTURE, "mean": [0.5] * 3, "std": [0.5] * 3}}
    path = lite0_safetensors(tmp_path / "lite0.safetensors")
    spec = resolve_weights(replace(spec_of("lite0", own), weights=str(path)))
    space = make_space(spec, threads=2)
    views_bchw = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    features_bd = space.encode(views_bchw)

    import timm
    from safetensors.torch import load_file

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(load_file(path))
    with torch.inference_mode():
        images = torch.from_numpy(views_bchw).float() / 127.5 - 1
        expected = network.global_pool(network.forward_features(images))
    assert features_bd.shape == (2, 1280)
    np.testing.assert_allclose(features_bd, expected.numpy(), rtol=1e-3, atol=1e-3)


def test_a_pickle_needs_a_stated_sum(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    with pytest.raises(ConfigError, match="is a pickle.*state its weights_sha256"):
        resolve_weights(spec_with(path))
    with pytest.raises(ConfigError, match="refused"):
        resolve_weights(spec_with(path, "0" * 64))
    spec = resolve_weights(spec_with(path, sha256_of(path)))
    assert make_space(spec).encode(np.zeros((1, 3, 64, 64), np.uint8)).shape == (1, 512)


def test_a_file_changed_after_planning_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    spec = resolve_weights(spec_with(path))
    save_file(state | {"fc.bias": torch.ones(1000)}, path)
    with pytest.raises(ConfigError, match="refused"):
        make_space(spec).encode(np.zeros((1, 3, 64, 64), np.uint8))


def test_weights_of_another_architecture_are_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    spec = replace(resolve_weights(spec_with(path)), architecture="torchvision:resnet50")
    with pytest.raises(ConfigError, match="not of torchvision:resnet50"):
        make_space(spec).encode(np.zeros((1, 3, 64, 64), np.uint8))


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("torchvision:resnet5", "no model"),
        ("timm:resnet5", "no model"),
        ("keras:vgg", "architecture is torchvision:NAME"),
    ],
)
def test_unknown_architectures(architecture: str, words: str) -> None:
    spec = replace(spec_with("x"), architecture=architecture)
    with pytest.raises(ConfigError, match=words):
        make_space(spec).encode(np.zeros((1, 3, 64, 64), np.uint8))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serves the folder `web` on loopback."""
    (tmp_path / "web").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "web"))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_published_weights_download_cache_and_mirror(
    state: dict[str, torch.Tensor], tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "web" / "published.pth"
    torch.save(state, path)
    right = Published("published.pth", f"{web}/published.pth", sha256_of(path))
    monkeypatch.setitem(weights.REGISTRY, "published", right)
    spec = resolve_weights(spec_with("published"))
    cached = tmp_path / "cache" / "manifpt" / "weights" / "published.pth"
    assert spec.weights == "published", "a path of this machine means nothing to another"
    assert cached.read_bytes() == path.read_bytes()
    path.unlink()  # from now on the cache must do
    assert resolve_weights(spec_with("published")) == spec
    cached.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="refused"):
        resolve_weights(spec_with("published"))
    cached.unlink()
    with pytest.raises(ConfigError, match="Can't download.*MANIFPT_WEIGHTS"):
        resolve_weights(spec_with("published"))
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    torch.save(state, mirror / "published.pth")
    monkeypatch.setenv("MANIFPT_WEIGHTS", str(mirror))
    assert resolve_weights(spec_with("published")) == spec
    assert make_space(spec).encode(np.zeros((1, 3, 64, 64), np.uint8)).shape == (1, 512)


def test_a_download_with_the_wrong_sum_never_reaches_the_cache(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web" / "published.pth").write_bytes(b"not what it was")
    monkeypatch.setitem(weights.REGISTRY, "published", Published("published.pth", f"{web}/published.pth", "1" * 64))
    with pytest.raises(ConfigError, match="does not have the stated SHA-256"):
        resolve_weights(spec_with("published"))
    assert not (tmp_path / "cache").exists()


def test_a_download_that_ends_early_never_reaches_the_cache(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web" / "own.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "send_header", _longer)
    monkeypatch.setattr(weights, "_SECURE", "http://")
    with pytest.raises(ConfigError, match="Can't download .*IncompleteRead"):
        resolve_weights(spec_with(f"{web}/own.safetensors"))
    assert not (tmp_path / "cache").exists()


def _longer(self: http.server.SimpleHTTPRequestHandler, name: str, value: str) -> None:
    told = "1000" if name == "Content-Length" else value
    http.server.BaseHTTPRequestHandler.send_header(self, name, told)


def test_an_address_that_a_reference_names_is_asked_by_https_alone(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come from a stranger, and a node reaches what the stranger can't."""
    (tmp_path / "web" / "own.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match="fetched by https alone"):
        resolve_weights(replace(spec_with(f"{web}/own.pth"), weights_sha256=sha256_of(tmp_path / "web" / "own.pth")))
    guarded = weights._Guarded()
    request = urllib.request.Request("https://hub.example/w.pth")
    with pytest.raises(urllib.error.URLError, match="a redirect to http://169.254.169.254/latest, which is not https"):
        guarded.redirect_request(request, None, 302, "Found", {}, "http://169.254.169.254/latest")
    assert guarded.redirect_request(request, None, 302, "Found", {}, "https://cdn.example/w.pth") is not None
    monkeypatch.setattr(weights, "_MOST_BYTES", 0)
    monkeypatch.setitem(weights.REGISTRY, "published", Published("own.pth", f"{web}/own.pth", "1" * 64))
    with pytest.raises(ConfigError, match="has more than 0 GiB"):
        resolve_weights(spec_with("published"))
    with pytest.raises(ConfigError, match="timm has no model 'hf-hub:owner/name'"):
        make_space(replace(spec_with("x"), architecture="timm:hf-hub:owner/name")).encode(
            np.zeros((1, 3, 64, 64), np.uint8)
        )


def test_barlow_twins_needs_the_sum_that_nobody_publishes() -> None:
    with pytest.raises(ConfigError, match="no published checksum"):
        resolve_weights(spec_of("selfsupervised", {}))
    with pytest.raises(ConfigError, match="does not begin with cf015f40cc"):
        resolve_weights(spec_of("selfsupervised", {"selfsupervised": {"weights_sha256": "0" * 64}}))


@pytest.mark.parametrize("kind", ["resnet50.pth", "checkpoint.pth"])
def test_both_files_of_barlow_twins_are_the_same_space(tmp_path: Path, kind: str) -> None:
    """Files of their format, since theirs can't be had here."""
    torch.manual_seed(0)
    network = resnet50()
    del network.fc
    state = network.state_dict()
    if kind == "checkpoint.pth":
        training = {f"module.backbone.{name}": value for name, value in state.items()}
        training |= {"module.projector.0.weight": torch.ones(2, 2), "module.bn.running_mean": torch.ones(2)}
        torch.save({"epoch": 1000, "model": training, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / kind)
    else:
        torch.save(state, tmp_path / kind)
    own = {"selfsupervised": {"weights": str(tmp_path / kind), "weights_sha256": sha256_of(tmp_path / kind)}}
    space = make_space(resolve_weights(spec_of("selfsupervised", own)))
    views = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)
    network.fc = torch.nn.Identity()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (space.spec.mean, space.spec.std))
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(views).float() / 255 - mean) / std)
    np.testing.assert_allclose(space.encode(views), expected.numpy(), rtol=1e-3, atol=1e-3)


def test_the_registry_agrees_with_torchvision() -> None:
    from torchvision.models import ResNet50_Weights

    for name, published in (("v1", ResNet50_Weights.IMAGENET1K_V1), ("v2", ResNet50_Weights.IMAGENET1K_V2)):
        entry = weights.REGISTRY[f"resnet50-imagenet1k-{name}"]
        assert entry.source == published.url
        assert entry.sha256.startswith(entry.file.removesuffix(".pth").rpartition("-")[2])


def test_supervised_is_the_2048_features_of_a_resnet50(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published file can't be had here: one of the same layers stands for it."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    network = resnet50().eval()
    torch.save(network.state_dict(), tmp_path / "resnet50-0676ba61.pth")
    monkeypatch.setenv("MANIFPT_WEIGHTS", str(tmp_path))
    with pytest.raises(ConfigError, match="refused"):
        resolve_weights(spec_of("supervised", {}))
    stated = replace(weights.REGISTRY["resnet50-imagenet1k-v1"], sha256=sha256_of(tmp_path / "resnet50-0676ba61.pth"))
    monkeypatch.setitem(weights.REGISTRY, "resnet50-imagenet1k-v1", stated)
    spec = resolve_weights(spec_of("supervised", {}))
    assert (spec.view.height_px, spec.mean) == (224, (0.485, 0.456, 0.406))
    views_bchw = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    features_bd = make_space(spec, threads=2).encode(views_bchw)
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        expected = network((torch.from_numpy(views_bchw) / 255 - mean) / std).numpy()
    assert features_bd.shape == (2, 2048)
    np.testing.assert_allclose(features_bd, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_features_do_not_hang_on_what_an_image_came_with(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Kernels round otherwise in batches of another size; a resumed run must give the same bytes."""
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    space = make_space(resolve_weights(spec_with(path)), threads=2)
    views_bchw = np.random.default_rng(0).integers(0, 256, (70, 3, 64, 64), dtype=np.uint8)
    together = space.encode(views_bchw)
    assert (space.encode(views_bchw[:1]) == together[:1]).all()
    assert (space.encode(views_bchw[3:8]) == together[3:8]).all()


@pytest.mark.parametrize("images", [0, 1_000_000], ids=["eager", "compiled"])
def test_features_do_not_hang_on_the_number_of_threads(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    """Batches go side by side, each on a share of the threads, and a shard of one batch has all of them."""
    monkeypatch.setitem(network._MOST_IMAGES, "cpu", 4)
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    spec = resolve_weights(spec_with(path))
    views_bchw = np.random.default_rng(0).integers(0, 256, (18, 3, 64, 64), dtype=np.uint8)
    alone, three = (make_space(spec, threads=threads, images=images) for threads in (1, 3))
    one_by_one = alone.encode(views_bchw)
    for count in (1, 4, 7, 18):
        assert (three.encode(views_bchw[:count]) == one_by_one[:count]).all()


def test_batches_go_side_by_side(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other: one after the other they would wait for ever."""
    monkeypatch.setitem(network._MOST_IMAGES, "cpu", 4)
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    space = network.NetworkSpace(resolve_weights(spec_with(path)), threads=2)
    forward, together = space._forward, threading.Barrier(2, timeout=30)

    def waiting(views_bchw: np.ndarray) -> torch.Tensor:
        together.wait()
        assert torch.get_num_threads() == 1
        return forward(views_bchw)

    monkeypatch.setattr(space, "_forward", waiting)
    assert space.encode(np.zeros((8, 3, 64, 64), np.uint8)).shape == (8, 512)
    assert torch.get_num_threads() == 2


def test_folding_keeps_the_features(state: dict[str, torch.Tensor]) -> None:
    from manifpt.spaces.network import _folded

    network = resnet18().eval()
    network.load_state_dict(state)
    folded = _folded(network, spec_of("mine", OWN))
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules()), "nothing was folded"
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in network.modules())


def test_a_network_that_can_not_be_traced_stays_whole() -> None:
    from manifpt.spaces.network import _folded

    class Branching(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    network = Branching()
    assert _folded(network, spec_of("mine", OWN)) is network


def test_a_machine_without_a_compiler_computes_the_same(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    spec = resolve_weights(spec_with(path))
    views_bchw = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)

    def none(*arguments: object, **options: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", none)
    features_bd = make_space(spec, threads=2, images=1_000_000).encode(views_bchw)
    assert "not_compiled" in capsys.readouterr().err
    assert (features_bd == make_space(spec, threads=2).encode(views_bchw)).all()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_compiled_network_gives_the_same_features(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    spec = resolve_weights(spec_with(path))
    views_bchw = np.random.default_rng(0).integers(0, 256, (70, 3, 64, 64), dtype=np.uint8)
    compiled_bd = make_space(spec, threads=2, images=1_000_000).encode(views_bchw)
    assert " compiled " in capsys.readouterr().err
    np.testing.assert_allclose(compiled_bd, make_space(spec, threads=2).encode(views_bchw), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_asked_for_and_part_of_what_a_space_is(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    spec = resolve_weights(spec_with(path))
    half = replace(spec, precision="bfloat16")
    assert "precision" not in spec.identity(), "bundles of before there was a choice stay good"
    assert half.identity()["precision"] == "bfloat16"
    views_bchw = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)
    full_bd, half_bd = (make_space(s, threads=2).encode(views_bchw) for s in (spec, half))
    assert (full_bd != half_bd).any()
    np.testing.assert_allclose(half_bd, full_bd, atol=0.05 * float(np.abs(full_bd).max()))
    with pytest.raises(ConfigError, match="precision is float32 or bfloat16"):
        spec_of("mine", {"mine": OWN["mine"] | {"precision": "int8"}})
