"""A folded local convolution for CUDA with what follows it: the layer norm of the channels, or GELU, in one pass.

Letters: B batch, C channels, H x W the map, M = B H W positions. Maps are channels last.

A program holds all channels of some positions, so that it can norm them. Their neighbours come from the cache: of nine
loads of a number, memory serves one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton.activations import gelu
from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.pointwise import by_position

NUMBERS = 2048  # of a program: 16 a thread, nine loads of which are under way at once


@triton.jit
def local_kernel(
    x, weight, bias, norm_weight, norm_bias, out, after, rows, height, width, eps, x_m,
    channels: tl.constexpr, unit: tl.constexpr, has_norm: tl.constexpr, with_gelu: tl.constexpr,
    exact: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: ``tile`` positions. ``weight`` is (9, C); ``out`` the convolution, ``after`` its norm."""
    first = tl.program_id(0) * tile
    place = tl.arange(0, tile)
    row = first + place  # 32 bits: dividing 64 would take longer than all else
    channel = tl.arange(0, block)[None, :]
    known = (channel < channels) | (channels == block)
    exists = row < rows
    y, z = row // width % height, row % width
    x += first.to(tl.int64) * (x_m * unit)
    out += first.to(tl.int64) * channels
    after += first.to(tl.int64) * channels
    total = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32).broadcast_to(tile, block)
    for tap in tl.static_range(9):
        dy, dz = tap // 3 - 1, tap % 3 - 1
        inside = exists & (y + dy >= 0) & (y + dy < height) & (z + dz >= 0) & (z + dz < width)
        source = x + (place + dy * width + dz)[:, None] * (x_m * unit) + channel
        values = tl.load(source, mask=inside[:, None] & known, other=0.0).to(tl.float32)
        total += values * tl.load(weight + tap * channels + channel, mask=known, other=0.0).to(tl.float32)
    target = place[:, None] * channels + channel
    if with_gelu:
        total = gelu(total, exact)
    tl.store(out + target, total.to(out.dtype.element_ty), mask=exists[:, None] & known)
    if has_norm:
        total = tl.where(known, total, 0.0)
        apart = tl.where(known, total - tl.sum(total, 1)[:, None] / channels, 0.0)
        variance = tl.sum(apart * apart, 1) / channels
        normed = apart * tl.rsqrt(variance + eps)[:, None]
        normed *= tl.load(norm_weight + channel, mask=known, other=0.0).to(tl.float32)
        normed += tl.load(norm_bias + channel, mask=known, other=0.0).to(tl.float32)
        tl.store(after + target, normed.to(after.dtype.element_ty), mask=exists[:, None] & known)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor, float] | None, with_gelu: bool
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    rows = by_position(x)
    unit = 8 if rows.stride(0) % 8 == 0 else 1
    out = torch.empty(batch, height, width, channels, dtype=x.dtype, device=x.device)
    after = out if norm is None else torch.empty_like(out)
    norm_weight, norm_bias, eps = (bias, bias, 0.0) if norm is None else norm
    block = triton.next_power_of_2(channels)
    tile = max(1, NUMBERS // block)
    with on_device_of(x):
        local_kernel[(triton.cdiv(len(rows), tile),)](
            rows, weight.flatten(1).t().contiguous(), bias, norm_weight, norm_bias, out, after,
            len(rows), height, width, eps, rows.stride(0) // unit,
            channels=channels, unit=unit, has_norm=norm is not None, with_gelu=with_gelu,
            exact=x.dtype == torch.float32, tile=tile, block=block, num_warps=4,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2), after.permute(0, 3, 1, 2)


def local_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y = conv(x) and the layer norm of its channels, both channels last, in the dtype of ``x``.

    Args:
        x: (B, C, H, W), best channels last.
        weight: (C, 1, 3, 3).
        bias, norm_weight, norm_bias: (C,).
        eps: of the norm.
    """
    return _launch(x, weight, bias, (norm_weight, norm_bias, eps), with_gelu=False)


def local_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(conv(x)), of arguments as :func:`local_norm` has them."""
    return _launch(x, weight, bias, None, with_gelu=True)[0]
