"""1x1 convolution for CUDA as one product of matrices, with what the fused network has before and after it.

Letters: M = B H W positions, I channels, O outputs. Maps are channels last, so a map is a matrix (M, I).

    out = act((x * scale * gate) W^T + bias) + residual * residual_scale

Each of scale (B, I), gate (M, I), residual (M, O) and residual_scale (O) may be absent. Apart, each of these factors
and terms would read and write a map once more, and so would the bias, which cuDNN's convolutions leave to another
kernel: at a batch of 128 that is most of what a fused network's time went into (docs/performance.md).

A program makes a tile of M x O. Those of the same rows run side by side, so that x comes from memory once and from L2
for the others. With scales a tile lies in one image, so that a program reads one row of them: gathered row by row, they
made the product four times as long. float32 is multiplied as three products of its halves in TF32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton.conditions import on_device_of

MULTIPROCESSORS = 132  # of an H100: fewer programs than these leave some idle


@triton.jit
def _multiply(x, y, total):
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)  # the interpreter would multiply the bits of bfloat16 as integers
    return tl.dot(x, y, total, input_precision="tf32x3")


# Triton interprets instead of compiling if TRITON_INTERPRET was set before this module was imported.
INTERPRETED = tl.constexpr(not isinstance(_multiply, triton.JITFunction))


@triton.jit
def _times(x, factor):
    """x * factor in the type of both, each product rounded once."""
    if INTERPRETED:
        return (x.to(tl.float32) * factor.to(tl.float32)).to(x.dtype)  # it would multiply the bits of bfloat16
    return x * factor


@triton.jit
def pointwise_kernel(
    x, gate, scale, weight, bias, residual, residual_scale, out, positions, x_m, gate_m, residual_m,
    channels: tl.constexpr, outputs: tl.constexpr, unit: tl.constexpr, silu: tl.constexpr,
    has_scale: tl.constexpr, has_gate: tl.constexpr, has_residual: tl.constexpr, has_residual_scale: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """One program: ``block_m`` positions of an image and ``block_n`` outputs.

    Without scales all ``positions`` of the batch are those of one image. Strides of positions are in ``unit`` numbers.
    """
    output_blocks: tl.constexpr = (outputs + block_n - 1) // block_n
    tile = tl.program_id(0) // output_blocks
    image = (tile // tl.cdiv(positions, block_m)).to(tl.int64)
    position = tile % tl.cdiv(positions, block_m) * block_m + tl.arange(0, block_m)
    output = tl.program_id(0) % output_blocks * block_n + tl.arange(0, block_n)
    exists = position < positions
    row = image * positions + tl.minimum(position, positions - 1)  # reads what is there, and is not written
    k = tl.arange(0, block_k)
    x += row[:, None] * (x_m * unit) + k[None, :]
    gate += row[:, None] * (gate_m * unit) + k[None, :]
    scale += image * channels + k
    weight += tl.minimum(output, outputs - 1)[None, :] * channels + k[:, None]
    total = tl.zeros([block_m, block_n], tl.float32)
    for first in range(0, channels, block_k):
        known = (k < channels - first) | (channels % block_k == 0)
        values = tl.load(x, mask=known[None, :], other=0.0)
        if has_scale:
            values = _times(values, tl.load(scale, mask=known, other=0.0)[None, :])
        if has_gate:
            values = _times(values, tl.load(gate, mask=known[None, :], other=0.0))
        total = _multiply(values, tl.load(weight, mask=known[:, None], other=0.0), total)
        x += block_k
        gate += block_k
        scale += block_k
        weight += block_k

    inside = output < outputs
    total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    if silu:
        total *= tl.sigmoid(total)
    if has_residual:
        before = residual + row[:, None] * (residual_m * unit) + output[None, :]
        identity = tl.load(before, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if has_residual_scale:
            identity *= tl.load(residual_scale + output, mask=inside, other=0.0).to(tl.float32)[None, :]
        total += identity
    target = out + row[:, None] * outputs + output[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=exists[:, None] & inside[None, :])


class Tile(NamedTuple):
    """Positions, outputs and channels of a program, its warps, and the stages of its pipelined loads."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def tile_for(images: int, positions: int, channels: int, outputs: int, exact: bool) -> Tile:
    """Tiles of 64 x 128 (as fast on an H200 as any, or nearly so), and smaller ones where these would be too few."""
    block_k = min(32 if exact else 64, max(16, triton.next_power_of_2(channels)))
    block_m, block_n = 64, min(64 if exact else 128, max(16, triton.next_power_of_2(outputs)))
    while block_m > 16 and images * triton.cdiv(positions, block_m) * triton.cdiv(outputs, block_n) < MULTIPROCESSORS:
        block_m, block_n = (block_m // 2, block_n) if block_m >= block_n else (block_m, block_n // 2)
    return Tile(block_m, block_n, block_k, 4, min(3, triton.cdiv(channels, block_k)))


def by_position(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C): a view of channels last, also of some of its channels; a copy elsewhere."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, *, scale: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, residual_scale: Tensor | None = None, silu: bool = False,
) -> Tensor:  # fmt: skip
    """The convolution with its factors and terms, channels last, in the dtype of ``x``; sums are float32.

    Args:
        x: (B, I, H, W), best channels last.
        weight: (O, I, 1, 1).
        bias: (O,).
        scale: (B, I), by which an image's channels are multiplied.
        gate: (B, I, H, W), by which ``x`` is multiplied.
        residual: (B, O, H, W), added last.
        residual_scale: (O,), by which the residual's channels are multiplied.
        silu: whether SiLU is taken of the product and its bias.

    Returns:
        (B, O, H, W).
    """
    batch, channels, height, width = x.shape
    outputs = len(weight)
    out = torch.empty(batch, height, width, outputs, dtype=x.dtype, device=x.device)
    maps = [by_position(m) for m in (x, gate, residual) if m is not None]
    unit = 8 if all(m.stride(0) % 8 == 0 for m in maps) else 1
    strides = [m.stride(0) // unit for m in maps]
    given = iter(zip(maps, strides, strict=True))
    (x_rows, x_m), (gate_rows, gate_m), (residual_rows, residual_m) = (
        next(given) if m is not None else (out, 0) for m in (x, gate, residual)
    )
    images, positions = (1, batch * height * width) if scale is None else (batch, height * width)
    tile = tile_for(images, positions, channels, outputs, x.dtype == torch.float32)
    tiles = images * triton.cdiv(positions, tile.block_m) * triton.cdiv(outputs, tile.block_n)
    with on_device_of(x):
        pointwise_kernel[(tiles,)](
            x_rows, gate_rows, out if scale is None else scale.contiguous(), weight.contiguous(), bias,
            residual_rows, bias if residual_scale is None else residual_scale, out,
            positions, x_m, gate_m, residual_m,
            channels=channels, outputs=outputs, unit=unit, silu=silu, has_scale=scale is not None,
            has_gate=gate is not None, has_residual=residual is not None,
            has_residual_scale=residual_scale is not None, block_m=tile.block_m, block_n=tile.block_n,
            block_k=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
