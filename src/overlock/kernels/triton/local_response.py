"""The middle of a ConvFFN for CUDA in one pass: GELU, the folded 3x3 depthwise filter, and the response norm's sums.

Letters: B batch, C channels, H x W the map, M = B C H W numbers.

On its own, each of the three reads and writes the map: 5 M numbers moved for GELU (2 M), the filter (2 M) and the norms
(M). Here it is 2 M, and partial sums of some KB. The norms scale channels, so that they can be applied by the 1x1
convolution that follows (overlock.fused.cuda_layers): what a program gives is the map before that, and its sums of
squares, each with one owner, added up in a fixed order.

A program is one warp, its lanes have channels, and it walks down four columns of a piece of the rows. A row goes into
three rows of the output, two of which wait as sums in registers for the rows below. GELU is the most of the work: it is
computed for six columns where four are written, and not nine times a number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton.activations import gelu
from overlock.kernels.triton.channel_scales import response_kernel
from overlock.kernels.triton.conditions import on_device_of

BLOCK = 128  # channels of a program: four a lane
COLUMNS = 4  # as written out below
ROWS = 56  # of a program at most: two more are read
PROGRAMS = 2112  # fewer leave a large GPU idle: 16 for each of 132 multiprocessors


@triton.jit
def _known(channel, channels, inside):
    """Channels that exist, of a position inside the map. Not ``&`` of a block and a scalar, which Triton 3.9's
    interpreter widens to 32 bits and then refuses as a mask.
    """
    return channel < tl.where(inside, channels, 0)


@triton.jit
def _value(x, column, width, exists, channel, channels, with_gelu: tl.constexpr, exact: tl.constexpr):
    """GELU of a block of channels at one position; GELU(0) = 0, so that the zeros around the map stay zeros."""
    inside = exists & (column >= 0) & (column < width)
    values = tl.load(x, mask=_known(channel, channels, inside), other=0.0).to(tl.float32)
    return gelu(values, exact) if with_gelu else values


@triton.jit
def _taps(weight, row: tl.constexpr, channel, known, channels):
    """The three taps of a row of the filter; ``weight`` is (9, C)."""
    left = tl.load(weight + 3 * row * channels + channel, mask=known, other=0.0).to(tl.float32)
    middle = tl.load(weight + (3 * row + 1) * channels + channel, mask=known, other=0.0).to(tl.float32)
    right = tl.load(weight + (3 * row + 2) * channels + channel, mask=known, other=0.0).to(tl.float32)
    return left, middle, right


@triton.jit
def _product(taps, left, middle, right):
    """What a row of the map adds to a position of a row of the output."""
    return taps[0] * left + taps[1] * middle + taps[2] * right


@triton.jit
def _finish(out, total, column, width, is_ours, channel, channels):
    """Write a position of the output, and give its square."""
    inside = is_ours & (column < width)
    tl.store(out, total.to(out.dtype.element_ty), mask=_known(channel, channels, inside))
    return tl.where(inside, total * total, 0.0)


@triton.jit
def filter_kernel(
    x, weight, bias, out, sums, x_b, x_h, x_w, out_b, out_h, out_w, channels, height, width, rows,
    with_gelu: tl.constexpr, with_sums: tl.constexpr, block: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: ``rows`` rows of four columns and a block of channels of one image.

    ``sums`` is (B, parts, C), a part for each four columns and piece of rows; without ``with_sums`` it stays as it is.
    """
    channel_blocks, tiles, pieces = tl.cdiv(channels, block), tl.cdiv(width, 4), tl.cdiv(height, rows)
    program = tl.program_id(0)
    channel = program % channel_blocks * block + tl.arange(0, block)
    part = program // channel_blocks % (tiles * pieces)
    batch = (program // (channel_blocks * tiles * pieces)).to(tl.int64)
    first = part // tiles * rows
    last = tl.minimum(first + rows, height)
    column = part % tiles * 4
    known = channel < channels

    top = _taps(weight, 0, channel, known, channels)
    centre = _taps(weight, 1, channel, known, channels)
    low = _taps(weight, 2, channel, known, channels)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)

    x += batch * x_b + column * x_w + channel
    out += batch * out_b + column * out_w + channel
    squares = tl.zeros([block], tl.float32)
    # Of each column, the row before this one, which lacks this one's part, and this one, which lacks two rows' parts.
    above0, above1, above2, above3 = squares, squares, squares, squares
    here0, here1, here2, here3 = squares, squares, squares, squares
    for row in range(first - 1, last + 1):
        exists = (row >= 0) & (row < height)
        source = x + row * x_h
        a = _value(source - x_w, column - 1, width, exists, channel, channels, with_gelu, exact)
        b = _value(source, column, width, exists, channel, channels, with_gelu, exact)
        c = _value(source + x_w, column + 1, width, exists, channel, channels, with_gelu, exact)
        d = _value(source + 2 * x_w, column + 2, width, exists, channel, channels, with_gelu, exact)
        e = _value(source + 3 * x_w, column + 3, width, exists, channel, channels, with_gelu, exact)
        f = _value(source + 4 * x_w, column + 4, width, exists, channel, channels, with_gelu, exact)
        target, is_ours = out + (row - 1) * out_h, row > first
        squares += _finish(target, above0 + _product(low, a, b, c) + offset, column, width, is_ours, channel, channels)
        squares += _finish(
            target + out_w, above1 + _product(low, b, c, d) + offset, column + 1, width, is_ours, channel, channels
        )
        squares += _finish(
            target + 2 * out_w, above2 + _product(low, c, d, e) + offset, column + 2, width, is_ours, channel, channels
        )
        squares += _finish(
            target + 3 * out_w, above3 + _product(low, d, e, f) + offset, column + 3, width, is_ours, channel, channels
        )
        above0, here0 = here0 + _product(centre, a, b, c), _product(top, a, b, c)
        above1, here1 = here1 + _product(centre, b, c, d), _product(top, b, c, d)
        above2, here2 = here2 + _product(centre, c, d, e), _product(top, c, d, e)
        above3, here3 = here3 + _product(centre, d, e, f), _product(top, d, e, f)
    if with_sums:
        target = sums + (batch * tiles * pieces + part) * channels + channel
        tl.store(target, squares, mask=known)


# Triton interprets instead of compiling if TRITON_INTERPRET was set before this module was imported.
INTERPRETED = not isinstance(filter_kernel, triton.JITFunction)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(3)


def pieces_of(height: int, programs: int) -> tuple[int, int]:
    """Rows of a program, and how many such pieces a map has, where its whole height makes so many programs."""
    rows = min(ROWS, height)
    while rows > 7 and programs * triton.cdiv(height, rows) < PROGRAMS:
        rows = triton.cdiv(rows, 2)
    return rows, triton.cdiv(height, rows)


def run_filter(x: Tensor, taps: Tensor, bias: Tensor, with_gelu: bool, with_sums: bool) -> tuple[Tensor, Tensor]:
    """The filter of x, or of GELU(x), channels last, in the dtype of ``x``, and its sums of squares.

    Args:
        x: (B, C, H, W), channels last.
        taps: (9, C).
        bias: (C,).
        with_gelu: whether GELU comes first.
        with_sums: whether squares are summed.

    Returns:
        (B, C, H, W), and sums (B, parts, C) in float32, with no parts if they are not wanted.
    """
    batch, channels, height, width = x.shape
    out = torch.empty_like(x)
    tiles, block = triton.cdiv(width, COLUMNS), min(BLOCK, triton.next_power_of_2(channels))
    columns = batch * tiles * triton.cdiv(channels, block)
    rows, pieces = pieces_of(height, columns)
    sums = torch.empty(batch, tiles * pieces if with_sums else 0, channels, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        filter_kernel[(columns * pieces,)](
            x, taps, bias, out, sums, *_strides(x), *_strides(out), channels, height, width, rows,
            with_gelu=with_gelu, with_sums=with_sums, block=block, exact=x.dtype == torch.float32, num_warps=1,
        )  # fmt: skip
    return out, sums


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
    batch, channels = x.shape[:2]
    taps = weight.flatten(1).t().contiguous()
    out, sums = run_filter(x.contiguous(memory_format=torch.channels_last), taps, bias, with_gelu=True, with_sums=True)
    scale = x.new_empty(batch, channels)
    with on_device_of(x):
        response_kernel[(batch,)](
            sums, norm_weight, scale, sums.shape[1], eps, channels=channels, block=triton.next_power_of_2(channels),
            num_warps=8,
        )  # fmt: skip
    return out, scale
