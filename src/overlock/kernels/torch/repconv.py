"""Dilated RepConv's training pass in plain PyTorch: N depthwise convolutions, each batch-normed, and their sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.torch.depthwise import convolve

KEPT = 16  # channels that lie side by side in what the CPU's kernels keep of a branch


def new_kept(x: Tensor, count: int) -> list[Tensor]:
    """Room for the results of branches, as they are kept for the gradients, from images (B, C, H, W).

    On CPU one (C / 16, B, H, W, 16) for each; on CUDA one (N, B, H, W, C) for all.
    """
    batch, channels, height, width = x.shape
    if x.device.type != "cpu":
        return [x.new_empty(count, batch, height, width, channels)]
    return [x.new_empty(-(-channels // KEPT), batch, height, width, KEPT) for _ in range(count)]


def _branches(x: Tensor, taps: Tensor, sizes: Sequence[int], dilations: Sequence[int]) -> list[Tensor]:
    parts = taps.split([k * k for k in sizes])
    filters = (part.t().unflatten(1, (1, k, k)) for part, k in zip(parts, sizes, strict=True))
    return [convolve(x, weight, None, r) for weight, r in zip(filters, dilations, strict=True)]


def _keep(x: Tensor, results: Sequence[Tensor]) -> list[Tensor]:
    """Results as the kernels for the device of ``x`` keep them, in its dtype."""
    kept = new_kept(x, len(results))
    if x.device.type != "cpu":
        kept[0].copy_(torch.stack([result.permute(0, 2, 3, 1) for result in results]))
        return kept
    blocks, batch, height, width, lanes = kept[0].shape
    for target, result in zip(kept, results, strict=True):
        padded = F.pad(result, (0, 0, 0, 0, 0, blocks * lanes - result.shape[1]))
        target.copy_(padded.view(batch, blocks, lanes, height, width).permute(1, 0, 3, 4, 2))
    return kept


def forward(
    x: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, sizes: Sequence[int], dilations: Sequence[int], eps: float
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """See overlock.ops.repconv."""
    exact = torch.promote_types(scale.dtype, torch.float32)
    results = _branches(x.to(exact), taps.to(exact), sizes, dilations)
    both = [torch.var_mean(result, (0, 2, 3), correction=0) for result in results]
    variance, mean = (torch.stack(numbers) for numbers in zip(*both, strict=True))
    factor = scale * torch.rsqrt(variance + eps)
    y = (shift - mean * factor).sum(0).view(-1, 1, 1)
    for result, weight in zip(results, factor, strict=True):
        y = y + result * weight.view(-1, 1, 1)
    return y.to(x.dtype), _keep(x, [result.detach() for result in results]), mean, variance


def backward(
    grad: Tensor, x: Tensor, taps: Tensor, scale: Tensor, _kept: Sequence[Tensor], _mean: Tensor, _variance: Tensor,
    sizes: Sequence[int], dilations: Sequence[int], eps: float, _wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, taps, scale and shift, from x alone."""

    def result(x: Tensor, taps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return forward(x, taps, scale, shift, sizes, dilations, eps)[0]

    return torch.func.vjp(result, x, taps, scale, torch.zeros_like(scale))[1](grad)
