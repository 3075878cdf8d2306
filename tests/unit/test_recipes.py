from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from manifpt.analysis.designs import read_designs
from manifpt.config import ReproduceConfig
from manifpt.errors import ConfigError, PlanMismatch
from manifpt.indexing import IndexOptions, index
from manifpt.manifest import Manifest, write_manifest
from manifpt.recipes import (
    Part,
    Recipe,
    families,
    framed,
    framed_name,
    framed_table,
    inputs,
    labels,
    paper_table2,
    paper_table4,
    paper_table5,
    recipe,
    reproduce,
    select,
    shipped,
)
from manifpt.recipes.phases import phase_randomized, phase_randomized_reals
from manifpt.recipes.tables import OURS
from manifpt.spaces.base import View
from tests.helpers.cluster import ROOT
from tests.helpers.images import encoded, picture
from tests.unit.test_stages import put

DATA = ROOT.parent / "shared" / "data"
SETS = ("gm_celeba64_many", "gm_cifar10", "gm_fashionmnist", "gm_mnist")
PAPERS = ("paper_gm_celeba", "paper_gm_chq", "paper_gm_cifar10", "paper_gm_ffhq")

SMALL: dict[str, Any] = {
    "name": "small",
    "title": "Small",
    "size_px": 8,
    "resolution": "8 px",
    "images": {"layout": "folders"},
    "real": {
        "reference": [{"path": "real", "except_every": 4}],
        "queries": [{"path": "real", "every": 4}],
        "licence": "ours",
    },
    "spaces": ["rgb"],
    "min_images": 2,
    "sources": [{"name": "a", "family": "gan", "provenance": {"listed": "repo"}}],
}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return str(path)


def of(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "family": "gan", "provenance": {"listed": "repo"}, **fields}


def manifest_of(folder: Path, uris: list[str], **options: Any) -> pa.Table:
    uri = str(folder / "manifest.parquet")
    write_manifest(index(uris, IndexOptions(**options), Counter()), uri)
    return Manifest(uri).read(0, 10**9)


def test_every_recipe_that_is_shipped_loads() -> None:
    assert set(shipped()) == {*SETS, *PAPERS}
    for name in shipped():
        found = recipe(name)
        assert found.name == name
        assert set(labels(found).values()) == set(families(found))


@pytest.mark.parametrize(
    ("name", "generators", "of_family"),
    [
        # Table 1 of the paper, with gp and lp as classes of their own.
        ("paper_gm_cifar10", 12, {"gan": 4, "vae": 3, "flow": 2, "score": 3}),
        ("paper_gm_celeba", 15, {"gan": 7, "vae": 5, "flow": 1, "score": 2}),
        ("paper_gm_chq", 17, {"gan": 6, "vae": 4, "flow": 2, "score": 5}),
        ("paper_gm_ffhq", 8, {"gan": 4, "vae": 2, "score": 2}),
    ],
)
def test_the_papers_sets_hold_the_generators_of_its_table_1(
    name: str, generators: int, of_family: dict[str, int]
) -> None:
    found = recipe(name)
    assert len(found.sources) == generators
    assert Counter(family for label, family in families(found).items() if label != "real") == of_family
    assert {source.provenance.listed for source in found.sources} == {"paper-fig"}
    assert found.paper_column in paper_table2()["Wang20"]


def test_table_5_has_the_rows_whose_averages_the_paper_means() -> None:
    """Three of those that it prints stand a column too far right."""
    rows = list(paper_table5().values())
    means = {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]}
    assert means == {
        "upsampling": 0.643, "nonlinearity": 0.434, "normalization": 0.532, "downsampling": 0.571, "skip": 0.412,
        "loss": 0.611,
    }  # fmt: skip
    assert set(means) <= set(read_designs("paper").choices)


@pytest.mark.parametrize("name", PAPERS)
def test_cross_recipes_map_labels_both_ways_to_labels_that_exist(name: str) -> None:
    here = recipe(name)
    [cross] = here.cross
    there = recipe(cross.recipe)
    [back] = there.cross
    assert back.recipe == name
    assert {there_label: label for label, there_label in back.labels.items()} == cross.labels
    assert cross.table4 in paper_table4()["Wang20"]
    for label, other in cross.labels.items():
        assert families(here)[label] == families(there)[other]


def test_what_two_sets_of_the_paper_share_is_what_table_1_lists_in_both() -> None:
    for name, other, count in (("paper_gm_cifar10", "paper_gm_celeba", 7), ("paper_gm_chq", "paper_gm_ffhq", 8)):
        both = set(labels(recipe(name)).values()) & set(labels(recipe(other)).values())
        assert set(recipe(name).cross[0].labels) == both
        assert len(both - {"real"}) == count


def test_the_papers_numbers() -> None:
    table2, table4 = paper_table2(), paper_table4()
    assert list(table2) == list(table4)
    assert len(table2) == 12
    assert {tuple(row) for row in table2.values()} == {("cifar10", "celeba", "chq", "ffhq")}
    sl = table2["ManiFPT_SL"]
    assert (sl["cifar10"].accuracy, sl["cifar10"].std, sl["celeba"].fd_ratio) == (72.018, 0.92, 168.0)
    assert (table2["McClo18"]["cifar10"].accuracy, table2["ManiFPT_SSL"]["ffhq"].fd_ratio) == (40.223, 40.9)
    assert (table2["Yu19"]["chq"].fd_ratio, table2["Durall20"]["ffhq"].std) == (74.5, 0.255)
    assert table4["Marra19"] == {"cifar10->celeba": 61.0, "celeba->cifar10": 58.6, "chq->ffhq": 54.3, "ffhq->chq": 30.3}
    assert (table4["ManiFPT_SSL"]["celeba->cifar10"], table4["ManiFPT_RGB"]["chq->ffhq"]) == (63.0, 66.3)


@pytest.mark.parametrize(("column", "points"), [("cifar10", 9.8), ("celeba", 11.6), ("chq", 3.7), ("ffhq", 1.9)])
def test_the_papers_best_minus_the_best_baseline(column: str, points: float) -> None:
    accuracy = {method: row[column].accuracy for method, row in paper_table2().items()}
    ours = max(accuracy[method] for method in OURS)
    assert round(ours - max(value for method, value in accuracy.items() if method not in OURS), 1) == points


@pytest.mark.parametrize("name", SETS)
def test_counts_agree_with_the_files(name: str) -> None:
    if not DATA.exists():
        pytest.skip("needs the image sets beside the project")
    found = recipe(name)
    files = {source.file for source in found.sources}
    reals = {part.path for part in (*found.real.reference, *found.real.queries)}
    assert {path.name for path in (DATA / name).glob("*.parquet")} == files | reals
    for source in found.sources:
        table = pq.read_table(DATA / name / str(source.file), columns=["gm", "is_real", "latent_group"])
        assert table["gm"].unique().to_pylist() == [source.name]
        assert (len(table), any(table["is_real"].to_pylist())) == (source.images, False)
        # Values are scoped by source, so that two sources never share a group.
        assert all(not value or value.startswith(f"{source.name}/") for value in table["latent_group"].to_pylist())


LABELS = {  # the classes, and the images of each, after merges and caps
    "gm_cifar10": {
        "duke_acgan": 1600, "duke_dcgan": 1600, "duke_wgan_clipping": 1600, "miaojiang_gan_cifar32": 1000,
        "pclucas14_pixelcnnpp": 1200, "chrischute_realnvp": 320, "chengbin_ddpm": 840, "real": 1600,
    },
    "gm_mnist": dict.fromkeys(
        ["alexandrengau_gmgan", "aminmed_vae", "corefrank_fgan_modeseeking", "disorganized", "elegant_gan_lr1e4",
         "elegant_gan_lr2e4", "ganergy_gan", "hooligans_gan_early", "jmerigot_gmgan", "mellissa_fgan", "real",
         "toutpourlagan_filtered"], 1000,
    ),
}  # fmt: skip


def part_images(parts: tuple[Part, ...]) -> int:
    return sum(part.images * max(1, len(part.crops_px)) for part in parts if part.images)


@pytest.mark.parametrize("name", SETS)
def test_reference_and_queries_of_the_published_sets(name: str, tmp_path: Path) -> None:
    if not DATA.exists():
        pytest.skip("needs the image sets beside the project")
    found, root = recipe(name), str(DATA / name)
    for part in (*found.real.reference, *found.real.queries):
        for crop_px in part.crops_px:  # pixels don't matter here
            source = pq.read_table(DATA / name / part.path)
            pq.write_table(source, tmp_path / framed_name(part.path, crop_px))
    uris = inputs(found, root, str(tmp_path))
    rows = manifest_of(tmp_path, uris, source_column="gm", keep_columns=found.images.keep_columns)
    chosen = select(found, rows)

    assert len(chosen.reference) == part_images(found.real.reference)
    assert set(chosen.reference["source"].to_pylist()) == {"real"}
    count = Counter(chosen.queries["source"].to_pylist())
    assert count["real"] == min(part_images(found.real.queries), found.most_images or 10**9)
    assert count == LABELS.get(name, count)
    assert set(count) | set(chosen.left_out) == set(labels(found).values())
    assert chosen.queries.equals(chosen.queries.sort_by("image_id"))
    place = {(path.partition(".")[0], row) for path, row in zip(*columns(chosen.reference), strict=True)}
    real = chosen.queries.filter(pa.compute.equal(chosen.queries["source"], "real"))
    assert not place & {(path.partition(".")[0], row) for path, row in zip(*columns(real), strict=True)}
    if name == "gm_cifar10":
        assert len(chosen.left_out) == 10
        assert all(path.startswith("train/") for path in chosen.reference["source_path"].to_pylist())
        assert {"chengbin_ddpm_conditional", "chengbin_ddpm_differential"} <= set(
            chosen.queries["recipe_source"].to_pylist()
        )
    if name == "gm_mnist":
        shares = Counter(s for s in chosen.queries["recipe_source"].to_pylist() if s.startswith("disorganized"))
        assert set(shares.values()) == {250}


def columns(rows: pa.Table) -> tuple[list[str], list[int]]:
    return [uri.rpartition("/")[2] for uri in rows["uri"].to_pylist()], rows["offset"].to_pylist()


def test_folders_are_divided_by_place_and_capped_evenly(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for folder, count in (("real", 10), ("a", 9), ("b", 3), ("c", 1), ("stranger", 5)):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.png").write_bytes(b"x")
    found = recipe(written(tmp_path, sources=[of("a", label="ab"), of("b", label="ab"), of("c")], most_images=8))
    assert inputs(found, str(root), "unused") == [str(root)]
    chosen = select(found, manifest_of(tmp_path, [str(root)]))
    assert chosen.reference["image_id"].to_pylist() == [f"real/{n}.png" for n in (1, 2, 3, 5, 6, 7, 9)]
    queries = list(zip(*(chosen.queries[name].to_pylist() for name in ("image_id", "source", "recipe_source"))))  # noqa: B905
    # b has three images, less than its share of four; a gives the other five, at equal steps.
    assert queries == [
        *((f"a/{number}.png", "ab", "a") for number in (0, 1, 3, 5, 7)),
        *((f"b/{number}.png", "ab", "b") for number in (0, 1, 2)),
        *((f"real/{number}.png", "real", "real") for number in (0, 4, 8)),
    ]
    assert chosen.left_out == {"c": "1 images; the recipe asks for 2"}


def test_places_are_those_in_the_file_though_a_manifest_sorts_ids_as_text(tmp_path: Path) -> None:
    for name, gm, count in (("reals.parquet", "real", 24), ("a.parquet", "a", 3)):
        pq.write_table(pa.table({"image": [b"x"] * count, "gm": [gm] * count}), tmp_path / name)
    found = recipe(
        written(
            tmp_path,
            images={"layout": "parquet", "source_column": "gm"},
            real={
                "reference": [{"path": "reals.parquet", "except_every": 12}],
                "queries": [{"path": "reals.parquet", "every": 12}],
                "licence": "ours",
            },
            sources=[of("a", file="a.parquet")],
        )
    )
    chosen = select(found, manifest_of(tmp_path, inputs(found, str(tmp_path), ""), source_column="gm"))
    assert sorted(chosen.queries["image_id"].to_pylist()) == [
        *(f"a.parquet#{row}" for row in range(3)), "reals.parquet#0", "reals.parquet#12",
    ]  # fmt: skip
    assert len(chosen.reference) == 22


def test_a_set_without_reals_or_without_enough_images_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "0.png").write_bytes(b"x")
    rows = manifest_of(tmp_path, [str(root)])
    with pytest.raises(ConfigError, match="finds no real image for its reference; it needs real"):
        select(recipe(written(tmp_path)), rows)
    (root / "real").mkdir()
    (root / "real" / "0.png").write_bytes(b"x")
    (root / "real" / "1.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match="no label has 2 images"):
        select(recipe(written(tmp_path)), manifest_of(tmp_path, [str(root)]))
    with pytest.raises(ConfigError, match="no column 'latent_group'"):
        select(recipe("gm_mnist"), rows)


PARQUET = {"layout": "parquet", "source_column": "gm"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"size_px": "8"}, "size_px can't be '8'; it is int"),
        ({"size_px": True}, "size_px can't be True"),
        ({"sources": []}, "has no source that is used"),
        ({"sources": [of("a", exclude="broken")]}, "has no source that is used"),
        ({"sources": [of("a", colour="red")]}, "sources: a: unknown field 'colour'"),
        ({"sources": [of("a"), of("a")]}, "two sources are named 'a'"),
        ({"sources": [of("real")]}, "'real' can't name a source"),
        ({"sources": [of("a/b")]}, "'a/b' can't name a source"),
        ({"sources": [of("a", family="cat")]}, "family is 'cat'; choose gan, vae"),
        ({"sources": [{"name": "a", "family": "gan"}]}, "sources: a: the field 'provenance' is missing"),
        ({"sources": [of("a", provenance={"listed": "hearsay"})]}, "listed is 'hearsay'; choose paper-fig"),
        ({"sources": [of("a", checkpoint="x")]}, "checkpoint and provenance.checkpoint come together"),
        ({"sources": [of("a", file="a.parquet")]}, "file is for the layout parquet"),
        ({"sources": [of("a", label="x"), of("b", label="x", family="vae")]}, "a and b share the label 'x'"),
        ({"sources": [of("a", label="x"), of("b", label="a")]}, "a is a source with the label 'x', and the label of b"),
        ({"images": {"layout": "folders", "source_column": "gm"}}, "source_column is for the layout parquet"),
        ({"images": {"layout": "folders", "keep_columns": ["x"]}}, "image files have no columns"),
        ({"images": {**PARQUET, "group_column": "g"}}, "group_column 'g' must be among keep_columns"),
        ({"images": PARQUET}, "file is for the layout parquet, which needs it"),
        ({"min_images": 0}, "are 1 or more"),
        ({"most_images": 1}, "most_images is less than min_images"),
        ({"cross": [{"recipe": "x", "table4": "y", "labels": {"b": "b"}}]}, "names 'b', which is no label here"),
        ({"cross": [{"recipe": "x", "table4": "y", "labels": {"a": "b", "real": "b"}}]}, "maps two labels to one"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert isinstance(recipe(written(tmp_path)), Recipe)  # without the change it is fine
    with pytest.raises(ConfigError, match=message):
        recipe(written(tmp_path, **changes))


WHOLE = {"path": "real"}


@pytest.mark.parametrize(
    ("reference", "queries", "message"),
    [
        (WHOLE, WHOLE, "are in the reference and in the queries"),
        ({**WHOLE, "every": 4}, {**WHOLE, "every": 4}, "are in the reference and in the queries"),
        ({**WHOLE, "except_every": 4}, {**WHOLE, "every": 3}, "are in the reference and in the queries"),
        ({**WHOLE, "every": 1}, WHOLE, "are 2 or more"),
        ({**WHOLE, "every": 4, "except_every": 4}, WHOLE, "exclude each other"),
        ({"path": "reals"}, WHOLE, "the folder of real images is named 'real'"),
        ({"path": "../real"}, WHOLE, "right under the root"),
        ({**WHOLE, "column": "x"}, WHOLE, "column and prefix come together"),
        ({**WHOLE, "column": "x", "prefix": "y"}, WHOLE, "column 'x' must be among keep_columns"),
        ({**WHOLE, "crops_px": [9]}, WHOLE, "crops_px need the layout parquet"),
    ],
)
def test_reals_that_would_be_projected_onto_themselves_are_refused(
    reference: dict[str, Any], queries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    real = {"reference": [reference], "queries": [queries], "licence": "ours"}
    with pytest.raises(ConfigError, match=message):
        recipe(written(tmp_path, real=real))


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [("train/", "test/", True), ("t", "test/", False), ("test/", "t", False), ("train/", None, False)],
)
def test_parts_of_one_file_are_apart_where_no_path_has_both_prefixes(
    one: str, other: str | None, apart: bool, tmp_path: Path
) -> None:
    def part(prefix: str | None) -> dict[str, Any]:
        return {"path": "r.parquet"} | ({"column": "p", "prefix": prefix} if prefix else {})

    changes = {
        "images": {**PARQUET, "keep_columns": ["p"]},
        "sources": [of("a", file="a.parquet")],
        "real": {"reference": [part(one)], "queries": [part(other)], "licence": "ours"},
    }
    if apart:
        assert recipe(written(tmp_path, **changes)).real.reference[0].prefix == one
        return
    with pytest.raises(ConfigError, match="are in the reference and in the queries"):
        recipe(written(tmp_path, **changes))


README = ROOT / "manifpt" / "recipes" / "README.md"


def test_the_readmes_example_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(README.read_text().partition("```yaml\n")[2].partition("```")[0])
    assert labels(recipe(str(tmp_path / "mine.yaml"))) == {"first_run": "mygan", "second_run": "mygan", "real": "real"}


@pytest.mark.parametrize("name", PAPERS)
def test_the_readmes_folders_are_the_recipes(name: str) -> None:
    tree = README.read_text().partition(f"    images/{name.removeprefix('paper_')}/  ")[2]
    folders = tree.partition("    images/")[0].partition("\n\n")[0].split()
    assert folders == ["real", *(source.name for source in recipe(name).sources)]


def test_a_crop_that_would_be_enlarged_is_refused(tmp_path: Path) -> None:
    real = {"reference": [{"path": "r.parquet", "crops_px": [7]}], "queries": [{"path": "q.parquet"}], "licence": "x"}
    with pytest.raises(ConfigError, match="a crop of less than 8 px would have to be enlarged"):
        recipe(written(tmp_path, images=PARQUET, sources=[of("a", file="a.parquet")], real=real))


def test_names_and_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe 'gm_cifar'; choose gm_celeba64_many"):
        recipe("gm_cifar")
    with pytest.raises(ConfigError, match="no recipe 'paper_tables'"):
        recipe("paper_tables")
    with pytest.raises(ConfigError, match=r"Can't read the recipe .*none\.yaml: No such file"):
        recipe(str(tmp_path / "none.yaml"))
    for text, message in (
        ("a: [", "is no YAML"),
        ("- a", "must hold names and values"),
        ("a: 1\na: 2", "stands twice"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match="the field 'title' is missing"):
        recipe(str(tmp_path / "bad.yaml"))


def test_what_is_merged_in_may_be_overridden(tmp_path: Path) -> None:
    text = Path(written(tmp_path)).read_text()
    one = "- &a {name: a, family: gan, provenance: {listed: repo}}\n"
    two = "- {<<: *a, name: b, label: c}\n"
    tail = yaml.safe_dump({name: SMALL[name] for name in ("spaces", "title")})
    (tmp_path / "merged.yaml").write_text(text.partition("sources:")[0] + f"sources:\n{one}{two}" + tail)
    found = recipe(str(tmp_path / "merged.yaml")).sources
    assert [(source.name, source.family, source.class_label) for source in found] == [
        ("a", "gan", "a"),
        ("b", "gan", "c"),
    ]


def noise(height_px: int, width_px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def test_framing_is_the_view_of_the_cropped_image() -> None:
    image_hwc = noise(21, 17)
    # An even difference: the crop lies on whole pixels, and cropping first gives the same bytes.
    inside = image_hwc[4:17, 2:15]
    view = View(9, 9, resized=True, min_px=9)
    # Antialiasing looks beyond a crop's edge where the image goes on, so only the middle must agree to the bit.
    assert (framed(image_hwc, 13, 9)[3:6, 3:6] == view.of(inside).transpose(1, 2, 0)[3:6, 3:6]).all()
    assert (framed(image_hwc, 17, 17) == image_hwc[2:19]).all()
    ramp_hwc = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], 24, 1).repeat(3, 2)
    assert ramp_hwc.shape == (24, 24, 3)
    # A crop of 23 of 24 px starts between two pixels: half a step of the ramp.
    assert set(framed(ramp_hwc, 23, 23)[5:18, 0, 0] - ramp_hwc[5:18, 0, 0]) <= {5}


def test_framing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="doesn't fit into 17 x 21 px"):
        framed(noise(21, 17), 18, 8)
    with pytest.raises(ConfigError, match="would have to be enlarged to 8 px"):
        framed(noise(21, 17), 7, 8)


def test_a_framed_table_keeps_rows_and_columns_and_is_lossless() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(21, 17)).save(buffer, "BMP")
    table = pa.table(
        {
            "format": ["bmp", "bmp"],
            "image": [buffer.getvalue()] * 2,
            "width": pa.array([17, 17], pa.int32()),
            "height": pa.array([21, 21], pa.int32()),
            "gm": ["real", "other"],
        }
    )
    found = framed_table(table, 13, 9)
    assert found.schema == table.schema
    assert found["gm"].to_pylist() == ["real", "other"]
    assert (found["format"][0].as_py(), found["width"][1].as_py(), found["height"][0].as_py()) == ("png", 9, 9)
    assert (np.asarray(Image.open(io.BytesIO(found["image"][1].as_py()))) == framed(noise(21, 17), 13, 9)).all()
    assert framed_name("a.b.parquet", 13) == "a.b.crop13.parquet"
    with pytest.raises(ConfigError, match=r"Row 0 can't be framed \(not_an_image"):
        framed_table(pa.table({"image": [b"no image"]}), 13, 9)
    with pytest.raises(ConfigError, match="binary files, not of struct"):
        framed_table(pa.table({"image": [{"bytes": b"x", "path": "a.png"}]}), 13, 9)
    with pytest.raises(ConfigError, match="needs a column 'image'; there are gm"):
        framed_table(table.select(["gm"]), 13, 9)


# --- phases ---


def magnitudes(image_hwc: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.fft2(image_hwc.astype(float), axes=(0, 1)))


@given(seed=st.integers(0, 99), height=st.integers(8, 21), width=st.integers(8, 21))
def test_random_phases_keep_colours_and_magnitudes(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    image_hwc = rng.integers(100, 150, (height, width, 3), dtype=np.uint8)  # far from where bytes end
    found = phase_randomized(image_hwc, rng)
    # Rounding moves a pixel by half a level at most, and a bin by the sum of all.
    assert np.abs(magnitudes(found) - magnitudes(image_hwc)).max() <= 0.5 * height * width
    np.testing.assert_allclose(magnitudes(found).sum(), magnitudes(image_hwc).sum(), rtol=0.05)
    covariances = [np.cov(pixels.reshape(-1, 3).T.astype(float)) for pixels in (image_hwc, found)]
    np.testing.assert_allclose(covariances[1], covariances[0], atol=0.05 * np.abs(covariances[0]).max() + 1)
    assert (found != image_hwc).mean() > 0.5


def test_reals_with_random_phases_are_those_that_can_be_decoded_always_the_same(tmp_path: Path) -> None:
    for n in range(3):
        Image.fromarray(noise(12, 9)).save(tmp_path / f"{n}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    write_manifest(index([str(tmp_path)], IndexOptions(source="real"), Counter()), str(tmp_path / "m.parquet"))
    view = View(9, 9, resized=True, min_px=9)
    first, again = (
        pa.Table.from_batches(phase_randomized_reals(Manifest(str(tmp_path / "m.parquet")), view)) for _ in range(2)
    )
    assert first.equals(again) and len(first) == 2
    images = [np.asarray(Image.open(io.BytesIO(data))) for data in first["image"].to_pylist()]
    assert images[0].shape == (9, 9, 3) and (images[0] != images[1]).any()


def test_a_table_of_another_recipe_or_of_other_images_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its manifests lie there, and were taken for the new one's, with the new one's name above the table."""
    output, images = str(tmp_path / "out"), tmp_path / "images"
    for name in ("real", "a"):
        for n in range(12):
            put(images / name / f"{n}.png", encoded(picture(8, seed=n + 50 * (name == "a")), "PNG"))

    def made(images: Path, **changes: Any) -> dict[str, str]:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(SMALL | changes))
        return reproduce._manifests(recipe(str(path)), str(images), output)

    os.makedirs(output)
    with pytest.raises((ConfigError, OSError)):
        made(tmp_path / "imgaes")  # a typo must not take the folder
    put(tmp_path / "out/framed/74/real.parquet", b"frames of other images")
    made(images)
    assert not (tmp_path / "out/framed").exists()
    made(images, title="Mended")
    for other, changes, what in ((tmp_path, {}, "images"), (images, {"min_images": 3}, "recipe")):
        with pytest.raises(PlanMismatch, match=f"holds another set: {what} differs"):
            made(other, **changes)


@pytest.mark.parametrize(
    ("runs", "size_px"), [(("phases-0.01",), 8), (("soft-0.01", "phases-0.01"), 128), (("random",), 8)]
)
def test_runs_that_leave_nothing_to_evaluate_are_refused_before_anything_is_made(
    tmp_path: Path, runs: tuple[str, ...], size_px: int
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL | {"spaces": ["frequency"], "size_px": size_px}))
    config = ReproduceConfig(recipe=str(tmp_path / "small.yaml"), images=str(tmp_path / "none"), runs=runs,
                             output=str(tmp_path / "out"))  # fmt: skip
    with pytest.raises(ConfigError, match=f"Of --runs {' '.join(runs)} nothing is left that small can evaluate"):
        reproduce.reproduce_tables(config)
    assert not list((tmp_path / "out").iterdir())


def test_another_recipes_output_is_tested_on_by_the_labels_that_both_have(tmp_path: Path) -> None:
    """`cross` says which are the same; the rest of the other's images is left out."""
    run = next(run for run in reproduce._RUNS if run.name == "nearest")

    def other(name: str, wanted: Sequence[reproduce._Run] = (), **changes: Any) -> reproduce._Other:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        facts = {"recipe": reproduce._deciding(asdict(replace(recipe(name), **changes))), "images": "images"}
        (folder / "recipe.json").write_text(json.dumps(facts))
        return reproduce._other(recipe("paper_gm_chq"), str(folder), wanted, False)

    found = other("paper_gm_ffhq")
    assert found.labels["real"] == "real" and found.labels["stylegan3"] == "stylegan3"
    assert set(found.labels) == set(labels(recipe("paper_gm_ffhq")).values())
    merged = replace(recipe("paper_gm_ffhq").sources[0], name="first_run", label="not_here")
    found = other("paper_gm_ffhq", sources=(merged, *recipe("paper_gm_ffhq").sources[1:]))
    assert found.labels["not_here"] is None and "first_run" not in found.labels and "biggan_deep" not in found.labels
    with pytest.raises(ConfigError, match="is of 64 px, paper_gm_chq of 256 px: make both with one --size-px"):
        other("paper_gm_ffhq", size_px=64)
    with pytest.raises(ConfigError, match="is of gm_mnist; the recipe paper_gm_chq says how to test on: paper_gm_ffhq"):
        other("gm_mnist")
    with pytest.raises(ConfigError, match="There is no run at .*paper_gm_ffhq/runs/nearest"):
        other("paper_gm_ffhq", wanted=[run])
    with pytest.raises(ConfigError, match="no output of reproduce_tables"):
        reproduce._other(recipe("paper_gm_chq"), str(tmp_path), (), False)


def test_a_recipe_of_another_size() -> None:
    assert reproduce._sized(recipe("paper_gm_cifar10"), None).size_px == 32
    assert reproduce._sized(recipe("paper_gm_celeba"), 32).size_px == 32
    with pytest.raises(ConfigError, match="is of 32 px, and pixels are never enlarged"):
        reproduce._sized(recipe("paper_gm_cifar10"), 64)
    with pytest.raises(ConfigError, match="1 or more"):
        reproduce._sized(recipe("paper_gm_cifar10"), 0)
