"""The reference bundle: the real images that stand for the data manifold, coded for one or several spaces.

Legend: N reference images, D dimensions.

    bundle.json                              written last: spaces, digests, versions
    reference.parquet                        where every image is, and its content hash; in order of image_id
    embeddings/<code>/part-00000.parquet     the same and `code`, for the images this code exists of

A code is what `Space.encode` returns, and `Space.embed` makes phi(x) of it: `rgb` and `frequency` share the pixels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifpt.artifacts import tensor_column, to_numpy
from manifpt.decode import DECODER, decoder_versions
from manifpt.documents import Kinds, check_columns, json_of, object_of, table_of
from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.plan import Plan
from manifpt.projection import NearestProjector, Rows
from manifpt.search import Choice, Vectors, choose_search, is_small
from manifpt.shards import is_part_path, read_commits, read_part
from manifpt.spaces import Space, SpaceSpec, make_space
from manifpt.storage import join, store_of

__all__ = [
    "LISTED_COLUMNS",
    "Bundle",
    "Codes",
    "Reference",
    "code_table",
    "codes_of",
    "finish_bundle",
    "held_codes",
    "library_versions",
    "open_bundle",
]

LISTED_COLUMNS = ["image_id", "uri", "container", "offset", "size_bytes", "content_hash"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The content of `bundle.json` that others need.

    Attributes:
        uri: the folder.
        spaces: specs by name.
        digest: of everything that decides a projection.
        images: N.
        parts: paths and SHA-256 by code key.
        dims: numbers an embedding has, by space.
        decoder_versions: of the libraries that decoded it.
        searches: the fastest exact search, by space.
    """

    uri: str
    spaces: dict[str, SpaceSpec]
    digest: str
    images: int
    parts: dict[str, list[dict[str, Any]]]
    dims: dict[str, int]
    decoder_versions: dict[str, str]
    searches: dict[str, Choice]


_BUNDLE: Kinds = {"digest": str, "images": int, "parts": dict, "dims": dict, "weights": dict, "versions": dict,
                  "spaces": list}  # fmt: skip


def open_bundle(uri: str) -> Bundle:
    """Reads `bundle.json`.

    Raises:
        ConfigError: there is none, or one that this version's decoder does not fit.
    """
    try:
        data = store_of(uri).read(join(uri, "bundle.json"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no finished reference bundle at {uri}; make one with jobs/build_reference.py."
        ) from error
    except PermissionError as error:
        raise ConfigError(f"Can't read the reference bundle {uri}: {error}.") from error
    where = f"The reference bundle {uri}"
    document = object_of(json_of(data, where), where, {"decoder": str})
    if document["decoder"] != DECODER:
        raise ConfigError(
            f"The reference {uri} was decoded by {document['decoder']} and this version decodes by {DECODER}, to other "
            f"pixels. Build the reference again."
        )
    document = object_of(document, where, _BUNDLE)
    versions = object_of(document["versions"], where, dict.fromkeys(decoder_versions(), str))
    weights, stated = document["weights"], object_of(document.get("searches", {}), where, {})
    specs = [SpaceSpec.from_json(fields) for fields in document["spaces"]]
    spaces = {spec.name: replace(spec, weights=weights.get(spec.name)) for spec in specs}
    object_of(weights, where, {name: str for name in spaces if name in weights})
    object_of(document["dims"], where, dict.fromkeys(spaces, int))
    for key in {spec.code_key for spec in specs}:
        for part in object_of(document["parts"], where, {key: list})[key]:
            path = object_of(part, where, {"path": str, "rows": int, "sha256": str})["path"]
            if not is_part_path(path):
                raise ConfigError(f"{where} names {path!r:.120}, which is no part of it: build the reference again.")
    return Bundle(
        uri=uri,
        spaces=spaces,
        digest=document["digest"],
        images=document["images"],
        parts=document["parts"],
        dims=document["dims"],
        decoder_versions={name: versions[name] for name in decoder_versions()},
        searches={name: Choice.from_json(stated.get(name)) for name in spaces},
    )


def library_versions() -> dict[str, str]:
    """Versions of what makes the numbers."""
    faiss = next((name for name in ("faiss-gpu", "faiss-cpu") if _installed(name)), "")
    names = ["manifpt", "numpy", "torch", "torchvision", "ray", "pyarrow", *([faiss] if faiss else [])]
    return {name: version(name) for name in names if _installed(name)} | decoder_versions()


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def finish_bundle(plan: Plan, output: str) -> Bundle:
    """Writes `reference.parquet` and `bundle.json` once all shards are committed.

    Raises:
        ConfigError: no image at all came through.
    """
    parts: dict[str, list[dict[str, Any]]] = {spec.code_key: [] for spec in plan.spaces}
    for commit in read_commits(output, range(plan.shards)):
        for path, part in sorted(commit["parts"].items()):
            parts[path.split("/")[1]].append({"path": path, "rows": part["rows"], "sha256": part["sha256"]})
    if not all(sum(part["rows"] for part in of_code) for of_code in parts.values()):
        raise ConfigError(f"No image of the manifest can be a reference; see {join(output, 'rejected.parquet')}.")
    document: dict[str, Any] = {
        "spaces": [spec.identity() for spec in plan.spaces],
        "decoder": DECODER,
        "parts": parts,
    }
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    uri = join(output, "bundle.json")
    if store_of(uri).stat(uri) is not None:  # written last, by an earlier call
        found = open_bundle(output)
        if found.digest == digest:
            return found
    dims, searches = _measured(plan, output, parts)
    document |= {
        "format": 1,
        "digest": digest,
        "images": _write_reference_table(plan, output),
        "manifest_digest": plan.manifest_digest,
        "dims": dims,
        "searches": searches,
        "searches_measured_on": {"cpu": platform.processor() or platform.machine(), "threads": os.cpu_count()},
        "weights": {spec.name: spec.weights for spec in plan.spaces if spec.weights},
        "versions": library_versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store_of(uri).create(uri, json.dumps(document, indent=2).encode())
    return open_bundle(output)


_SAMPLE_BYTES = 256 << 20  # of embeddings, on which searches are timed
_SAMPLE_ROWS = 8_192


def _measured(
    plan: Plan, output: str, parts: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Numbers an embedding has, and the fastest search, by space."""
    dims, searches = {}, {}
    for spec in plan.spaces:
        space = make_space(spec)
        of_code = parts[spec.code_key]
        some = [codes_of(read_part(output, of_code[0]["path"]))]
        dims[spec.name] = dim = int(space.embed(some[0][:1]).size)
        count, wanted = sum(part["rows"] for part in of_code), max(64, min(_SAMPLE_ROWS, _SAMPLE_BYTES // (4 * dim)))
        for part in of_code[1:]:
            if is_small(count, dim) or sum(map(len, some)) >= wanted:
                break
            some.append(codes_of(read_part(output, part["path"])))
        codes = np.concatenate(some)[:wanted]
        sample = Vectors(lambda r, c=codes, s=space, d=dim: s.embed(c[r]).reshape(-1, d), len(codes), dim)  # type: ignore[misc]
        choice = choose_search(sample, count, space.compact, os.cpu_count() or 1)
        searches[spec.name] = choice.to_json()
        if timed := choice.estimated_us:  # which took up to a minute
            event("search", space=spec.name, method=choice.method, dims=choice.dims, us_an_image=min(timed.values()))
    return dims, searches


def _write_reference_table(plan: Plan, output: str) -> int:
    """Every image that is in some code's part, once, shard by shard."""
    integers = {"offset", "size_bytes"}
    schema = pa.schema([pa.field(n, pa.int64() if n in integers else pa.string()) for n in LISTED_COLUMNS])
    images = 0
    with tempfile.TemporaryDirectory(prefix="manifpt-reference-") as folder:
        path = Path(folder) / "reference.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for commit in read_commits(output, range(plan.shards)):
                tables = [read_part(output, part, LISTED_COLUMNS) for part in commit["parts"]]
                if not tables:
                    continue  # every image of this shard was rejected
                table = pa.concat_tables([t.cast(schema) for t in tables]).group_by(LISTED_COLUMNS).aggregate([])
                table = table.select(LISTED_COLUMNS).sort_by("image_id")
                writer.write_table(table)
                images += len(table)
        store_of(output).upload(path, join(output, "reference.parquet"))
    return images


def code_table(rows: pa.Table, codes: np.ndarray, metadata: dict[str, str]) -> pa.Table:
    """The rows of one part. Parquet has no byte-sized integer, so uint8 codes are fixed-size binary with a shape."""
    if codes.dtype != np.uint8:
        return rows.append_column("code", tensor_column(codes)).replace_schema_metadata(metadata)
    flat = np.ascontiguousarray(codes).reshape(len(codes), -1)
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat.reshape(-1))]
    )
    shape = {"manifpt.code_shape": json.dumps(codes.shape[1:])}
    return rows.append_column("code", column).replace_schema_metadata(metadata | shape)


def codes_of(table: pa.Table) -> np.ndarray:
    """The inverse of `code_table`: uint8 or float32 [N, ...].

    Raises:
        ConfigError: the column is of another type, or its shape is not that of its bytes.
    """
    stated = (table.schema.metadata or {}).get(b"manifpt.code_shape")
    column = table["code"].combine_chunks()
    if isinstance(column.type, pa.FixedShapeTensorType) and column.type.value_type == pa.float32():
        return to_numpy(table["code"])
    shape = json_of(stated or b"null", "A code's shape")
    is_shape = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not is_shape or not pa.types.is_fixed_size_binary(column.type) or math.prod(shape) != column.type.byte_width:
        raise ConfigError("Codes are damaged (their shape is not that of their bytes): build the reference again.")
    width = column.type.byte_width
    raw = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width : (column.offset + len(column)) * width]
    return raw.reshape(-1, *shape)


class Codes:
    """The images of a bundle in one code, in memory, found by what they are and by where they lie.

    Attributes:
        image_ids: of all N rows.
        rows: those whose codes are held.
        array: uint8 or float32 [len(rows), ...].
    """

    def __init__(self, bundle: Bundle, key: str, share: int = 0, shares: int = 1) -> None:
        """Loads and verifies the code's parts.

        Args:
            bundle: it.
            key: of the code.
            share: which of `shares` equal parts to hold codes of; images are found in all of them.
            shares: 1: all codes.

        Raises:
            ConfigError: a part that is gone or was changed after the bundle was finished; or more shares than parts.
        """
        parts = bundle.parts[key]
        ends = np.cumsum([0, *(part["rows"] for part in parts)])
        cuts = np.linspace(0, len(parts), shares + 1).astype(int)
        if (np.diff(cuts) < 1).any():
            raise ConfigError(
                f"The reference {bundle.uri} has {len(parts)} parts and can't be held in {shares}: lower "
                f"--reference-shards, or build it with a smaller --shard-rows."
            )
        self.rows = range(int(ends[cuts[share]]), int(ends[cuts[share + 1]]))
        array: np.ndarray | None = None
        image_ids: list[pa.Array] = []
        hashes: list[np.ndarray] = []
        places: list[np.ndarray] = []
        # Part by part, so that memory never holds more than the share and one part's bytes.
        for (start, stop), table in zip(itertools.pairwise(ends.tolist()), _verified_parts(bundle, key), strict=True):
            image_ids += table["image_id"].chunks
            hashes.append(_keys(table["content_hash"].to_pylist()))
            places.append(_keys(map(_place, table["uri"].to_pylist(), table["offset"].to_pylist())))
            if start < stop and self.rows.start <= start < self.rows.stop:
                codes = codes_of(table)
                if array is None:
                    array = _empty(len(self.rows), codes, bundle.uri)
                if codes.shape[1:] != array.shape[1:] or codes.dtype != array.dtype:
                    raise ConfigError(f"The parts of {bundle.uri} hold codes of two shapes: build the reference again.")
                array[start - self.rows.start : stop - self.rows.start] = codes
        if array is None:
            raise ConfigError(f"A share of the reference {bundle.uri} holds no image: lower --reference-shards.")
        self.array = array
        self.image_ids: pa.Array = pa.concat_arrays(image_ids)
        self._by_hash, self._by_place = _Lookup(hashes), _Lookup(places)

    def rows_with(self, content_hashes: Sequence[str]) -> list[np.ndarray]:
        """int64 rows with these very pixels, for each hash."""
        return self._by_hash.rows(content_hashes)

    def rows_at(self, uris: Sequence[str], offsets: Sequence[int | None]) -> list[np.ndarray]:
        """int64 rows made of these very objects, whatever they are called in their manifest."""
        return self._by_place.rows([_place(uri, offset) for uri, offset in zip(uris, offsets, strict=True)])


@functools.lru_cache(maxsize=1)
def _held(uri: str, digest: str, key: str) -> Codes:
    bundle = open_bundle(uri)
    if bundle.digest != digest:
        raise ConfigError(f"The reference {uri} was built again while the job ran; start the job anew.")
    return Codes(bundle, key)


def held_codes(bundle: Bundle, key: str) -> Codes:
    """All codes, which a process that reads several runs holds once: those of the reference that it asked for last."""
    return _held(bundle.uri, bundle.digest, key)


def _place(uri: str, offset: int | None) -> str:
    return hashlib.blake2b(f"{offset}@{uri}".encode(), digest_size=16).hexdigest()


def _empty(rows: int, codes: np.ndarray, uri: str) -> np.ndarray:
    """Room for so many codes.

    Raises:
        ConfigError: there is none.
    """
    try:
        return np.empty((rows, *codes.shape[1:]), codes.dtype)
    except (MemoryError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"{rows} codes of the reference {uri}, of {codes[:1].nbytes} bytes each, are more than this machine's "
            f"memory holds: raise --reference-shards, or use larger machines."
        ) from error


def _keys(keys: Iterable[str]) -> np.ndarray:
    return np.array(list(keys), "S32")


class _Lookup:
    """Rows by 32-character key: a sorted array, since a dictionary of millions of strings takes gigabytes."""

    def __init__(self, keys: Sequence[np.ndarray]) -> None:
        keys_n = np.concatenate(keys)
        self._order = np.argsort(keys_n, kind="stable")
        self._sorted = keys_n[self._order]

    def rows(self, keys: Sequence[str]) -> list[np.ndarray]:
        keys_b = _keys(keys)
        low_b, high_b = (np.searchsorted(self._sorted, keys_b, side) for side in ("left", "right"))
        return [np.sort(self._order[low:high]) for low, high in zip(low_b.tolist(), high_b.tolist(), strict=True)]


def _verified_parts(bundle: Bundle, key: str) -> Iterator[pa.Table]:
    for part in bundle.parts[key]:
        uri = join(bundle.uri, part["path"])
        try:
            data = store_of(uri).read(uri)
        except FileNotFoundError as error:
            raise ConfigError(f"{uri} is gone: the bundle is damaged. Build the reference again.") from error
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise ConfigError(f"{uri} was changed after the bundle was finished. Build the reference again.")
        table = table_of(data, uri, [*LISTED_COLUMNS, "code"])
        if len(table) != part["rows"]:
            raise ConfigError(
                f"{uri} has {len(table)} rows, and its bundle says {part['rows']}: build the reference again."
            )
        yield _checked(table, uri)


_KINDS = {"offset": pa.int64(), "size_bytes": pa.int64()}


def _checked(table: pa.Table, uri: str) -> pa.Table:
    """A part, whose columns are what they are called."""
    check_columns(table.schema, uri, {name: _KINDS.get(name, pa.string()) for name in LISTED_COLUMNS})
    is_hash = pc.all(
        pc.and_(pc.string_is_ascii(table["content_hash"]), pc.less_equal(pc.binary_length(table["content_hash"]), 32))
    )
    if not is_hash.as_py() or any(table[name].null_count for name in ("image_id", "uri", "content_hash", "code")):
        raise ConfigError(f"{uri} is no part of a reference (rows without values). Build the reference again.")
    return table


class Reference:
    """The images of a bundle in one space: codes that spaces may share, and the projector over their embeddings."""

    def __init__(self, codes: Codes, spec: SpaceSpec, threads: int = 1, choice: Choice | None = None) -> None:
        self.codes = codes
        self.space: Space = make_space(spec, threads)
        self.shape: tuple[int, ...] = self.space.embed(codes.array[:1]).shape[1:]
        self._threads, self._choice = threads, choice

    @functools.cached_property
    def projector(self) -> NearestProjector:
        """Over all rows; made at the first use, since reading artifacts back needs none."""
        return self.projector_by(self._choice)

    def projector_by(self, choice: Choice | None) -> NearestProjector:
        """Over all rows, by another search."""
        dim = int(np.prod(self.shape))
        count = len(self.codes.array)
        return NearestProjector(
            self.embeddings_of, count, dim, self._threads, choice, self.space.compact, self.codes.array
        )

    def embeddings_of(self, rows: Rows) -> np.ndarray:
        """float32 [M, D] of some reference rows."""
        return self.space.embed(self.codes.array[rows]).reshape(-1, int(np.prod(self.shape)))
