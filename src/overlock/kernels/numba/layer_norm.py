"""The numba code around products and filters: local convolution with layer norm, regions, contexts."""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit

from overlock.kernels.numba.depthwise import filter_three
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, share
from overlock.kernels.numba.simd import LANES, load, load_part, spread, store, store_part, total, zeros

LOCAL = 3  # rows of a local convolution


@njit(**OPTIONS)
def normalise(row, width, channels, ones, weight, bias, eps, plain, out, first):
    """A row held as (blocks, width, LANES) with zeros beyond the channels, to its place plain and layer-normed.

    ``ones`` has the same zeros.
    """
    for x in range(width):
        both = spread(np.float32(0))
        for c in range(0, channels, LANES):
            value = load(row, c * width + x * LANES)
            store_part(plain, first + x * channels + c, value, min(LANES, channels - c))
            both = both + value
        mean = spread(total(both) / np.float32(channels))
        both = spread(np.float32(0))
        for c in range(0, channels, LANES):
            off = (load(row, c * width + x * LANES) - mean) * load(ones, c)
            both = both + off * off
        scale = spread(np.float32(1) / np.float32(math.sqrt(total(both) / np.float32(channels) + eps)))
        for c in range(0, channels, LANES):
            value = (load(row, c * width + x * LANES) - mean) * scale
            value = value * load(weight, c) + load(bias, c)
            store_part(out, first + x * channels + c, value, min(LANES, channels - c))


@njit(**OPTIONS)
def read_tokens(images, first, width, channels, lines, place, step):
    """A row of tokens, LANES channels of each to one of the lines ``step`` apart."""
    for x in range(width):
        for c in range(0, channels, LANES):
            value = load_part(images, first + x * channels + c, min(LANES, channels - c))
            store(lines, c // LANES * step + place + x * LANES, value)


@kernel
def local_and_norm(call, thread, threads):
    """A local convolution of images (B, H, W, C) with weight (9, C) and bias, and the layer norm of its result.

    ``call`` holds from index 2 on: the addresses of the images, the convolution's weight and bias, the norm's weight,
    bias and eps, of the result and of the normed result; B, H, W, C and the pieces that the rows are cut into.
    """
    p = carray(call, 15)
    batch, height, width, channels, pieces = p[10], p[11], p[12], p[13], p[14]
    numbers, blocks = (batch * height * width * channels,), (channels + LANES - 1) // LANES
    images, filtered, normed = floats(p[2], numbers), floats(p[8], numbers), floats(p[9], numbers)
    weights, biases, eps = floats(p[3], (9, channels)), floats(p[4], (channels,)), floats(p[7], (1,))[0]
    whole = zeros(3 * blocks * LANES).reshape(3, blocks * LANES)
    whole[0, :channels], whole[1, :channels], whole[2, :channels] = (
        1,
        floats(p[5], (channels,)),
        floats(p[6], (channels,)),
    )
    taps = zeros(blocks * 10 * LANES).reshape(blocks, 10 * LANES)
    for c in range(channels):
        for n in range(9):
            taps[c // LANES, n * LANES + c % LANES] = weights[n, c]
        taps[c // LANES, 9 * LANES + c % LANES] = biases[c]
    stride = (width + 2) * LANES
    step = (LOCAL + 1) * stride  # from one block's lines to the next; the last line stays zero
    lines = zeros(blocks * step)
    row = zeros(blocks * width * LANES)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        origin, piece = job // pieces * height * width * channels, job % pieces
        first, last = height * piece // pieces, height * (piece + 1) // pieces
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
            normalise(row, width, channels, whole[0], whole[1], whole[2], eps, filtered, normed, at)


@kernel
def average_regions(call, thread, threads):
    """Means (B, S S, C) of images (B, H, W, C) over S x S regions.

    ``call`` holds from index 2 on: the addresses of the images and the means; B, H, W, C, the stride of images' tokens
    and S.
    """
    p = carray(call, 10)
    batch, height, width, channels, stride, grid = p[4], p[5], p[6], p[7], p[8], p[9]
    images, means = floats(p[2], (1 << 60,)), floats(p[3], (batch * grid * grid * channels,))
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        b, i, j = job // (grid * grid), job // grid % grid, job % grid
        top, bottom = height * i // grid, (height * (i + 1) + grid - 1) // grid
        left, right = width * j // grid, (width * (j + 1) + grid - 1) // grid
        for c in range(0, channels, LANES):
            lanes, both = min(LANES, channels - c), spread(np.float32(0))
            for y in range(top, bottom):
                line = spread(np.float32(0))
                for x in range(left, right):
                    line = line + load_part(images, ((b * height + y) * width + x) * stride + c, lanes)
                both = both + line
            both = both * spread(np.float32(1) / np.float32((bottom - top) * (right - left)))
            store_part(means, job * channels + c, both, lanes)


@kernel
def join(call, thread, threads):
    """out (B, T, C + Cc) = features beside share * context + weight * prior + bias, the last two terms if asked for.

    ``call`` holds from index 2 on: the addresses of features, context, prior, share, weight, bias (Cc each) and out;
    the tokens B T, C, Cc; the strides of the tokens of features, context and prior; whether to add the prior; and the
    pieces.
    """
    p = carray(call, 17)
    tokens, channels, beside = p[9], p[10], p[11]
    everything = (1 << 60,)
    features, context, prior = floats(p[2], everything), floats(p[3], everything), floats(p[4], everything)
    kept, weight, bias, out = (
        floats(p[5], everything),
        floats(p[6], everything),
        floats(p[7], everything),
        floats(p[8], everything),
    )
    begin, end = share(p, thread, threads)
    for t in range(tokens * begin // p[16], tokens * end // p[16]):
        place = t * (channels + beside)
        for c in range(0, channels, LANES):
            lanes = min(LANES, channels - c)
            store_part(out, place + c, load_part(features, t * p[12] + c, lanes), lanes)
        for c in range(0, beside, LANES):
            lanes = min(LANES, beside - c)
            value = load_part(context, t * p[13] + c, lanes)
            if p[15]:
                value = value * load_part(kept, c, lanes) + load_part(bias, c, lanes)
                value = value + load_part(prior, t * p[14] + c, lanes) * load_part(weight, c, lanes)
            store_part(out, place + channels + c, value, lanes)
