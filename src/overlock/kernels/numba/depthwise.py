"""Depthwise convolutions on CPU, with a prologue and an epilogue in the same pass over memory."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from overlock.kernels.numba.activations import gelu, gelu_gradient
from overlock.kernels.numba.arguments import INT64, MAP, POINTER
from overlock.kernels.numba.flags import GELU, GELU_GRADIENT, SUM, SUM_SQUARES
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, maps, run, task_range
from overlock.kernels.numba.simd import LANES, aligned_zeros, load, masked_load, masked_store, prefetch, store
from overlock.kernels.numba.vector_tuples import load_all, multiply_add, repeat, store_all


@njit(**OPTIONS)
def read_row(images, first, channels, width, lanes, prologue, line, place):
    """One row of up to LANES channels into ``line``, whose margins stay zero.

    The row below, whose numbers lie too far apart for the machine to foresee, is on its way to the cache meanwhile.
    """
    prefetch_row(images, first + width * channels, channels, width)
    for x in range(width):
        value = masked_load(images, first + x * channels, lanes)
        store(line, place + x * LANES, gelu(value) if prologue & GELU else value)


@njit(**OPTIONS)
def prefetch_row(numbers, first, channels, width):
    for x in range(width):
        prefetch(numbers, first + x * channels)


def _filter_columns(count):
    """A filter of ``count`` neighbours of a row: each weight is read once for all."""

    @njit(**OPTIONS)
    def filter_columns(lines, weights, order, begin, end, size, step, stride, place, out, to):
        sums = repeat(load(weights, size * size * LANES), count)
        for k in range(begin, end):
            x, n = order[k] * stride + place, k * size * LANES
            for j in range(size):
                sums = multiply_add(sums, load(weights, n + j * LANES), load_all(lines, x + j * step, LANES, count))
        store_all(out, to, LANES, sums)

    return filter_columns


filter_seven, filter_one = _filter_columns(7), _filter_columns(1)


@njit(**OPTIONS)
def filter_seven_twice(lines, weights, order, begin, end, size, stride, place, out, to, step):
    """Seven neighbours in two rows, the second ``step`` numbers after the first in ``out``.

    Each input is read once for both. ``order`` goes on by one row, the last of the second's.
    """
    upper = lower = repeat(load(weights, size * size * LANES), 7)
    for row in range(begin, end):
        x, first, second = order[row] * stride + place, row * size * LANES, (row - 1) * size * LANES
        if 0 < row < size:
            for column in range(0, size * LANES, LANES):
                values = load_all(lines, x + column, LANES, 7)
                upper = multiply_add(upper, load(weights, first + column), values)
                lower = multiply_add(lower, load(weights, second + column), values)
        elif row == 0:
            for column in range(0, size * LANES, LANES):
                upper = multiply_add(upper, load(weights, first + column), load_all(lines, x + column, LANES, 7))
        else:
            for column in range(0, size * LANES, LANES):
                lower = multiply_add(lower, load(weights, second + column), load_all(lines, x + column, LANES, 7))
    store_all(out, to, LANES, upper)
    store_all(out, to + step, LANES, lower)


@njit(**OPTIONS)
def filter_row(lines, weights, order, begin, end, size, step, stride, width, out, to):
    """One row of results."""
    for x in range(0, width - 6, 7):
        filter_seven(lines, weights, order, begin, end, size, step, stride, x * LANES, out, to + x * LANES)
    for x in range(width - width % 7, width):
        filter_one(lines, weights, order, begin, end, size, step, stride, x * LANES, out, to + x * LANES)


@njit(**OPTIONS)
def filter_two_rows(lines, weights, order, begin, end, size, stride, width, out):
    """Two rows of results of at least seven columns, one after the other."""
    for x in range(0, width, 7):
        at = min(x, width - 7) * LANES  # the last seven may overlap those before
        filter_seven_twice(lines, weights, order, begin, end, size, stride, at, out, at, width * LANES)


@njit(**OPTIONS)
def filter_three(lines, weights, above, middle, below, width, out, to):
    """One row of results of a 3 x 3 filter, whose weights stay in registers; the rows begin at three places."""
    bias = load(weights, 9 * LANES)
    a, b, c = load(weights, 0), load(weights, LANES), load(weights, 2 * LANES)
    d, e, f = load(weights, 3 * LANES), load(weights, 4 * LANES), load(weights, 5 * LANES)
    g, h, i = load(weights, 6 * LANES), load(weights, 7 * LANES), load(weights, 8 * LANES)
    for x in range(0, width * LANES, LANES):
        value = bias + a * load(lines, above + x) + b * load(lines, above + x + LANES)
        value = value + c * load(lines, above + x + 2 * LANES) + d * load(lines, middle + x)
        value = value + e * load(lines, middle + x + LANES) + f * load(lines, middle + x + 2 * LANES)
        value = value + g * load(lines, below + x) + h * load(lines, below + x + LANES)
        store(out, to + x, value + i * load(lines, below + x + 2 * LANES))


@njit(**OPTIONS)
def filter_rows(lines, weights, order, begin, end, size, dilation, stride, width, count, out):
    """One row of results or two, from the lines in an order; those before the begin and from the end on are zeros."""
    if size == 3 and dilation == 1:
        for i in range(count):
            above, middle, below = order[i] * stride, order[i + 1] * stride, order[i + 2] * stride
            filter_three(lines, weights, above, middle, below, width, out, i * width * LANES)
    elif count == 2:
        filter_two_rows(lines, weights, order, begin, end, size, stride, width, out)
    else:
        filter_row(lines, weights, order, begin, end, size, dilation * LANES, stride, width, out, 0)


@njit(**OPTIONS)
def write_row(row, begin, width, lanes, epilogue, out, first, channels, sums, before_gelu):
    """A filtered row, after the epilogue, to its place, and its sum, or that of its squares, to those before."""
    both = load(sums, 0)
    for x in range(width):
        value = load(row, begin + x * LANES)
        if epilogue & GELU:
            value = gelu(value)
        if epilogue & GELU_GRADIENT:
            value = value * gelu_gradient(masked_load(before_gelu, first + x * channels, lanes))
        if epilogue & SUM_SQUARES:
            both = both + value * value
        if epilogue & SUM:
            both = both + value
        masked_store(out, first + x * channels, value, lanes)
    store(sums, 0, both)


@njit(**OPTIONS)
def images_together(batch, positions):
    """How many images, a divisor of the batch, are taken in turn for the same channels: they fit the L2 cache."""
    together = batch
    while together > 1 and (batch % together or together * positions > 2048):
        together -= 1
    return together


@kernel(
    x=MAP,  # (B, H, W, C)
    weight=POINTER,  # (K K, C)
    bias=POINTER,  # (C)
    out=MAP,  # (B, H, W, C); may be x, where the rows are not split
    sums=POINTER,  # (B, splits, C), of the results or their squares
    before_gelu=MAP,  # (B, H, W, C), which GELU_GRADIENT reads
    batch=INT64,
    height=INT64,
    width=INT64,
    channels=INT64,
    kernel_size=INT64,
    dilation=INT64,
    prologue=INT64,
    epilogue=INT64,
    splits=INT64,  # of the rows
)
def depthwise(call, thread, threads):
    """out = epilogue(convolution of prologue(x)), zeros around the images. A task is LANES channels of some rows.

    The rows of x that the filter spans are kept at hand, so that it can write over what it reads. Small images are
    taken one after another for the same channels: their taps, which lie far apart in memory, are then read once for
    all.
    """
    batch, height, width, channels = call.batch, call.height, call.width, call.channels
    size, dilation, splits, prologue, epilogue = (
        call.kernel_size,
        call.dilation,
        call.splits,
        call.prologue,
        call.epilogue,
    )
    numbers = (batch * height * width * channels,)
    images, out, before_gelu = maps(call.x, numbers), maps(call.out, numbers), maps(call.before_gelu, numbers)
    weights, bias = floats(call.weight, (size * size * channels,)), floats(call.bias, (channels,))
    sums = floats(call.sums, (batch, splits, channels))
    blocks, half, span = (channels + LANES - 1) // LANES, size // 2 * dilation, (size - 1) * dilation + 1
    stride, held, paired = (width + span - 1) * LANES, span + 1, LANES == 16 and dilation == 1 and width >= 7
    lines, order = aligned_zeros((held + 1) * stride), np.zeros(size + 1, np.int64)  # the last line stays zero
    rows, taps = aligned_zeros(2 * width * LANES), aligned_zeros((size * size + 1) * LANES)
    row_sums, exact = aligned_zeros(LANES), np.zeros(LANES, np.float64)
    together, held_block = images_together(batch, height * width), -1
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        group, rest = task // (blocks * splits * together), task % (blocks * splits * together)
        block, b, split = rest // (splits * together), group * together + rest // splits % together, rest % splits
        lanes = min(LANES, channels - block * LANES)
        first_row, last_row = height * split // splits, height * (split + 1) // splits
        if block != held_block:
            for n in range(size * size):
                store(taps, n * LANES, masked_load(weights, n * channels + block * LANES, lanes))
            store(taps, size * size * LANES, masked_load(bias, block * LANES, lanes))
            held_block = block
        origin = b * height * width * channels + block * LANES
        exact[:] = 0
        ready, y = max(first_row - half, 0), first_row
        while y < last_row:
            count = 2 if paired and y + 1 < last_row else 1
            while ready < min(y + half + count, height):
                read_row(
                    images, origin + ready * width * channels, channels, width, lanes, prologue, lines,
                    ready % held * stride + half * LANES,
                )  # fmt: skip
                ready += 1
            if call.out != call.x:
                prefetch_row(out, origin + y * width * channels, channels, count * width)
            top = max(-((y - half) // dilation), 0)
            bottom = min(size + count - 1, (height - 1 - y + half) // dilation + 1)
            for k in range(size + count - 1):
                row = y - half + k * dilation
                order[k] = row % held if 0 <= row < height else held
            filter_rows(lines, taps, order, top, bottom, size, dilation, stride, width, count, rows)
            row_sums[:] = 0
            for i in range(count):
                at = origin + (y + i) * width * channels
                write_row(rows, i * width * LANES, width, lanes, epilogue, out, at, channels, row_sums, before_gelu)
            for c in range(LANES):
                exact[c] += row_sums[c]
            y += count
        if epilogue & (SUM_SQUARES | SUM):
            for c in range(lanes):
                sums[b, split, block * LANES + c] = exact[c]


def filter_tokens(
    x: Tensor, weight: Tensor, bias: Tensor, *, prologue: int = 0, epilogue: int = 0, dilation: int = 1,
    before_gelu: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Filter tokens (B, H, W, C) with weight (K, K, C) and bias (C).

    Args:
        x: the tokens.
        weight, bias: of the filter.
        prologue, epilogue: GELU, or 0 for nothing.
        dilation: distance of a filter's neighbours.
        before_gelu: (B, H, W, C); multiply the result by GELU's derivative there.
    """
    (batch, height, width, channels), out = x.shape, torch.empty_like(x)
    blocks = batch * -(-channels // LANES)
    splits = max(1, min(2 * torch.get_num_threads() // blocks, height // 8))
    run(
        depthwise, blocks * splits, x=x, weight=weight.float().contiguous(), bias=bias.float().contiguous(), out=out,
        sums=None, before_gelu=before_gelu, batch=batch, height=height, width=width, channels=channels,
        kernel_size=weight.shape[0], dilation=dilation, prologue=prologue,
        epilogue=epilogue if before_gelu is None else epilogue | GELU_GRADIENT, splits=splits,
    )  # fmt: skip
    return out
