"""The numba code of contmix.py: ContMix's dynamic convolution; imports numba and compiles, so it is imported on use."""

from __future__ import annotations

import numpy as np
from numba import njit

from overlock.kernels.numba.activations import exp2
from overlock.kernels.numba.arguments import INT64, MAP, POINTER, STRIDES
from overlock.kernels.numba.runtime import ANY, OPTIONS, floats, kernel, maps, task_range
from overlock.kernels.numba.simd import (
    LANES,
    aligned_zeros,
    broadcast,
    load,
    load_broadcast,
    load_number,
    masked_load,
    masked_store,
    maximum,
    reduce_max,
    reduce_sum,
    store,
    store_number,
)
from overlock.kernels.numba.vector_tuples import store_all

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
            a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = broadcast(np.float32(0))
            for s in range(regions):
                place, left, key = s * used + n, used - n, first + s * by_region
                x, y = masked_load(weights, place, left), masked_load(weights, place + LANES, left - LANES)
                k = load_broadcast(keys, key + one * by_depth)
                a0, a1 = a0 + k * x, a1 + k * y
                k = load_broadcast(keys, key + two * by_depth)
                b0, b1 = b0 + k * x, b1 + k * y
                k = load_broadcast(keys, key + three * by_depth)
                c0, c1 = c0 + k * x, c1 + k * y
                k = load_broadcast(keys, key + four * by_depth)
                d0, d1 = d0 + k * x, d1 + k * y
            log2_e = broadcast(LOG2_E)
            store(rows, one * taps + n, a0 * log2_e)
            store(rows, one * taps + n + LANES, a1 * log2_e)
            store(rows, two * taps + n, b0 * log2_e)
            store(rows, two * taps + n + LANES, b1 * log2_e)
            store(rows, three * taps + n, c0 * log2_e)
            store(rows, three * taps + n + LANES, c1 * log2_e)
            store(rows, four * taps + n, d0 * log2_e)
            store(rows, four * taps + n + LANES, d1 * log2_e)


@njit(**OPTIONS)
def read_token(tokens, first, by_channel, channels, out, to):
    """A token's channels, side by side; what lies up to LANES beyond them is lost."""
    if by_channel == 1:
        for c in range(0, channels, LANES):
            store(out, to + c, masked_load(tokens, first + c, channels - c))
    else:
        for c in range(channels):
            out[to + c] = load_number(tokens, first + c * by_channel)


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
    store(out, to + kernel_height * kernel_width, broadcast(np.float32(-np.inf)))


@njit(**OPTIONS)
def no_biases(used, taps):
    """Those of four tokens (4, N + LANES) to begin with: zeros, also for tokens beside the last, and -inf beyond."""
    biases = aligned_zeros(4 * (taps + LANES))
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
            q = load_broadcast(query, i)
            a0, a1 = a0 + q * first, a1 + q * second
            q = load_broadcast(query, i + depth)
            b0, b1 = b0 + q * first, b1 + q * second
            q = load_broadcast(query, i + 2 * depth)
            c0, c1 = c0 + q * first, c1 + q * second
            q = load_broadcast(query, i + 3 * depth)
            d0, d1 = d0 + q * first, d1 + q * second
        store_all(out, n, taps, (a0, b0, c0, d0))
        store_all(out, n + LANES, taps, (a1, b1, c1, d1))


@njit(**OPTIONS)
def four_softmax(logits, taps, scale):
    """2 to the logits (4, N) less their largest, in place, and one over their sums (4).

    Four at a time, since each step of a lone one would wait for the last.
    """
    second, third, fourth = taps, 2 * taps, 3 * taps
    a, b, c, d = load(logits, 0), load(logits, second), load(logits, third), load(logits, fourth)
    for n in range(LANES, taps, LANES):
        a, b = maximum(load(logits, n), a), maximum(load(logits, second + n), b)
        c, d = maximum(load(logits, third + n), c), maximum(load(logits, fourth + n), d)
    top_a, top_b, top_c, top_d = (
        broadcast(reduce_max(a)),
        broadcast(reduce_max(b)),
        broadcast(reduce_max(c)),
        broadcast(reduce_max(d)),
    )
    a = b = c = d = broadcast(np.float32(0))
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
    scale[0], scale[1] = np.float32(1) / reduce_sum(a), np.float32(1) / reduce_sum(b)
    scale[2], scale[3] = np.float32(1) / reduce_sum(c), np.float32(1) / reduce_sum(d)


@njit(**OPTIONS)
def weigh_four(values, kernel, taps, first, second, third, fourth, width, kernel_height, kernel_width, mixed):
    """mixed (4, LANES) = kernels (4, N) times the values (H W, LANES) under four windows that begin at some places."""
    a = b = c = d = broadcast(np.float32(0))
    for k in range(kernel_height):
        row, n = k * width * LANES, k * kernel_width
        for j in range(kernel_width):
            at = row + j * LANES
            a = a + load_broadcast(kernel, n + j) * load(values, first + at)
            b = b + load_broadcast(kernel, n + j + taps) * load(values, second + at)
            c = c + load_broadcast(kernel, n + j + 2 * taps) * load(values, third + at)
            d = d + load_broadcast(kernel, n + j + 3 * taps) * load(values, fourth + at)
    store_all(mixed, 0, LANES, (a, b, c, d))


@njit(**OPTIONS)
def weigh_four_at_one_place(values, kernel, taps, first, width, kernel_height, kernel_width, mixed):
    """mixed (4, LANES) of four tokens with the same window, as they are at borders: each value is read once."""
    a = b = c = d = broadcast(np.float32(0))
    for k in range(kernel_height):
        place, n = first + k * width * LANES, k * kernel_width
        for j in range(kernel_width):
            x = load(values, place + j * LANES)
            a, b = a + load_broadcast(kernel, n + j) * x, b + load_broadcast(kernel, n + j + taps) * x
            c, d = c + load_broadcast(kernel, n + j + 2 * taps) * x, d + load_broadcast(kernel, n + j + 3 * taps) * x
    store_all(mixed, 0, LANES, (a, b, c, d))


@njit(**OPTIONS)
def weigh_four_in_a_row(values, kernel, taps, first, width, kernel_height, kernel_width, mixed):
    """mixed (4, LANES) of four tokens whose windows move with them, K >= 3: each value is read once."""
    a = b = c = d = broadcast(np.float32(0))
    last = kernel_width - 1
    for k in range(kernel_height):
        place, n = first + k * width * LANES, k * kernel_width
        x = load(values, place)
        a = a + load_broadcast(kernel, n) * x
        x = load(values, place + LANES)
        a, b = a + load_broadcast(kernel, n + 1) * x, b + load_broadcast(kernel, n + taps) * x
        x = load(values, place + 2 * LANES)
        a, b = a + load_broadcast(kernel, n + 2) * x, b + load_broadcast(kernel, n + taps + 1) * x
        c = c + load_broadcast(kernel, n + 2 * taps) * x
        for j in range(3, kernel_width):
            x = load(values, place + j * LANES)
            a, b = a + load_broadcast(kernel, n + j) * x, b + load_broadcast(kernel, n + taps + j - 1) * x
            c, d = (
                c + load_broadcast(kernel, n + 2 * taps + j - 2) * x,
                d + load_broadcast(kernel, n + 3 * taps + j - 3) * x,
            )
        x = load(values, place + kernel_width * LANES)
        b, c = b + load_broadcast(kernel, n + taps + last) * x, c + load_broadcast(kernel, n + 2 * taps + last - 1) * x
        d = d + load_broadcast(kernel, n + 3 * taps + last - 2) * x
        x = load(values, place + (kernel_width + 1) * LANES)
        c, d = (
            c + load_broadcast(kernel, n + 2 * taps + last) * x,
            d + load_broadcast(kernel, n + 3 * taps + last - 1) * x,
        )
        d = d + load_broadcast(kernel, n + 3 * taps + last) * load(values, place + (kernel_width + 2) * LANES)
    store_all(mixed, 0, LANES, (a, b, c, d))


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
def block_channels(values, first, by_channel, by_token, channels, tokens, blocked):
    """blocked (blocks, tokens, LANES) of values (C, tokens) of any strides: the layout nChw16c, zeros beyond C."""
    for block in range((channels + LANES - 1) // LANES):
        width, place = min(LANES, channels - block * LANES), block * tokens * LANES
        start = first + block * LANES * by_channel
        for t in range(tokens):
            if by_channel == 1:
                store(blocked, place + t * LANES, masked_load(values, start + t * by_token, width))
            else:
                for c in range(width):
                    blocked[place + t * LANES + c] = load_number(values, start + c * by_channel + t * by_token)
                for c in range(width, LANES):
                    blocked[place + t * LANES + c] = 0


@njit(**OPTIONS)
def write_token(mixed, place, scale, out, first, by_channel, width):
    """One token's channels of a block, scaled, to their place in ``out``."""
    if by_channel == 1:
        masked_store(out, first, load(mixed, place) * broadcast(scale), width)
    else:
        for c in range(width):
            store_number(out, first + c * by_channel, mixed[place + c] * scale)


@kernel(
    queries=MAP,  # (B, G, D, H W)
    keys=MAP,  # (B, G, D, S2)
    values=MAP,  # (B, G, C, H W)
    weight=POINTER,  # (S2, N)
    bias=POINTER,  # (N)
    rpb=POINTER,  # (G, 2 Kh - 1, 2 Kw - 1)
    out=MAP,  # (B, G, C, H W)
    groups=INT64,
    depth=INT64,
    channels=INT64,
    height=INT64,
    width=INT64,
    kernel_height=INT64,
    kernel_width=INT64,
    regions=INT64,
    splits=INT64,  # of a map
    query_strides=STRIDES,
    key_strides=STRIDES,
    value_strides=STRIDES,
    out_strides=STRIDES,
)
def contmix(call, thread, threads):
    """The dynamic convolution. A task is a part of one map of one group."""
    groups, depth, channels, splits = call.groups, call.depth, call.channels, call.splits
    height, width, kernel_height, kernel_width = call.height, call.width, call.kernel_height, call.kernel_width
    of_query, of_key, of_value, of_out = call.query_strides, call.key_strides, call.value_strides, call.out_strides
    queries, keys, values, out = (
        maps(call.queries, ANY),
        maps(call.keys, ANY),
        maps(call.values, ANY),
        maps(call.out, ANY),
    )
    size, blocks, used = height * width, (channels + LANES - 1) // LANES, kernel_height * kernel_width
    taps, side = (used + PAIR - 1) // PAIR * PAIR, (2 * kernel_height - 1) * (2 * kernel_width - 1)
    weights, biases = floats(call.weight, (call.regions * used,)), floats(call.bias, (used,))
    tables = floats(call.rpb, (groups, side))

    rows, blocked = aligned_zeros(depth * taps), aligned_zeros(blocks * size * LANES)
    bias, table = aligned_zeros(used + LANES), aligned_zeros(side + LANES)
    for n in range(used):
        bias[n] = biases[n] * LOG2_E
    query, logits = aligned_zeros(4 * depth + LANES), aligned_zeros(4 * taps)
    start, mixed = no_biases(used, taps), aligned_zeros(4 * LANES)
    window, scale, held = np.zeros(4, np.int64), np.zeros(4, np.float32), np.zeros((4, 2), np.int64)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        b, split, g = task // (groups * splits), task // groups % splits, task % groups
        first, last = size * split // splits, size * (split + 1) // splits
        fold_key(
            keys, b * of_key[0] + g * of_key[1], of_key[2], of_key[3], weights, depth, call.regions, used, taps, rows
        )  # fmt: skip
        held[:] = -1
        for i in range(side):
            table[i] = tables[g, i] * LOG2_E
        base = min(max(first // width - kernel_height // 2, 0), height - kernel_height)  # first row of any window
        bottom = min(max((last - 1) // width - kernel_height // 2, 0), height - kernel_height) + kernel_height
        positions = (bottom - base) * width
        place = b * of_value[0] + g * of_value[1] + base * width * of_value[3]
        block_channels(values, place, of_value[2], of_value[3], channels, positions, blocked)
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
                place = b * of_query[0] + g * of_query[1] + (t + i) * of_query[3]
                read_token(queries, place, of_query[2], depth, query, i * depth)
                x += 1
                if x == width:
                    y, x = y + 1, 0
            for i in range(count, 4):  # beside the last tokens, weighed for nothing
                window[i] = window[count - 1]
            four_logits(query, depth, rows, taps, start, logits)
            four_softmax(logits, taps, scale)
            for block in range(blocks):
                weigh(
                    blocked, block * positions * LANES, logits, taps, window, column_of_first, width, kernel_height,
                    kernel_width, mixed,
                )  # fmt: skip
                for i in range(count):
                    place = b * of_out[0] + g * of_out[1] + block * LANES * of_out[2] + (t + i) * of_out[3]
                    write_token(mixed, i * LANES, scale[i], out, place, of_out[2], min(LANES, channels - block * LANES))
