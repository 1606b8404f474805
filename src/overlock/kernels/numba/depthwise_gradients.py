"""Depthwise convolution and its gradients on CPU, by numba, with sums in float32; the filters are in depthwise.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from overlock.kernels.numba.arguments import INT64, MAP, POINTER
from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.kernels.numba.depthwise import filter_tokens, read_row
from overlock.kernels.numba.flags import GELU
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, maps, run, task_range
from overlock.kernels.numba.simd import LANES, aligned_zeros, broadcast, load, masked_store, store
from overlock.kernels.numba.vector_tuples import add_all, load_all, multiply_add, repeat

ZERO = np.float32(0)


@njit(**OPTIONS)
def correlate_three(row, above, here, below, step, width, sums):
    """Add a row of gradients times the nine values around each place to the nine sums."""
    first = second = third = repeat(broadcast(ZERO), 3)
    for x in range(0, width * LANES, LANES):
        y = load(row, x)
        first = multiply_add(first, y, load_all(above, x, step, 3))
        second = multiply_add(second, y, load_all(here, x, step, 3))
        third = multiply_add(third, y, load_all(below, x, step, 3))
    add_all(sums, 0, LANES, first)
    add_all(sums, 3 * LANES, LANES, second)
    add_all(sums, 6 * LANES, LANES, third)


def _correlate_columns(count):
    """Add a row of gradients times ``count`` neighbours in a row of values to as many sums."""

    @njit(**OPTIONS)
    def correlate_columns(row, line, first, step, width, sums, to):
        added = repeat(broadcast(ZERO), count)
        for x in range(0, width * LANES, LANES):
            added = multiply_add(added, load(row, x), load_all(line, first + x, step, count))
        add_all(sums, to, LANES, added)

    return correlate_columns


correlate_five, correlate_seven = _correlate_columns(5), _correlate_columns(7)


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


@kernel(
    x=MAP,  # (B, H, W, C)
    grads=MAP,  # (B, H, W, C)
    out=POINTER,  # (splits, K K + 1, C): gradients of the weights, and last of the biases
    batch=INT64,
    height=INT64,
    width=INT64,
    channels=INT64,
    kernel_size=INT64,
    dilation=INT64,
    prologue=INT64,
    splits=INT64,  # of the batch
)
def correlate(call, thread, threads):
    """Gradients of depthwise filters from prologue(x) and gradients. A task is LANES channels of some images.

    Around the images are zeros. The rows that a filter spans are kept at hand.
    """
    batch, height, width, channels = call.batch, call.height, call.width, call.channels
    size, dilation, splits = call.kernel_size, call.dilation, call.splits
    numbers = (batch * height * width * channels,)
    images, grads = maps(call.x, numbers), maps(call.grads, numbers)
    out = floats(call.out, (splits * (size * size + 1) * channels,))
    blocks, half, span = (channels + LANES - 1) // LANES, size // 2 * dilation, (size - 1) * dilation + 1
    step, padded = dilation * LANES, size + 6
    biases = size * padded * LANES
    stride = (width + span - 1 + 6 * dilation) * LANES
    lines, order = aligned_zeros((span + 1) * stride), np.zeros(size, np.int64)
    row, sums = aligned_zeros(width * LANES), aligned_zeros((size * padded + 1) * LANES)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        split, block = task // blocks, task % blocks
        lanes = min(LANES, channels - block * LANES)
        sums[:] = 0
        for b in range(batch * split // splits, batch * (split + 1) // splits):
            origin, ready = b * height * width * channels + block * LANES, 0
            for y in range(height):
                while ready < min(y + half + 1, height):
                    first, place = origin + ready * width * channels, ready % span * stride + half * LANES
                    read_row(images, first, channels, width, lanes, call.prologue, lines, place)
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
                    above, here, below = order[0] * stride, order[1] * stride, order[2] * stride
                    correlate_three(row, lines[above:], lines[here:], lines[below:], step, width, sums)
                else:
                    top, bottom = 0, size
                    while top < size and order[top] == span:
                        top += 1
                    while bottom > top and order[bottom - 1] == span:
                        bottom -= 1
                    correlate_row(row, lines, order, top, bottom, size, padded, step, stride, width, sums)
        to = split * (size * size + 1) * channels + block * LANES
        for k in range(size):
            for n in range(size):
                at = (k * size + n if size == 3 else k * padded + n) * LANES
                masked_store(out, to + (k * size + n) * channels, load(sums, at), lanes)
        masked_store(out, to + size * size * channels, load(sums, biases), lanes)


def _filter(x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool = False, **settings: Any) -> Tensor:
    """Images (B, C, H, W) filtered with weights (C, K, K), or those turned by half a circle, channels last."""
    bias = torch.zeros(x.shape[1]) if bias is None else bias
    taps = weight.permute(1, 2, 0).contiguous()  # flipped after it, where whole rows of channels move
    return to_images(filter_tokens(to_tokens(x), taps.flip(0, 1) if reverse else taps, bias, **settings))


def _correlate(grad: Tensor, x: Tensor, size: int, dilation: int, prologue: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of the weights (C, 1, K, K) and biases (C) that x (B, C, H, W) is filtered with."""
    grads, images = to_tokens(grad).to(x.dtype), to_tokens(x)
    batch, height, width, channels = images.shape
    blocks = -(-channels // LANES)
    splits = max(1, min(batch, 8 * torch.get_num_threads() // blocks))
    out = torch.empty(splits, size * size + 1, channels)
    run(
        correlate, splits * blocks, x=images, grads=grads, out=out, batch=batch, height=height, width=width,
        channels=channels, kernel_size=size, dilation=dilation, prologue=prologue, splits=splits,
    )  # fmt: skip
    both = out.sum(dim=0) if splits > 1 else out[0]
    return both[:-1].t().reshape(channels, 1, size, size), both[-1]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Images (B, C, H, W) filtered with weights (C, 1, K, K), channels last."""
    return _filter(x, weight[:, 0], bias, dilation=dilation)


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:  # noqa: ARG001
    """Gradient of the convolution with respect to its input, channels last."""
    return _filter(grad, weight[:, 0], None, reverse=True, dilation=dilation)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Gradient of the convolution with respect to its weight (C, 1, K, K), in float32."""
    return _correlate(grad, x, weight.shape[3], dilation)[0]


def with_residual(weight: Tensor) -> Tensor:
    """Weights (C, 1, K, K) as (C, K, K) whose centre carries the residual."""
    middle, both = weight.shape[3] // 2, weight[:, 0].clone()
    both[:, middle, middle] += 1
    return both


def local_conv(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """See overlock.ops.local_conv; channels last."""
    return _filter(x, with_residual(weight), bias, prologue=GELU if gelu else 0)


def gradients_in_turn(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of local_conv with respect to x, channels last, and to weight and bias, in a pass each."""
    of_x = _filter(grad, with_residual(weight), None, reverse=True, before_gelu=to_tokens(x) if gelu else None)
    return of_x, *_correlate(grad, x, weight.shape[3], 1, GELU if gelu else 0)
