"""The context flow of Focus-Net for CUDA: features, and beside them the updated context, in one pass (equation 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.pointwise import by_position

NUMBERS = 2048  # of a program


@triton.jit
def join_kernel(
    x, context, prior, alpha, beta, bias, out, rows, x_m, context_m, prior_m,
    channels: tl.constexpr, context_channels: tl.constexpr, unit: tl.constexpr, updates: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: all channels of some positions, (M, C + Cc)."""
    both: tl.constexpr = channels + context_channels
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    channel = tl.arange(0, block)[None, :]
    exists = (row < rows)[:, None]
    is_context = (channel >= channels) & (channel < both)
    values = tl.load(x + row[:, None] * (x_m * unit) + channel, mask=exists & (channel < channels), other=0.0)
    here = tl.maximum(channel - channels, 0)
    flowing = tl.load(context + row[:, None] * (context_m * unit) + here, mask=exists & is_context, other=0.0)
    flowing = flowing.to(tl.float32)
    if updates:
        given = tl.load(prior + row[:, None] * (prior_m * unit) + here, mask=exists & is_context, other=0.0)
        flowing *= tl.load(alpha + here, mask=is_context, other=0.0).to(tl.float32)
        flowing += given.to(tl.float32) * tl.load(beta + here, mask=is_context, other=0.0).to(tl.float32)
        flowing += tl.load(bias + here, mask=is_context, other=0.0).to(tl.float32)
    joined = tl.where(is_context, flowing, values.to(tl.float32))
    target = out + row[:, None] * both + channel
    tl.store(target, joined.to(out.dtype.element_ty), mask=exists & (channel < both))


def join_context(
    x: Tensor, context: Tensor, prior: Tensor, alpha: Tensor | None, beta: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Features and alpha * context + beta * prior + bias side by side, channels last.

    Args:
        x: (B, C, H, W), best channels last.
        context, prior: (B, Cc, H, W).
        alpha, beta, bias: (Cc,), or None for the context as it is.

    Returns:
        (B, C + Cc, H, W).
    """
    batch, channels, height, width = x.shape
    maps = [by_position(m) for m in (x, context, prior)]
    unit = 8 if all(m.stride(0) % 8 == 0 for m in maps) else 1
    both = channels + context.shape[1]
    out = torch.empty(batch, height, width, both, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(both)
    tile = max(1, NUMBERS // block)
    scales = (x, x, x) if alpha is None else (alpha, beta, bias)
    with on_device_of(x):
        join_kernel[(triton.cdiv(len(maps[0]), tile),)](
            *maps, *scales, out, len(maps[0]), *(m.stride(0) // unit for m in maps),
            channels=channels, context_channels=context.shape[1], unit=unit, updates=alpha is not None,
            tile=tile, block=block, num_warps=4,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
