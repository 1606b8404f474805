"""Sums over the tokens (B, T, C) on CPU, and the scales made of them: channel attention and global response norm.

Each image is cut into as many splits as keep all threads busy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from overlock.kernels.numba.arguments import FLOAT64, INT64, POINTER
from overlock.kernels.numba.flags import SUM_SQUARES
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, task_range
from overlock.kernels.numba.simd import LANES, aligned_zeros, broadcast, load, masked_load, masked_store, store

LONGEST = 64  # tokens summed up in float32 before they join a sum in float64


@kernel(
    x=POINTER,  # (B, T, C)
    sums=POINTER,  # (B, splits, C)
    batch=INT64,
    tokens=INT64,
    channels=INT64,
    splits=INT64,  # of the tokens
    epilogue=INT64,  # SUM or SUM_SQUARES
)
def channel_sums(call, thread, threads):
    """Sums of x, or of its squares, over parts of the tokens. A task is one of these."""
    batch, tokens, channels, splits = call.batch, call.tokens, call.channels, call.splits
    x, sums = floats(call.x, (batch * tokens * channels,)), floats(call.sums, (batch, splits, channels))
    begin, end = task_range(call.tasks, thread, threads)
    lane, exact = aligned_zeros(LANES), np.zeros(channels + LANES, np.float64)
    for task in range(begin, end):
        b, split = task // splits, task % splits
        first, last = tokens * split // splits, tokens * (split + 1) // splits
        exact[:] = 0
        for start in range(first, last, LONGEST):
            for c in range(0, channels, LANES):
                lanes, both = min(LANES, channels - c), broadcast(np.float32(0))
                for t in range(start, min(start + LONGEST, last)):
                    value = masked_load(x, (b * tokens + t) * channels + c, lanes)
                    both = both + (value * value if call.epilogue & SUM_SQUARES else value)
                store(lane, 0, both)
                for i in range(LANES):
                    exact[c + i] += lane[i]
        for c in range(channels):
            sums[b, split, c] = exact[c]


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


@kernel(
    sums=POINTER,  # (B, splits, C), over the tokens
    reduce_weight=POINTER,  # (R, C)
    reduce_bias=POINTER,  # (R)
    expand_weight=POINTER,  # (C, R)
    expand_bias=POINTER,  # (C)
    scale=POINTER,  # (B, C)
    batch=INT64,
    tokens=INT64,
    channels=INT64,
    hidden=INT64,  # R
    splits=INT64,
)
def squeeze_excite(call, thread, threads):
    """scale = sigmoid(W2 gelu(W1 means + b1) + b2), the means from sums. A task is an image."""
    batch, channels, splits = call.batch, call.channels, call.splits
    sums, scale = floats(call.sums, (batch, splits, channels)), floats(call.scale, (batch, channels))
    reduce_weight, reduce_bias = (
        floats(call.reduce_weight, (call.hidden, channels)),
        floats(call.reduce_bias, (call.hidden,)),
    )
    expand_weight, expand_bias = (
        floats(call.expand_weight, (channels, call.hidden)),
        floats(call.expand_bias, (channels,)),
    )
    means, hidden = np.empty(channels, np.float32), np.empty(call.hidden, np.float32)
    begin, end = task_range(call.tasks, thread, threads)
    for b in range(begin, end):
        for c in range(channels):
            both = 0.0
            for i in range(splits):
                both += sums[b, i, c]
            means[c] = both / call.tokens
        excite(means, reduce_weight, reduce_bias, expand_weight, expand_bias, hidden, scale[b])


@njit(**OPTIONS)
def response(squares, first, splits, weight, eps, scale):
    """scale (C) = 1 + weight * g / (mean of g + eps), with g the roots of sums (splits, C) from ``first`` on."""
    channels, mean = weight.size, 0.0
    for c in range(channels):
        both = 0.0
        for i in range(splits):
            both += squares[first + i * channels + c]
        scale[c] = math.sqrt(both)
        mean += scale[c] / channels
    for c in range(channels):
        scale[c] = np.float32(1) + weight[c] * scale[c] / (np.float32(mean) + eps)


@kernel(
    squares=POINTER,  # (B, splits, C), sums over the tokens
    weight=POINTER,  # (C)
    scale=POINTER,  # (B, C)
    eps=FLOAT64,
    batch=INT64,
    channels=INT64,
    splits=INT64,
)
def response_scale(call, thread, threads):
    """scale = 1 + weight * g / (mean of g + eps), with g the roots of the summed squares. A task is an image."""
    batch, channels, splits = call.batch, call.channels, call.splits
    squares, scale = floats(call.squares, (batch * splits * channels,)), floats(call.scale, (batch, channels))
    weight, eps = floats(call.weight, (channels,)), np.float32(call.eps)
    begin, end = task_range(call.tasks, thread, threads)
    for b in range(begin, end):
        response(squares, b * splits * channels, splits, weight, eps, scale[b])


@kernel(
    x=POINTER,  # (B, T, C)
    weight=POINTER,  # (C)
    bias=POINTER,  # (C)
    squares=POINTER,  # (B, splits, C), sums over the tokens
    out=POINTER,  # (B, T, C); may be x
    eps=FLOAT64,
    batch=INT64,
    tokens=INT64,
    channels=INT64,
    splits=INT64,  # of the tokens
)
def response_norm(call, thread, threads):
    """out = x * (1 + weight * g / (mean of g + eps)) + bias, with g the roots of the summed squares.

    A task is some tokens of an image.
    """
    tokens, channels, splits = call.tokens, call.channels, call.splits
    numbers = (call.batch * tokens * channels,)
    x, out, squares = floats(call.x, numbers), floats(call.out, numbers), floats(call.squares, numbers)
    weight, bias, eps = floats(call.weight, (channels,)), floats(call.bias, (channels,)), np.float32(call.eps)
    scale, shift = aligned_zeros(channels + LANES), aligned_zeros(channels + LANES)
    shift[:channels] = bias
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        b, split = task // splits, task % splits
        response(squares, b * splits * channels, splits, weight, eps, scale)
        for t in range(tokens * split // splits, tokens * (split + 1) // splits):
            for c in range(0, channels, LANES):
                place, lanes = (b * tokens + t) * channels + c, min(LANES, channels - c)
                masked_store(out, place, masked_load(x, place, lanes) * load(scale, c) + load(shift, c), lanes)


def token_splits(batch: int, tokens: int) -> int:
    """Into how many parts the tokens of an image are cut."""
    return max(1, min(-(-2 * torch.get_num_threads() // batch), tokens // 8))
