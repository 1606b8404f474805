"""Gradients of ContMix's dynamic convolution on CPU; imports numba and compiles, so it is imported on use.

Maps are float32 or bfloat16, everything between is float32.

Four tokens at a time, everything that has the size of their kernels stays in the first-level cache: kernels P again,
their gradients dP = grad . value, those of the logits dL = P (dP - sum P dP), and what these give to each input. Taps
are in the lanes where a token's taps are computed, channels where sums over taps or tokens are. A task is one map of
one group, or a part of it, with sums of its own, so that the result does not depend on which thread took it.

Letters as in kernels/torch/reference.py; a line is a row of taps, or all of them where a window is as wide as the map.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from overlock.kernels.numba.activations import exp2
from overlock.kernels.numba.arguments import INT64, MAP, POINTER, STRIDES
from overlock.kernels.numba.contmix import map_splits
from overlock.kernels.numba.contmix_kernels import LOG2_E, PAIR, four_logits, no_biases, read_token, tap_biases
from overlock.kernels.numba.runtime import ANY, OPTIONS, floats, kernel, maps, run, task_range
from overlock.kernels.numba.simd import (
    LANES,
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
)
from overlock.kernels.numba.vector_tuples import store_all

ZERO = np.float32(0)


@njit(**OPTIONS)
def read_planes(values, first, by_channel, by_token, channels, tokens, plane, out):
    """Values (C, tokens) of any strides as planes, one a channel."""
    for c in range(channels):
        for t in range(tokens):
            out[c * plane + t] = load_number(values, first + c * by_channel + t * by_token)


@njit(**OPTIONS)
def read_tap_keys(tap_keys, depth, used, taps, rows, columns):
    """Tap keys (D, N) as rows (D, taps) and as columns (blocks, N, LANES)."""
    for d in range(depth):
        block = d // LANES * used * LANES + d % LANES
        for n in range(used):
            rows[d * taps + n] = tap_keys[d * used + n]
            columns[block + n * LANES] = tap_keys[d * used + n]


@njit(**OPTIONS)
def four_kernel_gradients(planes, plane, grad, channels, window, width, lines, line, used, step, out):
    """out (4, N) = grad (4, C) @ the values under each token's window, zeros beyond."""
    first, second, third, fourth = window[0], window[1], window[2], window[3]
    for k in range(lines):
        for j in range(0, line, LANES):
            a = b = c = d = broadcast(ZERO)
            for i in range(channels):
                x = i * plane + k * width + j
                a, b = (
                    a + load_broadcast(grad, i) * load(planes, x + first),
                    b + load_broadcast(grad, channels + i) * load(planes, x + second),
                )
                c = c + load_broadcast(grad, 2 * channels + i) * load(planes, x + third)
                d = d + load_broadcast(grad, 3 * channels + i) * load(planes, x + fourth)
            to = k * line + j
            store_all(out, to, step, (a, b, c, d))
    for to in range(used, used + 4 * step, step):
        store(out, to, broadcast(ZERO))
        store(out, to + LANES, broadcast(ZERO))


@njit(**OPTIONS)
def softmax_gradient(logits, first, grads, at, taps):
    """2 to a token's logits less their largest, in place, and the logits' gradients in place of the kernel's.

    Returns one over the sum of the powers.
    """
    top = load(logits, first)
    for n in range(first + LANES, first + taps, LANES):
        top = maximum(load(logits, n), top)
    top = broadcast(reduce_max(top))
    both = weighted = broadcast(ZERO)
    for n in range(0, taps, LANES):
        power = exp2((load(logits, first + n) - top) * broadcast(LOG2_E))
        both, weighted = both + power, weighted + power * load(grads, at + n)
        store(logits, first + n, power)
    scale = np.float32(1) / reduce_sum(both)
    mean = broadcast(reduce_sum(weighted) * scale)
    for n in range(0, taps, LANES):
        store(grads, at + n, load(logits, first + n) * broadcast(scale) * (load(grads, at + n) - mean))
    return scale


@njit(**OPTIONS)
def add_to_biases(grads, step, taps, sums):
    for n in range(0, taps, LANES):
        a, b = load(grads, n) + load(grads, n + step), load(grads, n + 2 * step) + load(grads, n + 3 * step)
        store(sums, n, load(sums, n) + (a + b))


@njit(**OPTIONS)
def add_to_table(grads, step, offset, count, kernel_height, kernel_width, table):
    """Add tokens' gradients to those of the relative position bias, each from its row and column on."""
    side = 2 * kernel_width - 1
    for i in range(count):
        for k in range(kernel_height):
            source, to = i * step + k * kernel_width, (offset[i, 0] + k) * side + offset[i, 1]
            for j in range(0, kernel_width, LANES):
                store(table, to + j, load(table, to + j) + masked_load(grads, source + j, kernel_width - j))


@njit(**OPTIONS)
def four_through_tap_keys(grads, step, used, columns, query, depth, block, key_sums, out):
    """Four queries' gradients out (4, LANES) = grads (4, N) @ columns (N, LANES); adds grads^T @ query to the keys'."""
    left = depth - block * LANES
    first, second = masked_load(query, block * LANES, left), masked_load(query, depth + block * LANES, left)
    third = masked_load(query, 2 * depth + block * LANES, left)
    fourth = masked_load(query, 3 * depth + block * LANES, left)
    a = b = c = d = broadcast(ZERO)
    for n in range(used):
        place = (block * used + n) * LANES
        x = load(columns, place)
        p, q, r, s = (
            load_broadcast(grads, n),
            load_broadcast(grads, n + step),
            load_broadcast(grads, n + 2 * step),
            load_broadcast(grads, n + 3 * step),
        )
        a, b, c, d = a + p * x, b + q * x, c + r * x, d + s * x
        store(key_sums, place, load(key_sums, place) + p * first + q * second + r * third + s * fourth)
    store_all(out, 0, LANES, (a, b, c, d))


@njit(**OPTIONS)
def give_one(sums, kernel, at, y, window, width, lines, line):
    """Add a token's gradient, weighed by its kernel, to the values (H W, LANES) under its window."""
    for k in range(lines):
        place, n = (window + k * width) * LANES, at + k * line
        for j in range(line):
            to = place + j * LANES
            store(sums, to, load(sums, to) + load_broadcast(kernel, n + j) * y)


@njit(**OPTIONS)
def give_four_at_one_place(sums, kernel, taps, a, b, c, d, window, width, lines, line):
    """The same for four tokens with one window."""
    for k in range(lines):
        place, n = (window + k * width) * LANES, k * line
        for j in range(n, n + line):
            to = place + (j - n) * LANES
            x = load(sums, to) + load_broadcast(kernel, j) * a + load_broadcast(kernel, j + taps) * b
            store(sums, to, x + load_broadcast(kernel, j + 2 * taps) * c + load_broadcast(kernel, j + 3 * taps) * d)


@njit(**OPTIONS)
def give_four_in_a_row(sums, kernel, taps, a, b, c, d, window, width, lines, line):
    """The same for four tokens whose windows move with them, K >= 3."""
    for k in range(lines):
        to, n = (window + k * width) * LANES, k * line
        p, q, r, s = n, n + taps - 1, n + 2 * taps - 2, n + 3 * taps - 3
        store(sums, to, load(sums, to) + load_broadcast(kernel, p) * a)
        to += LANES
        store(sums, to, load(sums, to) + load_broadcast(kernel, p + 1) * a + load_broadcast(kernel, q + 1) * b)
        to += LANES
        x = load(sums, to) + load_broadcast(kernel, p + 2) * a
        store(sums, to, x + load_broadcast(kernel, q + 2) * b + load_broadcast(kernel, r + 2) * c)
        for j in range(3, line):
            to += LANES
            x = load(sums, to) + load_broadcast(kernel, p + j) * a + load_broadcast(kernel, q + j) * b
            store(sums, to, x + load_broadcast(kernel, r + j) * c + load_broadcast(kernel, s + j) * d)
        to += LANES
        x = load(sums, to) + load_broadcast(kernel, q + line) * b
        store(sums, to, x + load_broadcast(kernel, r + line) * c + load_broadcast(kernel, s + line) * d)
        to += LANES
        x = load(sums, to) + load_broadcast(kernel, r + line + 1) * c
        store(sums, to, x + load_broadcast(kernel, s + line + 1) * d)
        to += LANES
        store(sums, to, load(sums, to) + load_broadcast(kernel, s + line + 2) * d)


@njit(**OPTIONS)
def give(sums, positions, kernel, taps, grad, channels, scale, window, in_a_row, width, lines, line):
    """Add four tokens' gradients to those of the values (blocks, positions, LANES), in the way their windows allow."""
    first, second, third, fourth = window[0], window[1], window[2], window[3]
    for at in range(0, channels, LANES):
        part, left = sums[at * positions :], channels - at
        a, b = masked_load(grad, at, left), masked_load(grad, at + channels, left)
        c, d = masked_load(grad, at + 2 * channels, left), masked_load(grad, at + 3 * channels, left)
        a, b = a * load_broadcast(scale, 0), b * load_broadcast(scale, 1)
        c, d = c * load_broadcast(scale, 2), d * load_broadcast(scale, 3)
        if first == second and first == third and first == fourth:
            give_four_at_one_place(part, kernel, taps, a, b, c, d, first, width, lines, line)
        elif in_a_row and line >= 3 and second == first + 1 and third == first + 2 and fourth == first + 3:
            give_four_in_a_row(part, kernel, taps, a, b, c, d, first, width, lines, line)
        else:
            give_one(part, kernel, 0, a, first, width, lines, line)
            give_one(part, kernel, taps, b, second, width, lines, line)
            give_one(part, kernel, 2 * taps, c, third, width, lines, line)
            give_one(part, kernel, 3 * taps, d, fourth, width, lines, line)


@njit(**OPTIONS)
def window_start(position, size, kernel_size):
    return min(max(position - kernel_size // 2, 0), size - kernel_size)


@njit(**OPTIONS)
def locate(token, base, height, width, kernel_height, kernel_width, bias, table, held, out, to):
    """First position of a token's window, from row ``base`` on; its taps' biases to ``out``, unless these are there."""
    y, x = token // width, token % width
    top, left = window_start(y, height, kernel_height), window_start(x, width, kernel_width)
    row, column = top - y + kernel_height - 1, left - x + kernel_width - 1
    if row != held[0] or column != held[1]:  # seldom, inside the map
        tap_biases(bias, table, row, column, kernel_height, kernel_width, out, to)
        held[0], held[1] = row, column
    return (top - base) * width + left


@njit(**OPTIONS)
def write_block(vectors, count, channels, block, out, first, by_token):
    """A block of some tokens' channels to their places."""
    for i in range(count):
        masked_store(out, first + i * by_token + block * LANES, load(vectors, i * LANES), channels - block * LANES)


@njit(**OPTIONS)
def write_values(sums, positions, channels, out, first, by_position):
    """Gradients (blocks, positions, LANES) of values to their places, a position's channels side by side."""
    for t in range(positions):
        for c in range(0, channels, LANES):
            x = load(sums, c * positions + t * LANES)
            masked_store(out, first + t * by_position + c, x, channels - c)


@njit(**OPTIONS)
def write_tap_keys(sums, depth, used, out):
    """Gradients (blocks, N, LANES) of tap keys as (D, N)."""
    for d in range(depth):
        for n in range(used):
            out[d, n] = sums[(d // LANES * used + n) * LANES + d % LANES]


@kernel(
    queries=MAP,  # (B, G, D, H W)
    values=MAP,  # (B, G, C, H W)
    grads=MAP,  # (B, G, C, H W)
    tap_keys=POINTER,  # (B G, D, N)
    bias=POINTER,  # (N)
    rpb=POINTER,  # (G, 2 Kh - 1, 2 Kw - 1)
    query_grads=MAP,  # (B, H W, G, D)
    value_grads=MAP,  # (splits, B, H W, G, C)
    key_grads=POINTER,  # (B G, splits, D, N)
    bias_grads=POINTER,  # (B G, splits, N)
    rpb_grads=POINTER,  # (B G, splits, 2 Kh - 1, 2 Kw - 1)
    batch=INT64,
    groups=INT64,
    depth=INT64,
    channels=INT64,
    height=INT64,
    width=INT64,
    kernel_height=INT64,
    kernel_width=INT64,
    splits=INT64,  # of a map
    query_strides=STRIDES,
    value_strides=STRIDES,
    grad_strides=STRIDES,
)
def contmix_backward(call, thread, threads):
    """All gradients of the dynamic convolution. A task is a part of one map of one group."""
    batch, groups, depth, channels, splits = call.batch, call.groups, call.depth, call.channels, call.splits
    height, width, kernel_height, kernel_width = call.height, call.width, call.kernel_height, call.kernel_width
    of_query, of_value, of_grad = call.query_strides, call.value_strides, call.grad_strides
    size, used = height * width, kernel_height * kernel_width
    queries, values, grads = maps(call.queries, ANY), maps(call.values, ANY), maps(call.grads, ANY)
    taps, side = (used + PAIR - 1) // PAIR * PAIR, (2 * kernel_height - 1) * (2 * kernel_width - 1)
    step, tasks, plane = taps + PAIR, batch * groups * splits, size + LANES
    tap_keys, biases = floats(call.tap_keys, (batch * groups, depth * used)), floats(call.bias, (used,))
    tables, query_grads = floats(call.rpb, (groups, side)), maps(call.query_grads, ANY)
    value_grads, key_grads = maps(call.value_grads, ANY), floats(call.key_grads, (tasks, depth, used))
    bias_grads, table_grads = floats(call.bias_grads, (tasks, used)), floats(call.rpb_grads, (tasks, side))
    lines, line = (1, used) if kernel_width == width else (kernel_height, kernel_width)
    depth_blocks, blocks = (depth + LANES - 1) // LANES, (channels + LANES - 1) // LANES
    rows, planes = np.zeros(depth * taps, np.float32), np.zeros(channels * plane + LANES, np.float32)
    columns, key_sums = (
        np.zeros(depth_blocks * used * LANES, np.float32),
        np.zeros(depth_blocks * used * LANES, np.float32),
    )
    bias, table, table_sums = (
        np.zeros(used + LANES, np.float32),
        np.zeros(side + LANES, np.float32),
        np.zeros(side + LANES, np.float32),
    )
    bias[:used], bias_sums = biases, np.zeros(taps, np.float32)
    sums, mixed = np.zeros(blocks * size * LANES, np.float32), np.zeros(4 * LANES, np.float32)
    query, grad = np.zeros(4 * depth + LANES, np.float32), np.zeros(4 * channels + LANES, np.float32)
    start, logits = no_biases(used, taps), np.zeros(4 * taps, np.float32)
    kernel_grads, scale = np.zeros(4 * step, np.float32), np.zeros(4, np.float32)
    window, held = np.zeros(4, np.int64), np.zeros((4, 2), np.int64)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        b, g, split = task // splits // groups, task // splits % groups, task % splits
        first, last = size * split // splits, size * (split + 1) // splits
        base = window_start(first // width, height, kernel_height)
        here = (window_start((last - 1) // width, height, kernel_height) + kernel_height - base) * width
        read_tap_keys(tap_keys[task // splits], depth, used, taps, rows, columns)
        first_value = b * of_value[0] + g * of_value[1] + base * width * of_value[3]
        read_planes(values, first_value, of_value[2], of_value[3], channels, here, plane, planes)
        held[:], table[:side] = -1, tables[g]
        key_sums[:], bias_sums[:], table_sums[:], sums[:] = 0, 0, 0, 0
        for t in range(first, last, 4):
            count = min(4, last - t)
            for i in range(count):
                window[i] = locate(
                    t + i, base, height, width, kernel_height, kernel_width, bias, table, held[i], start,
                    i * (taps + LANES),
                )  # fmt: skip
                read_token(
                    queries, b * of_query[0] + g * of_query[1] + (t + i) * of_query[3], of_query[2], depth, query,
                    i * depth,
                )  # fmt: skip
                read_token(
                    grads, b * of_grad[0] + g * of_grad[1] + (t + i) * of_grad[3], of_grad[2], channels, grad,
                    i * channels,
                )  # fmt: skip
            # Tokens without a query and a gradient, beside the last ones, add nothing.
            query[count * depth :], grad[count * channels :], window[count:] = 0, 0, window[count - 1]
            four_logits(query, depth, rows, taps, start, logits)
            four_kernel_gradients(planes, plane, grad, channels, window, width, lines, line, used, step, kernel_grads)
            for i in range(4):
                scale[i] = softmax_gradient(logits, i * taps, kernel_grads, i * step, taps)
            add_to_biases(kernel_grads, step, taps, bias_sums)
            add_to_table(kernel_grads, step, held, count, kernel_height, kernel_width, table_sums)
            place = (b * size + t) * groups + g
            for block in range(depth_blocks):
                four_through_tap_keys(kernel_grads, step, used, columns, query, depth, block, key_sums, mixed)
                write_block(mixed, count, depth, block, query_grads, place * depth, groups * depth)
            give(sums, here, logits, taps, grad, channels, scale, window, t % width + 3 < width, width, lines, line)

        write_values(
            sums, here, channels, value_grads,
            (((split * batch + b) * size + base * width) * groups + g) * channels, groups * channels,
        )  # fmt: skip
        write_tap_keys(key_sums, depth, used, key_grads[task])
        bias_grads[task], table_grads[task] = bias_sums[:used], table_sums[:side]


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, weight, bias and rpb; see :func:`overlock.kernels.torch.reference.contmix`.

    Those of query and value have the type of ``value``, the others are float32.
    """
    grad, query, weight = grad.to(value.dtype), query.to(value.dtype), weight.float()
    bias, rpb = (None if x is None else x.float() for x in (bias, rpb))
    batch, groups, channels, height, width = value.shape
    depth, taps = query.shape[2], len(weight)
    positions, pairs = height * width, batch * groups
    keys = key.float().reshape(pairs * depth, -1)
    tap_keys = keys @ weight.t()  # B G D, N
    biases = weight.new_zeros(taps) if bias is None else bias.contiguous()
    sides = (2 * kernel_height - 1, 2 * kernel_width - 1)
    tables = weight.new_zeros(groups, *sides) if rpb is None else rpb.contiguous()
    queries, values, grads = query.flatten(3), value.flatten(3), grad.flatten(3)

    splits = map_splits(pairs, positions)
    query_grads = query.new_empty(batch, height, width, groups, depth)
    value_grads = (value.new_empty if splits == 1 else value.new_zeros)(splits, batch, height, width, groups, channels)
    key_grads, bias_grads = keys.new_empty(pairs, splits, depth, taps), keys.new_empty(pairs * splits, taps)
    table_grads = keys.new_empty(batch, groups, splits, *sides)
    run(
        contmix_backward, pairs * splits, queries=queries, values=values, grads=grads, tap_keys=tap_keys, bias=biases,
        rpb=tables, query_grads=query_grads, value_grads=value_grads, key_grads=key_grads, bias_grads=bias_grads,
        rpb_grads=table_grads, batch=batch, groups=groups, depth=depth, channels=channels, height=height, width=width,
        kernel_height=kernel_height, kernel_width=kernel_width, splits=splits, query_strides=queries.stride(),
        value_strides=values.stride(), grad_strides=grads.stride(),
    )  # fmt: skip
    key_grad, value_grad = (x.squeeze(i) if splits == 1 else x.sum(i) for x, i in ((key_grads, 1), (value_grads, 0)))
    by_tap = key_grad.view(pairs * depth, taps)
    return (
        query_grads.permute(0, 3, 4, 1, 2),
        (by_tap @ weight).view(key.shape),
        value_grad.permute(0, 3, 4, 1, 2),
        by_tap.t() @ keys,
        None if bias is None else bias_grads.sum(dim=0),
        None if rpb is None else table_grads.sum(dim=(0, 2)),
    )
