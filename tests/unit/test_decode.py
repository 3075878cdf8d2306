from __future__ import annotations

import io
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from manifpt.decode import MAX_BYTES, content_hash, decode, decoder_versions
from manifpt.errors import BadImage, RejectReason

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)
OTHER = 255 - PIXELS


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, raw: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG by hand. `raw`: the scan lines, each with its filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + header + before + body + after + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int, int], data: bytes = b"") -> bytes:
    """A TIFF by hand, of tags (number, type, value) and a strip of which 273 gives the place."""
    place = 8 + 2 + 12 * len(tags) + 4
    entries = [(number, kind, place if number in {273, 324} else value) for number, kind, value in sorted(tags)]
    listed = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + listed + struct.pack("<I", 0) + data


def strip(width: int, bits: int, photometric: int, data: bytes, *more: tuple[int, int, int]) -> bytes:
    """A TIFF of one row and one channel."""
    basic = [(256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 0)]
    return tiff(*basic, (277, 3, 1), (278, 3, 1), (279, 4, len(data)), *more, data=data)


def refused(data: bytes) -> RejectReason:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert "\n" not in caught.value.detail
    assert len(caught.value.detail) <= 300
    return caught.value.reason


def grey(*levels: int) -> list[list[int]]:
    return [[level] * 3 for level in levels]


def row_of(data: bytes) -> list[list[int]]:
    """The pixels of an image one pixel high."""
    image = decode(data)
    assert image.dtype == np.uint8
    assert image.shape[0] == 1
    assert image.shape[2] == 3
    assert image.flags.c_contiguous
    assert image.flags.writeable
    return image[0].tolist()


EXIF = Image.Exif()
EXIF[0x112] = 6
FILES = {
    "png": encoded(PIXELS, "PNG"),
    "palette": encoded(Image.fromarray(PIXELS).quantize(16), "PNG"),
    "jpeg": encoded(PIXELS, "JPEG"),
    "progressive": encoded(PIXELS, "JPEG", progressive=True),
    "jpeg with exif": encoded(PIXELS, "JPEG", exif=EXIF),
    "gif": encoded(PIXELS, "GIF"),
    "webp": encoded(PIXELS, "WEBP"),
    "lossless webp": encoded(PIXELS, "WEBP", lossless=True),
    "tiff": encoded(PIXELS, "TIFF"),
    "lzw": encoded(PIXELS, "TIFF", compression="tiff_lzw"),
    "bmp": encoded(PIXELS, "BMP"),
    "ppm": encoded(PIXELS, "PPM"),
}
DAMAGE = {RejectReason.TRUNCATED, RejectReason.CORRUPT}


class TestDamage:
    def test_zero_bytes(self) -> None:
        assert refused(b"") is RejectReason.EMPTY

    def test_more_bytes_than_allowed(self) -> None:
        assert refused(bytes(MAX_BYTES + 1)) is RejectReason.TOO_LARGE

    @pytest.mark.parametrize(
        "data",
        [b"hello, this is no image\n" * 9, b"\0", b"<html>", b"%PDF-1.7", b"PK\x03\x04" + bytes(40), b"RIFF1234WAVE"],
    )
    def test_something_else(self, data: bytes) -> None:
        assert refused(data) is RejectReason.NOT_AN_IMAGE

    @pytest.mark.parametrize("kind", ["png", "jpeg", "progressive", "palette", "gif", "webp", "tiff", "lzw"])
    def test_cut_anywhere(self, kind: str) -> None:
        data = FILES[kind]
        whole = decode(data)
        signature = 16 if kind == "webp" else 8
        reasons: set[RejectReason] = set()
        chosen = random.Random(kind).sample(range(signature, len(data)), 200)
        for end in {*range(signature, signature + 40), *chosen, *range(len(data) - 24, len(data))}:
            if end <= len(data) - 24:
                assert refused(data[:end]) in DAMAGE, end
                continue
            try:
                image = decode(data[:end])
            except BadImage as bad:
                reasons.add(bad.reason)
            else:  # what was lost isn't part of the picture: a checksum, the end marker
                np.testing.assert_array_equal(image, whole)
        assert reasons <= DAMAGE

    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "lzw", "bmp"])
    def test_half_a_file_is_truncated(self, kind: str) -> None:
        assert refused(FILES[kind][: len(FILES[kind]) // 2]) is RejectReason.TRUNCATED

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    @pytest.mark.parametrize("kind", ["png", "jpeg", "progressive", "lzw"])
    def test_a_file_that_was_not_written_to_its_end(self, kind: str, share: float) -> None:
        """Its length was set first: zeros, which are data to a decoder."""
        data = FILES[kind]
        kept = int(share * len(data))
        assert refused(data[:kept] + bytes(len(data) - kept)) in DAMAGE

    @given(st.integers(0, 2**32 - 1), st.floats(0.1, 1.0))
    def test_a_png_that_was_not_written_to_its_end(self, seed: int, share: float) -> None:
        """Zeros are rows of pixels to its decoder, more often than not."""
        rng = np.random.default_rng(seed)
        image_hwc = rng.integers(0, 255, (4, 4, 3), np.uint8).repeat(rng.integers(1, 16), 0).repeat(8, 1)
        data = encoded(image_hwc, "PNG")
        kept = int(share * (len(data) - 16))  # up to the checksum of its pixels
        assert refused(data[:kept] + bytes(len(data) - kept)) in DAMAGE

    @pytest.mark.parametrize("place", range(41, 61))
    def test_a_png_of_which_a_byte_of_pixels_was_changed(self, place: int) -> None:
        data = bytearray(encoded(np.zeros((64, 64, 3), np.uint8), "PNG", compress_level=0))
        data[place] ^= 1
        assert refused(bytes(data)) is RejectReason.CORRUPT

    @pytest.mark.parametrize("kind", ["jpeg", "progressive"])
    @pytest.mark.parametrize("behind", [b"", b"a film\xff\xda of its own"])
    def test_zeros_behind_the_end_of_a_jpeg_are_not_part_of_it(self, kind: str, behind: bytes) -> None:
        np.testing.assert_array_equal(decode(FILES[kind] + behind + bytes(64)), decode(FILES[kind]))

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF", "GIF"])
    @pytest.mark.parametrize("lower", [0, 128, 255])
    def test_a_flat_image_is_whole(self, kind: str, lower: int) -> None:
        """Coded, it ends in zeros."""
        image_hwc = np.full((512, 512, 3), lower, np.uint8)
        image_hwc[:200] = np.random.default_rng(0).integers(0, 255, (200, 512, 3))
        for options in ({}, {"quality": 75}, {"lossless": True, "method": 0}):
            assert decode(encoded(Image.fromarray(image_hwc), kind, **options)).shape == (512, 512, 3)

    @pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "lzw"])
    def test_cut_in_the_header_is_truncated_and_still_an_image(self, kind: str) -> None:
        assert refused(FILES[kind][:12]) is RejectReason.TRUNCATED

    def test_damaged_header_is_corrupt(self) -> None:
        data = bytearray(FILES["png"])
        data[20] ^= 1  # the width's last bit but some, which its checksum notices
        assert refused(bytes(data)) is RejectReason.CORRUPT

    def test_damaged_data_is_corrupt(self) -> None:
        data = bytearray(FILES["png"])
        data[len(data) // 2] ^= 0xFF
        assert refused(bytes(data)) in DAMAGE

    def test_warnings_never_become_errors(self) -> None:
        exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\1\0\0\0\6\0\0\0"
        data = FILES["jpeg"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decode(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])

    @settings(max_examples=300, deadline=None)
    @given(
        start=st.sampled_from(
            [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8 ", b"II*\0", b"BM"]
        ),
        rest=st.binary(max_size=200),
    )
    @example(b"P6 4 4 255\n", b"")
    @example(b"P1 hello", b"")
    def test_any_bytes(self, start: bytes, rest: bytes) -> None:
        try:
            image = decode(start + rest)
        except BadImage:
            return
        assert image.ndim == 3

    @settings(max_examples=600, deadline=None)
    @given(
        kind=st.sampled_from(sorted(FILES)),
        near=st.booleans(),
        flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    )
    def test_any_flips(self, kind: str, near: bool, flips: list[tuple[int, int]]) -> None:
        data = bytearray(FILES[kind])
        for place, value in flips:
            data[place % min(len(data), 60 if near else len(data))] = value
        try:
            image = decode(bytes(data))
        except BadImage:
            return
        assert image.dtype == np.uint8
        assert image.shape[2] == 3

    def test_flips_in_exif(self) -> None:
        data, dice = FILES["jpeg with exif"], random.Random(0)
        start, length = data.index(b"Exif\0\0") + 6, 26
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(dice.choice([1, 2, 4])):
                changed[start + dice.randrange(length)] = dice.randrange(256)
            assert decode(bytes(changed)).shape in {(24, 20, 3), (20, 24, 3)}  # metadata never cost an image


BIG = 100_000
BOMBS = {
    "png": png(BIG, BIG, 8, 2, bytes(1000)),
    "bmp": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, BIG, BIG, 1, 24, *[0] * 6),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2\x4c\1\0;",
    "gif, by a frame": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2\x4c\1\0;",
    "webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x86\1\xff\x86\1VP8 \0\0\0\0",
    "ppm": b"P6 100000 100000 255\n" + bytes(100),
    "tiff": tiff(
        (256, 4, BIG), (257, 4, BIG), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (278, 4, BIG),
        (279, 4, 100), data=bytes(100),
    ),
    "tiff, by a tile of 1 GiB": tiff(
        (256, 4, 10), (257, 4, 10), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, 16384),
        (323, 4, 65536), (324, 4, 0), (325, 4, 100), data=bytes(100),
    ),
    "png just over our limit": png(8193, 8193, 8, 2, bytes(1000)),
    "text": png(1, 1, 8, 2, b"\0abc", before=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))),
    "text at the end": png(1, 1, 8, 2, b"\0abc", after=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))),
    "profile": png(1, 1, 8, 2, b"\0abc", before=chunk(b"iCCP", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))),
}  # fmt: skip
_place = FILES["jpeg"].index(b"\xff\xc0") + 5
BOMBS["jpeg"] = FILES["jpeg"][:_place] + struct.pack(">HH", 65500, 65500) + FILES["jpeg"][_place + 4 :]


class TestBombs:
    @pytest.mark.parametrize("kind", sorted(BOMBS))
    def test_too_large(self, kind: str) -> None:
        assert len(BOMBS[kind]) < 100_000
        assert refused(BOMBS[kind]) is RejectReason.TOO_LARGE

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_without_taking_memory(self) -> None:
        """VmHWM, since `ru_maxrss` of a child starts at what its parent had."""
        code = """if True:
            import pickle, re, sys
            from manifpt.decode import decode
            from manifpt.errors import BadImage
            def peak_kib():
                return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
            bombs = pickle.load(sys.stdin.buffer)
            before = peak_kib()
            for bomb in bombs:
                try:
                    decode(bomb)
                except BadImage:
                    pass
            print(peak_kib() - before)
        """
        done = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(list(BOMBS.values())), capture_output=True, check=True
        )
        assert int(done.stdout) < 100 << 10

    def test_text_that_no_size_forbids(self) -> None:
        """Workflows of image generators are long, and no reason to lose an image."""
        data = png(1, 1, 8, 2, b"\0abc", before=chunk(b"tEXt", b"workflow\0" + b"a" * (2 << 20)))
        assert row_of(data) == [[97, 98, 99]]


class TestFrames:
    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_more_than_one(self, kind: str) -> None:
        data = encoded(PIXELS, kind, save_all=True, append_images=[Image.fromarray(OTHER)])
        assert refused(data) is RejectReason.ANIMATED

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_exactly_one(self, kind: str) -> None:
        assert decode(encoded(PIXELS, kind, save_all=True)).shape == PIXELS.shape

    def test_the_photograph_of_an_mpo(self) -> None:
        data = encoded(PIXELS, "MPO", save_all=True, append_images=[Image.fromarray(OTHER)])
        np.testing.assert_array_equal(decode(data), decode(encoded(PIXELS, "JPEG")))


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """How EXIF says an image is to be shown."""
    return {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image, 1),
    }[orientation]


class TestRule:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
    def test_lossless_formats_keep_pixels(self, kind: str) -> None:
        image = decode(encoded(PIXELS, kind))
        np.testing.assert_array_equal(image, PIXELS)
        assert image.flags.c_contiguous
        assert image.flags.writeable

    def test_jpeg_is_within_a_level_of_its_source_at_full_quality(self) -> None:
        smooth = np.tile(np.arange(0, 128, 2, dtype=np.uint8)[:, None, None], (1, 64, 3))
        image = decode(encoded(smooth, "JPEG", quality=100, subsampling=0))
        assert np.abs(image.astype(int) - smooth).max() <= 2

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
    def test_orientation(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x112] = orientation
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 90}}.get(kind, {})
        upright = decode(encoded(PIXELS, kind, **options))
        image = decode(encoded(PIXELS, kind, exif=exif, **options))
        np.testing.assert_array_equal(image, turned(upright, orientation))

    @pytest.mark.parametrize("orientation", [3, 6])
    def test_orientation_of_other_pixel_formats(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x112] = orientation
        deep = PIXELS[:, :, 0].astype(np.uint16) * 256 + 255
        np.testing.assert_array_equal(
            decode(encoded(deep, "PNG", exif=exif))[:, :, 1], turned(PIXELS[:, :, 0], orientation)
        )

    @pytest.mark.parametrize("orientation", [0, 9, 99])
    def test_no_such_orientation(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x112] = orientation
        np.testing.assert_array_equal(decode(encoded(PIXELS, "PNG", exif=exif)), PIXELS)

    @pytest.mark.parametrize("adobe", [True, False])
    def test_cmyk_jpeg(self, adobe: bool) -> None:
        cmyk = np.zeros((8, 16, 4), np.uint8)
        cmyk[:, :8] = [0, 255, 255, 0]
        data = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
        if not adobe:
            start = data.index(b"\xff\xee")
            data = data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]
        assert (b"Adobe" in data) is adobe
        image = decode(data)
        assert image.shape == (8, 16, 3)
        assert image[4, 2].tolist() == [255, 0, 0]
        assert image[4, 13].tolist() == [255, 255, 255]

    def test_palette_with_transparency_keeps_its_colours(self) -> None:
        palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60])) + chunk(b"tRNS", b"\0\x80")
        assert row_of(png(2, 1, 8, 3, b"\0\1\0", palette)) == [[40, 50, 60], [10, 20, 30]]

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (png(3, 1, 1, 0, b"\0\xa0"), grey(255, 0, 255)),
            (png(4, 1, 2, 0, b"\0\x1b"), grey(0, 85, 170, 255)),
            (png(2, 1, 4, 0, b"\0\x1e"), grey(17, 238)),
            (png(2, 1, 8, 0, b"\0\x07\xf0"), grey(7, 240)),
            (png(2, 1, 16, 0, b"\0\x12\xff\xfe\x01"), grey(0x12, 0xFE)),
            (png(1, 1, 16, 2, b"\0\x12\xff\x34\xfe\xfe\x01"), [[0x12, 0x34, 0xFE]]),
            (png(1, 1, 8, 4, b"\0\x63\0"), grey(99)),
            (png(1, 1, 16, 4, b"\0\x12\xff\0\1"), grey(0x12)),
            (png(1, 1, 8, 6, b"\0\1\2\3\0"), [[1, 2, 3]]),
            (png(1, 1, 16, 6, b"\0\x12\xff\x34\xfe\xfe\x01\0\0"), [[0x12, 0x34, 0xFE]]),
            (png(2, 1, 8, 0, b"\0\1\7", chunk(b"tRNS", b"\0\1")), grey(1, 7)),
            (png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", chunk(b"tRNS", b"\0\1\0\2\0\3")), [[1, 2, 3], [4, 5, 6]]),
            (b"P5 2 1 65535\n\x12\xff\xfe\x01", grey(0x12, 0xFE)),
            (b"P5 2 1 255\n\x07\xf0", grey(7, 240)),
            (b"P4 2 1\n\x80", grey(0, 255)),
            (strip(2, 16, 1, b"\xff\x12\x01\xfe"), grey(0x12, 0xFE)),
            (strip(2, 8, 0, b"\x10\xf0"), grey(239, 15)),  # zero is white
        ],
    )
    def test_pixel_formats(self, data: bytes, expected: list[list[int]]) -> None:
        assert row_of(data) == expected

    @pytest.mark.parametrize(
        "data",
        [
            b"Pf 1 1 -1.0\n\0\0\x80\x3f",
            strip(2, 12, 1, b"\xff\xf8\0"),
            strip(2, 16, 0, b"\xff\x12\x01\xfe"),  # 16 bits of which zero is white
            strip(2, 16, 1, b"\xff\x12\x01\xfe", (339, 3, 2)),  # signed
            strip(1, 32, 1, b"\0\0\1\0", (339, 3, 1)),
            strip(1, 32, 1, b"\0\0\x80\x3f", (339, 3, 3)),  # floating point
        ],
    )
    def test_pixel_formats_without_a_rule(self, data: bytes) -> None:
        assert refused(data) is RejectReason.UNSUPPORTED

    def test_transparent_pixels_keep_their_colours(self) -> None:
        image = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
        np.testing.assert_array_equal(decode(encoded(image, "PNG")), PIXELS)
        np.testing.assert_array_equal(decode(encoded(image, "WEBP", lossless=True, exact=True)), PIXELS)

    def test_colour_profiles_are_ignored(self) -> None:
        from PIL import ImageCms

        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        np.testing.assert_array_equal(decode(encoded(PIXELS, "PNG", icc_profile=profile)), PIXELS)

    def test_no_draft_mode(self) -> None:
        """All of a large JPEG is decoded."""
        assert decode(encoded(np.zeros((512, 640, 3), np.uint8), "JPEG")).shape == (512, 640, 3)


class TestContentHash:
    def test_of_pixels_and_not_of_files(self) -> None:
        hashes = {content_hash(decode(encoded(PIXELS, kind))) for kind in ("PNG", "BMP", "TIFF", "PPM")}
        assert hashes == {content_hash(PIXELS)}
        assert len(hashes.pop()) == 32

    def test_of_the_shape_too(self) -> None:
        shapes = [(2, 8, 3), (8, 2, 3), (4, 4, 3), (16, 1, 3), (1, 16, 3)]
        assert len({content_hash(np.zeros(shape, np.uint8)) for shape in shapes}) == len(shapes)

    def test_of_every_pixel(self) -> None:
        changed = PIXELS.copy()
        changed[-1, -1, -1] ^= 1
        assert content_hash(changed) != content_hash(PIXELS)

    def test_whatever_the_memory_layout(self) -> None:
        assert content_hash(PIXELS[:, ::-1]) == content_hash(PIXELS[:, ::-1].copy())


def test_versions_name_every_library() -> None:
    assert all(value not in {"", "None"} for value in decoder_versions().values())
