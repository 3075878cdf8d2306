from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.search import Choice, Found, Search, Vectors, choose, choose_search, make_search
from manifpt.search.approximate import ApproximateSearch
from manifpt.search.basis import Basis, Mixing, fit_basis, torch_of
from manifpt.search.device import InHalves
from manifpt.search.distinct import DistinctSearch, distinct_rows
from manifpt.search.flat import FlatSearch
from manifpt.search.pruned import PrunedSearch, _lower
from manifpt.search.screen import GROUP, code_type, coded, is_exact_in_bytes, products
from manifpt.search.vectors import sum_by_halves

BYTES_MULTIPLY = is_exact_in_bytes("cpu")
KINDS = ("noise", "planes", "levels", "near", "equal", "copies", "outliers")
SHAPES = ((1.0, 0.0), (1.0, 1e4), (1e-3, 10.0), (1e-19, 0.0), (1e-22, 0.0), (1e-43, 1.0), (3e18, 0.0))  # scale, offset


def vectors_of(reference_nd: np.ndarray) -> Vectors:
    return Vectors(lambda rows: reference_nd[rows], *reference_nd.shape)


def on_device(vectors: Vectors) -> Vectors:
    """What a GPU would compute, computed by the same code here."""
    held = Vectors(vectors.at, vectors.count, vectors.dim)
    assert held.hold_on("cpu")
    return held


def pruned(vectors: Vectors, dims: int) -> PrunedSearch:
    basis = fit_basis(torch_of(vectors.at(slice(0, vectors.count))), dims)
    return PrunedSearch(vectors, basis, lambda vectors_bd: vectors_bd)


def distinct(reference_nd: np.ndarray, inner: Callable[[Vectors], Search]) -> DistinctSearch:
    same_as = distinct_rows(lambda rows: reference_nd[rows], [slice(0, len(reference_nd))])
    vectors = vectors_of(reference_nd[np.unique(same_as)])
    return DistinctSearch(inner(vectors), vectors, same_as)


def draw(rng: np.random.Generator, kind: str, count: int, queries: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference and queries that are hard each in their own way: float64 [N, D] and [B, D]."""
    all_md = rng.standard_normal((count + queries, dim))
    if kind == "planes":  # what bounds are good at
        all_md = all_md[:, :2] @ rng.standard_normal((min(2, dim), dim)) + 1e-3 * all_md
    elif kind == "levels":  # many exact ties
        all_md = all_md.round()
    elif kind in ("near", "equal"):  # differences near the rounding of one embedding, or none
        all_md = all_md[:1] + (1e-5 * all_md if kind == "near" else 0 * all_md)
    elif kind == "copies":
        all_md = all_md[rng.integers(0, 1 + count // 5, len(all_md))]
    elif kind == "outliers":
        all_md[rng.integers(0, len(all_md), 1 + count // 20)] *= 1e6
    reference_nd, query_bd = all_md[:count], all_md[count:]
    query_bd[: queries // 3] = reference_nd[rng.integers(0, count, queries // 3)]
    query_bd[-1] = reference_nd.mean(axis=0)
    return reference_nd, query_bd


def check(found: Found, query_bd: np.ndarray, reference_nd: np.ndarray, k: int, excluded: list[np.ndarray]) -> None:
    """Against all float64 differences, summed in the same order, which tells what is as far but for the last bit."""
    squared_bn = np.stack([sum_by_halves(np.square(x_d.astype(np.float64) - reference_nd)) for x_d in query_bd])
    for b, rows in enumerate(excluded):
        squared_bn[b, rows] = np.inf
    squared_bn = np.pad(squared_bn, ((0, 0), (0, k)), constant_values=np.inf)
    order_bk = np.argsort(squared_bn, axis=1, kind="stable")[:, :k]
    squared_bk = np.take_along_axis(squared_bn, order_bk, 1)
    np.testing.assert_array_equal(found.row_bk, np.where(np.isfinite(squared_bk), order_bk, -1))
    np.testing.assert_allclose(found.squared_bk, squared_bk, rtol=1e-12)


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    count=st.sampled_from([1, 2, 31, 32, 33, 97, 250, 600]),
    dim=st.sampled_from([1, 2, 17, 64, 65, 130]),
    k=st.sampled_from([1, 2, 5, 64, 700]),
    shape=st.sampled_from(SHAPES),
    part=st.sampled_from([0.1, 0.5, 0.99, 1.0]),
    block_rows=st.sampled_from([32, 96, 32_768]),
    is_held=st.booleans(),
    in_bytes=st.booleans() if BYTES_MULTIPLY else st.just(False),
    left_out=st.sampled_from(["none", "some", "nearest", "all"]),
)
def test_every_search_finds_the_nearest(
    seed: int, kind: str, count: int, dim: int, k: int, shape: tuple[float, float], part: float, block_rows: int,
    is_held: bool, in_bytes: bool, left_out: str,
) -> None:  # fmt: skip
    """A bound that isn't one, a lost block, a tie told wrongly, or squares that under- or overflow change an answer."""
    rng = np.random.default_rng(seed)
    reference_nd, query_bd = ((shape[0] * (x + shape[1])).astype(np.float32) for x in draw(rng, kind, count, 12, dim))
    nearest_bn = np.argsort(np.square(query_bd[:, None].astype(np.float64) - reference_nd).sum(-1), axis=1)
    excluded = {
        "none": [],
        "some": [rng.choice(count, rng.integers(0, count + 1), replace=False) for _ in query_bd],
        "nearest": [nearest_bn[b, : int(rng.integers(0, 100))] for b in range(12)],
        "all": [np.arange(count) if b % 2 else np.arange(0) for b in range(12)],
    }[left_out]
    dims = max(2, int(part * dim))  # as many as D, or more: all coordinates, mixed
    answers: list[Found] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manifpt.search.vectors._HELD_BYTES", 1 << 30 if is_held else 0)
        patch.setattr("manifpt.search.vectors._BLOCK_BYTES", 4 * dim * 80)
        patch.setattr("manifpt.search.pruned._BLOCK_ROWS", block_rows)
        patch.setattr("manifpt.search.pruned.code_type", lambda device: torch.int8 if in_bytes else torch.float32)
        patch.setattr("manifpt.search.pruned._MOST_SEEDS", 7 * 4 * GROUP)  # batches of few queries
        patch.setattr("manifpt.search.device._PRODUCT_BYTES", 4 * 5 * count)
        patch.setattr("manifpt.search.device._PAIR_BYTES", 8 * dim * 40)
        patch.setattr("manifpt.search.device._ROWS", 100)
        vectors = vectors_of(reference_nd)
        for make in (
            FlatSearch,
            lambda inner: FlatSearch(on_device(inner), device="cpu"),
            lambda inner: pruned(inner, dims),
            lambda inner: pruned(on_device(inner), dims),
        ):
            for search in (make(vectors), distinct(reference_nd, make)):
                found = search.search(query_bd, k, excluded or None)
                check(found, query_bd, reference_nd, k, excluded)
                answers.append(found)
    for found in answers:  # the same bits, on whichever device
        np.testing.assert_array_equal(found.row_bk, answers[0].row_bk)
        np.testing.assert_array_equal(found.squared_bk, answers[0].squared_bk)


def exact_sketch(basis: Basis, vectors_bw: np.ndarray) -> np.ndarray:
    """The map that `Basis.sketch` rounds, by the orthonormal matrices nearest to its float32 ones: float64 [B, M]."""
    centred_bw = vectors_bw.astype(np.float64) - basis.mean_w.double().numpy()
    if isinstance(basis.rotated, Mixing):
        a, c = len(basis.rotated.left_aa), len(basis.rotated.right_cc)
        padded_bac = np.zeros((len(centred_bw), a * c))
        padded_bac[:, : centred_bw.shape[1]] = centred_bw
        left, right = (np.linalg.svd(m.double().numpy()) for m in (basis.rotated.left_aa, basis.rotated.right_cc))
        return ((left.U @ left.Vh) @ padded_bac.reshape(-1, a, c) @ (right.U @ right.Vh)).reshape(-1, a * c)
    u_mm, _, v_mw = np.linalg.svd(basis.rotated.axes_mw.double().numpy(), full_matrices=False)
    u_mm, v_mw, rest_m = u_mm[:, :-1], v_mw[:-1], u_mm[:, -1] * np.sign(u_mm[:, -1] @ basis.rotated.rest_m.numpy())
    inside_bm = centred_bw @ v_mw.T
    rest_b = np.linalg.norm(centred_bw - inside_bm @ v_mw, axis=1)
    return inside_bm @ u_mm.T + (rest_b - basis.rotated.rest_mean)[:, None] * rest_m


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from([(1.0, 0.0), (1.0, 1e3), (1e-20, 0.0), (1e4, 0.0)]),
    dim=st.sampled_from([3, 65, 300]),
    part=st.sampled_from([0.3, 1.0]),
)
def test_bounds_are_below_the_distances(
    seed: int, kind: str, shape: tuple[float, float], dim: int, part: float
) -> None:
    """An answer may be right by luck, so the bounds themselves are held against float64."""
    rng = np.random.default_rng(seed)
    reference_nd, query_bd = ((shape[0] * (x + shape[1])).astype(np.float32) for x in draw(rng, kind, 150, 20, dim))
    search = pruned(vectors_of(reference_nd), max(2, int(part * dim)))
    basis, block = search._basis, search._blocks[0]
    sketch_bm, error_b = basis.sketch(torch_of(query_bd))
    assert (np.linalg.norm(sketch_bm.numpy() - exact_sketch(basis, query_bd), axis=1) <= error_b.numpy()).all()
    code = coded(sketch_bm, error_b, sketch_bm.abs().amax(1), search._code_type)
    b = torch.arange(len(query_bd))
    product_bsg = (code.code_rm.long() @ block.code_nm.long().T).unflatten(1, (GROUP, -1)).int()
    distance_bn = np.linalg.norm(query_bd[:, None].astype(np.float64) - reference_nd, axis=-1)
    distance_bsg = np.where(block.row_n >= 0, distance_bn[:, block.row_n], np.inf).reshape(product_bsg.shape)
    lower_bg = _lower(code, b[:, None], block.step_g, block.least_g, block.error_g, product_bsg.amax(1))
    assert (lower_bg.numpy() <= distance_bsg.min(axis=1)).all()
    lower_bsg = _lower(code, b[:, None, None], block.step_g, block.square_sg, block.error_sg, product_bsg)
    assert (lower_bsg.numpy() <= distance_bsg).all()
    if kind == "planes" and shape == (1.0, 0.0):  # and they say something
        assert (lower_bsg.numpy() > 0.5 * distance_bsg).mean() > 0.4


def test_a_query_in_the_centre_has_a_sketch_with_an_error() -> None:
    """Its norm is zero, but the centred norm of its rest is not, and that is rounded too."""
    half_nd = torch.randn(100, 60, generator=torch.Generator().manual_seed(0))
    basis = fit_basis(torch.cat([half_nd, -half_nd]), 8)
    centre_1w = basis.mean_w[None].numpy()
    sketch_bm, error_b = basis.sketch(basis.mean_w[None])
    assert 0 < np.linalg.norm(sketch_bm.numpy() - exact_sketch(basis, centre_1w)) <= float(error_b)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_products_have_no_error_but_that_of_adding_pieces(dtype: torch.dtype) -> None:
    """Long codes of the largest bytes are more than a float32 sum holds; a last block is smaller than the buffer."""
    if dtype == torch.int8 and not BYTES_MULTIPLY:
        pytest.skip("not without error on this processor")
    rng = np.random.default_rng(0)
    out_bn = torch.full((64, 96), 7, dtype=torch.int32 if dtype == torch.int8 else dtype)
    for rows, columns, width in [(1, 32, 64), (33, 64, 8_192), (64, 96, 1_024), (64, 96, 1_088)]:
        a_bm = torch.from_numpy(rng.choice(np.array([-127, 126, 127], np.int8), (rows, width)))
        b_nm = torch.from_numpy(rng.choice(np.array([-127, 127], np.int8), (columns, width)))
        b_nm[0] = a_bm[0].sign() * 127  # the largest sum
        error_bn = (products(a_bm.to(dtype), b_nm.to(dtype), out_bn).long() - a_bm.long() @ b_nm.long().T).abs()
        pieces = 0 if dtype == torch.int8 else -(-width // 1_024) - 1
        assert (error_bn <= pieces * 2.0**-24 * 127**2 * width).all()


def test_slow_bytes_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor may multiply bytes without error, and in a plain loop."""
    product = torch._int_mm

    def slow(*args: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return product(*args)

    monkeypatch.setattr(torch, "_int_mm", slow)
    assert code_type("cpu") == torch.float32


@pytest.mark.parametrize("dims", [16, 130])
@pytest.mark.parametrize("kind", ["noise", "copies", "equal", "planes"])
@pytest.mark.parametrize("far", [0.0, 1e5])
def test_what_bounds_cannot_tell_is_still_exact(kind: str, far: float, dims: int) -> None:
    """More rows than are always looked at, so that the flat search takes over; more queries than one batch."""
    reference_nd, query_bd = (x.astype(np.float32) for x in draw(np.random.default_rng(4), kind, 1_500, 530, 40))
    query_bd += np.float32(far)
    search = make_search(lambda rows: reference_nd[rows], 1_500, 40, choice=Choice("pruned", dims), compact=np.asarray)
    some = np.r_[0:10, 500:530]
    found = search.search(query_bd, 2)
    check(Found(found.row_bk[some], found.squared_bk[some]), query_bd[some], reference_nd, 2, [])


@pytest.mark.parametrize("most_pairs", [None, 4_000])
def test_what_bounds_cannot_tell_is_given_up_before_it_fills_memory(
    monkeypatch: pytest.MonkeyPatch, most_pairs: int | None
) -> None:
    """Of many blocks as of one: pairs are bounded for each query, and for all of them."""
    reference_nd, query_bd = (x.astype(np.float32) for x in draw(np.random.default_rng(6), "noise", 6_000, 60, 40))
    monkeypatch.setattr("manifpt.search.pruned._BLOCK_ROWS", 256)
    if most_pairs:
        monkeypatch.setattr("manifpt.search.pruned._MOST_PAIRS", most_pairs)
    search = pruned(vectors_of(reference_nd), 16)
    held: list[np.ndarray] = []
    by_sketches = search._by_sketches
    monkeypatch.setattr(search, "_by_sketches", lambda q, b, r: (held.append(b), by_sketches(q, b, r))[1])
    check(search.search(query_bd, 2), query_bd, reference_nd, 2, [])
    assert np.bincount(held[0]).max() <= 6_000 // 4 + 256
    if most_pairs:
        assert len(held[0]) <= most_pairs + 60 * 256


def test_a_reference_too_large_for_the_device_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    reference_nd, query_bd = rng.standard_normal((200, 16)).astype(np.float32), np.zeros((3, 16), np.float32)
    monkeypatch.setattr("manifpt.search.device.free_bytes", lambda device: 8 * 4 * 200 * 16 - 1)
    vectors = vectors_of(reference_nd)
    assert not vectors.hold_on("cpu") and vectors.on_device is None
    check(FlatSearch(vectors, device="cpu").search(query_bd, 2), query_bd, reference_nd, 2, [])
    assert not vectors.hold_on("cpu"), "memory that comes free later is another's"
    monkeypatch.setattr("manifpt.search.device.free_bytes", lambda device: 8 * 4 * 200 * 16)
    assert vectors_of(reference_nd).hold_on("cpu")


class _Short:
    """A search with room for a few queries at a time."""

    def __init__(self, inner: Search, room: int) -> None:
        self._inner, self._room, self.asked = inner, room, list[int]()

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        self.asked.append(len(query_bd))
        if len(query_bd) > self._room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self._inner.search(query_bd, k, excluded)


def test_queries_that_a_device_has_no_memory_for_are_searched_in_halves() -> None:
    rng = np.random.default_rng(4)
    reference_nd, query_bd = (rng.standard_normal((count, 16)).astype(np.float32) for count in (90, 11))
    excluded = [np.array([b, 40], np.int64) for b in range(len(query_bd))]
    short = _Short(FlatSearch(vectors_of(reference_nd)), room=3)
    check(InHalves(short).search(query_bd, 2, excluded), query_bd, reference_nd, 2, excluded)
    assert max(length for length in short.asked if length <= 3) == 3 and sum(n for n in short.asked if n <= 3) == 11
    with pytest.raises(torch.cuda.OutOfMemoryError):
        InHalves(_Short(short, room=0)).search(query_bd, 2)


@pytest.mark.parametrize("method", ["flat", "pruned"])
def test_a_gpu_that_others_have_filled_leaves_the_search_to_the_cpu(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = FlatSearch if method == "flat" else PrunedSearch
    real = kind.__init__

    def full(self: Any, vectors: Vectors, *arguments: Any) -> None:
        if arguments[-1:] == ("cuda",):
            vectors.on_device = object()  # type: ignore[assignment]  # as if the rows had found room, and the codes none
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        real(self, vectors, *arguments)

    monkeypatch.setattr(kind, "__init__", full)
    monkeypatch.setattr("manifpt.search.has_gpu", lambda: True)
    monkeypatch.setattr("manifpt.search.is_small", lambda *_: False)
    rng = np.random.default_rng(4)
    reference_nd, query_bd = (rng.standard_normal((count, 16)).astype(np.float32) for count in (90, 11))
    made = make_search(
        lambda rows: reference_nd[rows],
        90,
        16,
        choice=Choice(method, 8 if method == "pruned" else 0),
        compact=lambda x: x,
    )
    check(made.search(query_bd, 2, None), query_bd, reference_nd, 2, [np.empty(0, np.int64)] * 11)
    assert "search_on_cpu" in capsys.readouterr().err


def test_faiss_without_memory_on_a_gpu_goes_on_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no error of its own for that, and keeps its memory apart from torch's."""
    rng = np.random.default_rng(4)
    reference_nd, query_bd = (rng.standard_normal((count, 16)).astype(np.float32) for count in (90, 11))
    search = FlatSearch(vectors_of(reference_nd))
    asked = []

    def knn_gpu(*_: object) -> None:
        asked.append(1)
        raise RuntimeError("Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory")

    monkeypatch.setattr(search._faiss, "knn_gpu", knn_gpu, raising=False)
    search._knn = functools.partial(search._knn_on_gpu, None)
    for _ in range(2):
        check(search.search(query_bd, 2), query_bd, reference_nd, 2, [np.empty(0, np.int64)] * 11)
    assert len(asked) == 1, "nor is it asked again"


@pytest.mark.parametrize(
    "make", [lambda vectors: FlatSearch(vectors, device="cpu"), lambda vectors: pruned(vectors, 8)]
)
def test_products_of_less_than_float32_are_not_used(make: Callable[[Vectors], Search]) -> None:
    """The bounds are those of float32; TF32 may be allowed by an environment variable, or by another library."""
    vectors = on_device(vectors_of(np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)))
    try:
        torch.set_float32_matmul_precision("medium")
        search = make(vectors)
        torch.set_float32_matmul_precision("medium")
        search.search(np.zeros((2, 16), np.float32), 1)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bounds_do_the_work_where_energy_compacts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that always falls back would be exact as well, and of no use."""
    rng = np.random.default_rng(5)
    all_md = (10 * rng.standard_normal((60, 64)))[rng.integers(0, 60, 3_030)] + 0.1 * rng.standard_normal((3_030, 64))
    reference_nd, query_bd = np.split(all_md.astype(np.float32), [3_000])
    search = pruned(vectors_of(reference_nd), 8)
    monkeypatch.setattr(search, "_everything", None)
    check(search.search(query_bd, 2), query_bd, reference_nd, 2, [])


def test_a_copy_of_an_excluded_row_is_no_smaller_than_it_is() -> None:
    """Rows 0 and 5 are equal, 3 and 4 lie as far on other sides. Without 0, the first of them is 3, not 5."""
    reference_nd = np.array([[1, 0], [9, 9], [8, 8], [-1, 0], [0, 1], [1, 0]], np.float32)
    search, query_bd = distinct(reference_nd, FlatSearch), np.zeros((1, 2), np.float32)
    assert search.search(query_bd, 2).row_bk.tolist() == [[0, 3]]
    assert search.search(query_bd, 1, [np.array([0])]).row_bk.tolist() == [[3]]
    assert search.search(query_bd, 2, [np.array([0, 3])]).row_bk.tolist() == [[4, 5]]


@pytest.mark.parametrize("make", [FlatSearch, lambda inner: pruned(inner, 8), lambda inner: pruned(inner, 100)])
@pytest.mark.parametrize("others", [1, 100])
def test_squares_that_float32_cannot_hold(make: Callable[[Vectors], Search], others: int) -> None:
    """Lost below 1e-45, a farther row looks nearer; above 1e38, where the sums end, none has a distance at all."""
    noise_nd = np.random.default_rng(10).standard_normal((others, 100))
    tiny_nd = np.vstack([np.full(100, 2e-23), np.eye(1, 100) * 1e-22, noise_nd]).astype(np.float32)
    check(make(vectors_of(tiny_nd)).search(0 * tiny_nd[:9], 1), 0 * tiny_nd[:9], tiny_nd, 1, [])
    for scale in (1e17, 1e18, 1e37):
        huge_nd = (scale * np.vstack([np.full((2, 100), [[0.16], [0.11]]), noise_nd / 1e3])).astype(np.float32)
        query_bd = np.full((9, 100), 0.12 * scale, np.float32)
        query_bd[1] = huge_nd[0]
        check(make(vectors_of(huge_nd)).search(query_bd, 1), query_bd, huge_nd, 1, [])


@pytest.mark.parametrize("count", [1, 30, 900])
def test_the_approximate_search_tells_true_distances(count: int) -> None:
    reference_nd, query_bd = (x.astype(np.float32) for x in draw(np.random.default_rng(7), "noise", count, 20, 12))
    excluded = [np.arange(count) if b == 1 else np.arange(b) % count for b in range(20)]
    found = ApproximateSearch(vectors_of(reference_nd)).search(query_bd, 3, excluded)
    assert (found.row_bk[1] == -1).all() and np.isinf(found.squared_bk[1]).all()
    hits = 0
    for b, rows in enumerate(excluded):
        row_k, squared_k = (x[b, found.row_bk[b] >= 0] for x in (found.row_bk, found.squared_bk))
        allowed = np.setdiff1d(np.arange(count), rows)
        true_n = np.square(query_bd[b].astype(np.float64) - reference_nd).sum(axis=1)
        assert np.isin(row_k, allowed).all() and bool(len(row_k)) == bool(len(allowed))
        np.testing.assert_allclose(squared_k, true_n[row_k], rtol=1e-12)
        hits += not len(allowed) or row_k[0] == allowed[true_n[allowed].argmin()]
    assert hits >= 10  # a guess, but no blind one


def test_the_chosen_search_is_the_one_that_takes_least(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = vectors_of(np.random.default_rng(8).random((300, 300), np.float32))
    assert choose_search(sample, 300, np.asarray, 1) == Choice("flat")  # small: nothing is measured
    for least in ("flat", "128", "300"):  # the order in which they are timed; pruned ones twice: fixed cost, and whole
        times = iter({"flat": [1, 0, 9, 0, 9], "128": [9, 0, 1, 0, 9], "300": [9, 0, 9, 8, 1]}[least])
        monkeypatch.setattr(choose, "_us_a_query", lambda call, queries, t=times: float(next(t)))
        choice = choose_search(sample, 10**6, np.asarray, 1)
        assert (choice.method, choice.dims) == (("flat", 0) if least == "flat" else ("pruned", int(least)))
        assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
        assert set(choice.estimated_us) == {"flat", "128", "300"}
