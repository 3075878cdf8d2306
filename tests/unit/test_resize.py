"""Resizing on a device: Pillow's own pixels, to the bit, and the same codes of a shard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from manifpt.spaces import SpaceSpec, spec_of
from manifpt.spaces.base import View
from manifpt.spaces.resize import resized
from manifpt.spaces.weights import resolve_weights
from manifpt.stages import Encoder, decode_rows
from tests.helpers.images import encoded, picture
from tests.unit.test_stages import NATIVE, planned, put, travelled


@pytest.mark.parametrize(
    ("height_px", "width_px", "target"),
    [
        (32, 32, (224, 224)),
        (224, 224, (224, 224)),
        (300, 200, (224, 224)),  # one side grows, the other shrinks: Pillow's passes change places
        (109, 89, (64, 64)),
        (3000, 40, (32, 32)),
        (33, 57, (112, 112)),
        (1000, 777, (224, 224)),
        (2100, 2000, (64, 48)),  # more terms a sum than float32 holds
    ],
)
def test_resizing_on_a_device_gives_pillows_pixels(height_px: int, width_px: int, target: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    images_bhwc = rng.integers(0, 256, (2, height_px, width_px, 3), dtype=np.uint8)
    images_bhwc[0, : height_px // 2] = 255  # an edge between extremes, where weights under zero overshoot
    images_bhwc[0, height_px // 2 :] = 0
    view = View(*target, resized=True, min_px=1)
    expected_bchw = np.stack([view.of(image_hwc) for image_hwc in images_bhwc])
    found_bchw = resized(torch.from_numpy(images_bhwc.transpose(0, 3, 1, 2).copy()), *target)
    assert found_bchw is not None
    assert (found_bchw.numpy() == expected_bchw).all()


def test_another_rule_of_pillows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody must get other pixels: the caller asks Pillow itself."""
    from manifpt.spaces import resize

    monkeypatch.setattr(resize, "_bicubic", lambda x: max(0.0, 1 - abs(x)))
    resize._first_direction.cache_clear()
    resize._weights.cache_clear()
    try:
        assert resized(torch.zeros((1, 3, 20, 20), dtype=torch.uint8), 31, 31) is None
    finally:
        resize._first_direction.cache_clear()
        resize._weights.cache_clear()


@pytest.mark.parametrize("sizes", [(32, 32, 32), (32, 48, 32), (32, 300, 32), (64, 64, 64)])
def test_a_shard_resized_later_has_the_same_codes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Of one size, of several, with one too large to travel, and of the network's own size."""
    torch.manual_seed(0)
    save_file(resnet18().state_dict(), tmp_path / "own.safetensors")
    own = {
        "mine": {"architecture": "torchvision:resnet18", "size_px": 64, "weights": str(tmp_path / "own.safetensors")}
    }
    for n, size in enumerate(sizes):
        put(tmp_path / f"queries/a/{n}.png", encoded(picture(size, seed=n), "PNG"))
    network = replace(resolve_weights(spec_of("mine", own)), height_px=64, width_px=64)
    plan = planned(tmp_path, "queries", (NATIVE, network))
    now, later = (travelled(decode_rows(plan, 0, resize_later)) for resize_later in (False, True))
    key = network.view.key
    assert later[f"view:{key}"].shape[2:] == ((32, 32) if set(sizes) == {32} else (64, 64))
    one, other = (Encoder(plan.spaces, threads=2)(shard) for shard in (now, later))
    for name in one:
        if name.startswith(("code:", "index:")):
            np.testing.assert_array_equal(one[name], other[name])


def test_a_view_that_a_space_of_pixels_shares_is_resized_at_once(tmp_path: Path) -> None:
    """It is that space's code: a reference made where there is a GPU had images of another size than it said."""
    torch.manual_seed(0)
    save_file(resnet18().state_dict(), tmp_path / "own.safetensors")
    own = {"mine": {"architecture": "torchvision:resnet18", "size_px": 32, "min_px": 32,
                    "weights": str(tmp_path / "own.safetensors")}}  # fmt: skip
    put(tmp_path / "queries/a/0.png", encoded(picture(40), "PNG"))
    pixels = SpaceSpec(name="rgb", kind="rgb", size_px=32, height_px=32, width_px=32)
    network = replace(resolve_weights(spec_of("mine", own)), height_px=32, width_px=32)
    assert pixels.view.key == network.view.key
    shard = decode_rows(planned(tmp_path, "queries", (pixels, network)), 0, resize_later=True)
    assert shard[f"view:{pixels.view.key}"].shape == (1, 3, 32, 32)
