"""The numba code of contmix.py: ContMix's dynamic convolution; imports numba and compiles, so it is imported on use."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, share
from overlock.kernels.numba.simd import (
    LANES,
    at_least,
    exp2,
    largest,
    load,
    load_part,
    load_spread,
    spread,
    store,
    store_part,
    total,
    zeros,
)

PAIR = 2 * LANES  # taps are padded to whole pairs of vectors
LOG2_E = np.float32(1.4426950408889634)


@njit(**OPTIONS)
def fold_key(keys, first, by_depth, by_region, weights, depth, regions, used, taps, rows):
    """rows (D, N) = log2(e) key (D, S2) @ weights (S2, N).

    weight @ (key^T query) = rows^T query takes D numbers a tap, not S2, and the softmax powers of 2. The key begins at
    ``first`` and has any strides; ``used`` taps of the weights become ``taps`` of the rows, zeros beyond.
    """
    for one in range(0, depth, 4):  # four at a time; the last may come again
        two, three, four = min(one + 1, depth - 1), min(one + 2, depth - 1), min(one + 3, depth - 1)
        for n in range(0, taps, PAIR):
            a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = spread(np.float32(0))
            for s in range(regions):
                place, left, key = s * used + n, used - n, first + s * by_region
                x, y = load_part(weights, place, left), load_part(weights, place + LANES, left - LANES)
                k = load_spread(keys, key + one * by_depth)
                a0, a1 = a0 + k * x, a1 + k * y
                k = load_spread(keys, key + two * by_depth)
                b0, b1 = b0 + k * x, b1 + k * y
                k = load_spread(keys, key + three * by_depth)
                c0, c1 = c0 + k * x, c1 + k * y
                k = load_spread(keys, key + four * by_depth)
                d0, d1 = d0 + k * x, d1 + k * y
            log2_e = spread(LOG2_E)
            store(rows, one * taps + n, a0 * log2_e)
            store(rows, one * taps + n + LANES, a1 * log2_e)
            store(rows, two * taps + n, b0 * log2_e)
            store(rows, two * taps + n + LANES, b1 * log2_e)
            store(rows, three * taps + n, c0 * log2_e)
            store(rows, three * taps + n + LANES, c1 * log2_e)
            store(rows, four * taps + n, d0 * log2_e)
            store(rows, four * taps + n + LANES, d1 * log2_e)


@njit(**OPTIONS)
def read_token(maps, first, by_channel, channels, out, to):
    """A token's channels, side by side; what lies up to LANES beyond them is lost."""
    if by_channel == 1:
        for c in range(0, channels, LANES):
            store(out, to + c, load_part(maps, first + c, channels - c))
    else:
        for c in range(channels):
            out[to + c] = maps[first + c * by_channel]


@njit(**OPTIONS)
def tap_biases(bias, table, row, column, kernel_height, kernel_width, out, to):
    """N of out = bias plus the part of the relative position bias that begins at a row and column.

    Whole vectors are written, the next row over what is too much of the last; ``out`` has room for one more, and is
    -inf beyond.
    """
    side = 2 * kernel_width - 1
    for k in range(kernel_height):
        first, source = k * kernel_width, (row + k) * side + column
        for j in range(0, kernel_width, LANES):
            store(out, to + first + j, load(bias, first + j) + load(table, source + j))
    store(out, to + kernel_height * kernel_width, spread(np.float32(-np.inf)))


@njit(**OPTIONS)
def no_biases(used, taps):
    """Those of four tokens (4, N + LANES) to begin with: zeros, also for tokens beside the last, and -inf beyond."""
    biases = zeros(4 * (taps + LANES))
    for i in range(4):
        biases[i * (taps + LANES) + used : (i + 1) * (taps + LANES)] = -np.inf
    return biases


@njit(**OPTIONS)
def four_logits(query, depth, rows, taps, biases, out):
    """out (4, N) = biases (4, N + LANES) + query (4, D) @ rows (D, N)."""
    step = taps + LANES
    for n in range(0, taps, PAIR):
        a0, a1 = load(biases, n), load(biases, n + LANES)
        b0, b1 = load(biases, n + step), load(biases, n + step + LANES)
        c0, c1 = load(biases, n + 2 * step), load(biases, n + 2 * step + LANES)
        d0, d1 = load(biases, n + 3 * step), load(biases, n + 3 * step + LANES)
        for i in range(depth):
            first, second = load(rows, i * taps + n), load(rows, i * taps + n + LANES)
            q = load_spread(query, i)
            a0, a1 = a0 + q * first, a1 + q * second
            q = load_spread(query, i + depth)
            b0, b1 = b0 + q * first, b1 + q * second
            q = load_spread(query, i + 2 * depth)
            c0, c1 = c0 + q * first, c1 + q * second
            q = load_spread(query, i + 3 * depth)
            d0, d1 = d0 + q * first, d1 + q * second
        store(out, n, a0)
        store(out, n + LANES, a1)
        store(out, n + taps, b0)
        store(out, n + taps + LANES, b1)
        store(out, n + 2 * taps, c0)
        store(out, n + 2 * taps + LANES, c1)
        store(out, n + 3 * taps, d0)
        store(out, n + 3 * taps + LANES, d1)


@njit(**OPTIONS)
def four_softmax(logits, taps, scale):
    """2 to the logits (4, N) less their largest, in place, and one over their sums (4).

    Four at a time, since each step of a lone one would wait for the last.
    """
    second, third, fourth = taps, 2 * taps, 3 * taps
    a, b, c, d = load(logits, 0), load(logits, second), load(logits, third), load(logits, fourth)
    for n in range(LANES, taps, LANES):
        a, b = at_least(load(logits, n), a), at_least(load(logits, second + n), b)
        c, d = at_least(load(logits, third + n), c), at_least(load(logits, fourth + n), d)
    top_a, top_b, top_c, top_d = spread(largest(a)), spread(largest(b)), spread(largest(c)), spread(largest(d))
    a = b = c = d = spread(np.float32(0))
    for n in range(0, taps, LANES):
        power = exp2(load(logits, n) - top_a)
        store(logits, n, power)
        a = a + power
        power = exp2(load(logits, second + n) - top_b)
        store(logits, second + n, power)
        b = b + power
        power = exp2(load(logits, third + n) - top_c)
        store(logits, third + n, power)
        c = c + power
        power = exp2(load(logits, fourth + n) - top_d)
        store(logits, fourth + n, power)
        d = d + power
    scale[0], scale[1] = np.float32(1) / total(a), np.float32(1) / total(b)
    scale[2], scale[3] = np.float32(1) / total(c), np.float32(1) / total(d)


@njit(**OPTIONS)
def weigh_four(values, kernel, taps, first, second, third, fourth, width, kernel_height, kernel_width, mixed):
    """mixed (4, LANES) = kernels (4, N) times the values (H W, LANES) under four windows that begin at some places."""
    a = b = c = d = spread(np.float32(0))
    for k in range(kernel_height):
        row, n = k * width * LANES, k * kernel_width
        for j in range(kernel_width):
            at = row + j * LANES
            a = a + load_spread(kernel, n + j) * load(values, first + at)
            b = b + load_spread(kernel, n + j + taps) * load(values, second + at)
            c = c + load_spread(kernel, n + j + 2 * taps) * load(values, third + at)
            d = d + load_spread(kernel, n + j + 3 * taps) * load(values, fourth + at)
    store(mixed, 0, a)
    store(mixed, LANES, b)
    store(mixed, 2 * LANES, c)
    store(mixed, 3 * LANES, d)


@njit(**OPTIONS)
def weigh_four_at_one_place(values, kernel, taps, first, width, kernel_height, kernel_width, mixed):
    """mixed (4, LANES) of four tokens with the same window, as they are at borders: each value is read once."""
    a = b = c = d = spread(np.float32(0))
    for k in range(kernel_height):
        place, n = first + k * width * LANES, k * kernel_width
        for j in range(kernel_width):
            x = load(values, place + j * LANES)
            a, b = a + load_spread(kernel, n + j) * x, b + load_spread(kernel, n + j + taps) * x
            c, d = c + load_spread(kernel, n + j + 2 * taps) * x, d + load_spread(kernel, n + j + 3 * taps) * x
    store(mixed, 0, a)
    store(mixed, LANES, b)
    store(mixed, 2 * LANES, c)
    store(mixed, 3 * LANES, d)


@njit(**OPTIONS)
def weigh_four_in_a_row(values, kernel, taps, first, width, kernel_height, kernel_width, mixed):
    """mixed (4, LANES) of four tokens whose windows move with them, K >= 3: each value is read once."""
    a = b = c = d = spread(np.float32(0))
    last = kernel_width - 1
    for k in range(kernel_height):
        place, n = first + k * width * LANES, k * kernel_width
        x = load(values, place)
        a = a + load_spread(kernel, n) * x
        x = load(values, place + LANES)
        a, b = a + load_spread(kernel, n + 1) * x, b + load_spread(kernel, n + taps) * x
        x = load(values, place + 2 * LANES)
        a, b = a + load_spread(kernel, n + 2) * x, b + load_spread(kernel, n + taps + 1) * x
        c = c + load_spread(kernel, n + 2 * taps) * x
        for j in range(3, kernel_width):
            x = load(values, place + j * LANES)
            a, b = a + load_spread(kernel, n + j) * x, b + load_spread(kernel, n + taps + j - 1) * x
            c, d = c + load_spread(kernel, n + 2 * taps + j - 2) * x, d + load_spread(kernel, n + 3 * taps + j - 3) * x
        x = load(values, place + kernel_width * LANES)
        b, c = b + load_spread(kernel, n + taps + last) * x, c + load_spread(kernel, n + 2 * taps + last - 1) * x
        d = d + load_spread(kernel, n + 3 * taps + last - 2) * x
        x = load(values, place + (kernel_width + 1) * LANES)
        c, d = c + load_spread(kernel, n + 2 * taps + last) * x, d + load_spread(kernel, n + 3 * taps + last - 1) * x
        d = d + load_spread(kernel, n + 3 * taps + last) * load(values, place + (kernel_width + 2) * LANES)
    store(mixed, 0, a)
    store(mixed, LANES, b)
    store(mixed, 2 * LANES, c)
    store(mixed, 3 * LANES, d)


@njit(**OPTIONS)
def weigh(values, block, kernel, taps, window, column, width, kernel_height, kernel_width, mixed):
    """mixed (4, LANES) of four tokens from a column on, in the way that their windows allow.

    The windows are places among the values, whose ``block`` begins at an index.
    """
    first, second, third, fourth = (
        block + window[0] * LANES,
        block + window[1] * LANES,
        block + window[2] * LANES,
        block + window[3] * LANES,
    )
    if first == second and second == third and third == fourth:
        weigh_four_at_one_place(values, kernel, taps, first, width, kernel_height, kernel_width, mixed)
    elif kernel_width >= 3 and column + 3 < width and second == first + LANES and fourth == first + 3 * LANES:
        weigh_four_in_a_row(values, kernel, taps, first, width, kernel_height, kernel_width, mixed)
    else:
        weigh_four(values, kernel, taps, first, second, third, fourth, width, kernel_height, kernel_width, mixed)


@njit(**OPTIONS)
def pack(values, first, by_channel, by_token, channels, tokens, packed):
    """packed (blocks, tokens, LANES) of values (C, tokens) of any strides, channels side by side, zeros beyond C."""
    for block in range((channels + LANES - 1) // LANES):
        width, place = min(LANES, channels - block * LANES), block * tokens * LANES
        start = first + block * LANES * by_channel
        for t in range(tokens):
            if by_channel == 1:
                store(packed, place + t * LANES, load_part(values, start + t * by_token, width))
            else:
                for c in range(width):
                    packed[place + t * LANES + c] = values[start + c * by_channel + t * by_token]
                for c in range(width, LANES):
                    packed[place + t * LANES + c] = 0


@njit(**OPTIONS)
def unpack(mixed, place, scale, out, first, by_channel, width):
    """One token's channels of a block, scaled, to their place in ``out``."""
    if by_channel == 1:
        store_part(out, first, load(mixed, place) * spread(scale), width)
    else:
        for c in range(width):
            out[first + c * by_channel] = mixed[place + c] * scale


@kernel
def mix(call, thread, threads):
    """Fill out (B, G, C, H W) from queries (B, G, D, H W), keys (B, G, D, S2) and values (B, G, C, H W) of any strides.

    ``call`` holds from index 2 on: the addresses of queries, keys, values, weights (S2, N), bias (N), rpb
    (G, 2 Kh - 1, 2 Kw - 1) and out; B, G, D, C, H, W, Kh, Kw, S2 and the pieces that a map is cut into; strides of
    queries, values, out and keys.
    """
    p = carray(call, 35)
    groups, depth, channels = p[10], p[11], p[12]
    height, width, kernel_height, kernel_width, regions, pieces = p[13], p[14], p[15], p[16], p[17], p[18]
    everything = (1 << 60,)
    queries, values, out = floats(p[2], everything), floats(p[4], everything), floats(p[8], everything)
    size, blocks, used = height * width, (channels + LANES - 1) // LANES, kernel_height * kernel_width
    taps, side = (used + PAIR - 1) // PAIR * PAIR, (2 * kernel_height - 1) * (2 * kernel_width - 1)
    keys, weights = floats(p[3], everything), floats(p[5], (regions * used,))
    biases, tables = floats(p[6], (used,)), floats(p[7], (groups, side))

    rows, packed = zeros(depth * taps), zeros(blocks * size * LANES)
    bias, table = zeros(used + LANES), zeros(side + LANES)
    for n in range(used):
        bias[n] = biases[n] * LOG2_E
    query, logits = zeros(4 * depth + LANES), zeros(4 * taps)
    start, mixed = no_biases(used, taps), zeros(4 * LANES)
    window, scale, held = np.zeros(4, np.int64), np.zeros(4, np.float32), np.zeros((4, 2), np.int64)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        b, piece, g = job // (groups * pieces), job // groups % pieces, job % groups
        first, last = size * piece // pieces, size * (piece + 1) // pieces
        fold_key(keys, b * p[31] + g * p[32], p[33], p[34], weights, depth, regions, used, taps, rows)
        held[:] = -1
        for i in range(side):
            table[i] = tables[g, i] * LOG2_E
        base = min(max(first // width - kernel_height // 2, 0), height - kernel_height)  # first row of any window
        bottom = min(max((last - 1) // width - kernel_height // 2, 0), height - kernel_height) + kernel_height
        rows_here = (bottom - base) * width
        pack(values, b * p[23] + g * p[24] + base * width * p[26], p[25], p[26], channels, rows_here, packed)
        y, x = first // width, first % width
        for t in range(first, last, 4):
            count, column_of_first = min(4, last - t), x
            for i in range(count):
                top = min(max(y - kernel_height // 2, 0), height - kernel_height)
                left = min(max(x - kernel_width // 2, 0), width - kernel_width)
                window[i] = (top - base) * width + left
                row, column = top - y + kernel_height - 1, left - x + kernel_width - 1
                if row != held[i, 0] or column != held[i, 1]:  # seldom, inside the map
                    tap_biases(bias, table, row, column, kernel_height, kernel_width, start, i * (taps + LANES))
                    held[i, 0], held[i, 1] = row, column
                place = b * p[19] + g * p[20] + (t + i) * p[22]
                read_token(queries, place, p[21], depth, query, i * depth)
                x += 1
                if x == width:
                    y, x = y + 1, 0
            for i in range(count, 4):  # beside the last tokens, weighed for nothing
                window[i] = window[count - 1]
            four_logits(query, depth, rows, taps, start, logits)
            four_softmax(logits, taps, scale)
            for block in range(blocks):
                begin_of_block = block * rows_here * LANES
                weigh(
                    packed, begin_of_block, logits, taps, window, column_of_first, width, kernel_height, kernel_width,
                    mixed,
                )  # fmt: skip
                for i in range(count):
                    place = b * p[27] + g * p[28] + block * LANES * p[29] + (t + i) * p[30]
                    unpack(mixed, i * LANES, scale[i], out, place, p[29], min(LANES, channels - block * LANES))
