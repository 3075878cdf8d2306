"""Batch normalisation over the batch of all workers, on any device.

PyTorch's own (`SyncBatchNorm`) needs CUDA. Without, a worker would normalise by its own share, and two workers of B
images would not compute what one of 2 B does.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from manifpt.encoder.loss import Total

__all__ = ["GlobalBatchNorm", "globalized"]


class GlobalBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d` and `2d` with statistics of all workers in training; the same tensors by the same names."""

    total: Total

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"[B, C] or [B, C, H, W], not {list(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float [B, C] or [B, C, H, W] -> the same shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        axes, shape = ((0, 2, 3), (1, -1, 1, 1)) if input.ndim == 4 else ((0,), (1, -1))
        count = self.total(input.new_tensor(float(input.numel() // input.shape[1])))
        mean = self.total(input.sum(axes)) / count
        centred = input - mean.view(shape)
        variance = self.total(centred.square().sum(axes)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        standard = centred / (variance + self.eps).sqrt().view(shape)
        return standard * self.weight.view(shape) + self.bias.view(shape) if self.affine else standard

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def globalized(network: nn.Module, total: Total) -> nn.Module:
    """The network with every batch normalisation replaced, weights and names kept."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            kind = next(tensor for tensor in child.state_dict().values() if tensor.is_floating_point())
            normalization = GlobalBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, device=kind.device, dtype=kind.dtype
            )
            normalization.load_state_dict(child.state_dict())
            normalization.total = total
            setattr(network, name, normalization)
        else:
            globalized(child, total)
    return network
