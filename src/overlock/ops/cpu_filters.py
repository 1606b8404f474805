"""Depthwise filters on CPU by numba, with what comes before and after them in one pass over memory."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from overlock.ops.threads import OPTIONS, floats, kernel, run, share
from overlock.ops.vectors import LANES, gelu, gelu_gradient, load, load_part, store, store_part

# What is done in the same pass, added up.
GELU_BEFORE, GELU_AFTER, SQUARES, SUMS, GELU_GRADIENT = 1, 2, 4, 8, 16


@njit(**OPTIONS)
def read_row(images, first, channels, width, lanes, steps, line, place):
    """One row of up to LANES channels into ``line``, whose margins stay zero."""
    for x in range(width):
        value = load_part(images, first + x * channels, lanes)
        store(line, place + x * LANES, gelu(value) if steps & GELU_BEFORE else value)


@njit(**OPTIONS)
def filter_seven(lines, weights, order, begin, end, size, step, stride, place, out, to):
    """Seven neighbours of a row: each weight is read once for all."""
    a = b = c = d = e = f = g = load(weights, size * size * LANES)
    for k in range(begin, end):
        x, n = order[k] * stride + place, k * size * LANES
        for j in range(size):
            w, at = load(weights, n + j * LANES), x + j * step
            a, b = a + w * load(lines, at), b + w * load(lines, at + LANES)
            c, d = c + w * load(lines, at + 2 * LANES), d + w * load(lines, at + 3 * LANES)
            e, f = e + w * load(lines, at + 4 * LANES), f + w * load(lines, at + 5 * LANES)
            g = g + w * load(lines, at + 6 * LANES)
    store(out, to, a)
    store(out, to + LANES, b)
    store(out, to + 2 * LANES, c)
    store(out, to + 3 * LANES, d)
    store(out, to + 4 * LANES, e)
    store(out, to + 5 * LANES, f)
    store(out, to + 6 * LANES, g)


@njit(**OPTIONS)
def filter_one(lines, weights, order, begin, end, size, step, stride, place, out, to):
    a = load(weights, size * size * LANES)
    for k in range(begin, end):
        x, n = order[k] * stride + place, k * size * LANES
        for j in range(size):
            a = a + load(weights, n + j * LANES) * load(lines, x + j * step)
    store(out, to, a)


@njit(**OPTIONS)
def write_row(row, width, lanes, steps, out, first, channels, squares, others):
    """A filtered row to its place, and its squares to those of the rows before."""
    both = load(squares, 0)
    for x in range(width):
        value = load(row, x * LANES)
        if steps & GELU_AFTER:
            value = gelu(value)
        if steps & GELU_GRADIENT:
            value = value * gelu_gradient(load_part(others, first + x * channels, lanes))
        if steps & SQUARES:
            both = both + value * value
        if steps & SUMS:
            both = both + value
        store_part(out, first + x * channels, value, lanes)
    store(squares, 0, both)


@kernel
def depthwise(call, thread, threads):
    """Filter images (B, H, W, C) with weights (K K, C) and bias (C), zeros around them, into out (B, H, W, C).

    ``call`` holds from index 2 on: the addresses of images, weights, bias, out and sums (B, C), which takes the sums of
    the results or of their squares; B, H, W, C, K, the steps, and the pieces that the rows are cut into, 1 where
    ``out`` is ``images`` or there are sums to take; the dilation; and the address of other images, which GELU_GRADIENT
    reads. LANES channels of the rows that a filter spans are kept at hand, so that it can write over what it reads.
    """
    p = carray(call, 16)
    batch, height, width, channels, size, steps, pieces = p[7], p[8], p[9], p[10], p[11], p[12], p[13]
    dilation, others = p[14], floats(p[15], (batch * height * width * channels,))
    images, out = floats(p[2], (batch * height * width * channels,)), floats(p[5], (batch * height * width * channels,))
    weights, bias, sums = (
        floats(p[3], (size * size, channels)),
        floats(p[4], (channels,)),
        floats(p[6], (batch, channels)),
    )
    blocks, half, span = (channels + LANES - 1) // LANES, size // 2 * dilation, (size - 1) * dilation + 1
    stride = (width + span - 1) * LANES
    lines, order = np.zeros(span * stride, np.float32), np.zeros(size, np.int64)
    row, taps = np.zeros(width * LANES, np.float32), np.zeros((size * size + 1) * LANES, np.float32)
    squares, sum_of_squares = np.zeros(LANES, np.float32), np.zeros(LANES, np.float64)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        b, block, piece = job // (blocks * pieces), job // pieces % blocks, job % pieces
        lanes, first_row, last_row = (
            min(LANES, channels - block * LANES),
            height * piece // pieces,
            height * (piece + 1) // pieces,
        )
        for c in range(lanes):
            for n in range(size * size):
                taps[n * LANES + c] = weights[n, block * LANES + c]
            taps[size * size * LANES + c] = bias[block * LANES + c]
        origin = b * height * width * channels + block * LANES
        sum_of_squares[:] = 0
        ready = max(first_row - half, 0)
        for y in range(first_row, last_row):
            while ready < min(y + half + 1, height):
                read_row(
                    images, origin + ready * width * channels, channels, width, lanes, steps, lines,
                    ready % span * stride + half * LANES,
                )  # fmt: skip
                ready += 1
            top, bottom = max(-((y - half) // dilation), 0), min(size, (height - 1 - y + half) // dilation + 1)
            for k in range(top, bottom):
                order[k] = (y - half + k * dilation) % span
            for x in range(0, width - 6, 7):
                filter_seven(lines, taps, order, top, bottom, size, dilation * LANES, stride, x * LANES, row, x * LANES)
            for x in range(width - width % 7, width):
                filter_one(lines, taps, order, top, bottom, size, dilation * LANES, stride, x * LANES, row, x * LANES)
            squares[:] = 0
            write_row(row, width, lanes, steps, out, origin + y * width * channels, channels, squares, others)
            for c in range(LANES):
                sum_of_squares[c] += squares[c]
        if steps & (SQUARES | SUMS):
            for c in range(lanes):
                sums[b, block * LANES + c] = sum_of_squares[c]


def filter_tokens(
    tokens: Tensor, weight: Tensor, bias: Tensor, steps: int = 0, dilation: int = 1, before_gelu: Tensor | None = None
) -> Tensor:
    """Filter tokens (B, H, W, C) with weight (K, K, C) and bias (C).

    Args:
        steps: GELU_BEFORE, GELU_AFTER or both, added up.
        dilation: distance of a filter's neighbours.
        before_gelu: (B, H, W, C); multiply the result by GELU's derivative there.
    """
    out, jobs = torch.empty_like(tokens), tokens.shape[0] * -(-tokens.shape[3] // LANES)
    pieces = max(1, min(2 * torch.get_num_threads() // jobs, tokens.shape[1] // 8))
    steps = steps if before_gelu is None else steps | GELU_GRADIENT
    sizes = (*tokens.shape, weight.shape[0], steps, pieces, dilation, tokens if before_gelu is None else before_gelu)
    run(depthwise, jobs * pieces, tokens, weight.contiguous(), bias.contiguous(), out, out, *sizes)
    return out
