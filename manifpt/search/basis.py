"""The map from vectors to sketches: principal axes and the norm of the rest, rotated; with a bound of its rounding.

Legend: B vectors, N rows of a sample, W coordinates of a vector, M of its sketch; W <= A C in a Kronecker product.

`manifpt.search.screen` says what it is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from manifpt.search.vectors import LARGE, Vectors

__all__ = ["UNIT", "Axes", "Basis", "Mixing", "fit_basis", "in_float32", "norms", "sample_of", "torch_of"]

UNIT = 2.0**-24  # half the distance from 1 to the next float32
_SUM_BLOCK = 256  # terms of one float32 sum; sums of sums keep the error bound near the square root's
_NORM_BLOCK = 64
_SAMPLE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Axes:
    """Rotated principal axes.

    Attributes:
        axes_mw: float32 [M, W], a rotation times orthonormal axes.
        rest_m: float32 [M], the rotated axis of the rest's norm.
        rest_mean: the centre of that norm.
        error: spectral norm of what they lack to be exact.
    """

    axes_mw: torch.Tensor
    rest_m: torch.Tensor
    rest_mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Mixing:
    """A rotation of all W coordinates, as a Kronecker product, which is cheap: float32 [A, A] and [C, C], A C >= W."""

    left_aa: torch.Tensor
    right_cc: torch.Tensor
    error: float


class Basis:
    """The map P from vectors to sketches."""

    def __init__(self, mean_w: torch.Tensor, rotated: Axes | Mixing) -> None:
        """Args:
        mean_w: float32 [W], the centre.
        rotated: onto fewer coordinates, or all of them.
        """
        self.mean_w, self.rotated = mean_w, rotated

    @property
    def dims(self) -> int:
        """M."""
        if isinstance(self.rotated, Axes):
            return len(self.rotated.axes_mw)
        return len(self.rotated.left_aa) * len(self.rotated.right_cc)

    def to(self, device: str) -> Basis:
        """The same basis on a device."""
        mean_w, rotated = self.mean_w.to(device), self.rotated
        if isinstance(rotated, Mixing):
            mixing = replace(rotated, left_aa=rotated.left_aa.to(device), right_cc=rotated.right_cc.to(device))
            return Basis(mean_w, mixing)
        return Basis(mean_w, replace(rotated, axes_mw=rotated.axes_mw.to(device), rest_m=rotated.rest_m.to(device)))

    def sketch(self, vectors_bw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [B, W] -> sketches float32 [B, M], and a bound of their errors, float64 [B].

        What is too large for float32 squares has a sketch of zero and an infinite error: it is never ruled out.
        """
        centred_bw = vectors_bw - self.mean_w
        norm_b = norms(centred_bw)
        # Of centring, and of the caller's own sums of two.
        given_b = 4 * UNIT * (norm_b + float(norms(self.mean_w[None])))
        if isinstance(self.rotated, Mixing):
            sketch_bm, error_b = _mixed(self.rotated, centred_bw), given_b + norm_b * self.rotated.error
        else:
            sketch_bm, error_b = _on_axes(self.rotated, centred_bw, norm_b, given_b)
        # Squares below the normal numbers, 2^-126, may be lost: of norms, of the codes' rounding, of distances.
        error_b = error_b + math.sqrt(len(self.mean_w) + self.dims) * 2.0**-60
        is_fit_b = (norms(sketch_bm) < LARGE) & error_b.isfinite()
        return sketch_bm.masked_fill_(~is_fit_b[:, None], 0), error_b.masked_fill_(~is_fit_b, torch.inf)


def _mixed(mixing: Mixing, centred_bw: torch.Tensor) -> torch.Tensor:
    a, c = len(mixing.left_aa), len(mixing.right_cc)
    padded_bw = torch.nn.functional.pad(centred_bw, (0, a * c - centred_bw.shape[1]))
    half_bac = (padded_bw.reshape(-1, c) @ mixing.right_cc).reshape(-1, a, c)
    return torch.matmul(mixing.left_aa, half_bac).reshape(-1, a * c)


def _on_axes(
    axes: Axes, centred_bw: torch.Tensor, norm_b: torch.Tensor, given_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dims, width = axes.axes_mw.shape
    sketch_bm = torch.zeros((len(centred_bw), dims), device=centred_bw.device)
    for start in range(0, width, _SUM_BLOCK):
        part = slice(start, start + _SUM_BLOCK)
        sketch_bm.addmm_(centred_bw[:, part], axes.axes_mw[:, part].T)
    sums = min(width, _SUM_BLOCK) + -(-width // _SUM_BLOCK) + 2
    error_b = given_b + norm_b * (_gamma(sums) * math.sqrt(dims) + axes.error)
    inside_b = norms(sketch_bm)
    rest_b = (norm_b.square() - inside_b.square()).clamp(min=0).sqrt()
    # |rest^2 - computed| <= t  =>  |rest - computed| <= t / max(computed, sqrt(t)).
    t_b = (2 * norm_b + error_b) * error_b + 4 * _gamma(_NORM_BLOCK + 4) * norm_b.square()
    error_b = error_b + t_b / torch.maximum(rest_b, t_b.sqrt()).clamp(min=1e-30)
    sketch_bm.addr_((rest_b - axes.rest_mean).float(), axes.rest_m)
    return sketch_bm, error_b + 8 * UNIT * (norm_b + abs(axes.rest_mean))


def _gamma(terms: int) -> float:
    return terms * UNIT / (1 - terms * UNIT)


def in_float32() -> None:
    """From now on float32 products of this process are what they say.

    TF32 and bfloat16, which an environment variable or another library may have allowed in their place, err by more
    than any bound here.
    """
    torch.set_float32_matmul_precision("highest")


def norms(vectors_bw: torch.Tensor) -> torch.Tensor:
    """float64 [B], with a relative error of gamma_{64 + 4}: short float32 sums, added in float64."""
    whole = vectors_bw.shape[1] // _NORM_BLOCK * _NORM_BLOCK
    parts_bp = torch.linalg.vector_norm(vectors_bw[:, :whole].unflatten(1, (-1, _NORM_BLOCK)), dim=2)
    rest_b = torch.linalg.vector_norm(vectors_bw[:, whole:], dim=1)
    return (parts_bp.double().square().sum(1) + rest_b.double().square()).sqrt()


def fit_basis(sample_nw: torch.Tensor, dims: int, seed: int = 0) -> Basis:
    """A basis for vectors like these.

    Any orthonormal axes give sound bounds; the sample's principal ones give tight bounds.

    Args:
        sample_nw: float32 [N, W], some of the reference.
        dims: M; W or more: no projection.
        seed: of the rotation and of the search for axes; nothing but speed depends on it.
    """
    mean_w = sample_nw.mean(0)
    generator = torch.Generator().manual_seed(seed)
    width = sample_nw.shape[1]
    if dims >= width:
        c = min(64, width)
        a = -(-width // c)
        left_aa, right_cc = _rotation(a, generator), _rotation(c, generator)
        error = (
            _off(left_aa.float(), left_aa) + _off(right_cc.float(), right_cc)
            + _gamma(c + 1) * math.sqrt(c) + _gamma(a + 1) * math.sqrt(a)
        ) * 1.01  # fmt: skip
        return Basis(mean_w, Mixing(left_aa.float(), right_cc.float(), error))
    centred_nw = sample_nw - mean_w
    axes_dw = _principal_axes(centred_nw, dims - 1, generator)
    rotation_mm = _rotation(dims, generator)
    exact_mw = rotation_mm[:, :-1] @ axes_dw
    axes_mw = exact_mw.float().contiguous()
    error = _off(axes_mw, exact_mw) + _off(axes_dw @ axes_dw.T, torch.eye(dims - 1, dtype=torch.float64))
    rest_n = centred_nw.double().square().sum(1) - (centred_nw @ axes_dw.float().T).double().square().sum(1)
    rest_mean = float(rest_n.clamp(min=0).sqrt().mean())
    rest_m = rotation_mm[:, -1].float().contiguous()
    return Basis(mean_w, Axes(axes_mw, rest_m, rest_mean, 1.01 * error + 1e-6))


def sample_of(vectors: Vectors, compact: Callable[[np.ndarray], np.ndarray], dims: int) -> torch.Tensor:
    """Rows at equal steps, enough for so many axes: float32 [N, W]."""
    wanted = min(vectors.count, max(2_048, min(4 * dims, 4_096)), max(256, _SAMPLE_BYTES // (4 * vectors.dim)))
    rows = np.linspace(0, vectors.count - 1, wanted).astype(np.int64)
    return torch_of(compact(vectors.at(rows)))


def torch_of(vectors_bw: np.ndarray) -> torch.Tensor:
    """The same numbers as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(vectors_bw, np.float32))


def _rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    """float64 [size, size], orthonormal to within 1e-12 or so."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def _off(matrix: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of a difference, which bounds the spectral one."""
    return float(torch.linalg.matrix_norm(matrix.double() - exact))


def _principal_axes(centred_nw: torch.Tensor, dims: int, generator: torch.Generator) -> torch.Tensor:
    """float64 [dims, W], orthonormal: subspace iteration from random axes, then sorted by nothing in particular."""
    axes_wd = torch.randn(centred_nw.shape[1], dims, generator=generator)
    for _ in range(3):
        axes_wd = _orthonormal(centred_nw.T @ (centred_nw @ axes_wd)).float()
    return _orthonormal(axes_wd).T


def _orthonormal(vectors_wd: torch.Tensor) -> torch.Tensor:
    """float64 [W, d] with the same span: by two rounds of Cholesky, five times as fast as a QR."""
    basis_wd = vectors_wd.double()
    for _ in range(2):
        lower_dd, failed = torch.linalg.cholesky_ex(basis_wd.T @ basis_wd)
        if failed:
            return torch.linalg.qr(vectors_wd.double()).Q
        basis_wd = torch.linalg.solve_triangular(lower_dd, basis_wd.T, upper=False).T
    return basis_wd
