"""The numba code of global response norm: sums over maps, and their scaling, in one pass each over tokens (B, T, C)."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.kernels.numba.runtime import floats, kernel, run, share
from overlock.kernels.numba.simd import LANES, load, load_part, spread, store, store_part

LONGEST = 64  # tokens summed up in float32 before their sum joins others


@kernel
def multiply_and_sum(call, thread, threads):
    """Sums (B, pieces, C) of a * b over pieces of the tokens (B, T, C).

    ``call`` holds from index 2 on: the addresses of a, b and the sums; B, T, C and the pieces.
    """
    p = carray(call, 9)
    batch, tokens, channels, pieces = p[5], p[6], p[7], p[8]
    a, b = floats(p[2], (batch * tokens * channels,)), floats(p[3], (batch * tokens * channels,))
    sums = floats(p[4], (batch, pieces, channels))
    line = np.zeros(channels + LANES, np.float32)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        image, piece = job // pieces, job % pieces
        line[:] = 0
        for t in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            place = (image * tokens + t) * channels
            for c in range(0, channels, LANES):
                lanes = min(LANES, channels - c)
                product = load_part(a, place + c, lanes) * load_part(b, place + c, lanes)
                store(line, c, load(line, c) + product)
        for c in range(channels):
            sums[image, piece, c] = line[c]


@kernel
def scale_and_sum(call, thread, threads):
    """out (B, T, C) = a * scale + b * other, or + other where there is no b; scale and other (B, C).

    ``call`` holds from index 2 on: the addresses of a, scale, b, other and out; B, T, C, the pieces of the tokens, and
    whether there is a b.
    """
    p = carray(call, 12)
    batch, tokens, channels, pieces = p[7], p[8], p[9], p[10]
    numbers = batch * tokens * channels
    a, b, out = floats(p[2], (numbers,)), floats(p[4], (numbers,)), floats(p[6], (numbers,))
    scale, other = floats(p[3], (batch * channels,)), floats(p[5], (batch * channels,))
    one = spread(np.float32(1))
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        image, piece = job // pieces, job % pieces
        for t in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            place = (image * tokens + t) * channels
            for c in range(0, channels, LANES):
                lanes, n = min(LANES, channels - c), image * channels + c
                factor = load_part(b, place + c, lanes) if p[11] else one
                value = load_part(a, place + c, lanes) * load_part(scale, n, lanes)
                store_part(out, place + c, value + factor * load_part(other, n, lanes), lanes)


def _tokens(x: Tensor) -> Tensor:
    return to_tokens(x).flatten(1, 2)


def sum_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b (B, C, H, W) over the maps, (B, C)."""
    first = _tokens(a)
    second = first if b is a else _tokens(b)
    batch, tokens, channels = first.shape
    pieces = max(-(-tokens // LONGEST), 1)
    sums = a.new_empty(batch, pieces, channels)
    run(multiply_and_sum, batch * pieces, first, second, sums, batch, tokens, channels, pieces)
    return sums.sum(dim=1)


def scale_and_add(a: Tensor, scale: Tensor, b: Tensor | None, other: Tensor) -> Tensor:
    """a * scale + b * other, or + other without b; maps (B, C, H, W), numbers (B, C); channels last."""
    first = _tokens(a)
    second = first if b is None else _tokens(b)
    batch, tokens, channels = first.shape
    pieces = max(1, min(-(-2 * torch.get_num_threads() // batch), tokens))
    out = torch.empty_like(first)
    tensors = (first, scale.contiguous(), second, other.contiguous(), out)
    run(scale_and_sum, batch * pieces, *tensors, batch, tokens, channels, pieces, b is not None)
    return to_images(out.unflatten(1, a.shape[2:]))
