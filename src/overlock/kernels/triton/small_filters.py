"""Depthwise 3x3 convolution of any dilation for CUDA, its nine taps one by one.

Letters: B batch, C channels, H x W the map, M = B H W positions. Maps are channels last, weights are (9, C).

A dilated 3x3 filter as a dense one (overlock.kernels.triton.depthwise) would be a band of zeros for the most part. Nine
multiply-adds of a number are few: what counts is memory. A program has some positions and a block of channels; the
neighbours of a number come from the cache, so that memory serves one load of nine. A bias, or what is there already,
is added in the same pass. The weight's gradient goes by rows of taps: a program sums three taps over every so many
positions, and what the programs found is added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.pointwise import MULTIPROCESSORS, by_position

TILE, BLOCK = 32, 64  # positions and channels of a program
WAVES = 8  # programs for each multiprocessor that sum a weight's gradient


@triton.jit
def filter_kernel(
    x, weight, bias, out, rows, height, width, dilation,
    channels: tl.constexpr, reverse: tl.constexpr, has_bias: tl.constexpr, adds: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: ``tile`` positions and a ``block`` of channels; with ``adds`` on top of what ``out`` holds."""
    blocks: tl.constexpr = (channels + block - 1) // block
    channel = (tl.program_id(0) % blocks * block + tl.arange(0, block))[None, :]
    known = (channel < channels) | (channels % block == 0)
    first = tl.program_id(0) // blocks * tile
    place = tl.arange(0, tile)
    row = first + place  # 32 bits: dividing 64 would take longer than all else
    exists = row < rows
    y, z = row // width % height, row % width
    x += first.to(tl.int64) * channels
    out += first.to(tl.int64) * channels
    total = tl.zeros([tile, block], tl.float32)
    for tap in tl.static_range(9):
        up, right = (tap // 3 - 1) * dilation, (tap % 3 - 1) * dilation
        inside = exists & (y + up >= 0) & (y + up < height) & (z + right >= 0) & (z + right < width)
        source = x + (place + up * width + right)[:, None] * channels + channel
        factor = tl.load(weight + (8 - tap if reverse else tap) * channels + channel, mask=known, other=0.0)
        total += tl.load(source, mask=inside[:, None] & known, other=0.0).to(tl.float32) * factor.to(tl.float32)
    if has_bias:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    target = out + place[:, None] * channels + channel
    inside = exists[:, None] & known
    if adds:
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    grad, x, out, rows, height, width, dilation, parts,
    channels: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: a row of three taps, over every ``parts``-th tile of positions. ``out`` is (parts, 9, C)."""
    blocks: tl.constexpr = (channels + block - 1) // block
    channel = (tl.program_id(0) % blocks * block + tl.arange(0, block))[None, :]
    known = (channel < channels) | (channels % block == 0)
    tap_row = tl.program_id(0) // blocks % 3
    part = tl.program_id(0) // (3 * blocks)
    up = (tap_row - 1) * dilation
    left = tl.zeros([tile, block], tl.float32)
    middle = tl.zeros([tile, block], tl.float32)
    right = tl.zeros([tile, block], tl.float32)
    for first in range(part * tile, rows, parts * tile):
        row = first + tl.arange(0, tile)
        y, z = row // width % height + up, row % width
        exists = (row < rows) & (y >= 0) & (y < height)
        at = row.to(tl.int64)[:, None] * channels + channel
        values = tl.load(grad + at, mask=exists[:, None] & known, other=0.0).to(tl.float32)
        source = x + at + up * width * channels
        inside = (exists & (z >= dilation))[:, None] & known
        left += values * tl.load(source - dilation * channels, mask=inside, other=0.0).to(tl.float32)
        middle += values * tl.load(source, mask=exists[:, None] & known, other=0.0).to(tl.float32)
        inside = (exists & (z + dilation < width))[:, None] & known
        right += values * tl.load(source + dilation * channels, mask=inside, other=0.0).to(tl.float32)
    channel = tl.program_id(0) % blocks * block + tl.arange(0, block)
    target = out + (part * 9 + tap_row * 3) * channels + channel
    tl.store(target, tl.sum(left, 0), mask=channel < channels)
    tl.store(target + channels, tl.sum(middle, 0), mask=channel < channels)
    tl.store(target + 2 * channels, tl.sum(right, 0), mask=channel < channels)


def _block(channels: int) -> int:
    return min(BLOCK, triton.next_power_of_2(channels))


def convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, dilation: int, *, reverse: bool = False, out: Tensor | None = None,
    adds: bool = False,
) -> Tensor:  # fmt: skip
    """The convolution, or with ``reverse`` its input's gradient. Channels last, in the dtype of ``x``.

    Args:
        x: (B, C, H, W), best channels last.
        taps: (9, C).
        bias: (C,) or None.
        dilation: distance of neighbours.
        reverse: take the taps in reverse.
        out: (B, C, H, W) channels last, for the result.
        adds: add it there.
    """
    batch, channels, height, width = x.shape
    rows = by_position(x).contiguous()
    target = torch.empty_like(rows) if out is None else by_position(out)
    block = _block(channels)
    programs = triton.cdiv(len(rows), TILE) * triton.cdiv(channels, block)
    with on_device_of(x):
        filter_kernel[(programs,)](
            rows, taps, taps if bias is None else bias, target, len(rows), height, width, dilation,
            channels=channels, reverse=reverse, has_bias=bias is not None, adds=adds,
            tile=TILE, block=block, num_warps=4,
        )  # fmt: skip
    return target.view(batch, height, width, channels).permute(0, 3, 1, 2)


def weight_gradient(grad: Tensor, x: Tensor, dilation: int) -> Tensor:
    """Gradient with respect to the taps, (9, C) in float32."""
    channels, height, width = x.shape[1:]
    rows, grads = by_position(x).contiguous(), by_position(grad).contiguous()
    block = _block(channels)
    blocks = triton.cdiv(channels, block)
    parts = min(triton.cdiv(len(rows), TILE), triton.cdiv(WAVES * MULTIPROCESSORS, 3 * blocks))
    sums = torch.empty(parts, 9, channels, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        weight_kernel[(3 * blocks * parts,)](
            grads, rows, sums, len(rows), height, width, dilation, parts,
            channels=channels, tile=TILE, block=block, num_warps=4,
        )  # fmt: skip
    return sums.sum(0)
