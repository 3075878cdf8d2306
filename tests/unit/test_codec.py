"""The codec audit: header facts of real and made files, and which sources they give away."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manifpt.errors import ConfigError
from manifpt.metrics.codec import CodecAudit, Fact, audit, container_facts
from tests.helpers.images import bad_files, encoded, picture, png_bomb


def audited(
    made: dict[str, Callable[[int], dict[str, Fact]]], count: int = 40, seed: int = 0, **how: bool
) -> CodecAudit:
    """An audit of sources, each of which makes facts from a number."""
    facts = [make(number) for make in made.values() for number in range(count)]
    return audit(facts, np.repeat(np.arange(len(made)), count), {}, list(made), seed, **how)


def png(seed: int) -> dict[str, Fact]:
    return container_facts(encoded(picture(seed=seed), "PNG"))


def jpeg(seed: int) -> dict[str, Fact]:
    return container_facts(encoded(picture(seed=seed), "JPEG", quality=90))


def test_facts_of_a_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    facts = container_facts(
        encoded(picture(40), "JPEG", quality=80, subsampling="4:2:0", progressive=True, exif=exif, icc_profile=b"x")
    )
    assert facts.pop("quantisation") != jpeg(0)["quantisation"]
    assert facts == {
        "format": "JPEG", "mode": "RGB", "bit_depth": 8, "width_px": 40, "height_px": 40, "exif": True, "icc": True,
        "subsampling": "2x2,1x1,1x1", "progressive": True,
    }  # fmt: skip
    plain = container_facts(encoded(picture(40, seed=1), "JPEG", quality=80, subsampling="4:4:4"))
    assert (plain["subsampling"], plain["progressive"], plain["exif"]) == ("1x1,1x1,1x1", False, False)
    assert plain["quantisation"] == container_facts(encoded(picture(9), "JPEG", quality=80))["quantisation"]
    assert container_facts(encoded(picture(mode="CMYK"), "JPEG"))["mode"] == "CMYK"


def test_facts_of_a_png() -> None:
    assert png(0) == {
        "format": "PNG", "mode": "RGB", "bit_depth": 8, "colour_type": 2, "interlace": False, "width_px": 32,
        "height_px": 32, "exif": False, "icc": False,
    }  # fmt: skip
    palette = container_facts(encoded(picture().quantize(4), "PNG", bits=2))
    assert (palette["mode"], palette["bit_depth"], palette["colour_type"]) == ("P", 2, 3)
    interlaced = bytearray(encoded(picture(), "PNG"))
    interlaced[28] = 1
    interlaced[29:33] = struct.pack(">I", zlib.crc32(interlaced[12:29]))
    assert container_facts(bytes(interlaced))["interlace"] is True


def test_facts_of_other_formats() -> None:
    for lossless, expected in ((True, "lossless"), (False, "lossy")):
        for options in ({}, {"icc_profile": b"x" * 11}, {"save_all": True, "append_images": [picture(seed=5)]}):
            facts = container_facts(encoded(picture(), "WEBP", lossless=lossless, **options))
            assert (facts["format"], facts["compression"]) == ("WEBP", expected)
    assert container_facts(encoded(picture(), "TIFF", compression="tiff_lzw"))["compression"] == "tiff_lzw"
    assert container_facts(encoded(picture(), "BMP"))["format"] == "BMP"


def test_no_file_raises() -> None:
    for name, (data, _) in bad_files().items():
        assert "format" in container_facts(data), name
    assert container_facts(b"") == container_facts(b"text" * 99) == {"format": "unreadable"}
    assert container_facts(png_bomb()) == {"format": "unreadable"}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"]))
def test_damaged_headers_never_raise(data: st.DataObject, kind: str) -> None:
    whole = bytearray(encoded(picture(16), kind))
    for place in data.draw(st.lists(st.integers(0, min(len(whole), 400) - 1), max_size=6)):
        whole[place] = data.draw(st.integers(0, 255))
    facts = container_facts(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    assert facts == {"format": "unreadable"} or facts["width_px"]


def test_a_source_in_another_format_is_marked_and_those_alike_are_not() -> None:
    found = audited({"a": png, "b": jpeg, "c": png, "d": png})
    assert found.separable == {"a": False, "b": True, "c": False, "d": False}
    assert found.why == {"b": "format: JPEG, others PNG"}
    assert found.chance == 0.25
    assert found.accuracy == pytest.approx((1 + 3 / 3) / 4)
    np.testing.assert_array_equal(found.pair_accuracy_ss[1], [1, 0.5, 1, 1])
    np.testing.assert_array_equal(found.pair_accuracy_ss[0], [0.5, 1, 0.5, 0.5])


def test_sources_that_are_alike_are_at_chance() -> None:
    found = audited({"a": png, "b": png})
    assert found.separable == {"a": False, "b": False}
    assert (found.accuracy, found.chance, found.why) == (0.5, 0.5, {})


def test_halves_that_differ_are_all_marked() -> None:
    found = audited({"a": png, "b": png, "c": jpeg, "d": jpeg})
    assert all(found.separable.values())
    assert found.why["a"] == "format: PNG, c, d JPEG"
    assert found.why["d"] == "format: JPEG, a, b PNG"


def test_the_fact_that_differs_is_named() -> None:
    def coarse(seed: int) -> dict[str, Fact]:
        return container_facts(encoded(picture(seed=seed), "JPEG", quality=60))

    def unlike(seed: int) -> dict[str, Fact]:
        return jpeg(seed) | {"progressive": seed % 10 != 0}

    found = audited({"fine": jpeg, "coarse": coarse, "often": unlike})
    assert found.why["coarse"].startswith("quantisation: ")
    assert found.why["often"] == "progressive: True, fine False"


def test_a_fact_that_is_more_frequent_is_told_with_its_shares() -> None:
    """Both have most of one value, but one of them has nothing else."""
    found = audited({"a": lambda n: {"mode": "v"}, "b": lambda n: {"mode": "vvvvwwwxxx"[n % 10]}}, count=100)
    assert found.pair_accuracy_ss[0, 1] == pytest.approx(0.8, abs=0.05)
    assert found.why == {"a": "mode: v in 100%, in 40% of others", "b": "mode: v in 40%, in 100% of others"}


def test_facts_that_tell_only_together_are_found() -> None:
    found = audited(
        {
            "same": lambda n: {"mode": n % 2, "icc": n % 2},
            "other": lambda n: {"mode": n % 2, "icc": 1 - n % 2},
        }
    )
    assert found.separable == {"same": True, "other": True}
    assert found.why["same"] == "all facts together, against others"


def test_values_seen_once_tell_nothing() -> None:
    """Each file's own tables: learnt by heart on one half, of no use on the other. The format is what tells."""
    found = audited(
        {"a": lambda n: {"format": "JPEG", "own": f"a{n}"}, "b": lambda n: {"format": "PNG", "own": f"b{n}"}}
    )
    assert found.accuracy == 1
    assert found.why["a"] == "format: JPEG, others PNG"
    alike = audited({"a": lambda n: {"own": f"a{n}"}, "b": lambda n: {"own": f"b{n}"}})
    assert alike.accuracy == 0.5
    assert not any(alike.separable.values())


def test_random_facts_mark_nobody() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        made = {
            name: lambda n: {fact: int(rng.integers(3)) for fact in ("mode", "icc", "exif", "progressive")}
            for name in "abcd"
        }
        found = audited(made, count=60, seed=seed)
        assert not any(found.separable.values())
        assert abs(found.accuracy - 0.25) < 0.15


def test_size_is_a_fact_only_where_images_are_fed_at_their_own() -> None:
    made: dict[str, Callable[[int], dict[str, Fact]]] = {"a": png, "b": lambda n: png(n) | {"width_px": 33}}
    assert not any(audited(made).separable.values())
    found = audited(made, native_size=True)
    assert found.why == {"a": "width_px: 32, others 33", "b": "width_px: 33, others 32"}


def test_unreadable_and_missing_facts_are_values() -> None:
    found = audited({"a": lambda n: container_facts(b"no image"), "b": png, "c": png})
    assert found.separable == {"a": True, "b": False, "c": False}
    assert found.why["a"] == "format: unreadable, others PNG"


def test_sizes_of_sources_do_not_matter() -> None:
    facts = [png(0)] * 4 + [png(0)] * 400 + [jpeg(0)] * 30
    label_b = np.repeat([0, 1, 2], [4, 400, 30])
    found = audit(facts, label_b, {"flag": [None] * 434}, ["few", "many", "jpeg"], seed=0)
    assert found.separable == {"few": False, "many": False, "jpeg": True}
    assert found.pair_accuracy_ss[0, 1] == 0.5


def test_what_can_not_be_audited_is_refused() -> None:
    facts = [png(0)] * 9
    with pytest.raises(ConfigError, match=r"'b' has 3 image\(s\)"):
        audit(facts, np.repeat([0, 1], [6, 3]), {}, ["a", "b"], 0)
    with pytest.raises(ConfigError, match="8 values of labels"):
        audit(facts, np.repeat([0, 1], [4, 4]), {}, ["a", "b"], 0)
    with pytest.raises(ConfigError, match="2 values of flag"):
        audit(facts, np.repeat([0, 1], [5, 4]), {"flag": [1, 2]}, ["a", "b"], 0)
    with pytest.raises(ConfigError, match="add another"):
        audit(facts, np.zeros(9, np.int64), {}, ["a"], 0)
    with pytest.raises(ConfigError, match="none of 2"):
        audit(facts, np.repeat([0, 7], [5, 4]), {}, ["a", "b"], 0)


def published(cifar: Path, names: list[str]) -> CodecAudit:
    facts, label, through = [], [], []
    for number, name in enumerate(names):
        table = pq.read_table(cifar / f"{name}.parquet", columns=["image", "went_through_jpeg"]).slice(0, 100)
        facts += [container_facts(data) for data in table["image"].to_pylist()]
        through += table["went_through_jpeg"].to_pylist()
        label += [number] * len(table)
    return audit(facts, np.array(label), {"went_through_jpeg": through}, names, seed=0)


def test_published_sources_that_went_through_jpeg_are_marked(cifar: Path) -> None:
    names = sorted(path.stem for path in cifar.glob("*.parquet") if path.stem != "real_cifar10_jpeg")
    found = published(cifar, names)
    marked = {name for name, is_separable in found.separable.items() if is_separable}
    assert marked == {"chengbin_ddpm_conditional", "chengbin_ddpm_differential", "qingqing_ddpm_conditional"}
    assert all(found.why[name].startswith("went_through_jpeg: True, ") for name in marked)
    assert found.accuracy == pytest.approx(2 * found.chance)  # JPEG or not is all that the files tell


def test_published_reals_in_jpeg_are_marked_by_their_format(cifar: Path) -> None:
    found = published(cifar, ["real_cifar10_jpeg", "real_cifar10_png_lossless", "duke_dcgan", "pfnet_dcgan"])
    assert found.separable["real_cifar10_jpeg"]
    assert found.why == {"real_cifar10_jpeg": "format: JPEG, others PNG"}
    assert not any(published(cifar, ["duke_dcgan", "pfnet_dcgan"]).separable.values())
