"""Global response norm in plain PyTorch, and the two passes over memory that its forward and backward are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See overlock.ops.response_norm."""
    # Not torch.promote_types: an export of torch 2.6 that holds its call cannot be read back.
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=exact)
    return _scale(x, norms, weight, bias, eps)


def twice_differentiable(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same, with second derivatives of zero, not NaN, where a map is zero throughout and its norm has a corner."""
    squares = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).square().sum(dim=(2, 3), keepdim=True)
    norms = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    return _scale(x, norms, weight, bias, eps)


def _scale(x: Tensor, norms: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    scale = weight.view(1, -1, 1, 1) * (norms / (norms.mean(dim=1, keepdim=True) + eps)) + 1
    return torch.addcmul(bias.view(1, -1, 1, 1).to(x.dtype), x, scale.to(x.dtype))


def sum_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b (B, C, H, W) over the maps, (B, C)."""
    return (a * b).sum(dim=(2, 3))


def scale_and_add(a: Tensor, scale: Tensor, b: Tensor | None, other: Tensor) -> Tensor:
    """a * scale + b * other, or + other without b; maps (B, C, H, W), numbers (B, C)."""
    scale, other = scale[:, :, None, None], other[:, :, None, None]
    return a * scale + (other if b is None else b * other)
