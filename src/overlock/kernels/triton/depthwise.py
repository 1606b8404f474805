"""Depthwise convolution with a large kernel for CUDA, in Triton: products with banded matrices on tensor cores.

Letters: B batch, C channels, H x W the map, K x K the kernel (odd, stride 1, zeros around: the output has the map's
size), p = K // 2, ky and kx a tap. In a channel, a row of the output is a sum of K rows of the map, each times a banded
(Toeplitz) matrix:

    out[r, j] = sum over ky of  x[r + ky - p, i - p] T_ky[i, j],    T_ky[i, j] = w[ky, i - j] where 0 <= i - j < K, or 0

For a tile of J columns the band has I >= K + J - 1 rows: 32 x 16 numbers for K up to 17, 16 x 8 for K up to 9. So of
I multiply-adds K count, about a half. In return tensor cores do them, at more than ten times the speed of the ordinary
units, and a thread reads neither taps nor values one by one.

What is left to save are loads. A program has M blocks of S rows of the output. A row of the map, loaded once for each
block, meets the bands of S taps side by side, I x (S J) numbers, since it counts for S rows of the output:

    (M, I) x (I, S J)    for each of K + S - 1 rows of the map, each of the program's channels, summed in float32

The blocks of all images are numbered through, so that maps of 14 x 14 or 7 x 7 fill a program too. The input's gradient
is the convolution with the taps reversed. The weight's gradient is a product over rows, those of all images:

    P[i, (s, j)] = sum over r of  x[r, i - p] g[r - ky_s + p, j],    grad_w[ky, kx] = sum over j of  P[kx + j, (ky, j)]

Every sum has one owner and a fixed order. The maps are channels last, others are copied, and a load brings a thread 8
channels where C is a multiple of 8. float32 is multiplied as three products of its halves in TF32, exact to about
float32's own rounding. Filters of 3 x 3 taps, dilated or not, go by small_filters.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton import conditions, small_filters

PROGRAMS = 264  # of the weight's gradient, where the images have rows for it: two for each of 132 multiprocessors


@triton.jit
def _multiply(x, y, total):
    """total + x @ y for each channel, in float32."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)  # the interpreter would multiply the bits of bfloat16 as integers
    return tl.dot(x, y, total, input_precision="tf32x3")


# Triton interprets instead of compiling if TRITON_INTERPRET was set before this module was imported.
INTERPRETED = tl.constexpr(not isinstance(_multiply, triton.JITFunction))


@triton.jit
def band_kernel(
    weight, bands, size: tl.constexpr, reverse: tl.constexpr,
    window: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """One program: 8 rows of a channel's bands, (C, I, K + 2 S - 2, J), by descending ky, S - 1 zeros on both sides."""
    taps: tl.constexpr = size + 2 * rows - 2
    program = tl.program_id(0)
    channel = (program // (window // 8)).to(tl.int64)
    i, n = (program % (window // 8) * 8 + tl.arange(0, 8))[:, None], tl.arange(0, padded)[None, :]
    tap_row = size + rows - 2 - n // columns
    tap_column = i - n % columns
    used = (tap_row >= 0) & (tap_row < size) & (tap_column >= 0) & (tap_column < size)
    tap = tap_row * size + tap_column
    if reverse:
        tap = size * size - 1 - tap
    values = tl.load(weight + channel * (size * size) + tap, mask=used, other=0.0)
    tl.store(bands + (channel * window + i) * (taps * columns) + n, values, mask=n < taps * columns)


@triton.jit
def conv_kernel(
    x, bands, bias, out, batches, eighths, height, width,
    size: tl.constexpr, has_bias: tl.constexpr, adds: tl.constexpr, unit: tl.constexpr, blocks: tl.constexpr,
    window: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: M ``blocks`` of S ``rows``, J ``columns`` and a ``block`` of channels.

    With ``adds`` on top of what ``out`` holds.
    """
    taps: tl.constexpr = size + 2 * rows - 2
    reach: tl.constexpr = size // 2
    channels = eighths * unit
    program = tl.program_id(0)
    channel_blocks, column_blocks, row_blocks = tl.cdiv(channels, block), tl.cdiv(width, columns), tl.cdiv(height, rows)
    channel = program % channel_blocks * block + tl.arange(0, block)
    known = (channel < channels) | (unit == block)  # which the compiler sees then: one load for the block
    first_column = program // channel_blocks % column_blocks * columns
    index = program // (channel_blocks * column_blocks) * blocks + tl.arange(0, blocks)
    batch = (index // row_blocks).to(tl.int64)[:, None, None]
    first_row = (index % row_blocks * rows)[:, None, None]

    i = tl.arange(0, window)
    row = first_row - reach
    column = (first_column - reach + i)[None, :, None]
    inside = (batch < batches) & (column >= 0) & (column < width) & known[None, None, :]
    source = x + ((batch * height + row) * width + column) * channels + channel[None, None, :]
    n = tl.arange(0, rows * columns)
    band = channel.to(tl.int64)[:, None, None] * window + i[None, :, None]
    band = bands + band * (taps * columns) + (size + rows - 2) * columns + n[None, None, :]
    total = tl.zeros([block, blocks, rows * columns], tl.float32)
    values = tl.load(source, mask=inside & (row >= 0) & (row < height), other=0.0)
    for _ in range(size + rows - 1):
        row += 1
        source += width * channels
        following = tl.load(source, mask=inside & (row >= 0) & (row < height), other=0.0)
        total = _multiply(tl.permute(values, (2, 0, 1)), tl.load(band, mask=known[:, None, None], other=0.0), total)
        values = following
        band -= columns

    if has_bias:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[:, None, None]
    row, column = first_row + (n // columns)[None, :, None], (first_column + n % columns)[None, :, None]
    target = out + ((batch * height + row) * width + column) * channels + channel[None, None, :]
    inside = (batch < batches) & (row < height) & (column < width) & known[None, None, :]
    result = tl.permute(total, (1, 2, 0))
    if adds:
        result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    grad, x, out, batches, eighths, height, width, places, image_parts,
    size: tl.constexpr, unit: tl.constexpr, blocks: tl.constexpr, height_p: tl.constexpr,
    window: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: P of S ``rows`` of taps, over part of the tiles of M rows and J columns.

    The M ``blocks`` of a tile are ``height_p`` rows of each of M / ``height_p`` images. A program walks over every
    ``places``-th place in an image, and there over every ``image_parts``-th group of so many images. ``out`` is
    (image_parts, places, C, groups of S taps, I, S J).
    """
    groups: tl.constexpr = (size + rows - 1) // rows
    reach: tl.constexpr = size // 2
    images: tl.constexpr = blocks // height_p
    channels = eighths * unit
    program = tl.program_id(0)
    channel_blocks, column_blocks = tl.cdiv(channels, block), tl.cdiv(width, columns)
    group = program % groups
    channel = program // groups % channel_blocks * block + tl.arange(0, block)
    known = (channel < channels) | (unit == block)
    part = program // (groups * channel_blocks)
    first_image = part // places * images
    step = (image_parts * images * height).to(tl.int64) * width * channels

    m, i, n = tl.arange(0, blocks)[:, None, None], tl.arange(0, window), tl.arange(0, rows * columns)
    up = (reach - group * rows - n // columns)[None, :, None]  # from a row of the map to the one that it counts for
    total = tl.zeros([block, window, rows * columns], tl.float32)
    for place in range(part % places, tl.cdiv(height, height_p) * column_blocks, places):
        first_column = place % column_blocks * columns
        row = place // column_blocks * height_p + m % height_p
        start = (first_image + m // height_p).to(tl.int64) * height + row
        column = (first_column - reach + i)[None, :, None]
        values_in = (row < height) & (column >= 0) & (column < width) & known[None, None, :]
        values_at = x + (start * width + column) * channels + channel[None, None, :]
        column = (first_column + n % columns)[None, :, None]
        grads_in = (row < height) & (row + up >= 0) & (row + up < height) & (column < width) & known[None, None, :]
        grads_at = grad + ((start + up) * width + column) * channels + channel[None, None, :]
        left = batches - first_image - m // height_p
        values = tl.load(values_at, mask=values_in & (left > 0), other=0.0)
        grads = tl.load(grads_at, mask=grads_in & (left > 0), other=0.0)
        for _ in range(first_image, batches, image_parts * images):
            left -= image_parts * images
            values_at += step
            grads_at += step
            next_values = tl.load(values_at, mask=values_in & (left > 0), other=0.0)
            next_grads = tl.load(grads_at, mask=grads_in & (left > 0), other=0.0)
            total = _multiply(tl.permute(values, (2, 1, 0)), tl.permute(grads, (2, 0, 1)), total)
            values, grads = next_values, next_grads

    target = ((part * channels + channel.to(tl.int64)) * groups + group)[:, None, None] * window + i[None, :, None]
    tl.store(out + target * (rows * columns) + n[None, None, :], total, mask=known[:, None, None])


class Tile(NamedTuple):
    """Sizes of a program, such that a thread has 64 sums, or 32 in float32, whose operands are split in two.

    A map's next row is read during a product of the one before. In 16 bits so are the bands, by ``stages``; in float32
    that would take 130 KB of shared memory.
    """

    blocks: int
    rows: int
    window: int
    columns: int
    warps: int
    stages: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"blocks": self.blocks, "rows": self.rows, "window": self.window, "columns": self.columns}


BLOCK = 8  # channels of a program: one load of 16-bit numbers
LARGEST = 31  # filter, dilated
LARGEST_IMAGE = 2**31 // 32  # numbers of one: 32 bits count those of 32 images


def tile_for(size: int, dtype: torch.dtype) -> Tile:
    exact = dtype == torch.float32
    columns = 8 if size <= 9 else 16
    window = triton.next_power_of_2(size + columns - 1)
    return Tile(
        blocks=32 if exact and window <= 32 else 16,
        rows=2 if exact else 4,
        window=window,
        columns=columns,
        warps=4 if columns == 8 else 8,
        stages=1 if exact else 2,
    )


def why_not(x: Tensor, weight: Tensor, dilation: int) -> str | None:
    """Reason why the kernels cannot run a convolution, or None."""
    taps = weight.shape[-1]
    size = dilation * (taps - 1) + 1
    reason = conditions.why_not(x)
    if reason is not None:
        return reason
    if weight.dtype != x.dtype:
        reason = f"it takes images and weights of one dtype, not {x.dtype} and {weight.dtype}"
    elif tuple(weight.shape) != (x.shape[1], 1, taps, taps) or taps % 2 == 0 or not 3 <= taps <= size <= LARGEST:
        given = f"{tuple(weight.shape)} dilated by {dilation}"
        reason = f"it takes weights (C, 1, K, K), K odd and dilated 3 to {LARGEST}, not {given}"
    elif x[0].numel() >= LARGEST_IMAGE:
        reason = "32 images have more numbers than 32 bits can count"
    return reason


def _map_sizes(x: Tensor) -> dict[str, int]:
    """Sizes of a map with its channels last. A count of 8 channels each shows that loads may be so wide."""
    batch, channels, height, width = x.shape
    unit = BLOCK if channels % BLOCK == 0 else 1
    return {"batches": batch, "eighths": channels // unit, "height": height, "width": width, "unit": unit}


def _without_gaps(weight: Tensor, dilation: int) -> Tensor:
    """A dilated filter as a dense one, zeros between its taps: a band takes as long with zeros in it."""
    if dilation == 1:
        return weight
    size = dilation * (weight.shape[-1] - 1) + 1
    dense = weight.new_zeros(len(weight), 1, size, size)
    dense[:, :, ::dilation, ::dilation] = weight
    return dense


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, *, reverse: bool = False,
    out: Tensor | None = None, adds: bool = False,
) -> Tensor:  # fmt: skip
    """The convolution, or with ``reverse`` the one with the taps reversed. Channels last, in the dtype of ``x``.

    It is written to ``out``, a map (B, C, H, W) with its channels last, if that is given; with ``adds``, added there.
    """
    if weight.shape[-1] == 3:
        taps = weight.flatten(1).t().contiguous()
        return small_filters.convolve(x, taps, bias, dilation, reverse=reverse, out=out, adds=adds)
    batch, channels, height, width = x.shape
    weight = _without_gaps(weight, dilation)
    size = weight.shape[-1]
    together = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(together) if out is None else out
    tile = tile_for(size, x.dtype)
    blocks = triton.cdiv(batch * triton.cdiv(height, tile.rows), tile.blocks)
    programs = blocks * triton.cdiv(width, tile.columns) * triton.cdiv(channels, BLOCK)
    bands = torch.empty(channels, tile.window, size + 2 * tile.rows - 2, tile.columns, dtype=x.dtype, device=x.device)

    with conditions.on_device_of(x):
        band_kernel[(channels * tile.window // 8,)](
            weight.contiguous(), bands, size=size, reverse=reverse, window=tile.window, columns=tile.columns,
            rows=tile.rows, padded=triton.next_power_of_2(bands[0, 0].numel()), num_warps=4,
        )  # fmt: skip
        conv_kernel[(programs,)](
            together, bands, bands if bias is None else bias, out, **_map_sizes(x), size=size,
            has_bias=bias is not None, adds=adds, **tile.sizes, block=BLOCK, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return out


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:  # noqa: ARG001
    """Gradient of the convolution with respect to its input."""
    return convolve(grad, weight, None, dilation, reverse=True)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Gradient of the convolution with respect to its weight (C, 1, K, K); of a dilated one, every so many taps."""
    if weight.shape[-1] == 3:
        return small_filters.weight_gradient(grad, x, dilation).t().reshape(weight.shape).to(weight.dtype)
    batch, channels, height, width = x.shape
    size = dilation * (weight.shape[-1] - 1) + 1
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    tile = tile_for(size, x.dtype)._replace(blocks=16)  # 32 would take all registers
    groups = triton.cdiv(size, tile.rows)
    programs = groups * triton.cdiv(channels, BLOCK)
    height_p = min(tile.blocks, triton.next_power_of_2(height))
    wanted = triton.cdiv(PROGRAMS, programs)
    image_parts = min(triton.cdiv(batch, tile.blocks // height_p), wanted)
    places = min(triton.cdiv(height, height_p) * triton.cdiv(width, tile.columns), triton.cdiv(wanted, image_parts))
    parts = image_parts * places
    shape = (parts, channels, groups, tile.window, tile.rows, tile.columns)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)

    with conditions.on_device_of(x):
        weight_kernel[(programs * parts,)](
            grad, x, sums, **_map_sizes(x), places=places, image_parts=image_parts, size=size, height_p=height_p,
            **tile.sizes, block=BLOCK, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    taps = _sum_diagonals(sums, size)[:, ::dilation, ::dilation]
    return taps.reshape(weight.shape).to(weight.dtype)


def _sum_diagonals(sums: Tensor, size: int) -> Tensor:
    """grad_w[ky, kx] = sum over j of P[kx + j, (ky, j)]: (parts, C, groups, I, S, J) -> (C, K, K)."""
    parts, channels, groups, _, rows, columns = sums.shape
    part, channel, group, i, row, column = sums.stride()
    diagonals = sums.as_strided(
        (parts, channels, groups, rows, size, columns), (part, channel, group, row, i, i + column)
    )
    return diagonals.sum((0, 5)).flatten(1, 2)[:, :size]
