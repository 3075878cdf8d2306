"""What a manifest is made of and read from: manifests, and Parquet and tar files of images with labels."""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.errors import BadImage, ConfigError
from manifpt.fetch import fetch
from manifpt.indexing import IndexOptions, index
from manifpt.manifest import COLUMNS, Manifest, write_manifest
from tests.fuzz.places import Documents, new_folder
from tests.helpers.images import encoded, picture

__all__ = ["check", "mutated", "seeds"]

_FIELDS = IndexOptions(source_column="gm", split_column="side", keep_columns=("note",))
_MOST_ROWS = 64


@functools.cache
def _documents() -> Documents:
    folder = new_folder()
    images = [encoded(picture(8, seed), "PNG") for seed in range(3)]
    labels = {"gm": ["gan", "vae", "real"], "side": ["train", None, "test"], "note": [1, 2, None]}
    pq.write_table(pa.table({"image": images, "format": ["PNG"] * 3, "width": [8] * 3} | labels), folder / "a.parquet")
    cells = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"img": cells} | labels), folder / "b.parquet", row_group_size=2, compression="zstd")
    with tarfile.open(folder / "c.tar", "w") as tar:
        for number, image in enumerate(images):
            fields = json.dumps({name: values[number] for name, values in labels.items()}).encode()
            for name, data in ((f"x/{number}.png", image), (f"x/{number}.json", fields)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    batches = index([str(folder / name) for name in ("a.parquet", "b.parquet", "c.tar")], _FIELDS, Counter())
    write_manifest(batches, str(folder / "manifest.parquet"))
    return Documents(folder, ["manifest.parquet", "manifest.parquet", "a.parquet", "b.parquet", "c.tar"])


def seeds() -> list[bytes]:
    """One of each."""
    return _documents().seeds()


def mutated(data: bytes, dice: random.Random) -> bytes:
    """As its kind can be damaged."""
    return _documents().mutated(data, dice)


def check(data: bytes) -> int:
    """Reads a manifest as a job does, or indexes a file and fetches what the index says of it."""
    documents = _documents()
    name = documents.placed(data)
    try:
        if name == "manifest.parquet":
            _read(str(documents.folder / name))
        else:
            _index(str(documents.folder / name))
    except ConfigError:
        pass
    return 0


def _read(uri: str) -> None:
    manifest = Manifest(uri)
    try:
        table = manifest.read(0, _MOST_ROWS)
        for field in COLUMNS:
            assert table.schema.field(field.name).type == field.type
        for row in table.to_pylist():
            assert isinstance(row["image_id"], str)
            assert isinstance(row["uri"], str)
            assert isinstance(row["source"], str)
        manifest.read(max(0, manifest.rows - _MOST_ROWS), manifest.rows, ["size_bytes"])
    finally:
        manifest.close()


def _index(uri: str) -> None:
    for batch in index([uri], _FIELDS, Counter()):
        batch.validate(full=True)
        rows = batch.slice(0, _MOST_ROWS).to_pylist()
        for row, found in zip(rows, fetch(rows), strict=True):
            assert row["source"]
            assert isinstance(found, bytes | BadImage)
