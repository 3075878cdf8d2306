from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from manifpt.errors import ConfigError
from manifpt.spaces import SpaceSpec, make_space, spec_of
from manifpt.spaces.base import View
from manifpt.spaces.pixels import log_spectrum, pixels


def test_a_digest_in_capitals_is_the_same() -> None:
    fields = {"name": "mine", "kind": "network", "weights_sha256": "AB12"}
    assert SpaceSpec.from_json(fields) == SpaceSpec.from_json(fields | {"weights_sha256": "ab12"})


def test_rgb_is_unit_range_without_normalisation() -> None:
    space = make_space(SpaceSpec(name="rgb", kind="rgb", height_px=2, width_px=2))
    codes = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2) * 23
    embedding = space.embed(space.encode(codes))
    assert embedding.dtype == np.float32
    np.testing.assert_array_equal(embedding, codes.astype(np.float32) / np.float32(255))


def test_frequency_is_the_formula_of_the_paper_written_out() -> None:
    """log(|sum_hw x[h, w] exp(-2 pi i (u h / H + v w / W))| + 1e-12), zero frequency in the middle, a channel."""
    rng = np.random.default_rng(0)
    height_px, width_px = 6, 5
    image_chw = rng.integers(0, 256, (3, height_px, width_px), dtype=np.uint8)
    expected = np.empty((3, height_px, width_px))
    h, w = np.mgrid[:height_px, :width_px]
    for c in range(3):
        for u in range(height_px):
            for v in range(width_px):
                wave = np.exp(-2j * np.pi * (u * h / height_px + v * w / width_px))
                magnitude = abs((image_chw[c] / 255 * wave).sum())
                row, column = (u + height_px // 2) % height_px, (v + width_px // 2) % width_px
                expected[c, row, column] = np.log(magnitude + 1e-12)
    np.testing.assert_allclose(log_spectrum(pixels(image_chw[None], "rgb"))[0], expected, atol=1e-6)


def test_a_black_image_has_a_finite_spectrum() -> None:
    assert np.allclose(log_spectrum(np.zeros((1, 3, 8, 8))), np.log(1e-12))


def test_pixel_spaces_share_their_code() -> None:
    rgb, frequency = (SpaceSpec(name=kind, kind=kind, height_px=32, width_px=32) for kind in ("rgb", "frequency"))
    assert rgb.code_key == frequency.code_key
    assert SpaceSpec(name="rgb", kind="rgb", size_px=32).code_key != rgb.code_key


@pytest.mark.parametrize(
    ("name", "own", "words"),
    [
        ("rbg", {}, "Unknown space 'rbg'; known: rgb"),
        ("mine", {"mine": {"kind": "wavelet"}}, "kind is one of"),
        ("mine", {"mine": {"kind": "network", "architectur": "timm:x"}}, "unknown field 'architectur'"),
        ("../up", {"../up": {"kind": "rgb"}}, "a folder's name"),
    ],
)
def test_what_a_config_can_get_wrong(name: str, own: dict[str, dict[str, str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_of(name, own)


def test_own_spaces_and_changed_ones() -> None:
    own = {"mine": {"architecture": "timm:resnet18", "mean": [0.5, 0.5, 0.5]}, "rgb": {"size_px": 64}}
    mine = spec_of("mine", own)
    assert (mine.kind, mine.size_px, mine.mean) == ("network", 224, (0.5, 0.5, 0.5))
    assert spec_of("rgb", own).size_px == 64
    assert spec_of("frequency", own, size_px=48).size_px == 48
    assert spec_of("supervised", own).architecture == "torchvision:resnet50"
    assert SpaceSpec.from_json(mine.identity() | {"weights": None}) == mine


@pytest.mark.parametrize(("height_px", "width_px"), [(8, 8), (9, 9), (8, 9), (12, 7), (16, 10)])
def test_half_a_spectrum_is_no_longer_than_all_of_it(height_px: int, width_px: int) -> None:
    """A wrong mirror would lose distance; a wrong scale would lengthen it, and make bounds that are none."""
    rng = np.random.default_rng(9)
    space = make_space(SpaceSpec(name="frequency", kind="frequency", height_px=height_px, width_px=width_px))
    images = rng.integers(0, 256, (40, 3, height_px, width_px), dtype=np.uint8)
    embeddings_bd = space.embed(images).reshape(40, -1)
    compact_bw = space.compact(embeddings_bd).astype(np.float64)
    assert compact_bw.shape[1] <= embeddings_bd.shape[1] / 2 + 6
    whole_b = np.linalg.norm(np.diff(embeddings_bd.astype(np.float64), axis=0), axis=1)
    half_b = np.linalg.norm(np.diff(compact_bw, axis=0), axis=1)
    assert (half_b <= whole_b * (1 + 1e-6)).all()
    assert (half_b >= whole_b * (1 - 1e-4)).all()
    noise_bd = rng.standard_normal(embeddings_bd.shape).astype(np.float32)  # no spectrum: the map itself shortens
    half_bw = space.compact(noise_bd)
    assert (np.linalg.norm(half_bw, axis=1) <= np.linalg.norm(noise_bd, axis=1)).all()
    assert (space.compact(torch.from_numpy(noise_bd)).numpy() == half_bw).all(), "a GPU's map is the same"


# What plans and bundles held before there was a choice of colours and codecs; a change here orphans them all.
OLD_IDENTITIES = {
    "rgb": {
        "name": "rgb", "kind": "rgb", "size_px": None, "height_px": 32, "width_px": 32, "min_px": 0,
        "architecture": None, "weights_sha256": None, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    },
    "supervised": {
        "name": "supervised", "kind": "network", "size_px": 224, "height_px": 32, "width_px": 32, "min_px": 0,
        "architecture": "torchvision:resnet50", "weights_sha256": None, "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(OLD_IDENTITIES))
def test_an_identity_without_new_fields_is_the_old_one(name: str) -> None:
    spec = replace(spec_of(name, {}), height_px=32, width_px=32)
    assert spec.identity() == OLD_IDENTITIES[name]
    assert SpaceSpec.from_json(OLD_IDENTITIES[name]) == replace(spec, weights=None)
    assert (spec.color, spec.codec) == ("rgb", "")
    assert View(32, 32, resized=False, min_px=8).key == "native-32x32-min8", "the folder of a bundle's codes"


@pytest.mark.parametrize("fields", [{"color": "ycbcr"}, {"codec": "jpeg"}, {"color": "ycbcr", "codec": "jpeg"}])
def test_an_identity_with_new_fields_holds_them(fields: dict[str, str]) -> None:
    spec = SpaceSpec(name="x", kind="rgb", height_px=8, width_px=8, **fields)  # type: ignore[arg-type]
    assert {name: spec.identity().get(name) for name in fields} == fields
    assert SpaceSpec.from_json(spec.identity()) == spec


def test_colors_share_their_code_and_codecs_do_not() -> None:
    plain = SpaceSpec(name="rgb", kind="rgb", height_px=8, width_px=8)
    assert replace(plain, color="ycbcr").code_key == plain.code_key
    assert replace(plain, codec="jpeg").code_key != plain.code_key


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"color": "hsv"}, "color is rgb or ycbcr, not 'hsv'"),
        ({"codec": "webp"}, "codec is jpeg or empty, not 'webp'"),
        ({"kind": "network", "color": "ycbcr"}, "color is for pixel spaces"),
    ],
)
def test_colors_and_codecs_that_there_are_not(fields: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SpaceSpec.from_json({"name": "x", "kind": "rgb", **fields})


def test_ycbcr_is_pillows_within_its_rounding() -> None:
    image_hwc = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image_hwc[0, :8] = [[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    theirs_chw = np.asarray(Image.fromarray(image_hwc).convert("YCbCr")).astype(np.float64).transpose(2, 0, 1)
    theirs_chw[1:] -= 128
    space = make_space(spec_of("ycbcr", {"ycbcr": {"height_px": 64, "width_px": 64}}))
    ours_chw = space.embed(image_hwc.transpose(2, 0, 1)[None])[0]
    assert ours_chw.dtype == np.float32
    assert np.abs(ours_chw * 255 - theirs_chw).max() <= 1.01  # Pillow cuts off what is behind the point
    assert np.abs(ours_chw[1:]).max() <= 0.5 + 1e-7


def test_grey_has_no_chroma_and_its_own_brightness() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), 3, axis=1)
    found = make_space(SpaceSpec(name="x", kind="rgb", color="ycbcr", height_px=16, width_px=16)).embed(grey)[0]
    np.testing.assert_allclose(found[0], grey[0, 0] / 255, atol=1e-7)
    np.testing.assert_allclose(found[1:], 0, atol=1e-7)


def test_frequency_of_ycbcr_is_the_spectrum_of_those_channels() -> None:
    image = np.random.default_rng(1).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    spec = replace(spec_of("frequency_ycbcr", {}), height_px=8, width_px=8)
    red, green, blue = image[0].astype(np.float64) / 255
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = np.stack([y, (blue - y) / 1.772, (red - y) / 1.402])[None]
    np.testing.assert_allclose(make_space(spec).embed(image), log_spectrum(channels), atol=1e-5)
