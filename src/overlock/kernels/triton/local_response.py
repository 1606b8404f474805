"""The middle of a ConvFFN for CUDA in one pass: GELU, the folded 3x3 depthwise filter, and the response norm's sums.

Letters: B batch, C channels, H x W the map, M = B C H W numbers.

On its own, each of the three reads and writes the map: 5 M numbers moved for GELU (2 M), the filter (2 M) and the norms
(M). Here it is 2 M, and partial sums of some KB. The norms scale channels, so that they can be applied by the 1x1
convolution that follows (overlock.fused.cuda_layers): what a program gives is the map before that, and its sums of
squares, each with one owner, added up in a fixed order.

A program has a tile of columns and a block of channels, and walks down some rows. A row of the map is read in three
places, a column apart, which the caches make one read of memory; each row goes into three rows of the output, which are
two sums in registers while they wait for the rows below. GELU is so computed three times a number, not nine.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # channels of a program: 128 bytes of a position in 16 bits, a line of the cache
ROWS = 16  # of a program: two more are read
WARPS = 4


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _weight_of_row(weight, row: tl.constexpr, channel, known, channels):
    """The three taps of a row of the filter, (1, block) each; ``weight`` is (9, C)."""
    left = tl.load(weight + 3 * row * channels + channel, mask=known, other=0.0).to(tl.float32)
    middle = tl.load(weight + (3 * row + 1) * channels + channel, mask=known, other=0.0).to(tl.float32)
    right = tl.load(weight + (3 * row + 2) * channels + channel, mask=known, other=0.0).to(tl.float32)
    return left, middle, right


@triton.jit
def filter_kernel(
    x, weight, bias, out, sums, x_b, x_h, x_w, out_b, out_h, out_w, channels, height, width, rows,
    columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: ``rows`` rows of a tile of columns and a block of channels of one image.

    ``sums`` is (B, parts, C), a part for each tile and piece of rows.
    """
    channel_blocks, tiles, pieces = tl.cdiv(channels, block), tl.cdiv(width, columns), tl.cdiv(height, rows)
    program = tl.program_id(0)
    channel = program % channel_blocks * block + tl.arange(0, block)[None, :]
    part = program // channel_blocks % (tiles * pieces)
    batch = (program // (channel_blocks * tiles * pieces)).to(tl.int64)
    first = part // tiles * rows
    last = tl.minimum(first + rows, height)
    column = part % tiles * columns + tl.arange(0, columns)[:, None]
    known = channel < channels
    inside = (column < width) & known

    top_left, top, top_right = _weight_of_row(weight, 0, channel, known, channels)
    left, centre, right = _weight_of_row(weight, 1, channel, known, channels)
    low_left, low, low_right = _weight_of_row(weight, 2, channel, known, channels)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)

    x += batch * x_b + column * x_w + channel
    out += batch * out_b + column * out_w + channel
    above = tl.zeros([columns, block], tl.float32)  # of the row before this one, which lacks this one's part
    here = tl.zeros([columns, block], tl.float32)
    squares = tl.zeros([columns, block], tl.float32)
    for row in range(first - 1, last + 1):
        exists = (row >= 0) & (row < height)
        place = x + row * x_h
        before = tl.load(place - x_w, mask=inside & (column > 0) & exists, other=0.0).to(tl.float32)
        value = tl.load(place, mask=inside & exists, other=0.0).to(tl.float32)
        after = tl.load(place + x_w, mask=(column < width - 1) & known & exists, other=0.0).to(tl.float32)
        before, value, after = _gelu(before), _gelu(value), _gelu(after)  # GELU(0) = 0: zeros around the map stay zeros
        done = above + before * low_left + value * low + after * low_right + offset
        if row > first:
            tl.store(out + (row - 1) * out_h, done.to(out.dtype.element_ty), mask=inside)
            squares += done * done
        above = here + before * left + value * centre + after * right
        here = before * top_left + value * top + after * top_right
    squares = tl.where(inside, squares, 0.0)
    target = sums + (batch * tiles * pieces + part) * channels + channel
    tl.store(target, tl.sum(squares, 0)[None, :], mask=known)


@triton.jit
def scale_kernel(sums, weight, out, parts, channels, eps, channels_p: tl.constexpr):
    """One program: the response norm's scales of one image, 1 + weight * n / (mean of n over the channels + eps)."""
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, channels_p)
    known = channel < channels
    total = tl.zeros([channels_p], tl.float32)
    for part in range(parts):
        total += tl.load(sums + (batch * parts + part) * channels + channel, mask=known, other=0.0)
    norms = tl.sqrt(total)
    mean = tl.sum(norms, 0) / channels + eps
    scale = 1 + tl.load(weight + channel, mask=known, other=0.0).to(tl.float32) * (norms / mean)
    tl.store(out + batch * channels + channel, scale.to(out.dtype.element_ty), mask=known)


# Triton interprets instead of compiling if TRITON_INTERPRET was set before this module was imported.
INTERPRETED = not isinstance(filter_kernel, triton.JITFunction)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(3)


def filter_and_scale(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = conv(GELU(x)), channels last, and the scales that a response norm gives it.

    Args:
        x: (B, C, H, W), best channels last.
        weight: (C, 1, 3, 3).
        bias: (C,).
        norm_weight: (C,), the response norm's.
        eps: of the response norm.

    Returns:
        y (B, C, H, W) and scales (B, C), both in the dtype of ``x``. Sums are kept in float32.
    """
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    columns = 8 if width <= 8 else 16
    tiles, pieces = triton.cdiv(width, columns), triton.cdiv(height, ROWS)
    sums = torch.empty(batch, tiles * pieces, channels, dtype=torch.float32, device=x.device)
    scale = x.new_empty(batch, channels)
    taps = weight.flatten(1).t().contiguous()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        filter_kernel[(batch * tiles * pieces * triton.cdiv(channels, BLOCK),)](
            x, taps, bias, out, sums, *_strides(x), *_strides(out), channels, height, width, ROWS,
            columns=columns, block=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        scale_kernel[(batch,)](
            sums, norm_weight, scale, tiles * pieces, channels, eps, channels_p=triton.next_power_of_2(channels),
            num_warps=8,
        )  # fmt: skip
    return out, scale
