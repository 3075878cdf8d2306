from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manifpt.decode import decode
from manifpt.errors import BadImage, RejectReason
from manifpt.spaces.base import View
from tests.helpers.images import encoded

RNG = np.random.default_rng(0)


def image_of(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(height: int, width: int, min_px: int = 1) -> View:
    return View(height, width, resized=True, min_px=min_px)


class TestNative:
    def test_same_size_is_the_image_itself(self) -> None:
        image = image_of(5, 7)
        view = View(5, 7, resized=False, min_px=1).of(image)
        assert view.shape == (3, 5, 7)
        assert view.flags.c_contiguous
        np.testing.assert_array_equal(view, image.transpose(2, 0, 1))

    @pytest.mark.parametrize("size", [(5, 8), (7, 5), (6, 7), (10, 14)])
    def test_another_size_is_refused(self, size: tuple[int, int]) -> None:
        with pytest.raises(BadImage) as caught:
            View(5, 7, resized=False, min_px=1).of(image_of(*size))
        assert caught.value.reason is RejectReason.SIZE_MISMATCH
        assert f"{size[1]} x {size[0]}" in caught.value.detail


class TestTooSmall:
    @pytest.mark.parametrize("size", [(15, 100), (100, 15), (15, 15)])
    @pytest.mark.parametrize("native", [True, False])
    def test_under_the_least_side(self, size: tuple[int, int], native: bool) -> None:
        with pytest.raises(BadImage) as caught:
            View(32, 32, resized=not native, min_px=16).of(image_of(*size))
        assert caught.value.reason is RejectReason.TOO_SMALL

    def test_exactly_the_least_side(self) -> None:
        assert resized(32, 32, min_px=16).of(image_of(16, 16)).shape == (3, 32, 32)


class TestResized:
    @settings(max_examples=150, deadline=None)
    @given(*[st.integers(1, 150)] * 4)
    def test_any_size_to_any_size(self, height: int, width: int, to_height: int, to_width: int) -> None:
        view = resized(to_height, to_width).of(np.full((height, width, 3), 200, np.uint8))
        assert view.shape == (3, to_height, to_width)
        assert view.dtype == np.uint8
        assert (view == 200).all()  # a black frame, or one of half the brightness, would be padding

    @pytest.mark.parametrize(
        ("height", "width", "to_px"), [(225, 300, 224), (300, 225, 224), (232, 232, 224), (331, 400, 518)]
    )
    def test_rounding_does_not_lead_out_of_the_image(self, height: int, width: int, to_px: int) -> None:
        """225 / 224 * 224 is more than 225 by a rounding error, and the crop's offset then less than zero."""
        assert resized(to_px, to_px).of(image_of(height, width)).shape == (3, to_px, to_px)

    @pytest.mark.parametrize("size", [(64, 128), (128, 64), (65, 128), (100, 103)])
    def test_aspect_ratio_and_centre(self, size: tuple[int, int]) -> None:
        """A disc in the centre stays a disc in the centre."""
        y, x = np.mgrid[: size[0], : size[1]]
        inside = np.hypot(y - (size[0] - 1) / 2, x - (size[1] - 1) / 2) < 20
        view = resized(32, 32).of(np.repeat(np.where(inside, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2))
        found = view[0] > 127
        radius = 20 * 32 / min(size)
        assert abs(found.sum() - np.pi * radius**2) < 0.08 * np.pi * radius**2
        np.testing.assert_allclose(np.argwhere(found).mean(axis=0), 15.5, atol=0.3)
        assert abs(int(found.any(axis=0).sum()) - int(found.any(axis=1).sum())) <= 1

    def test_crop_takes_the_middle(self) -> None:
        image = np.zeros((32, 96, 3), np.uint8)
        image[:, 32:64] = 255
        assert (resized(32, 32).of(image) == 255).all()
        assert (resized(32, 32).of(image.transpose(1, 0, 2)) == 255).all()

    def test_same_height_only_crops(self) -> None:
        image = image_of(32, 96)
        np.testing.assert_array_equal(resized(32, 32).of(image), image[:, 32:64].transpose(2, 0, 1))

    @pytest.mark.parametrize("factor", [2, 3, 4, 8])
    def test_checkerboard_becomes_grey(self, factor: int) -> None:
        """The highest frequency there is must vanish, and not fold into a lower one."""
        board = ((np.indices((128, 128)).sum(axis=0) % 2) * 255).astype(np.uint8)
        side = 128 // factor
        view = resized(side, side).of(np.repeat(board[:, :, None], 3, axis=2)).astype(int)
        inner = view[:, 2:-2, 2:-2]
        assert np.abs(inner - 127.5).max() <= 4

    def test_no_reduction_in_steps(self) -> None:
        image = image_of(200, 200)
        expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        np.testing.assert_array_equal(resized(32, 32).of(image), expected)

    def test_transposed_image_gives_transposed_view(self) -> None:
        image = image_of(50, 81)
        one, other = resized(24, 24).of(image), resized(24, 24).of(image.transpose(1, 0, 2))
        assert np.abs(one.astype(int) - other.transpose(0, 2, 1)).max() <= 1

    def test_does_not_change_its_input(self) -> None:
        image = image_of(50, 81)
        before = image.copy()
        image.setflags(write=False)
        resized(24, 24).of(image)
        np.testing.assert_array_equal(image, before)


def test_keys_differ_where_views_do() -> None:
    views = [View(h, w, r, m) for h in (8, 9) for w in (8, 9) for r in (True, False) for m in (1, 2)]
    assert len({view.key for view in views}) == len(views)


def smooth(height: int, width: int) -> np.ndarray:
    small = Image.fromarray(RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def through_jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=75, subsampling="4:2:0")
    return np.asarray(Image.open(stream))


class TestCodec:
    def test_is_what_pillow_makes_of_it_at_the_size_it_came_in(self) -> None:
        image = smooth(37, 51)
        native = View(37, 51, resized=False, min_px=8, codec="jpeg").of(image)
        np.testing.assert_array_equal(native, through_jpeg(image).transpose(2, 0, 1))
        small = View(16, 16, resized=True, min_px=8, codec="jpeg")
        np.testing.assert_array_equal(small.of(image), resized(16, 16).of(through_jpeg(image)))
        np.testing.assert_array_equal(small.whole(image), small.of(image))

    def test_files_of_either_codec_end_nearly_alike(self) -> None:
        """Where one was JPEG and the other PNG, only the first loses anything; through the codec, both did."""
        view, plain = (View(64, 64, resized=False, min_px=8, codec=codec) for codec in ("jpeg", ""))
        for _ in range(5):
            png = smooth(64, 64)
            png = (png + RNG.normal(0, 4, png.shape)).clip(0, 255).astype(np.uint8)
            jpeg = decode(encoded(Image.fromarray(png), "JPEG", quality=75, subsampling="4:2:0"))
            before, after = (np.abs(v.of(png).astype(int) - v.of(jpeg).astype(int)).mean() for v in (plain, view))
            assert after < 0.35 * before

    def test_other_sizes_are_refused_as_without(self) -> None:
        view = View(16, 16, resized=False, min_px=8, codec="jpeg")
        for size, reason in (((17, 16), RejectReason.SIZE_MISMATCH), ((7, 16), RejectReason.TOO_SMALL)):
            with pytest.raises(BadImage) as caught:
                view.of(smooth(*size))
            assert caught.value.reason is reason

    def test_an_image_longer_than_a_jpeg_is_rejected(self) -> None:
        """A small PNG can be; libjpeg's error would end the job."""
        long = np.zeros((8, 65_501, 3), np.uint8)
        with pytest.raises(BadImage) as caught:
            View(8, 8, resized=True, min_px=8, codec="jpeg").of(long)
        assert caught.value.reason is RejectReason.TOO_LARGE
        assert View(8, 8, resized=True, min_px=8, codec="jpeg").of(long[:, 1:]).shape == (3, 8, 8)

    def test_has_a_key_of_its_own(self) -> None:
        keys = {View(8, 8, resized=False, min_px=8, codec=codec).key for codec in ("", "jpeg")}
        assert keys == {"native-8x8-min8", "native-8x8-min8-jpeg"}
