"""The residual 3x3 depthwise convolution of the blocks in training, for CUDA: y = a + conv(a), a = GELU(x) or x.

Letters: B batch, C channels, H x W the map. Maps are channels last, weights are (9, C).

The residual is one more in the middle tap. Forward is the filter of local_response.py. All gradients are one pass too,
which reads x and y's gradient g once and computes GELU and its slope anew:

    grad_x = slope(x) (conv^T(g) + g),    grad_w[ky, kx] = sum of g[r, c] a[r + ky - 1, c + kx - 1]

A program is one warp, its lanes have channels, and it walks down four columns of a piece of the rows, of one image
after another. A row of g goes into three rows of grad_x, two of which wait as sums in registers. A row of g meets the
rows of a above and at it, and a row of a the row of g above it: so a row of each is kept too. The sums of the weight's
gradient stay in registers until the end; what the programs found is added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton import conditions
from overlock.kernels.triton.activations import gelu, gelu_slope
from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.local_response import COLUMNS, PROGRAMS, pieces_of, run_filter

BLOCK = 64  # channels of a program: two a lane, for which 60 numbers each are kept


@triton.jit
def _load(source, column, width, exists, channel, channels):
    """A block of channels at one position, zeros outside of the map."""
    inside = exists & (column >= 0) & (column < width)
    return tl.load(source, mask=channel < tl.where(inside, channels, 0), other=0.0).to(tl.float32)


@triton.jit
def _act(x, with_gelu: tl.constexpr, exact: tl.constexpr):
    return gelu(x, exact) if with_gelu else x


@triton.jit
def _slope(x, with_gelu: tl.constexpr, exact: tl.constexpr):
    return gelu_slope(x, exact) if with_gelu else x


@triton.jit
def _transposed(left_tap, middle_tap, right_tap, left, middle, right):
    """What a row of g adds to a position of a row of grad_x: the taps go the other way."""
    return left_tap * right + middle_tap * middle + right_tap * left


@triton.jit
def _finish(target, total, slope, column, width, is_ours, channel, channels, with_gelu: tl.constexpr):
    inside = is_ours & (column < width)
    total = total * slope if with_gelu else total
    tl.store(target, total.to(target.dtype.element_ty), mask=channel < tl.where(inside, channels, 0))


@triton.jit
def gradient_kernel(  # noqa: PLR0915 - its registers, by name
    x, grad, weight, of_x, sums, batches, height, width, rows, parts, channels: tl.constexpr,
    with_gelu: tl.constexpr, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: ``rows`` rows of four columns and a block of channels, of every ``parts``-th image.

    ``weight`` has the residual in its middle tap. ``sums`` is (programs of a block, 10, C): nine taps and the bias.
    """
    blocks: tl.constexpr = (channels + block - 1) // block
    tiles, pieces = tl.cdiv(width, 4), tl.cdiv(height, rows)
    channel = tl.program_id(0) % blocks * block + tl.arange(0, block)
    known = channel < channels
    place = tl.program_id(0) // blocks
    column = place % tiles * 4
    first = place // tiles % pieces * rows
    last = tl.minimum(first + rows, height)
    part = place // (tiles * pieces)
    origin = tl.full([], 0, tl.int64)

    w0 = tl.load(weight + channel, mask=known, other=0.0)
    w1 = tl.load(weight + channels + channel, mask=known, other=0.0)
    w2 = tl.load(weight + 2 * channels + channel, mask=known, other=0.0)
    w3 = tl.load(weight + 3 * channels + channel, mask=known, other=0.0)
    w4 = tl.load(weight + 4 * channels + channel, mask=known, other=0.0)
    w5 = tl.load(weight + 5 * channels + channel, mask=known, other=0.0)
    w6 = tl.load(weight + 6 * channels + channel, mask=known, other=0.0)
    w7 = tl.load(weight + 7 * channels + channel, mask=known, other=0.0)
    w8 = tl.load(weight + 8 * channels + channel, mask=known, other=0.0)

    # Each its own zeros: a loop does not carry names that were one tensor before it.
    t0 = tl.zeros([block], tl.float32)
    t1 = tl.zeros([block], tl.float32)
    t2 = tl.zeros([block], tl.float32)
    t3 = tl.zeros([block], tl.float32)
    t4 = tl.zeros([block], tl.float32)
    t5 = tl.zeros([block], tl.float32)
    t6 = tl.zeros([block], tl.float32)
    t7 = tl.zeros([block], tl.float32)
    t8 = tl.zeros([block], tl.float32)
    t9 = tl.zeros([block], tl.float32)
    for image in range(part, batches, parts):
        start = ((origin + image) * height * width + column) * channels
        # Of grad_x, the row before this one, which lacks this one's part, and this one, which lacks two rows' parts.
        above0 = tl.zeros([block], tl.float32)
        above1 = tl.zeros([block], tl.float32)
        above2 = tl.zeros([block], tl.float32)
        above3 = tl.zeros([block], tl.float32)
        here0 = tl.zeros([block], tl.float32)
        here1 = tl.zeros([block], tl.float32)
        here2 = tl.zeros([block], tl.float32)
        here3 = tl.zeros([block], tl.float32)
        # The row before this one, of a, of g where it is the program's own, and of the slopes.
        pa = tl.zeros([block], tl.float32)
        pb = tl.zeros([block], tl.float32)
        pc = tl.zeros([block], tl.float32)
        pd = tl.zeros([block], tl.float32)
        pe = tl.zeros([block], tl.float32)
        pf = tl.zeros([block], tl.float32)
        pg0 = tl.zeros([block], tl.float32)
        pg1 = tl.zeros([block], tl.float32)
        pg2 = tl.zeros([block], tl.float32)
        pg3 = tl.zeros([block], tl.float32)
        slope0 = tl.zeros([block], tl.float32)
        slope1 = tl.zeros([block], tl.float32)
        slope2 = tl.zeros([block], tl.float32)
        slope3 = tl.zeros([block], tl.float32)
        for row in range(first - 1, last + 1):
            exists = (row >= 0) & (row < height)
            own = tl.where((row >= first) & (row < last), 1.0, 0.0)
            source = grad + start + row * width * channels + channel
            g_left = _load(source - channels, column - 1, width, exists, channel, channels)
            g0 = _load(source, column, width, exists, channel, channels)
            g1 = _load(source + channels, column + 1, width, exists, channel, channels)
            g2 = _load(source + 2 * channels, column + 2, width, exists, channel, channels)
            g3 = _load(source + 3 * channels, column + 3, width, exists, channel, channels)
            g_right = _load(source + 4 * channels, column + 4, width, exists, channel, channels)
            target, is_ours = of_x + start + (row - 1) * width * channels + channel, row > first
            total = above0 + _transposed(w0, w1, w2, g_left, g0, g1)
            _finish(target, total, slope0, column, width, is_ours, channel, channels, with_gelu)
            total = above1 + _transposed(w0, w1, w2, g0, g1, g2)
            _finish(target + channels, total, slope1, column + 1, width, is_ours, channel, channels, with_gelu)
            total = above2 + _transposed(w0, w1, w2, g1, g2, g3)
            _finish(target + 2 * channels, total, slope2, column + 2, width, is_ours, channel, channels, with_gelu)
            total = above3 + _transposed(w0, w1, w2, g2, g3, g_right)
            _finish(target + 3 * channels, total, slope3, column + 3, width, is_ours, channel, channels, with_gelu)
            above0 = here0 + _transposed(w3, w4, w5, g_left, g0, g1)
            above1 = here1 + _transposed(w3, w4, w5, g0, g1, g2)
            above2 = here2 + _transposed(w3, w4, w5, g1, g2, g3)
            above3 = here3 + _transposed(w3, w4, w5, g2, g3, g_right)
            here0 = _transposed(w6, w7, w8, g_left, g0, g1)
            here1 = _transposed(w6, w7, w8, g0, g1, g2)
            here2 = _transposed(w6, w7, w8, g1, g2, g3)
            here3 = _transposed(w6, w7, w8, g2, g3, g_right)

            source = x + start + row * width * channels + channel
            x0 = _load(source, column, width, exists, channel, channels)
            x1 = _load(source + channels, column + 1, width, exists, channel, channels)
            x2 = _load(source + 2 * channels, column + 2, width, exists, channel, channels)
            x3 = _load(source + 3 * channels, column + 3, width, exists, channel, channels)
            a = _act(_load(source - channels, column - 1, width, exists, channel, channels), with_gelu, exact)
            b, c, d, e = (
                _act(x0, with_gelu, exact), _act(x1, with_gelu, exact),
                _act(x2, with_gelu, exact), _act(x3, with_gelu, exact),
            )  # fmt: skip
            f = _act(_load(source + 4 * channels, column + 4, width, exists, channel, channels), with_gelu, exact)
            slope0, slope1 = _slope(x0, with_gelu, exact), _slope(x1, with_gelu, exact)
            slope2, slope3 = _slope(x2, with_gelu, exact), _slope(x3, with_gelu, exact)
            g0, g1, g2, g3 = g0 * own, g1 * own, g2 * own, g3 * own
            t0 += g0 * pa + g1 * pb + g2 * pc + g3 * pd
            t1 += g0 * pb + g1 * pc + g2 * pd + g3 * pe
            t2 += g0 * pc + g1 * pd + g2 * pe + g3 * pf
            t3 += g0 * a + g1 * b + g2 * c + g3 * d
            t4 += g0 * b + g1 * c + g2 * d + g3 * e
            t5 += g0 * c + g1 * d + g2 * e + g3 * f
            t6 += pg0 * a + pg1 * b + pg2 * c + pg3 * d
            t7 += pg0 * b + pg1 * c + pg2 * d + pg3 * e
            t8 += pg0 * c + pg1 * d + pg2 * e + pg3 * f
            t9 += g0 + g1 + g2 + g3
            pa, pb, pc, pd, pe, pf = a, b, c, d, e, f
            pg0, pg1, pg2, pg3 = g0, g1, g2, g3

    target = sums + place * 10 * channels + channel
    tl.store(target, t0, mask=known)
    tl.store(target + channels, t1, mask=known)
    tl.store(target + 2 * channels, t2, mask=known)
    tl.store(target + 3 * channels, t3, mask=known)
    tl.store(target + 4 * channels, t4, mask=known)
    tl.store(target + 5 * channels, t5, mask=known)
    tl.store(target + 6 * channels, t6, mask=known)
    tl.store(target + 7 * channels, t7, mask=known)
    tl.store(target + 8 * channels, t8, mask=known)
    tl.store(target + 9 * channels, t9, mask=known)


def why_not(x: Tensor, weight: Tensor, *call: object) -> str | None:
    """Reason why the kernels cannot run a call, or None."""
    if tuple(weight.shape[1:]) != (1, 3, 3):
        return f"it takes 3 x 3 taps, not {tuple(weight.shape[2:])}"
    return conditions.why_not(x, weight, *call)


def _with_residual(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> taps (9, C) in float32, one more in the middle."""
    taps = weight.flatten(1).t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    taps[4] += 1
    return taps


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, with_gelu: bool) -> Tensor:
    """See overlock.ops.local_conv. Channels last."""
    taps = _with_residual(weight)
    offset = taps.new_zeros(taps.shape[1]) if bias is None else bias
    x = x.contiguous(memory_format=torch.channels_last)
    return run_filter(x, taps, offset, with_gelu=with_gelu, with_sums=False)[0]


def gradients(grad: Tensor, x: Tensor, weight: Tensor, with_gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (channels last), of the weight (C, 1, 3, 3) and of the bias (C,)."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
    of_x = torch.empty_like(x)
    block = min(BLOCK, triton.next_power_of_2(channels))
    blocks, tiles = triton.cdiv(channels, block), triton.cdiv(width, COLUMNS)
    rows, pieces = pieces_of(height, batch * tiles * blocks)
    parts = min(batch, triton.cdiv(PROGRAMS, blocks * tiles * pieces))
    sums = torch.empty(parts * pieces * tiles, 10, channels, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        gradient_kernel[(len(sums) * blocks,)](
            x, grad, _with_residual(weight), of_x, sums, batch, height, width, rows, parts, channels=channels,
            with_gelu=with_gelu, exact=x.dtype == torch.float32, block=block, num_warps=1,
        )  # fmt: skip
    total = sums.sum(0)
    return of_x, total[:9].t().reshape(weight.shape).to(weight.dtype), total[9].to(weight.dtype)
