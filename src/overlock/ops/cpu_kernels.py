"""The numba code of cpu.py; imports numba and compiles, so it is imported on use.

T tokens of a tile, N taps, S2 region centres, C value channels of a block.

Every function has one signature, so that processes that compile at the same time write the same bytes to numba's cache.
Loop bounds that must be constants to become whole vector registers are module constants or frozen by a factory whose
functions are compiled into ``mix`` and not cached by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

TOKENS = 64  # logits of a tile, 169 x 64 float32, stay in a core's caches
BLOCK = 16  # value channels side by side in memory, one AVX-512 register; padded with zeros
LOG2_E = np.float32(1.4426950408889634)
# No "nnan" and "ninf": a NaN must come out as one.
OPTIONS: dict[str, Any] = dict(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)


@njit(**OPTIONS)
def multiply_add(weights, rows, sums):
    """sums (N, T) += weights (N, S) @ rows (S, T), two sums and seven terms a pass."""
    count, terms = weights.shape
    pairs = count - count % 2
    sevens = terms - terms % 7
    for n in range(0, pairs, 2):
        first, second = sums[n], sums[n + 1]
        w, u = weights[n], weights[n + 1]
        for s in range(0, sevens, 7):
            w0, w1, w2, w3, w4, w5, w6 = w[s], w[s + 1], w[s + 2], w[s + 3], w[s + 4], w[s + 5], w[s + 6]
            u0, u1, u2, u3, u4, u5, u6 = u[s], u[s + 1], u[s + 2], u[s + 3], u[s + 4], u[s + 5], u[s + 6]
            a0, a1, a2, a3 = rows[s], rows[s + 1], rows[s + 2], rows[s + 3]
            a4, a5, a6 = rows[s + 4], rows[s + 5], rows[s + 6]
            for t in range(TOKENS):
                x0, x1, x2, x3, x4, x5, x6 = a0[t], a1[t], a2[t], a3[t], a4[t], a5[t], a6[t]
                first[t] += w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + w4 * x4 + w5 * x5 + w6 * x6
                second[t] += u0 * x0 + u1 * x1 + u2 * x2 + u3 * x3 + u4 * x4 + u5 * x5 + u6 * x6
        for s in range(sevens, terms):
            w0, u0, a0 = w[s], u[s], rows[s]
            for t in range(TOKENS):
                first[t] += w0 * a0[t]
                second[t] += u0 * a0[t]
    for n in range(pairs, count):
        first = sums[n]
        for s in range(terms):
            w0, a0 = weights[n, s], rows[s]
            for t in range(TOKENS):
                first[t] += w0 * a0[t]


@njit(**OPTIONS)
def softmax(logits, total):
    """Exponentials of logits (N, T) less their largest, in place, and their sums ``total`` (T).

    2^x = 2^k 2^f: the integer part goes into the exponent bits of a float, the fraction into a polynomial (relative
    error 2e-7), which vectorises where a call of the library's exp does not.
    """
    largest, fraction, exponent = np.empty(TOKENS, np.float32), np.empty(TOKENS, np.float32), np.empty(TOKENS, np.int32)
    power = exponent.view(np.float32)
    largest[:] = logits[0]
    total[:] = 0
    for n in range(1, logits.shape[0]):
        row = logits[n]
        for t in range(TOKENS):
            largest[t] = max(largest[t], row[t])
    for n in range(logits.shape[0]):
        row = logits[n]
        for t in range(TOKENS):
            difference = row[t] - largest[t]
            x = max(difference * LOG2_E, np.float32(-100))
            whole = np.int32(x - np.float32(0.5))  # x <= 0: rounds to the nearest integer
            fraction[t] = x - np.float32(whole) + (difference - difference)  # keeps a NaN, which max may drop
            exponent[t] = (whole + np.int32(127)) << np.int32(23)
        for t in range(TOKENS):
            f = fraction[t]
            p = np.float32(1.5403530e-4) * f + np.float32(1.3333558e-3)
            p = p * f + np.float32(9.6181291e-3)
            p = p * f + np.float32(5.5504109e-2)
            p = p * f + np.float32(2.4022651e-1)
            p = p * f + np.float32(6.9314718e-1)
            p = p * f + np.float32(1)
            row[t] = p * power[t]
            total[t] += row[t]


@njit(**OPTIONS)
def windows(start, tokens, height, width, kernel_height, kernel_width, window, offset):
    """First position of each token's window, and of its relative position biases; whether the latter are all one."""
    same = True
    for t in range(tokens):
        y, x = (start + t) // width, (start + t) % width
        top = min(max(y - kernel_height // 2, 0), height - kernel_height)
        left = min(max(x - kernel_width // 2, 0), width - kernel_width)
        window[t] = top * width + left
        offset[t] = (top - y + kernel_height - 1) * (2 * kernel_width - 1) + left - x + kernel_width - 1
        same = same and offset[t] == offset[0]
    return same


@njit(**OPTIONS)
def biases(bias, table, offset, same, kernel_width, logits):
    """logits (N, T) = bias (N) + the relative position biases that each token reads."""
    for n in range(logits.shape[0]):
        base = (n // kernel_width) * (2 * kernel_width - 1) + n % kernel_width
        row = logits[n]
        if same:
            row[:] = bias[n] + table[base + offset[0]]
        else:
            for t in range(TOKENS):
                row[t] = bias[n] + table[base + offset[t]]


def make_weigh(constant_width: int) -> Callable[..., None]:
    """The weighted sum for one kernel width, 0 for any: the compiler unrolls a constant row of taps."""

    @njit(**OPTIONS)
    def weigh(value, kernels, window, tokens, width, kernel_height, kernel_width, mixed):
        """mixed (T, C) = kernels (T, N) times the values (H W C) under each token's window."""
        columns = constant_width if constant_width else kernel_width
        for t in range(tokens):
            out = mixed[t]
            out[:] = 0
            for k in range(kernel_height):
                first = (window[t] + k * width) * BLOCK
                row = value[first : first + columns * BLOCK]
                kernel = kernels[t, k * columns : (k + 1) * columns]
                for c in range(BLOCK):
                    total = out[c]
                    for j in range(columns):
                        total += kernel[j] * row[c + j * BLOCK]
                    out[c] = total

    return weigh


weigh_5, weigh_7, weigh_9, weigh_13, weigh_any = (make_weigh(k) for k in (5, 7, 9, 13, 0))


@njit(**OPTIONS)
def weigh(value, kernels, window, tokens, width, kernel_height, kernel_width, mixed):
    if kernel_width == 5:
        weigh_5(value, kernels, window, tokens, width, kernel_height, kernel_width, mixed)
    elif kernel_width == 7:
        weigh_7(value, kernels, window, tokens, width, kernel_height, kernel_width, mixed)
    elif kernel_width == 9:
        weigh_9(value, kernels, window, tokens, width, kernel_height, kernel_width, mixed)
    elif kernel_width == 13:
        weigh_13(value, kernels, window, tokens, width, kernel_height, kernel_width, mixed)
    else:
        weigh_any(value, kernels, window, tokens, width, kernel_height, kernel_width, mixed)


def compile_cached(signature: str) -> Callable[[Callable], Callable]:
    """Compile now for one signature and cache, where there is a place to write one."""

    def decorate(function: Callable) -> Callable:
        try:
            return njit(signature, cache=True, **OPTIONS)(function)
        except RuntimeError:  # no writable place for the cache
            return njit(signature, **OPTIONS)(function)

    return decorate


@compile_cached(
    "void(f4[:,:,:,:], f4[:,:,:,::1], f4[:,:,:,::1], f4[:,::1], f4[::1], f4[:,::1], f4[:,:,:,:],"
    " i8, i8, i8, i8, i8, i8)"
)
def mix(queries, values, keys, weight, bias, rpb, out, height, width, kernel_height, kernel_width, begin, end):
    """Fill tiles ``begin`` to ``end`` of out (B, G, C, H W).

    From queries (B, G, D, H W), values in blocks of channels (B, G, blocks, H W 16) and keys (B, G, S2, D).
    """
    groups, depth, size = queries.shape[1:]
    channels, blocks, taps = out.shape[2], values.shape[2], kernel_height * kernel_width
    pieces = (size + TOKENS - 1) // TOKENS
    for job in range(begin, end):
        b, g = job // (groups * pieces), (job // pieces) % groups
        start = (job % pieces) * TOKENS
        tokens = min(TOKENS, size - start)
        window, offset = np.zeros(TOKENS, np.int64), np.zeros(TOKENS, np.int64)
        same = windows(start, tokens, height, width, kernel_height, kernel_width, window, offset)

        query, affinity = np.zeros((depth, TOKENS), np.float32), np.zeros((keys.shape[2], TOKENS), np.float32)
        for d in range(depth):
            for t in range(tokens):
                query[d, t] = queries[b, g, d, start + t]
        multiply_add(keys[b, g], query, affinity)
        logits = np.empty((taps, TOKENS), np.float32)
        biases(bias, rpb[g], offset, same, kernel_width, logits)
        multiply_add(weight, affinity, logits)
        total = np.empty(TOKENS, np.float32)
        softmax(logits, total)
        kernels = np.empty((TOKENS, taps), np.float32)
        for n in range(taps):
            for t in range(tokens):
                kernels[t, n] = logits[n, t]

        mixed = np.empty((TOKENS, BLOCK), np.float32)
        for block in range(blocks):
            weigh(values[b, g, block], kernels, window, tokens, width, kernel_height, kernel_width, mixed)
            for c in range(min(BLOCK, channels - block * BLOCK)):
                for t in range(tokens):
                    out[b, g, block * BLOCK + c, start + t] = mixed[t, c] / total[t]
