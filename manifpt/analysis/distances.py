"""How far each source's images lie from the reals, from a run's shards; their artifacts stay unread.

Legend: N images of a source.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifpt.documents import check_columns, parquet_errors
from manifpt.manifest import REAL
from manifpt.plan import Plan
from manifpt.reader import finished_shards
from manifpt.shards import part_path
from manifpt.storage import join, store_of

__all__ = ["Distances", "read_distances"]

_KINDS = {"source": pa.string(), "distance": pa.float32(), "twin": pa.string(), "content_hash": pa.string()}


@dataclass(frozen=True, slots=True)
class Distances:
    """Of the images of a run in one space.

    Attributes:
        by_source: float32 [N] each, sources in ascending order.
        holds_image: whether one image's very pixels are among the run's.
    """

    by_source: dict[str, np.ndarray]
    holds_image: bool

    def of(self, sources: Iterable[str]) -> np.ndarray:
        """float32, those of some sources together."""
        return np.concatenate([np.empty(0, np.float32), *(self.by_source[source] for source in sources)])


def read_distances(run: str, plan: Plan, space: str, image_hash: str) -> Distances:
    """Reads four light columns of all shards.

    Reals of which the reference holds a copy are left out, as in a training: their distance says nothing of a real that
    is new.

    Args:
        run: the run folder.
        plan: its.
        space: one of its.
        image_hash: content hash to look for.

    Raises:
        ConfigError: a run that isn't finished, or is damaged.
    """

    def read(shard: int) -> pa.Table:
        uri = join(run, part_path("artifacts", space, shard))
        with store_of(uri).open(uri) as stream, parquet_errors(uri):
            file = pq.ParquetFile(stream)
            check_columns(file.schema_arrow, uri, _KINDS)
            return file.read(list(_KINDS), use_threads=False).replace_schema_metadata(None)

    with ThreadPoolExecutor(16) as pool:
        table = pa.concat_tables(pool.map(read, finished_shards(run, plan)))
    holds_image = pc.any(pc.equal(table["content_hash"], image_hash)).as_py()
    is_copy = pc.and_(pc.equal(table["source"], REAL), pc.is_in(table["twin"], pa.array(["copy", "near_copy"])))
    table = table.filter(pc.invert(is_copy)).select(["source", "distance"]).sort_by("source").combine_chunks()
    names = pc.unique(table["source"]).to_pylist()
    return Distances(
        {name: table.filter(pc.equal(table["source"], name))["distance"].to_numpy() for name in names},
        bool(holds_image),
    )
