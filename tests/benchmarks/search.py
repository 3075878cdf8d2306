"""Search: ours against `faiss.IndexFlatL2` and against a float32 GEMM in torch, on the same vectors and threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from manifpt.search import Choice, Vectors, choose_search, make_search
from manifpt.search.flat import FlatSearch
from manifpt.spaces import Space, SpaceSpec, make_space
from tests.benchmarks.data import SHARED, faces, generated, sample_views, views
from tests.benchmarks.measure import median, paired
from tests.helpers.weights import ARCHITECTURE, lite0_safetensors

__all__ = ["run"]

_QUERIES = 1_024
_SAMPLE_ROWS = 8_192  # as when a reference is built


@dataclass(frozen=True)
class Case:
    """float32 [B, D] and [N, D] of one space."""

    name: str
    query_bd: np.ndarray
    reference_nd: np.ndarray
    compact: Callable[[np.ndarray], np.ndarray] = lambda embeddings_bd: embeddings_bd


def run(rounds: int, threads: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Times every case; `search_<case>` is our speed over that of FAISS flat."""
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    results, ratios = {}, {}
    for case in (*real_cases(folder), *hard_cases()):
        result = one(case, rounds, threads)
        results[case.name] = result
        ratios[f"search_{case.name}"] = round(result["faiss_us"] / result["ours_us"], 3)
        say(
            f"search {case.name:16} N {len(case.reference_nd):6} D {case.reference_nd.shape[1]:6}  "
            f"faiss {result['faiss_us']:8.1f} us  torch {result['torch_us']:8.1f} us  ours {result['ours_us']:8.1f} us"
            f"  x{ratios[f'search_{case.name}']:.2f}  identical {result['identical']:.4f}"
            f"  by {result['choice']['method']} {result['choice']['dims']}"
            + "".join(
                f"  {name} {result[f'{name}_us']:.1f} us"
                for name in ("torch_gpu", "flat_gpu")
                if f"{name}_us" in result
            )
        )
    return {"results": results, "ratios": ratios}


def one(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """One case: k = 1 for all."""
    query_bd, reference_nd = case.query_bd, case.reference_nd
    index = faiss.IndexFlatL2(reference_nd.shape[1])
    index.add(reference_nd)
    norms_n = torch.from_numpy(reference_nd).square().sum(1)
    begin = time.perf_counter()
    choice = chosen(case, threads)
    chosen_s, begin = time.perf_counter() - begin, time.perf_counter()
    search = make_search(
        lambda rows: reference_nd[rows], *reference_nd.shape, choice=choice, compact=case.compact, threads=threads
    )
    built_s = time.perf_counter() - begin
    contenders = {
        "faiss": lambda: index.search(query_bd, 1),
        "torch": lambda: gemm(query_bd, torch.from_numpy(reference_nd), norms_n),
        "ours": lambda: search.search(query_bd, 1),
        "ours_k2": lambda: search.search(query_bd, 2),
    }
    if torch.cuda.is_available():  # both keep the reference on the device
        device_nd, device_n = torch.from_numpy(reference_nd).cuda(), norms_n.cuda()
        contenders["torch_gpu"] = lambda: gemm(query_bd, device_nd, device_n, 1024)
        on_device = FlatSearch(Vectors(lambda rows: reference_nd[rows], *reference_nd.shape), threads, device="cuda")
        contenders["flat_gpu"] = lambda: on_device.search(query_bd, 1)
    seconds = paired(contenders, rounds)
    found = search.search(query_bd, 1)
    flat_b = index.search(query_bd, 1)[1][:, 0]
    theirs_b = differences(query_bd, reference_nd[flat_b])
    ours_b = differences(query_bd, reference_nd[found.row_bk[:, 0]])
    return {
        "n": len(reference_nd),
        "d": reference_nd.shape[1],
        "queries": len(query_bd),
        "choice": choice.to_json(),
        "chosen_s": round(chosen_s, 2),
        "built_s": round(built_s, 2),
        "seconds": seconds,
        **{f"{name}_us": round(1e6 * median(values) / len(query_bd), 2) for name, values in seconds.items()},
        # A tie, or a rounding error of FAISS: ours is then as near, or nearer.
        "identical": float(((found.row_bk[:, 0] == flat_b) | (ours_b == theirs_b)).mean()),
        "nearer_than_faiss": int((ours_b < theirs_b).sum()),
        "farther_than_faiss": int((ours_b > theirs_b).sum()),
    }


def chosen(case: Case, threads: int) -> Choice:
    """As a reference does: on its first rows."""
    part_nd = case.reference_nd[:_SAMPLE_ROWS]
    return choose_search(
        Vectors(lambda rows: part_nd[rows], *part_nd.shape), len(case.reference_nd), case.compact, threads
    )


def gemm(query_bd: np.ndarray, reference_nd: torch.Tensor, norms_n: torch.Tensor, block: int = 128) -> np.ndarray:
    """argmin |y|^2 - 2 x.y, in blocks whose products stay near the cache."""
    queries = torch.from_numpy(query_bd).to(reference_nd.device).split(block)
    return torch.cat([torch.addmm(norms_n, part, reference_nd.T, alpha=-2).argmin(1) for part in queries]).cpu().numpy()


def differences(query_bd: np.ndarray, near_bd: np.ndarray) -> np.ndarray:
    """float64 [B]."""
    difference_bd = query_bd.astype(np.float64) - near_bd
    return np.einsum("bd,bd->b", difference_bd, difference_bd)


def real_cases(folder: Path) -> Iterator[Case]:
    """Generated queries on real references."""
    if not SHARED.exists():
        query, reference = sample_views("query")[:_QUERIES], sample_views("reference")
        for name in ("rgb", "frequency"):
            yield from pixel_cases(name, "28", query, reference)
        return
    cifar = SHARED / "gm_cifar10"
    query32, real32 = generated(cifar, 32, _QUERIES), views(cifar / "real_cifar10_jpeg.parquet", 32)
    yield from pixel_cases("rgb", "32", query32, real32)
    noise = np.random.default_rng(0).integers(0, 256, query32.shape, dtype=np.uint8)
    yield from pixel_cases("rgb", "32_noise_queries", noise, real32)
    yield from pixel_cases("frequency", "32", query32, real32)
    yield from pixel_cases("rgb", "8", *(shrunk(images, 4) for images in (query32, real32)))
    spec = SpaceSpec(
        name="lite0", kind="network", architecture=ARCHITECTURE, size_px=112, mean=(0.5,) * 3, std=(0.5,) * 3,
        weights=str(lite0_safetensors(folder / "lite0.safetensors")), weights_sha256="",
    )  # fmt: skip
    yield Case("supervised", *features(spec, query32, real32))
    del query32, real32
    yield from pixel_cases("rgb", "64", generated(SHARED / "gm_celeba64_many", 64, _QUERIES), faces(30_000))


def pixel_cases(kind: str, size: str, query: np.ndarray, reference: np.ndarray) -> Iterator[Case]:
    """One case of a pixel space."""
    spec = SpaceSpec(name=kind, kind=kind, height_px=query.shape[2], width_px=query.shape[3])
    space = make_space(spec)
    yield Case(f"{kind}{size}", flat(space, query), flat(space, reference), space.compact)


def flat(space: Space, codes: np.ndarray) -> np.ndarray:
    """Embeddings float32 [N, D], a block at a time."""
    parts = [space.embed(codes[start : start + 512]) for start in range(0, len(codes), 512)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def shrunk(images_bchw: np.ndarray, factor: int) -> np.ndarray:
    """Block means, uint8: a real space of few dimensions."""
    b, c, h, w = images_bchw.shape
    blocks = images_bchw.reshape(b, c, h // factor, factor, w // factor, factor)
    return blocks.mean((3, 5)).round().astype(np.uint8)


def features(spec: SpaceSpec, *images: np.ndarray) -> Iterator[np.ndarray]:
    """Features float32 [N, D] of 32-px images, enlarged as a job does."""
    from dataclasses import replace

    from manifpt.spaces.weights import resolve_weights

    space = make_space(resolve_weights(replace(spec, weights_sha256=None)), torch.get_num_threads())
    for images_bchw in images:
        enlarged = [spec.view.of(image_chw.transpose(1, 2, 0)) for image_chw in images_bchw]
        yield space.encode(np.stack(enlarged))


def hard_cases() -> Iterator[Case]:
    """What no bound helps with: still exact, and at most twice as slow as a flat scan."""
    rng = np.random.default_rng(0)
    noise_nd = rng.random((10_000, 3_072), dtype=np.float32)
    yield Case("hard_noise", rng.random((512, 3_072), dtype=np.float32), noise_nd)
    yield Case("hard_far", 1 + rng.random((512, 3_072), dtype=np.float32), noise_nd)
    yield Case("hard_copies", noise_nd[:512], np.concatenate([noise_nd[:100]] * 100))
    yield Case("hard_equal", rng.random((512, 3_072), dtype=np.float32), np.full((10_000, 3_072), 0.5, np.float32))
