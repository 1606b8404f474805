"""The numba code of channel attention and response norm: sums over the tokens (B, T, C) and the scales made of them.

Each image is cut into as many pieces as keep all threads busy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, njit

from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, share
from overlock.kernels.numba.simd import LANES, load, load_part, spread, store, store_part, zeros

LONGEST = 64  # tokens summed up in float32 before they join a sum in float64


@kernel
def sum_up(call, thread, threads):
    """Partial sums (B, pieces, C) of x (B, T, C), or of its squares.

    ``call`` holds from index 2 on: the addresses of x and the sums; B, T, C, pieces, and whether to square.
    """
    p = carray(call, 9)
    batch, tokens, channels, pieces = p[4], p[5], p[6], p[7]
    x, sums = floats(p[2], (batch * tokens * channels,)), floats(p[3], (batch, pieces, channels))
    begin, end = share(p, thread, threads)
    lane, exact = zeros(LANES), np.zeros(channels + LANES, np.float64)
    for job in range(begin, end):
        b, piece = job // pieces, job % pieces
        first, last = tokens * piece // pieces, tokens * (piece + 1) // pieces
        exact[:] = 0
        for start in range(first, last, LONGEST):
            for c in range(0, channels, LANES):
                width, both = min(LANES, channels - c), spread(np.float32(0))
                for t in range(start, min(start + LONGEST, last)):
                    place = (b * tokens + t) * channels + c
                    value = load_part(x, place, width)
                    both = both + (value * value if p[8] else value)
                store(lane, 0, both)
                for i in range(LANES):
                    exact[c + i] += lane[i]
        for c in range(channels):
            sums[b, piece, c] = exact[c]


@njit(**OPTIONS)
def excite(means, reduce_weight, reduce_bias, expand_weight, expand_bias, hidden, scale):
    """scale (C) = sigmoid(W2 gelu(W1 means + b1) + b2)."""
    for r in range(hidden.size):
        z = reduce_bias[r]
        for c in range(means.size):
            z += reduce_weight[r, c] * means[c]
        hidden[r] = np.float32(0.5) * z * (np.float32(1) + np.float32(math.erf(z * np.float32(0.70710678))))
    for c in range(means.size):
        z = expand_bias[c]
        for r in range(hidden.size):
            z += expand_weight[c, r] * hidden[r]
        scale[c] = np.float32(1) / (np.float32(1) + np.float32(math.exp(-z)))


@kernel
def excite_images(call, thread, threads):
    """scale (B, C) = sigmoid(W2 gelu(W1 means + b1) + b2), the means from sums (B, parts, C) over the tokens.

    ``call`` holds from index 2 on: the addresses of the sums, the four parameters and the scale; B, T, C, the parts and
    the hidden width.
    """
    p = carray(call, 13)
    batch, tokens, channels, parts, width = p[8], p[9], p[10], p[11], p[12]
    sums, scale = floats(p[2], (batch, parts, channels)), floats(p[7], (batch, channels))
    reduce_weight, reduce_bias = floats(p[3], (width, channels)), floats(p[4], (width,))
    expand_weight, expand_bias = floats(p[5], (channels, width)), floats(p[6], (channels,))
    means, hidden = np.empty(channels, np.float32), np.empty(width, np.float32)
    begin, end = share(p, thread, threads)
    for b in range(begin, end):
        for c in range(channels):
            both = 0.0
            for i in range(parts):
                both += sums[b, i, c]
            means[c] = both / tokens
        excite(means, reduce_weight, reduce_bias, expand_weight, expand_bias, hidden, scale[b])


@njit(**OPTIONS)
def respond(sums, first, parts, weight, eps, scale):
    """scale (C) = 1 + weight * g / (mean of g + eps), with g the roots of sums (parts, C) from ``first`` on."""
    channels, mean = weight.size, 0.0
    for c in range(channels):
        total = 0.0
        for i in range(parts):
            total += sums[first + i * channels + c]
        scale[c] = math.sqrt(total)
        mean += scale[c] / channels
    for c in range(channels):
        scale[c] = np.float32(1) + weight[c] * scale[c] / (np.float32(mean) + eps)


@kernel
def response_scale(call, thread, threads):
    """scale (B, C) = 1 + weight * g / (mean of g + eps), with g the roots of sums (B, parts, C).

    ``call`` holds from index 2 on: the addresses of the sums, weight, eps and scale; B, C and the parts.
    """
    p = carray(call, 9)
    batch, channels, parts = p[6], p[7], p[8]
    sums, scale = floats(p[2], (batch * parts * channels,)), floats(p[5], (batch, channels))
    weight, eps = floats(p[3], (channels,)), floats(p[4], (1,))[0]
    begin, end = share(p, thread, threads)
    for b in range(begin, end):
        respond(sums, b * parts * channels, parts, weight, eps, scale[b])


@kernel
def scale_by_response(call, thread, threads):
    """out (B, T, C) = x * (1 + weight * g / (mean of g + eps)) + bias, with g the roots of sums (B, parts, C).

    ``call`` holds from index 2 on: the addresses of x, weight, bias, out, sums and eps; B, T, C, the pieces to
    work on and those that there are sums of.
    """
    p = carray(call, 13)
    batch, tokens, channels, pieces, parts = p[8], p[9], p[10], p[11], p[12]
    numbers = (batch * tokens * channels,)
    x, weight, bias, out = (
        floats(p[2], numbers),
        floats(p[3], (channels,)),
        floats(p[4], (channels,)),
        floats(p[5], numbers),
    )
    sums, eps = floats(p[6], (batch * parts * channels,)), floats(p[7], (1,))[0]
    scale, shift = zeros(channels + LANES), zeros(channels + LANES)
    shift[:channels] = bias
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        b, piece = job // pieces, job % pieces
        respond(sums, b * parts * channels, parts, weight, eps, scale)
        for t in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            for c in range(0, channels, LANES):
                place, lanes = (b * tokens + t) * channels + c, min(LANES, channels - c)
                store_part(out, place, load_part(x, place, lanes) * load(scale, c) + load(shift, c), lanes)


def pieces_of(batch: int, tokens: int) -> int:
    return max(1, min(-(-2 * torch.get_num_threads() // batch), tokens // 8))
