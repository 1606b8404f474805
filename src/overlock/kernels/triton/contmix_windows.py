"""ContMix's Triton kernels where tokens share windows: at most two rows and two columns of windows.

All tokens of a window see the same values, so the mixing is attention: two products of matrices with a softmax
between them, the window's N taps as the keys. A tile is up to 64 tokens of one window. Letters and conventions as in
contmix_kernels.py; height and width are compiled in, since they are K or K + 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from overlock.kernels.triton.contmix_kernels import LN2, dot, key_product, load_keys, load_rows, product, shift


@triton.jit
def _window(number, width: tl.constexpr, kernel_width: tl.constexpr):
    """Row and column of the first tap of a window, which are its own row and column among the windows."""
    across: tl.constexpr = width - kernel_width + 1
    return number // across, number % across


@triton.jit
def _tokens(
    tile, token, height: tl.constexpr, width: tl.constexpr, kernel_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, parts: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """Rows and columns in the map of tokens of a tile, and which of them exist.

    Tokens of a window are counted in the ``rows`` and ``columns`` of the first, which no other exceeds.
    """
    window_row, window_column = _window(tile // parts, width, kernel_width)
    token += tile % parts * tokens
    row, column = window_row * rows + token // columns, window_column * columns + token % columns
    inside = (token < rows * columns) & (row < height) & (column < width)
    return tl.minimum(row, height - 1), tl.minimum(column, width - 1), inside


@triton.jit
def _place(row, column, height, width, kernel_height: tl.constexpr, kernel_width: tl.constexpr):
    """Number of a token's shifts in the table."""
    return shift(row, height, kernel_height) * kernel_width + shift(column, width, kernel_width)


@triton.jit
def _positions(entry, window_row, window_column, width, kernel_height: tl.constexpr, kernel_width: tl.constexpr):
    """Of taps, their positions in the map."""
    tap = tl.minimum(entry, kernel_height * kernel_width - 1)
    return (window_row + tap // kernel_width) * width + window_column + tap % kernel_width


@triton.jit
def forward_kernel(
    query, keys, value, table, out,
    query_b, query_g, query_t, value_b, value_g, value_t, out_b, out_g, out_t, out_c, half, batches, groups, tiles,
    depth: tl.constexpr, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, parts: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, taps_p: tl.constexpr, tokens: tl.constexpr, chunk: tl.constexpr,
    unit: tl.constexpr, out_unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one batch and group. Programs of the same rows of the table run side by side."""
    batch = (tl.program_id(0) % batches).to(tl.int64)
    tile = tl.program_id(0) // batches % tiles
    group = (tl.program_id(0) // batches // tiles).to(tl.int64)
    window_row, window_column = _window(tile // parts, width, kernel_width)
    row, column, inside = _tokens(tile, tl.arange(0, tokens), height, width, kernel_width, rows, columns, parts, tokens)
    place = _place(row, column, height, width, kernel_height, kernel_width)
    entry = tl.arange(0, chunk)
    biases = table + (group * kernel_height * kernel_width + place[:, None]) * taps_p + entry[None, :]
    keys += ((batch * groups + group) * taps_p + entry[None, :]) * depth_p + tl.arange(0, depth_p)[:, None]
    token = row * width + column
    features = load_rows(query + (batch * query_b + group * query_g) * unit, token, query_t * unit, depth, depth_p)
    value += (batch * value_b + group * value_g) * unit

    largest = tl.full([tokens], float("-inf"), tl.float32)
    total = tl.zeros([tokens], tl.float32)
    mixed = tl.zeros([tokens, channels_p], tl.float32)
    for first in range(0, taps_p, chunk):
        high, low = load_keys(keys + first * depth_p, half, exact)
        logits = key_product(features, high, low, False, exact) + tl.load(biases + first)
        raised = tl.maximum(largest, tl.max(logits, 1))
        kernels = tl.exp2(logits - raised[:, None])
        shrink = tl.exp2(largest - raised)
        total = total * shrink + tl.sum(kernels, 1)
        largest = raised
        position = _positions(first + entry, window_row, window_column, width, kernel_height, kernel_width)
        seen = load_rows(value, position, value_t * unit, channels, channels_p)
        mixed = mixed * shrink[:, None] + dot(kernels.to(seen.dtype), seen, exact)

    result = mixed / total[:, None]
    channel = tl.arange(0, channels_p)[None, :]
    target = out + (batch * out_b + group * out_g) * out_unit + token[:, None] * (out_t * out_unit) + channel * out_c
    tl.store(target, result.to(out.dtype.element_ty), mask=inside[:, None] & (channel < channels))


@triton.jit
def query_kernel(
    grad, query, keys, value, table, lse, delta, grad_query,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, value_b, value_g, value_t, out_b, out_g, out_t, out_c,
    half, batches, groups, tiles,
    depth: tl.constexpr, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, parts: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, taps_p: tl.constexpr, tokens: tl.constexpr, chunk: tl.constexpr,
    unit: tl.constexpr, out_unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one batch and group. Gradient of query; leaves lse and delta for the other kernels.

    With P the kernels, dP[t, n] = grad[t] . value[win(t) + n] and delta[t] = sum over n of P dP, the gradient of the
    query is sum over n of P (dP - delta) keys. Both sums and delta are kept up to date in one pass over the taps.
    """
    batch = (tl.program_id(0) % batches).to(tl.int64)
    tile = tl.program_id(0) // batches % tiles
    group = (tl.program_id(0) // batches // tiles).to(tl.int64)
    pair = batch * groups + group
    window_row, window_column = _window(tile // parts, width, kernel_width)
    row, column, inside = _tokens(tile, tl.arange(0, tokens), height, width, kernel_width, rows, columns, parts, tokens)
    place = _place(row, column, height, width, kernel_height, kernel_width)
    entry = tl.arange(0, chunk)
    biases = table + (group * kernel_height * kernel_width + place[:, None]) * taps_p + entry[None, :]
    keys += (pair * taps_p + entry[None, :]) * depth_p + tl.arange(0, depth_p)[:, None]
    token = row * width + column
    features = load_rows(query + (batch * query_b + group * query_g) * unit, token, query_t * unit, depth, depth_p)
    grads = load_rows(grad + (batch * grad_b + group * grad_g) * unit, token, grad_t * unit, channels, channels_p)
    value += (batch * value_b + group * value_g) * unit

    largest = tl.full([tokens], float("-inf"), tl.float32)
    total = tl.zeros([tokens], tl.float32)
    mean = tl.zeros([tokens], tl.float32)
    sum_scaled = tl.zeros([tokens, depth_p], tl.float32)
    sum_keys = tl.zeros([tokens, depth_p], tl.float32)
    for first in range(0, taps_p, chunk):
        high, low = load_keys(keys + first * depth_p, half, exact)
        logits = key_product(features, high, low, False, exact) + tl.load(biases + first)
        raised = tl.maximum(largest, tl.max(logits, 1))
        kernels = tl.exp2(logits - raised[:, None])
        shrink = tl.exp2(largest - raised)
        largest = raised
        position = _positions(first + entry, window_row, window_column, width, kernel_height, kernel_width)
        seen = load_rows(value, position, value_t * unit, channels, channels_p)
        scaled = kernels * dot(grads, tl.trans(seen), exact)
        total = total * shrink + tl.sum(kernels, 1)
        mean = mean * shrink + tl.sum(scaled, 1)
        high = tl.trans(high)
        low = tl.trans(low)
        sum_scaled = sum_scaled * shrink[:, None] + key_product(scaled, high, low, False, exact)
        sum_keys = sum_keys * shrink[:, None] + key_product(kernels, high, low, False, exact)

    mean /= total
    where = pair * height * width + token
    tl.store(lse + where, largest + tl.log2(total), mask=inside)
    tl.store(delta + where, mean, mask=inside)
    result = (sum_scaled - mean[:, None] * sum_keys) / total[:, None] * LN2
    channel = tl.arange(0, depth_p)[None, :]
    target = grad_query + (batch * out_b + group * out_g) * out_unit
    target += token[:, None] * (out_t * out_unit) + channel * out_c
    tl.store(target, result.to(grad_query.dtype.element_ty), mask=inside[:, None] & (channel < depth))


@triton.jit
def value_kernel(
    grad, query, keys, table, lse, grad_value,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, out_b, out_g, out_t, out_c, half, batches, groups, tiles,
    depth: tl.constexpr, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, parts: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, taps_p: tl.constexpr, tokens: tl.constexpr, chunk: tl.constexpr,
    unit: tl.constexpr, out_unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of positions of one batch and group, and the tokens of all windows that hold them."""
    chunks: tl.constexpr = (height * width + chunk - 1) // chunk
    batch = (tl.program_id(0) % batches).to(tl.int64)
    position = tl.program_id(0) // batches % chunks * chunk + tl.arange(0, chunk)
    group = (tl.program_id(0) // batches // chunks).to(tl.int64)
    pair = batch * groups + group
    table += group * kernel_height * kernel_width * taps_p
    keys += pair * taps_p * depth_p + tl.arange(0, depth_p)[:, None]
    query += (batch * query_b + group * query_g) * unit
    grad += (batch * grad_b + group * grad_g) * unit
    lse += pair * height * width
    summed = tl.zeros([chunk, channels_p], tl.float32)
    for tile in range(tiles):
        window_row, window_column = _window(tile // parts, width, kernel_width)
        row, column, inside = _tokens(
            tile, tl.arange(0, tokens), height, width, kernel_width, rows, columns, parts, tokens
        )
        tap_row, tap_column = position // width - window_row, position % width - window_column
        reached = (tap_row >= 0) & (tap_row < kernel_height) & (tap_column >= 0) & (tap_column < kernel_width)
        entry = tl.where(reached, tap_row * kernel_width + tap_column, 0)
        if height == kernel_height and width == kernel_width:
            entry = position  # one window: taps in order, which can be loaded several at once
        token = row * width + column
        features = load_rows(query, token, query_t * unit, depth, depth_p)
        high, low = load_keys(keys + entry[None, :] * depth_p, half, exact)
        place = _place(row, column, height, width, kernel_height, kernel_width)
        logits = key_product(features, high, low, False, exact)
        logits += tl.load(table + place[:, None] * taps_p + entry[None, :])
        kernels = tl.exp2(logits - tl.load(lse + token)[:, None])
        grads = load_rows(grad, token, grad_t * unit, channels, channels_p)
        grads = tl.where(inside[:, None], grads, 0.0).to(grads.dtype)
        part = dot(tl.trans(kernels.to(grads.dtype)), grads, exact)
        summed += tl.where(reached[:, None], part, 0.0)

    channel = tl.arange(0, channels_p)[None, :]
    target = grad_value + (batch * out_b + group * out_g) * out_unit
    target += position[:, None] * (out_t * out_unit) + channel * out_c
    inside = (position < height * width)[:, None] & (channel < channels)
    tl.store(target, summed.to(grad_value.dtype.element_ty), mask=inside)


@triton.jit
def taps_kernel(
    grad, query, keys, value, table, lse, delta, grad_keys, grad_biases,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, value_b, value_g, value_t,
    half, batches, groups, tiles, splits,
    depth: tl.constexpr, channels: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, parts: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, taps_p: tl.constexpr, tokens: tl.constexpr, chunk: tl.constexpr,
    together: tl.constexpr, unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of taps, a group, ``together`` tiles, and every ``splits``-th image.

    Gradients of the keys, (tiles / together, BG, taps, D), an image after the other, and of the biases of each token,
    (splits, G, tiles x tokens, taps), summed over images.
    """
    chunks: tl.constexpr = taps_p // chunk
    entry = tl.program_id(0) % chunks * chunk + tl.arange(0, chunk)
    first_tile = tl.program_id(0) // chunks % tl.cdiv(tiles, together) * together
    split = (tl.program_id(0) // chunks // tl.cdiv(tiles, together) % splits).to(tl.int64)
    group = (tl.program_id(0) // chunks // tl.cdiv(tiles, together) // splits).to(tl.int64)

    tile = first_tile + tl.arange(0, together)[:, None]
    index = tl.arange(0, tokens)[None, :]
    row, column, inside = _tokens(tile, index, height, width, kernel_width, rows, columns, parts, tokens)
    inside = inside & (tile < tiles)
    token = row * width + column
    place = _place(row, column, height, width, kernel_height, kernel_width)
    biases = table + (group * kernel_height * kernel_width + place[:, :, None]) * taps_p + entry[None, None, :]
    window_row, window_column = _window(tl.minimum(tile, tiles - 1) // parts, width, kernel_width)
    position = _positions(entry[None, :], window_row, window_column, width, kernel_height, kernel_width)
    channel = tl.arange(0, channels_p)[None, None, :]
    feature = tl.arange(0, depth_p)

    summed = tl.zeros([together, tokens, chunk], tl.float32)
    for batch in range(split, batches, splits):
        pair = batch * groups + group
        pointer = keys + (pair * taps_p + entry[None, None, :]) * depth_p + feature[None, :, None]
        high, low = load_keys(pointer, half, exact)
        high, low = high.broadcast_to(together, depth_p, chunk), low.broadcast_to(together, depth_p, chunk)
        pointer = query + (batch * query_b + group * query_g) * unit + token[:, :, None] * (query_t * unit)
        features = tl.load(pointer + feature[None, None, :], mask=(feature < depth)[None, None, :], other=0.0)
        logits = key_product(features, high, low, False, exact) + tl.load(biases)
        kernels = tl.exp2(logits - tl.load(lse + pair * height * width + token)[:, :, None])
        pointer = grad + (batch * grad_b + group * grad_g) * unit + token[:, :, None] * (grad_t * unit)
        grads = tl.load(pointer + channel, mask=channel < channels, other=0.0)
        pointer = value + (batch * value_b + group * value_g) * unit + position[:, :, None] * (value_t * unit)
        seen = tl.load(pointer + channel, mask=channel < channels, other=0.0)
        grad_kernels = dot(grads, tl.trans(seen, 0, 2, 1), exact)
        grad_logits = kernels * (grad_kernels - tl.load(delta + pair * height * width + token)[:, :, None])
        grad_logits = tl.where(inside[:, :, None], grad_logits, 0.0)
        summed += grad_logits
        part = tl.sum(product(tl.trans(grad_logits, 0, 2, 1), features, exact), 0)
        target = grad_keys + (first_tile // together).to(tl.int64) * batches * groups * taps_p * depth_p
        tl.store(target + (pair * taps_p + entry[:, None]) * depth_p + feature[None, :], part)

    place = (tile * tokens + index)[:, :, None]
    target = grad_biases + ((split * groups + group) * tiles * tokens + place) * taps_p + entry[None, None, :]
    tl.store(target, summed, mask=(tile < tiles)[:, :, None])
