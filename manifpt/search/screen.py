"""A small integer copy of the reference, whose distances bound the true ones from below.

Legend: B queries, N reference rows, W coordinates of a vector, M of its sketch, S rows a group, G groups.

A vector w is centred and projected onto M - 1 principal axes; the norm of what is left over is one more coordinate.
That map P never lengthens a difference:

    |P x - P y|^2 = |A (x - y)|^2 + (|x - A'A x| - |y - A'A y|)^2 <= |x - y|^2,    A: orthonormal rows.

A fixed rotation spreads the energy over the M coordinates, which are then rounded to one byte each, in steps of a size
of each query's and each group's own. Bytes multiply without error, and by the triangle inequality the rounding costs no
more than its own norm, which is known:

    |x - y| >= |P x - P y| >= |s q(x) - t q(y)| - |P x - s q(x)| - |P y - t q(y)|.

Where a float computes any of this, its error bound is added to the norm of the rounding; so the bounds are sound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from manifpt.search.basis import UNIT, norms

__all__ = ["GROUP", "Coded", "code_type", "coded", "is_exact_in_bytes", "products"]

GROUP = 32  # rows whose bounds are first looked at together
_PAD = 64  # what integer products like
_EXACT = 1024  # coordinates whose products of codes float32 adds without error
_LEAST_STEP = 2.0**-60  # products of two are normal numbers


@dataclass(frozen=True, slots=True)
class Coded:
    """R sketches as bytes: R queries, or the rows of R / S groups.

    Attributes:
        code_rm: integers of a byte, in int8 or float32 [R, M], padded with zeros.
        step_r: float32 [R], the sketch is near step * code.
        square_r: float32 [R], |step code|^2, with a relative error of 2^-21 at most.
        error_r: float32 [R], at most this far is step * code from the exact sketch.
    """

    code_rm: torch.Tensor
    step_r: torch.Tensor
    square_r: torch.Tensor
    error_r: torch.Tensor


def coded(sketch_rm: torch.Tensor, sketch_error_r: torch.Tensor, largest_r: torch.Tensor, dtype: torch.dtype) -> Coded:
    """Rounds sketches to bytes.

    Args:
        sketch_rm: float32 [R, M].
        sketch_error_r: float64 [R], how far they may be from the exact ones.
        largest_r: float32 [R], the largest magnitude that a byte must hold: of the row, or of its group.
        dtype: see `code_type`.
    """
    step_r = (largest_r / 127).clamp(min=_LEAST_STEP)
    code_rm = (sketch_rm / step_r[:, None]).round_().clamp_(-127, 127)
    rounded_r = norms(sketch_rm - code_rm * step_r[:, None]) + 4 * UNIT * norms(sketch_rm)
    width = sketch_rm.shape[1]
    padded_rm = torch.zeros((len(code_rm), -(-width // _PAD) * _PAD), dtype=dtype, device=code_rm.device)
    padded_rm[:, :width] = code_rm
    square_r = (norms(code_rm) * step_r.double()).square()
    slop = 1 + 1e-5  # of what was computed here itself
    return Coded(padded_rm, step_r, square_r.float(), ((rounded_r + sketch_error_r) * slop).float())


def code_type(device: str) -> torch.dtype:
    """What codes are held and multiplied in: int8, or float32 where bytes don't multiply without error, or not faster.

    On processors without a byte dot product, torch may multiply bytes in a plain loop, 25 times slower than float32.
    """
    if not is_exact_in_bytes(device):
        return torch.float32
    if device != "cpu":
        return torch.int8
    a_bytes, b_bytes = torch.ones((128, 256), dtype=torch.int8), torch.ones((1024, 256), dtype=torch.int8)
    a_floats, b_floats = a_bytes.float(), b_bytes.float()
    in_bytes_s = _least_s(lambda: torch._int_mm(a_bytes, b_bytes.T))
    return torch.int8 if in_bytes_s < _least_s(lambda: a_floats @ b_floats.T) else torch.float32


def is_exact_in_bytes(device: str) -> bool:
    """Whether bytes multiply without error here: some processors add pairs in 16 bits and saturate (oneDNN says so)."""
    a = torch.full((32, 256), 127, dtype=torch.int8, device=device)
    b = torch.full((64, 256), -127, dtype=torch.int8, device=device)
    b[::2] = 127
    try:
        product = torch._int_mm(a, b.T)
    except RuntimeError:
        return False
    return bool((product == (a.double() @ b.double().T)).all())


def _least_s(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def products(code_bm: torch.Tensor, code_nm: torch.Tensor, out_bn: torch.Tensor) -> torch.Tensor:
    """Products of codes of one type, in the memory of `out_bn`: int32 or float32 [B, N].

    Those of bytes have no error. Those in float32 have none either up to 1,024 coordinates, since every partial sum is
    an integer of at most 127^2 * 1,024 < 2^24. Longer codes are multiplied in such pieces, each without error; adding
    a piece costs at most 2^-24 |x| |y|.
    """
    rows, columns = len(code_bm), len(code_nm)
    if code_bm.dtype == torch.int8:
        padded = max(32, -(-rows // 8) * 8)  # CUDA wants multiples
        if padded != rows:
            code_bm = torch.nn.functional.pad(code_bm, (0, 0, 0, padded - rows))
        # Contiguous, which torch demands on a CPU, when a block is smaller than the others, too.
        return torch._int_mm(code_bm, code_nm.T, out=out_bn.view(-1)[: padded * columns].view(padded, columns))[:rows]
    product_bn = out_bn.view(-1)[: rows * columns].view(rows, columns)
    torch.mm(code_bm[:, :_EXACT], code_nm[:, :_EXACT].T, out=product_bn)
    for start in range(_EXACT, code_bm.shape[1], _EXACT):
        part = slice(start, start + _EXACT)
        product_bn += code_bm[:, part] @ code_nm[:, part].T
    return product_bn
