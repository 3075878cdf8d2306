"""What a network says of artifacts, on its way to a table: in memory and as Parquet.

Legend: B artifacts, S labels, F features, K numbers of a spectrum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.artifacts import tensor_column, to_numpy
from manifpt.metrics.attribution import accuracy, balanced_accuracy
from manifpt.storage import store_of

__all__ = ["Outputs", "joined", "read_outputs", "write_outputs"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a method says of B artifacts or images.

    Attributes:
        logits_bs: float32 [B, S].
        features_bf: float32 [B, F], of the layer before.
        spectrum_bk: float32 [B, K], of the artifacts themselves: see `spectrum.spectrum_of`; of a method without
            artifacts, K is 0.
        label_b, row_b: int64 [B], as they came.
    """

    logits_bs: np.ndarray
    features_bf: np.ndarray
    spectrum_bk: np.ndarray
    label_b: np.ndarray
    row_b: np.ndarray

    @property
    def predicted_b(self) -> np.ndarray:
        """int64 [B]."""
        return np.asarray(self.logits_bs.argmax(1))

    @property
    def is_right_b(self) -> np.ndarray:
        """bool [B]."""
        return np.asarray(self.predicted_b == self.label_b)

    @property
    def is_finite_b(self) -> np.ndarray:
        """bool [B], whether all that is said of an artifact are finite numbers."""
        said = (self.logits_bs, self.features_bf, self.spectrum_bk)
        return np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in said])

    def take(self, number_n: np.ndarray) -> Outputs:
        """Some of them, by number (int64 [N])."""
        return Outputs(*(getattr(self, name)[number_n] for name in _FIELDS))

    @property
    def accuracy(self) -> float:
        """Share of images whose source is told."""
        return accuracy(self.label_b, self.predicted_b)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the sources."""
        return balanced_accuracy(self.label_b, self.predicted_b)


def joined(batches: Iterable[Outputs]) -> Outputs:
    """At least one batch, as one."""
    found = list(batches)
    return Outputs(*(np.concatenate([getattr(batch, name) for batch in found]) for name in _FIELDS))


_FIELDS = ("logits_bs", "features_bf", "spectrum_bk", "label_b", "row_b")


def write_outputs(uri: str, batches: Iterable[Outputs]) -> None:
    """One Parquet object of at least one batch."""
    found = joined(batches)
    table = pa.table(
        {"row": found.row_b, "label": found.label_b}
        | {
            name: tensor_column(values.astype(np.float32))
            for name, axis in _TENSORS
            if (values := getattr(found, f"{name}_b{axis}")).shape[1]  # Arrow has no tensors without numbers
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store_of(uri).write(uri, sink.getvalue().to_pybytes())


_TENSORS = (("logits", "s"), ("features", "f"), ("spectrum", "k"))


def read_outputs(uris: Sequence[str]) -> Outputs:
    """Of one or several objects together, in the order of the rows."""
    tables = [pq.read_table(pa.BufferReader(store_of(uri).read(uri))) for uri in uris]
    table = pa.concat_tables(tables).combine_chunks().sort_by("row")
    nothing = np.empty((len(table), 0), np.float32)
    logits_bs, features_bf, spectrum_bk = (
        to_numpy(table[name]) if name in table.column_names else nothing for name, _ in _TENSORS
    )
    return Outputs(logits_bs, features_bf, spectrum_bk, table["label"].to_numpy(), table["row"].to_numpy())
