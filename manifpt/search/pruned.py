"""The exact search that looks at a few rows only: bounds from `screen`, distances for what the bounds leave.

Legend: B queries, N reference rows, M coordinates of a sketch, S rows a group, G groups, k neighbours, P pairs.

1. Integer products of codes bound every distance from below; a group of S rows keeps its smallest bound.
2. The rows of the best group that look nearest are measured. The k-th of their distances bounds the answer from above.
3. Rows whose bound is above that can't be among the k nearest. The rest is bounded again, by float sketches.
4. What is left is measured by differences, in float32, and in float64 where rounding could matter.

A query whose bounds leave too much, as one of noise does, gets the flat search. So every answer is proved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manifpt.search.basis import Axes, Basis, in_float32, torch_of
from manifpt.search.device import DeviceRows
from manifpt.search.flat import FlatSearch
from manifpt.search.screen import GROUP, Coded, code_type, coded, products
from manifpt.search.vectors import Batch, Found, Vectors, joined, nearest_of_pairs, pairwise

__all__ = ["PrunedSearch"]

_QUERIES = {"cpu": 512, "cuda": 4_096}  # at a time
_BLOCK_ROWS = 32_768  # of codes at a time: the products of one block stay near the cache
# A query that keeps more than N / _MANY rows after the codes, or N / _TOO_MANY after the sketches, is cheaper by the
# flat search, which costs a GPU less than a few hundred rows that are compared one by one.
_MANY = {"cpu": 4, "cuda": 32}
_TOO_MANY = {"cpu": 16, "cuda": 128}
_FEW = 256  # but so many are always fine
_MOST_PAIRS = 1 << 25  # of a batch: half a GiB; beyond, those with more than their part of it are given up
_SEED_GROUPS = 4  # for each of the k neighbours, of which
_SEEDS = 3  # rows are measured first
_MOST_SEEDS = 1 << 23  # bounds of a batch's best groups, which take some 50 bytes each
_SINGLE = 8  # queries that are compared with every row by differences, rather than by a flat search


@dataclass(frozen=True, slots=True)
class _Block:
    """Codes of up to `_BLOCK_ROWS` rows. Group g is the rows at g, g + G, g + 2 G ..., which are alike in norm.

    Attributes:
        row_n: int64 [S * G], of the reference, on the device; -1 for padding.
        code_nm: int8 or float32 [S * G, M].
        step_g: float32 [G].
        square_sg, error_sg: float32 [S, G], see `Coded`; the square of padding is infinite.
        least_g, error_g: float32 [G], least square and largest error of each group.
    """

    row_n: torch.Tensor
    code_nm: torch.Tensor
    step_g: torch.Tensor
    square_sg: torch.Tensor
    error_sg: torch.Tensor
    least_g: torch.Tensor
    error_g: torch.Tensor


class PrunedSearch:
    """Exact by proof."""

    def __init__(
        self,
        vectors: Vectors,
        basis: Basis,
        compact: Callable[[Any], Any],
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        """Codes the reference.

        Args:
            vectors: the reference, float32 [N, D].
            basis: from a sample of it.
            compact: float32 [B, D] -> float32 [B, W], of NumPy or torch, a linear map that lengthens no difference.
            threads: CPU threads.
            device: where the codes lie, and the reference if it isn't too large.
        """
        if device != "cpu":
            vectors.hold_on(device)
        # What a flat search costs beside pairs: where the rows lie decides, not where the codes do.
        self._rows_on = "cpu" if vectors.on_device is None else "cuda"
        self._vectors, self._compact, self._threads, self._device = vectors, compact, threads, device
        self._basis = basis.to(device)
        self._flat: FlatSearch | None = None
        self._queries = _QUERIES[device]
        torch.set_num_threads(threads)
        in_float32()
        self._code_type = code_type(device)
        sketches: list[torch.Tensor] = []
        errors, self._blocks = [], []
        for start in range(0, vectors.count, _BLOCK_ROWS):
            rows = slice(start, min(start + _BLOCK_ROWS, vectors.count))
            sketch_nm, error_n = self._sketches(rows)
            self._blocks.append(_block(rows.start, sketch_nm, error_n, self._code_type))
            if isinstance(basis.rotated, Axes):  # else the vectors themselves are as near
                sketches.append(sketch_nm.cpu())
                errors.append(error_n.cpu().numpy())
        self._sketch_nm: np.ndarray | None = None
        self._sketches_on_device: DeviceRows | None = None
        if sketches and vectors.on_device is not None:
            blocks = (sketch_nm.numpy() for sketch_nm in sketches)
            self._sketches_on_device = DeviceRows(blocks, vectors.count, basis.dims, vectors.on_device.device)
        elif sketches:
            self._sketch_nm = torch.cat(sketches).numpy()
        self._sketch_error_n = np.concatenate(errors) if errors else np.empty(0, np.float64)
        product_type = torch.int32 if self._code_type == torch.int8 else torch.float32
        self._product_bn = torch.empty((self._queries, len(self._blocks[0].row_n)), dtype=product_type, device=device)

    def _sketches(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [self._sketch(Batch(self._vectors.at(part))) for part in self._vectors.slices(rows)]
        return torch.cat([sketch for sketch, _ in parts]), torch.cat([error for _, error in parts])

    def _sketch(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self._vectors.on_device is not None:
            return self._basis.sketch(self._compact(batch.on(self._vectors.on_device.device)))
        return self._basis.sketch(torch_of(self._compact(batch.query_bd)).to(self._device))

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """The k nearest rows of float32 [B, D]; `excluded[b]` are rows that query b must not find."""
        import faiss

        torch.set_num_threads(self._threads)
        in_float32()
        faiss.omp_set_num_threads(self._threads)
        step = max(1, min(self._queries, _MOST_SEEDS // (_SEED_GROUPS * k * GROUP)))
        parts = [slice(start, start + step) for start in range(0, len(query_bd), step)]
        done = [self._some(query_bd[part], k, excluded[part] if excluded else None) for part in parts]
        found = joined([found for found, _ in done])
        hard = np.flatnonzero(np.concatenate([is_hard_b for _, is_hard_b in done]))
        if len(hard):
            again = self._everything(query_bd[hard], k, [excluded[b] for b in hard.tolist()] if excluded else None)
            found.row_bk[hard], found.squared_bk[hard] = again.row_bk, again.squared_bk
        return found

    def _everything(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None) -> Found:
        """For queries that the bounds don't help: all of them together, since the whole reference has to be read."""
        if len(query_bd) > _SINGLE or self._vectors.on_device is not None:
            held = self._vectors.on_device
            device = held.device if held is not None else self._device if self._device != "cpu" else None
            self._flat = self._flat or FlatSearch(self._vectors, self._threads, device)
            return self._flat.search(query_bd, k, excluded)
        pair_b = np.repeat(np.arange(len(query_bd)), self._vectors.count)
        row_p = np.tile(np.arange(self._vectors.count), len(query_bd))
        allowed = _Excluded(excluded, self._vectors.count).allows(pair_b, row_p)
        return nearest_of_pairs(self._vectors, Batch(query_bd), pair_b[allowed], row_p[allowed], k)

    @torch.inference_mode()
    def _some(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None) -> tuple[Found, np.ndarray]:
        """The answer, and which queries the bounds don't help."""
        batch = Batch(query_bd)
        sketch_bm, error_b = self._sketch(batch)
        code = coded(sketch_bm, error_b, sketch_bm.abs().amax(1), self._code_type)
        queries = _Queries(batch, sketch_bm, error_b, code, k, _Excluded(excluded, self._vectors.count))
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for block in self._blocks:
            pairs.append(self._survivors(block, queries))
            if queries.count(pairs[-1][0]):
                pairs = [queries.not_hard(*found) for found in pairs]
        pair_b, row_p = (np.concatenate(part) for part in zip(*pairs, strict=True))
        pair_b, row_p = self._by_sketches(queries, pair_b, row_p)
        return nearest_of_pairs(self._vectors, batch, pair_b, row_p, k), queries.is_hard_b

    def _survivors(self, block: _Block, queries: _Queries) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (query, row) of a block that the codes don't rule out."""
        product_bn = products(queries.code.code_rm, block.code_nm, self._product_bn)
        product_bsg = product_bn.unflatten(1, (GROUP, -1))
        every_b = torch.arange(len(product_bn), device=product_bn.device)[:, None]
        lower_bg = _lower(queries.code, every_b, block.step_g, block.least_g, block.error_g, product_bsg.amax(1))
        near = min(_SEED_GROUPS * queries.k, lower_bg.shape[1])
        seed_bt = lower_bg.topk(near, dim=1, largest=False).indices
        self._tighten(block, queries, product_bsg, every_b.expand(-1, near).reshape(-1), seed_bt.reshape(-1), near)

        upper_b = torch.from_numpy(queries.upper_b).to(lower_bg.device)
        is_left_bg = lower_bg <= upper_b[:, None]
        limit = max(_FEW, self._vectors.count // _MANY[self._rows_on])
        queries.add_hard(is_left_bg.sum(1).cpu().numpy() + queries.left_b // GROUP > limit // GROUP)
        is_left_bg &= ~torch.from_numpy(queries.is_hard_b).to(is_left_bg.device)[:, None]
        pair_b, pair_g = is_left_bg.nonzero(as_tuple=True)
        lower_sp = self._members(block, queries, product_bsg, pair_b, pair_g)
        left_s, left_p = (lower_sp <= upper_b[pair_b]).nonzero(as_tuple=True)
        row_p = block.row_n[left_s * len(block.least_g) + pair_g[left_p]].cpu().numpy()
        kept_b = pair_b[left_p].cpu().numpy()
        allowed = (row_p >= 0) & queries.excluded.allows(kept_b, row_p)
        return kept_b[allowed], row_p[allowed]

    def _members(
        self, block: _Block, queries: _Queries, product_bsg: torch.Tensor, pair_b: torch.Tensor, pair_g: torch.Tensor
    ) -> torch.Tensor:
        """Bounds of all rows of some groups: float32 [S, P]."""
        square_sp, error_sp = block.square_sg[:, pair_g], block.error_sg[:, pair_g]
        return _lower(queries.code, pair_b, block.step_g[pair_g], square_sp, error_sp, product_bsg[pair_b, :, pair_g].T)

    def _tighten(
        self,
        block: _Block,
        queries: _Queries,
        product_bsg: torch.Tensor,
        pair_b: torch.Tensor,
        pair_g: torch.Tensor,
        near: int,
    ) -> None:
        """Measures what looks nearest, a few rows for each neighbour, for an upper bound of the k-th distance."""
        lower_sp = self._members(block, queries, product_bsg, pair_b, pair_g)
        lower_bn = lower_sp.T.reshape(-1, near * GROUP)
        place_sp = torch.arange(GROUP, device=pair_g.device)[:, None] * len(block.least_g) + pair_g
        row_bn = block.row_n[place_sp.T.reshape(-1, near * GROUP)]
        if queries.excluded.keys_p is not None:
            every_bn = np.broadcast_to(np.arange(len(row_bn))[:, None], row_bn.shape)
            row_p = row_bn.reshape(-1).cpu().numpy()
            allowed_bn = queries.excluded.allows(every_bn.reshape(-1), row_p).reshape(row_bn.shape)
            lower_bn = lower_bn.masked_fill(~torch.from_numpy(allowed_bn).to(lower_bn.device), torch.inf)
        best = lower_bn.topk(min(_SEEDS * queries.k, lower_bn.shape[1]), dim=1, largest=False)
        row_bc = row_bn.gather(1, best.indices).cpu().numpy()
        kept_b, kept_c = (torch.isfinite(best.values).cpu().numpy() & (row_bc >= 0)).nonzero()
        squared_p = self._vectors.pair_distances(queries.batch, kept_b, row_bc[kept_b, kept_c])
        squared_bc = np.full(row_bc.shape, np.inf)
        squared_bc[kept_b, kept_c] = self._vectors.bounds(squared_p)[1]
        queries.tighten(squared_bc)

    def _by_sketches(self, queries: _Queries, pair_b: np.ndarray, row_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs that float sketches don't rule out either."""
        pair_b, row_p = queries.not_hard(pair_b, row_p)
        squared_p = None
        if self._sketches_on_device is not None:
            squared_p = self._sketches_on_device.pair_distances(queries.sketch_bm, pair_b, row_p)
        elif self._sketch_nm is not None:
            squared_p = np.empty(len(pair_b), np.float32)
            pairwise(queries.sketch_bm.cpu().numpy(), pair_b, self._sketch_nm, row_p, squared_p)
        if squared_p is not None:
            error_b = queries.error_b.cpu().numpy()
            slop = 1 - (self._basis.dims + 4) * 2.0**-24
            lower_p = slop * np.sqrt(squared_p) - (error_b[pair_b] + self._sketch_error_n[row_p]) * (1 + 1e-6)
            kept = lower_p <= queries.upper_b[pair_b]
            pair_b, row_p = pair_b[kept], row_p[kept]
        counts_b = np.bincount(pair_b, minlength=len(queries.batch))
        queries.add_hard(counts_b > max(_FEW, self._vectors.count // _TOO_MANY[self._rows_on]))
        return queries.not_hard(pair_b, row_p)


class _Queries:
    """A batch of queries, and what is known of their answers so far."""

    def __init__(
        self,
        batch: Batch,
        sketch_bm: torch.Tensor,
        error_b: torch.Tensor,
        code: Coded,
        k: int,
        excluded: _Excluded,
    ) -> None:
        self.batch, self.sketch_bm, self.error_b, self.code = batch, sketch_bm, error_b, code
        self.k, self.excluded = k, excluded
        self.is_hard_b = np.zeros(len(batch), bool)
        self.left_b = np.zeros(len(batch), np.int64)  # rows of the blocks so far that the codes don't rule out
        self._best_bk = np.full((len(batch), k), np.inf)  # upper bounds of squared distances of k rows
        self.upper_b = np.full(len(batch), np.inf)  # so far is the k-th nearest at most

    def tighten(self, squared_bc: np.ndarray) -> None:
        """Takes upper bounds of the squared distances of further rows: float64 [B, c]."""
        self._best_bk = np.sort(np.hstack([self._best_bk, squared_bc]), axis=1)[:, : self.k]
        self.upper_b = np.sqrt(self._best_bk[:, -1]) * (1 + 1e-6)

    def count(self, pair_b: np.ndarray) -> bool:
        """Counts pairs of a further block; whether some queries have too many for all to be held."""
        self.left_b += np.bincount(pair_b, minlength=len(self.left_b))
        if self.left_b[~self.is_hard_b].sum() <= _MOST_PAIRS:
            return False
        self.add_hard(self.left_b > _MOST_PAIRS // len(self.left_b))
        return True

    def add_hard(self, is_hard_b: np.ndarray) -> None:
        """Queries for the flat search."""
        self.is_hard_b |= is_hard_b

    def not_hard(self, pair_b: np.ndarray, row_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of the other queries."""
        kept_p = ~self.is_hard_b[pair_b]
        return pair_b[kept_p], row_p[kept_p]


class _Excluded:
    """Pairs that must not be found, as sorted keys b * N + row."""

    def __init__(self, excluded: Sequence[np.ndarray] | None, count: int) -> None:
        self._count = count
        parts = [rows.astype(np.int64) + b * count for b, rows in enumerate(excluded or ()) if len(rows)]
        self.keys_p = np.sort(np.concatenate(parts)) if parts else None

    def allows(self, pair_b: np.ndarray, row_p: np.ndarray) -> np.ndarray:
        """bool [P]."""
        if self.keys_p is None:
            return np.ones(len(pair_b), bool)
        key_p = pair_b.astype(np.int64) * self._count + row_p
        place_p = np.searchsorted(self.keys_p, key_p).clip(max=len(self.keys_p) - 1)
        return self.keys_p[place_p] != key_p


def _lower(
    code: Coded, b: torch.Tensor, step: torch.Tensor, square: torch.Tensor, error: torch.Tensor, product: torch.Tensor
) -> torch.Tensor:
    """float32 bounds of the distances between queries b and what has these steps, squares, errors and products."""
    sum_ = code.square_r[b] + square
    # 2^-19 of the sum is more than the errors of the squares (2^-21), of adding eight pieces of a product (7 * 2^-24),
    # and of these few operations together.
    apart = ((1 - 2.0**-19) * sum_ - (2 * code.step_r[b] * step) * product).clamp_(min=0).sqrt_()
    return (1 - 1e-6) * apart - (1 + 1e-6) * (code.error_r[b] + error)


def _block(start: int, sketch_nm: torch.Tensor, error_n: torch.Tensor, dtype: torch.dtype) -> _Block:
    """Puts rows into groups of like norm, so that one step fits them all, and the least norm says much of each."""
    order = sketch_nm.square().sum(1).argsort(stable=True)
    groups = -(-len(order) // GROUP)
    padding = groups * GROUP - len(order)
    order_gs = torch.cat([order, order[-1:].expand(padding)]).reshape(groups, GROUP)
    is_padding_sg = (torch.arange(groups * GROUP, device=order.device) >= len(order)).reshape(groups, GROUP).T
    largest_n = sketch_nm.abs().amax(1)
    largest_g = largest_n[order_gs].amax(1)
    place_sg = order_gs.T.contiguous()
    place_n = place_sg.reshape(-1)
    code = coded(sketch_nm[place_n], error_n[place_n], largest_g.repeat(GROUP), dtype)
    square_sg = code.square_r.reshape(GROUP, groups).masked_fill(is_padding_sg, torch.inf)
    error_sg = code.error_r.reshape(GROUP, groups).masked_fill(is_padding_sg, 0)
    row_n = torch.where(is_padding_sg, -1, place_sg + start).reshape(-1)
    return _Block(row_n, code.code_rm, code.step_r[:groups], square_sg, error_sg, square_sg.amin(0), error_sg.amax(0))
