"""The loss of Barlow Twins (Zbontar et al. 2021, eq. 1 and 2), over the batch of all workers.

Legend: B images of this worker, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["LAMBDA", "Total", "alone", "barlow_twins", "cross_correlation"]

Total = Callable[[torch.Tensor], torch.Tensor]  # the sum over all workers, which gradients pass in both directions

LAMBDA = 0.0051  # facebookresearch/barlowtwins; it stands in the name of the published weights
_EPSILON = 1e-5  # of batch normalisation, by which the released code standardises


def alone(value: torch.Tensor) -> torch.Tensor:
    """The sum over the only worker."""
    return value


def cross_correlation(one_bd: torch.Tensor, other_bd: torch.Tensor, total: Total = alone) -> torch.Tensor:
    """Correlations of the dimensions of two embeddings of the same images (eq. 2), over the images of all workers.

    Args:
        one_bd, other_bd: float [B, D] both.
        total: sums over workers.

    Returns:
        correlation_dd: float [D, D], in -1 to 1.
    """
    count = total(one_bd.new_tensor(float(len(one_bd))))
    standard = []
    for embedding_bd in (one_bd, other_bd):
        centred_bd = embedding_bd - total(embedding_bd.sum(0)) / count
        variance_d = total(centred_bd.square().sum(0)) / count
        standard.append(centred_bd / (variance_d + _EPSILON).sqrt())
    return total(standard[0].T @ standard[1]) / count


def barlow_twins(one_bd: torch.Tensor, other_bd: torch.Tensor, total: Total = alone) -> torch.Tensor:
    """sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2 (eq. 1), the same number on every worker.

    Args:
        one_bd, other_bd: float [B, D], projected embeddings of two views of each image.
        total: sums over workers.
    """
    correlation_dd = cross_correlation(one_bd, other_bd, total)
    diagonal_d = correlation_dd.diagonal()
    others = correlation_dd.square().sum() - diagonal_d.square().sum()
    return (1 - diagonal_d).square().sum() + LAMBDA * others
