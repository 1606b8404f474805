"""All gradients of the residual 3 x 3 depthwise convolution of the blocks on CPU, in one pass over its two maps."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from overlock.kernels.numba.activations import exp2, normal_cdf
from overlock.kernels.numba.arguments import INT64, MAP, POINTER
from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.kernels.numba.depthwise import filter_three, prefetch_row, read_row
from overlock.kernels.numba.depthwise_gradients import correlate_three, gradients_in_turn, with_residual
from overlock.kernels.numba.repconv import task_splits
from overlock.kernels.numba.repconv_tiles import cut
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, maps, run, task_range
from overlock.kernels.numba.simd import LANES, aligned_zeros, broadcast, load, masked_load, masked_store, store

HELD, ZEROS = 3, 3  # rows that a filter spans, and the place of a row of zeros after them


@njit(**OPTIONS)
def read_activated(images, first, channels, width, lanes, line, slopes, place):
    """One row of GELU of up to LANES channels into ``line``, and of its derivative into ``slopes``."""
    prefetch_row(images, first + width * channels, channels, width)
    for x in range(width):
        value = masked_load(images, first + x * channels, lanes)
        share = normal_cdf(value)
        density = exp2(value * value * broadcast(np.float32(-0.72134752))) * broadcast(np.float32(0.39894228))
        store(line, place + x * LANES, value * share)
        store(slopes, place + x * LANES, share + value * density)


@njit(**OPTIONS)
def write_gradients(row, slopes, place, gelu, width, lanes, out, first, channels):
    """A filtered row, with GELU times its derivative, to its place."""
    for x in range(width):
        value = load(row, x * LANES)
        if gelu:
            value = value * load(slopes, place + x * LANES)
        masked_store(out, first + x * channels, value, lanes)


@njit(**OPTIONS)
def add_row(line, place, width, sums, to):
    """The sum of a row to one before."""
    both = load(sums, to)
    for x in range(width):
        both = both + load(line, place + x * LANES)
    store(sums, to, both)


@kernel(
    x=MAP,  # (B, H, W, C)
    grads=MAP,  # (B, H, W, C)
    taps=POINTER,  # (9, C), from the last to the first
    of_x=MAP,  # (B, H, W, C)
    of_taps=POINTER,  # (splits, 10, C): gradients of the weights, and last of the biases
    batch=INT64,
    height=INT64,
    width=INT64,
    channels=INT64,
    gelu=INT64,  # whether x goes through it first
    bands=INT64,  # of an image's rows
    splits=INT64,  # of the bands of all images
)
def local_backward(call, thread, threads):
    """Gradients of a + conv(a), with a = GELU(x) or x. A task is LANES channels of some bands.

    Three rows of the gradients and of a are at hand, and of the derivatives of GELU.
    """
    batch, height, width, channels, bands = call.batch, call.height, call.width, call.channels, call.bands
    numbers = (batch * height * width * channels,)
    images, grads, of_x = maps(call.x, numbers), maps(call.grads, numbers), maps(call.of_x, numbers)
    weights, of_taps = floats(call.taps, (9 * channels,)), floats(call.of_taps, (call.splits * 10 * channels,))
    stride = (width + 2) * LANES
    lines, grad_lines, slopes = (
        aligned_zeros((HELD + 1) * stride),
        aligned_zeros((HELD + 1) * stride),
        aligned_zeros((HELD + 1) * stride),
    )
    taps, sums, row = aligned_zeros(10 * LANES), aligned_zeros(10 * LANES), aligned_zeros(width * LANES)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        block, split = task // call.splits, task % call.splits
        lanes = min(LANES, channels - block * LANES)
        for n in range(9):
            store(taps, n * LANES, masked_load(weights, n * channels + block * LANES, lanes))
        sums[:] = 0
        first_band, last_band = cut(batch * bands, split, call.splits)
        for index in range(first_band, last_band):
            origin = index // bands * height * width * channels + block * LANES
            top, bottom = cut(height, index % bands, bands)
            ready = max(top - 1, 0)
            for y in range(top, bottom):
                while ready < min(y + 2, height):
                    first, place = origin + ready * width * channels, ready % HELD * stride + LANES
                    read_row(grads, first, channels, width, lanes, 0, grad_lines, place)
                    if call.gelu:
                        read_activated(images, first, channels, width, lanes, lines, slopes, place)
                    else:
                        read_row(images, first, channels, width, lanes, 0, lines, place)
                    ready += 1
                middle = y % HELD * stride
                above = ((y - 1) % HELD if y > 0 else ZEROS) * stride
                below = ((y + 1) % HELD if y + 1 < height else ZEROS) * stride
                filter_three(grad_lines, taps, above, middle, below, width, row, 0)
                write_gradients(
                    row, slopes, middle + LANES, call.gelu, width, lanes, of_x, origin + y * width * channels, channels
                )  # fmt: skip
                correlate_three(
                    grad_lines[middle + LANES :], lines[above:], lines[middle:], lines[below:], LANES, width, sums
                )  # fmt: skip
                add_row(grad_lines, middle + LANES, width, sums, 9 * LANES)
        for n in range(10):
            place = (split * 10 + n) * channels + block * LANES
            masked_store(of_taps, place, load(sums, n * LANES), lanes)


def local_gradients(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of local_conv with respect to x, channels last, weight and bias, these in float32."""
    if weight.shape[3] != 3:
        return gradients_in_turn(grad, x, weight, gelu)
    grads, tokens = to_tokens(grad.to(x.dtype)), to_tokens(x)
    batch, height, width, channels = tokens.shape
    blocks = -(-channels // LANES)
    bands = max(1, min(height // 8, 4 * torch.get_num_threads() // (blocks * batch)))
    splits = task_splits(blocks, batch * bands)
    of_x, of_taps = torch.empty_like(tokens), torch.empty(splits, 10, channels)
    run(
        local_backward, blocks * splits, x=tokens, grads=grads,
        taps=with_residual(weight).flip(1, 2).flatten(1).t().float().contiguous(), of_x=of_x, of_taps=of_taps,
        batch=batch, height=height, width=width, channels=channels, gelu=int(gelu), bands=bands, splits=splits,
    )  # fmt: skip
    both = of_taps.sum(0)
    return to_images(of_x), both[:9].t().unflatten(1, (1, 3, 3)), both[9]
