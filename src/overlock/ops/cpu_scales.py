"""The numba code of inference.py: channel attention and response norm, two passes over tokens (B, T, C).

The first pass takes sums, or sums of squares, over a piece of the tokens, the second finds the scale of every
channel from all of them and applies it to its piece. Each image is cut into as many pieces as there are threads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from overlock.ops.threads import OPTIONS, floats, kernel, run, share
from overlock.ops.vectors import LANES, load, load_part, silu, spread, store, store_part

LONGEST = 64  # tokens summed up in float32 before they join a sum in float64


@kernel
def sum_up(call, thread, threads):
    """Partial sums (B, pieces, C) of x (B, T, C), plus ``other`` where there is one, written to ``out``; or of squares.

    ``call`` holds from index 2 on: the addresses of x, other, out and the sums; B, T, C, pieces, whether there is an
    other, and whether to square.
    """
    p = carray(call, 12)
    batch, tokens, channels, pieces = p[6], p[7], p[8], p[9]
    numbers = (batch * tokens * channels,)
    x, other, out = floats(p[2], numbers), floats(p[3], numbers), floats(p[4], numbers)
    sums = floats(p[5], (batch, pieces, channels))
    begin, end = share(p, thread, threads)
    lane, exact = np.zeros(LANES, np.float32), np.zeros(channels + LANES, np.float64)
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
                    if p[10]:
                        value = value + load_part(other, place, width)
                        store_part(out, place, value, width)
                    both = both + (value * value if p[11] else value)
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
def excite_and_gate(call, thread, threads):
    """out (B, T, C) = x * scale, times silu(gate) where there is one; the scale from sums (B, pieces, C).

    ``call`` holds from index 2 on: the addresses of x, gate, out, sums, and of the four parameters; B, T, C, pieces,
    the hidden width, and whether there is a gate.
    """
    p = carray(call, 16)
    batch, tokens, channels, pieces, width = p[10], p[11], p[12], p[13], p[14]
    numbers = (batch * tokens * channels,)
    x, gate, out = floats(p[2], numbers), floats(p[3], numbers), floats(p[4], numbers)
    sums, reduce_weight, reduce_bias = (
        floats(p[5], (batch, pieces, channels)),
        floats(p[6], (width, channels)),
        floats(p[7], (width,)),
    )
    expand_weight, expand_bias = floats(p[8], (channels, width)), floats(p[9], (channels,))
    means, hidden, scale = (
        np.empty(channels, np.float32),
        np.empty(width, np.float32),
        np.zeros(channels + LANES, np.float32),
    )
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        b, piece = job // pieces, job % pieces
        for c in range(channels):
            total = 0.0
            for i in range(pieces):
                total += sums[b, i, c]
            means[c] = total / tokens
        excite(means, reduce_weight, reduce_bias, expand_weight, expand_bias, hidden, scale[:channels])
        for t in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            for c in range(0, channels, LANES):
                place, lanes = (b * tokens + t) * channels + c, min(LANES, channels - c)
                value = load_part(x, place, lanes) * load(scale, c)
                store_part(out, place, value * silu(load_part(gate, place, lanes)) if p[15] else value, lanes)


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
    sums, eps = floats(p[6], (batch, parts, channels)), floats(p[7], (1,))[0]
    scale, shift = np.zeros(channels + LANES, np.float32), np.zeros(channels + LANES, np.float32)
    shift[:channels] = bias
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        b, piece = job // pieces, job % pieces
        mean = 0.0
        for c in range(channels):
            total = 0.0
            for i in range(parts):
                total += sums[b, i, c]
            scale[c] = math.sqrt(total)
            mean += scale[c] / channels
        for c in range(channels):
            scale[c] = np.float32(1) + weight[c] * scale[c] / (np.float32(mean) + eps)
        for t in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            for c in range(0, channels, LANES):
                place, lanes = (b * tokens + t) * channels + c, min(LANES, channels - c)
                store_part(out, place, load_part(x, place, lanes) * load(scale, c) + load(shift, c), lanes)


def _pieces(batch: int, tokens: int) -> int:
    return max(1, min(-(-2 * torch.get_num_threads() // batch), tokens // 8))


def squeeze_excite(
    x: Tensor, other: Tensor | None, gate: Tensor | None,
    reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor,
) -> Tensor:  # fmt: skip
    """SE(x + other) * silu(gate) of contiguous (B, T, C); the last two where given."""
    batch, tokens, channels = x.shape
    pieces = _pieces(batch, tokens)
    out, sums = torch.empty_like(x), x.new_empty(batch, pieces, channels)
    sizes = (batch, tokens, channels, pieces)
    run(sum_up, batch * pieces, x, x if other is None else other, out, sums, *sizes, other is not None, 0)
    parameters = [p.contiguous() for p in (reduce_weight, reduce_bias, expand_weight, expand_bias)]
    summed = x if other is None else out
    width = reduce_weight.shape[0]
    run(
        excite_and_gate, batch * pieces, summed, x if gate is None else gate, out, sums, *parameters, *sizes, width,
        gate is not None,
    )  # fmt: skip
    return out


def response_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, squares: Tensor | None = None
) -> Tensor:
    """Global response norm of contiguous (B, T, C) into ``out``, which may be ``x``.

    Args:
        squares: each channel's sum of squares (B, C), where it is known already.
    """
    batch, tokens, channels = x.shape
    pieces = _pieces(batch, tokens)
    parts = 1 if squares is not None else pieces
    if squares is None:
        squares = x.new_empty(batch, pieces, channels)
        run(sum_up, batch * pieces, x, x, x, squares, batch, tokens, channels, pieces, 0, 1)
    tensors = (x, weight.contiguous(), bias.contiguous(), out, squares, x.new_full((1,), eps))
    run(scale_by_response, batch * pieces, *tensors, batch, tokens, channels, pieces, parts)
    return out
