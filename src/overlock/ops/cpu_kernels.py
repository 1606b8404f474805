"""The numba code of cpu.py; imports numba and compiles, so it is imported on use.

Loop bounds that must be constants to become whole vector registers are module constants or frozen by a factory whose
functions are compiled into ``mix`` and not cached by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from overlock.ops.threads import OPTIONS, floats, kernel, share

TOKENS = 32  # a job's; its taps, N x D float32, and its windows stay in a core's caches
BLOCK = 16  # value channels, or taps, side by side in memory: one AVX-512 register; padded
LOG2_E = np.float32(1.4426950408889634)
LOWEST = np.float32(-100)  # 2^-100 is nothing beside the largest tap's 1


@njit(**OPTIONS)
def add_products(weights, rows, sums):
    """sums (N) += weights (D) @ rows (D, N), eight terms a pass."""
    depth, count = rows.shape
    eights = depth - depth % 8
    for d in range(0, eights, 8):
        w0, w1, w2, w3 = weights[d], weights[d + 1], weights[d + 2], weights[d + 3]
        w4, w5, w6, w7 = weights[d + 4], weights[d + 5], weights[d + 6], weights[d + 7]
        a0, a1, a2, a3, a4, a5 = rows[d], rows[d + 1], rows[d + 2], rows[d + 3], rows[d + 4], rows[d + 5]
        a6, a7 = rows[d + 6], rows[d + 7]
        for n in range(count):
            first = w0 * a0[n] + w1 * a1[n] + w2 * a2[n] + w3 * a3[n]
            sums[n] += first + (w4 * a4[n] + w5 * a5[n] + w6 * a6[n] + w7 * a7[n])
    for d in range(eights, depth):
        w0, a0 = weights[d], rows[d]
        for n in range(count):
            sums[n] += w0 * a0[n]


@intrinsic
def power_of_two(_typing_context, exponent):  # noqa: ARG001
    """2 to an int32, made from the bits of a float32; numba's own integers would widen to 64 bits on the way."""

    def generate(context, builder, signature, arguments):
        integer = arguments[0].type
        biased = builder.add(arguments[0], integer(127))
        return builder.bitcast(builder.shl(biased, integer(23)), context.get_value_type(signature.return_type))

    return types.float32(types.int32), generate


@intrinsic
def larger(_typing_context, a, b):  # noqa: ARG001
    """The larger of two float32, any where one is NaN: flags that numba's max lacks, so that a loop vectorises."""

    def generate(_context, builder, _signature, arguments):
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *arguments, flags=flags), *arguments, flags=flags)

    return types.float32(types.float32, types.float32), generate


@njit(**OPTIONS)
def softmax(logits):
    """2 to the logits (N) less their largest, in place; returns their sum.

    2^x = 2^k 2^f: the integer part goes into the exponent bits of a float, the fraction into a polynomial (relative
    error 1.6e-7), which vectorises where a call of the library's exp does not.
    """
    largest, total = logits[0], np.float32(0)
    for n in range(logits.size):
        largest = larger(largest, logits[n])
    for n in range(logits.size):
        x = logits[n] - largest
        x = LOWEST if x < LOWEST else x  # not larger(), which may drop a NaN
        whole = np.int32(x - np.float32(0.5))  # x <= 0: rounds to the nearest integer
        f = x - np.float32(whole)
        p = np.float32(1.3264727e-3) * f + np.float32(9.671513e-3)
        p = p * f + np.float32(5.5507336e-2)
        p = p * f + np.float32(2.4022242e-1)
        p = p * f + np.float32(6.93147e-1)
        p = (p * f + np.float32(1)) * power_of_two(whole)
        logits[n] = p
        total += p
    return total


@njit(**OPTIONS)
def tap_biases(bias, table, row, column, kernel_height, kernel_width, taps):
    """taps (N) = bias plus the part of the relative position bias that begins at a row and column, in powers of 2."""
    for k in range(kernel_height):
        part, source = taps[k * kernel_width : (k + 1) * kernel_width], table[row + k, column : column + kernel_width]
        for j in range(kernel_width):
            part[j] = (bias[k * kernel_width + j] + source[j]) * LOG2_E


def make_weigh(constant_width: int) -> Callable[..., None]:
    """The weighted sum for one kernel width, 0 for any: the compiler unrolls a constant row of taps."""

    @njit(fastmath={"contract", "nsz"}, error_model="numpy")  # the order of sums as written
    def weigh(value, taps, window, width, kernel_height, kernel_width, mixed):
        """mixed (C) = taps (N) times the values (H W C) under a window."""
        columns = constant_width if constant_width else kernel_width
        mixed[:] = 0
        for k in range(kernel_height):
            first = (window + k * width) * BLOCK
            row = value[first : first + columns * BLOCK]
            part = taps[k * columns : (k + 1) * columns]
            for c in range(BLOCK):
                total = np.float32(0)  # of its own, so that the next row need not wait for this one
                for j in range(columns):
                    total += part[j] * row[c + j * BLOCK]
                mixed[c] += total

    return weigh


weigh_5, weigh_7, weigh_9, weigh_13, weigh_any = (make_weigh(k) for k in (5, 7, 9, 13, 0))


@njit(**OPTIONS)
def weigh(value, taps, window, width, kernel_height, kernel_width, mixed):
    if kernel_width == 5:
        weigh_5(value, taps, window, width, kernel_height, kernel_width, mixed)
    elif kernel_width == 7:
        weigh_7(value, taps, window, width, kernel_height, kernel_width, mixed)
    elif kernel_width == 9:
        weigh_9(value, taps, window, width, kernel_height, kernel_width, mixed)
    elif kernel_width == 13:
        weigh_13(value, taps, window, width, kernel_height, kernel_width, mixed)
    else:
        weigh_any(value, taps, window, width, kernel_height, kernel_width, mixed)


@kernel
def mix(call, thread, threads):
    """Fill out (B, G, C, H W) from queries (B, G, D, H W), both of any strides.

    ``call`` holds: the addresses of queries, logit rows (B, G, D, N padded), values in blocks of channels
    (B, G, blocks, H W, 16), bias (N), rpb (G, 2 Kh - 1, 2 Kw - 1) and out; B, G, D, C, H, W, Kh, Kw; strides of queries
    and of out.
    """
    p = carray(call, 24)
    batch, groups, depth, channels = p[8], p[9], p[10], p[11]
    height, width, kernel_height, kernel_width = p[12], p[13], p[14], p[15]
    size, blocks, taps = height * width, (channels + BLOCK - 1) // BLOCK, kernel_height * kernel_width
    padded = (taps + BLOCK - 1) // BLOCK * BLOCK
    queries, out = floats(p[2], (1 << 62,)), floats(p[7], (1 << 62,))
    rows, values = floats(p[3], (batch * groups, depth, padded)), floats(p[4], (batch * groups, blocks, size * BLOCK))
    bias = floats(p[5], (taps,))
    rpb = floats(p[6], (groups, 2 * kernel_height - 1, 2 * kernel_width - 1))

    pieces = (size + TOKENS - 1) // TOKENS
    query, mixed, logits = np.empty(depth, np.float32), np.empty(BLOCK, np.float32), np.empty(padded, np.float32)
    biases = np.empty(padded, np.float32)
    biases[taps:] = -np.inf
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        b, g = job // (groups * pieces), (job // pieces) % groups
        bg = b * groups + g
        last_row = last_column = -1
        for t in range((job % pieces) * TOKENS, min((job % pieces + 1) * TOKENS, size)):
            y, x = t // width, t % width
            top = min(max(y - kernel_height // 2, 0), height - kernel_height)
            left = min(max(x - kernel_width // 2, 0), width - kernel_width)
            row, column = top - y + kernel_height - 1, left - x + kernel_width - 1
            if row != last_row or column != last_column:  # seldom inside the map
                tap_biases(bias, rpb[g], row, column, kernel_height, kernel_width, biases)
                last_row, last_column = row, column
            first = b * p[16] + g * p[17] + t * p[19]
            for d in range(depth):
                query[d] = queries[first + d * p[18]] * LOG2_E
            logits[:] = biases
            add_products(query, rows[bg], logits)
            share_of_one = np.float32(1) / softmax(logits)
            first = b * p[20] + g * p[21] + t * p[23]
            for block in range(blocks):
                weigh(values[bg, block], logits, top * width + left, width, kernel_height, kernel_width, mixed)
                for c in range(min(BLOCK, channels - block * BLOCK)):
                    out[first + (block * BLOCK + c) * p[22]] = mixed[c] * share_of_one
