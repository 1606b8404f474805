"""Depthwise convolution and its gradients on CPU in float32, by numba; the filters themselves are in depthwise.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.kernels.numba.depthwise import GELU_BEFORE, filter_tokens, read_row
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, run, share
from overlock.kernels.numba.simd import LANES, load, spread, store, store_part, zeros

ZERO = np.float32(0)


@njit(**OPTIONS)
def add(sums, to, value):
    store(sums, to, load(sums, to) + value)


@njit(**OPTIONS)
def correlate_three(row, above, here, below, step, width, sums):
    """Add a row of gradients times the nine values around each place to the nine sums."""
    a = b = c = d = e = f = g = h = i = spread(ZERO)
    for x in range(0, width * LANES, LANES):
        y = load(row, x)
        a, b, c = a + y * load(above, x), b + y * load(above, x + step), c + y * load(above, x + 2 * step)
        d, e, f = d + y * load(here, x), e + y * load(here, x + step), f + y * load(here, x + 2 * step)
        g, h, i = g + y * load(below, x), h + y * load(below, x + step), i + y * load(below, x + 2 * step)
    add(sums, 0, a)
    add(sums, LANES, b)
    add(sums, 2 * LANES, c)
    add(sums, 3 * LANES, d)
    add(sums, 4 * LANES, e)
    add(sums, 5 * LANES, f)
    add(sums, 6 * LANES, g)
    add(sums, 7 * LANES, h)
    add(sums, 8 * LANES, i)


@njit(**OPTIONS)
def correlate_five(row, line, first, step, width, sums, to):
    """Add a row of gradients times five neighbours in a row of values to five sums."""
    a = b = c = d = e = spread(ZERO)
    for x in range(0, width * LANES, LANES):
        y, at = load(row, x), first + x
        a, b = a + y * load(line, at), b + y * load(line, at + step)
        c, d = c + y * load(line, at + 2 * step), d + y * load(line, at + 3 * step)
        e = e + y * load(line, at + 4 * step)
    add(sums, to, a)
    add(sums, to + LANES, b)
    add(sums, to + 2 * LANES, c)
    add(sums, to + 3 * LANES, d)
    add(sums, to + 4 * LANES, e)


@njit(**OPTIONS)
def correlate_seven(row, line, first, step, width, sums, to):
    """The same for seven."""
    a = b = c = d = e = f = g = spread(ZERO)
    for x in range(0, width * LANES, LANES):
        y, at = load(row, x), first + x
        a, b = a + y * load(line, at), b + y * load(line, at + step)
        c, d = c + y * load(line, at + 2 * step), d + y * load(line, at + 3 * step)
        e, f = e + y * load(line, at + 4 * step), f + y * load(line, at + 5 * step)
        g = g + y * load(line, at + 6 * step)
    add(sums, to, a)
    add(sums, to + LANES, b)
    add(sums, to + 2 * LANES, c)
    add(sums, to + 3 * LANES, d)
    add(sums, to + 4 * LANES, e)
    add(sums, to + 5 * LANES, f)
    add(sums, to + 6 * LANES, g)


@njit(**OPTIONS)
def correlate_row(row, lines, order, begin, end, size, padded, step, stride, width, sums):
    """Add what a row of gradients gives to the sums of all taps, (size, padded) of them."""
    for k in range(begin, end):
        n, line, to = 0, order[k] * stride, k * padded * LANES
        while n < size:
            left = size - n
            if left < 5 or left % 5 == 0 or left == 9:
                correlate_five(row, lines, line + n * step, step, width, sums, to + n * LANES)
                n += 5
            else:
                correlate_seven(row, lines, line + n * step, step, width, sums, to + n * LANES)
                n += 7


@kernel
def correlate(call, thread, threads):
    """Gradients (pieces, K K + 1, C) of depthwise filters, and last of biases, from images and gradients (B, H, W, C).

    Around the images are zeros.

    ``call`` holds from index 2 on: the addresses of images, gradients and out; B, H, W, C, K, the dilation, the pieces
    that the images are cut into, each with sums of its own, and GELU_BEFORE if that is done to the images. The rows
    that a filter spans are kept at hand.
    """
    p = carray(call, 13)
    batch, height, width, channels, size, dilation, pieces = p[5], p[6], p[7], p[8], p[9], p[10], p[11]
    images, grads = (
        floats(p[2], (batch * height * width * channels,)),
        floats(p[3], (batch * height * width * channels,)),
    )
    out = floats(p[4], (pieces * (size * size + 1) * channels,))
    blocks, half, span = (channels + LANES - 1) // LANES, size // 2 * dilation, (size - 1) * dilation + 1
    step, padded = dilation * LANES, size + 6
    biases = size * padded * LANES
    stride = (width + span - 1 + 6 * dilation) * LANES
    lines, order = zeros((span + 1) * stride), np.zeros(size, np.int64)
    row, sums = zeros(width * LANES), zeros((size * padded + 1) * LANES)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        piece, block = job // blocks, job % blocks
        lanes = min(LANES, channels - block * LANES)
        sums[:] = 0
        for b in range(batch * piece // pieces, batch * (piece + 1) // pieces):
            origin, ready = b * height * width * channels + block * LANES, 0
            for y in range(height):
                while ready < min(y + half + 1, height):
                    first = origin + ready * width * channels
                    read_row(images, first, channels, width, lanes, p[12], lines, ready % span * stride + half * LANES)
                    ready += 1
                read_row(grads, origin + y * width * channels, channels, width, lanes, 0, row, 0)
                both = load(sums, biases)
                for x in range(width):
                    both = both + load(row, x * LANES)
                store(sums, biases, both)
                for k in range(size):
                    at = y - half + k * dilation
                    order[k] = at % span if 0 <= at < height else span  # the last line holds zeros
                if size == 3:
                    a, b_, c = order[0] * stride, order[1] * stride, order[2] * stride
                    correlate_three(row, lines[a:], lines[b_:], lines[c:], step, width, sums)
                else:
                    top, bottom = 0, size
                    while top < size and order[top] == span:
                        top += 1
                    while bottom > top and order[bottom - 1] == span:
                        bottom -= 1
                    correlate_row(row, lines, order, top, bottom, size, padded, step, stride, width, sums)
        to = piece * (size * size + 1) * channels + block * LANES
        for k in range(size):
            for n in range(size):
                at = (k * size + n if size == 3 else k * padded + n) * LANES
                store_part(out, to + (k * size + n) * channels, load(sums, at), lanes)
        store_part(out, to + size * size * channels, load(sums, biases), lanes)


def _filter(x: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
    """Images (B, C, H, W) filtered with weights (C, K, K), channels last."""
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    return to_images(filter_tokens(to_tokens(x), weight.permute(1, 2, 0), bias, **settings))


def _correlate(grad: Tensor, x: Tensor, size: int, dilation: int, steps: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of the weights (C, 1, K, K) and biases (C) that x (B, C, H, W) is filtered with."""
    grads, images = to_tokens(grad), to_tokens(x)
    batch, height, width, channels = images.shape
    blocks = -(-channels // LANES)
    pieces = max(1, min(batch, 8 * torch.get_num_threads() // blocks))
    out = images.new_empty(pieces, size * size + 1, channels)
    sizes = (batch, height, width, channels, size, dilation, pieces, steps)
    run(correlate, pieces * blocks, images, grads, out, *sizes)
    both = out.sum(dim=0)
    return both[:-1].view(size, size, channels).permute(2, 0, 1)[:, None], both[-1]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Images (B, C, H, W) filtered with weights (C, 1, K, K), channels last."""
    return _filter(x, weight[:, 0], bias, dilation=dilation)


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:  # noqa: ARG001
    """Gradient of the convolution with respect to its input, channels last."""
    return _filter(grad, weight[:, 0].flip(1, 2), None, dilation=dilation)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Gradient of the convolution with respect to its weight (C, 1, K, K)."""
    return _correlate(grad, x, weight.shape[3], dilation)[0]


def _with_residual(weight: Tensor) -> Tensor:
    """Weights (C, 1, K, K) as (C, K, K) whose centre carries the residual."""
    middle, both = weight.shape[3] // 2, weight[:, 0].clone()
    both[:, middle, middle] += 1
    return both


def local_conv(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """See overlock.ops.local_conv; channels last."""
    return _filter(x, _with_residual(weight), bias, steps=GELU_BEFORE if gelu else 0)


def local_gradients(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of local_conv with respect to x, channels last, weight and bias."""
    of_x = _filter(grad, _with_residual(weight).flip(1, 2), None, before_gelu=to_tokens(x) if gelu else None)
    return of_x, *_correlate(grad, x, weight.shape[3], 1, GELU_BEFORE if gelu else 0)
