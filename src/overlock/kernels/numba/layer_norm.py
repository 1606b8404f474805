"""The local convolution of a block and the layer norm of its result on CPU, in one pass over memory."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from overlock.kernels.numba.arguments import FLOAT64, INT64, POINTER
from overlock.kernels.numba.depthwise import filter_three
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, task_range
from overlock.kernels.numba.simd import (
    LANES,
    aligned_zeros,
    broadcast,
    load,
    masked_load,
    masked_store,
    reduce_sum,
    store,
)

LOCAL = 3  # rows of a local convolution


@njit(**OPTIONS)
def normalise(row, width, channels, ones, weight, bias, eps, plain, out, first):
    """A row held as (blocks, width, LANES) with zeros beyond the channels, to its place plain and layer-normed.

    ``ones`` has the same zeros.
    """
    for x in range(width):
        both = broadcast(np.float32(0))
        for c in range(0, channels, LANES):
            value = load(row, c * width + x * LANES)
            masked_store(plain, first + x * channels + c, value, min(LANES, channels - c))
            both = both + value
        mean = broadcast(reduce_sum(both) / np.float32(channels))
        both = broadcast(np.float32(0))
        for c in range(0, channels, LANES):
            off = (load(row, c * width + x * LANES) - mean) * load(ones, c)
            both = both + off * off
        scale = broadcast(np.float32(1) / np.float32(math.sqrt(reduce_sum(both) / np.float32(channels) + eps)))
        for c in range(0, channels, LANES):
            value = (load(row, c * width + x * LANES) - mean) * scale
            value = value * load(weight, c) + load(bias, c)
            masked_store(out, first + x * channels + c, value, min(LANES, channels - c))


@njit(**OPTIONS)
def read_tokens(images, first, width, channels, lines, place, step):
    """A row of tokens, LANES channels of each to one of the lines ``step`` apart."""
    for x in range(width):
        for c in range(0, channels, LANES):
            value = masked_load(images, first + x * channels + c, min(LANES, channels - c))
            store(lines, c // LANES * step + place + x * LANES, value)


@kernel(
    x=POINTER,  # (B, H, W, C)
    filter_weight=POINTER,  # (9, C)
    filter_bias=POINTER,  # (C)
    norm_weight=POINTER,  # (C)
    norm_bias=POINTER,  # (C)
    filtered=POINTER,  # (B, H, W, C)
    normed=POINTER,  # (B, H, W, C)
    eps=FLOAT64,
    batch=INT64,
    height=INT64,
    width=INT64,
    channels=INT64,
    splits=INT64,  # of the rows
)
def local_conv_and_norm(call, thread, threads):
    """A 3 x 3 depthwise convolution, and the layer norm of its result. A task is some rows of an image."""
    height, width, channels, splits = call.height, call.width, call.channels, call.splits
    numbers, blocks = (call.batch * height * width * channels,), (channels + LANES - 1) // LANES
    images, filtered, normed = floats(call.x, numbers), floats(call.filtered, numbers), floats(call.normed, numbers)
    weights, biases = floats(call.filter_weight, (9, channels)), floats(call.filter_bias, (channels,))
    ones, weight, bias = aligned_zeros(blocks * LANES), aligned_zeros(blocks * LANES), aligned_zeros(blocks * LANES)
    ones[:channels] = 1
    weight[:channels], bias[:channels] = floats(call.norm_weight, (channels,)), floats(call.norm_bias, (channels,))
    taps, eps = aligned_zeros(blocks * 10 * LANES).reshape(blocks, 10 * LANES), np.float32(call.eps)
    for c in range(channels):
        for n in range(9):
            taps[c // LANES, n * LANES + c % LANES] = weights[n, c]
        taps[c // LANES, 9 * LANES + c % LANES] = biases[c]
    stride = (width + 2) * LANES
    step = (LOCAL + 1) * stride  # from one block's lines to the next; the last line stays zero
    lines = aligned_zeros(blocks * step)
    row = aligned_zeros(blocks * width * LANES)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        origin, split = task // splits * height * width * channels, task % splits
        first, last = height * split // splits, height * (split + 1) // splits
        ready = max(first - 1, 0)
        for y in range(first, last):
            while ready < min(y + 2, height):
                at, place = origin + ready * width * channels, ready % LOCAL * stride + LANES
                read_tokens(images, at, width, channels, lines, place, step)
                ready += 1
            above, below = (y - 1) % LOCAL if y > 0 else LOCAL, (y + 1) % LOCAL if y + 1 < height else LOCAL
            for block in range(blocks):
                at = block * step
                filter_three(
                    lines, taps[block], at + above * stride, at + y % LOCAL * stride, at + below * stride, width, row,
                    block * width * LANES,
                )  # fmt: skip
            at = origin + y * width * channels
            normalise(row, width, channels, ones, weight, bias, eps, filtered, normed, at)
