"""The Triton kernels of ContMix's dynamic convolution; contmix.py calls them.

Letters as in contmix.py. Maps come as (B, G, HW, C) with the channels of a token side by side, given by a pointer
and the strides of batch, group and token; everything else is contiguous. Names that end in _p are sizes padded to a
power of two. Tokens beyond the map and taps beyond the last repeat the last one, so that every address is valid; what
they add is masked. Offsets inside one image are 32-bit, those of images and groups 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(x, y):
    """x @ y in float32, of operands of one dtype: float32 as it is (no tf32), 16-bit numbers without rounding."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)  # the interpreter would multiply the bits of bfloat16 as integers
    return tl.dot(x, y, input_precision="ieee")


# Triton interprets instead of compiling if TRITON_INTERPRET was set before this module was imported.
INTERPRETED = tl.constexpr(not isinstance(_dot, triton.JITFunction))


@triton.jit
def _product(x, y, exact: tl.constexpr):
    """x @ y to float32's accuracy (``exact``), or to 16 bits of mantissa with float32's range.

    16-bit matrix units are many times faster than the float32 path, but rounding an affinity or a logit to their 8 or
    11 bits would show, and float16 overflows. So a number is split in two bfloat16 (high + low), and low x low dropped.
    """
    if exact:
        result = _dot(x.to(tl.float32), y.to(tl.float32))
    else:
        x_high = x.to(tl.bfloat16)
        y_high = y.to(tl.bfloat16)
        result = _dot(x_high, y_high)
        if x.dtype != tl.bfloat16:
            result += _dot((x.to(tl.float32) - x_high.to(tl.float32)).to(tl.bfloat16), y_high)
        if y.dtype != tl.bfloat16:
            result += _dot(x_high, (y.to(tl.float32) - y_high.to(tl.float32)).to(tl.bfloat16))
    return result


@triton.jit
def _window(token, size, kernel: tl.constexpr):
    """First row (or column) of a token's window."""
    return tl.minimum(tl.maximum(token - kernel // 2, 0), size - kernel)


@triton.jit
def _first_tap(row, column, height, width, kernel_height: tl.constexpr, kernel_width: tl.constexpr):
    """Of a token's first tap: its position in the map, and its entry in the relative position bias."""
    window_row = _window(row, height, kernel_height)
    window_column = _window(column, width, kernel_width)
    entry = (window_row - row + kernel_height - 1) * (2 * kernel_width - 1) + window_column - column + kernel_width - 1
    return window_row * width + window_column, entry


@triton.jit
def _chunk(start, width, taps: tl.constexpr, chunk: tl.constexpr, kernel_width: tl.constexpr):
    """Consecutive taps, which of them exist, and their steps from the first tap in the map and in the position bias."""
    tap = start + tl.arange(0, chunk)
    inside = tap < taps
    tap = tl.minimum(tap, taps - 1)
    row, column = tap // kernel_width, tap % kernel_width
    return tap, inside, row * width + column, row * (2 * kernel_width - 1) + column


@triton.jit
def _load_columns(pointer, rows, row_stride, size: tl.constexpr, padded: tl.constexpr):
    """(len(rows), padded) numbers of a matrix with contiguous rows of ``size``, zeros beyond."""
    column = tl.arange(0, padded)
    return tl.load(pointer + rows[:, None] * row_stride + column[None, :], mask=column[None, :] < size, other=0.0)


@triton.jit
def _load_key(key, group, depth: tl.constexpr, regions: tl.constexpr, depth_p: tl.constexpr, regions_p: tl.constexpr):
    """Region centres (D, S^2) of one batch and group, zeros in the padding."""
    channel = tl.arange(0, depth_p)[:, None]
    region = tl.arange(0, regions_p)[None, :]
    inside = (channel < depth) & (region < regions)
    return tl.load(key + (group * depth + channel) * regions + region, mask=inside, other=0.0)


@triton.jit
def _load_weight(weight, tap, inside, regions: tl.constexpr, regions_p: tl.constexpr):
    """Rows of the weight as columns, (S^2, n), zeros in the padding."""
    region = tl.arange(0, regions_p)[:, None]
    return tl.load(weight + tap[None, :] * regions + region, mask=inside[None, :] & (region < regions), other=0.0)


@triton.jit
def _logits(
    affinity, weight, tap, inside, entry, tap_entry, bias, rpb,
    has_bias: tl.constexpr, has_rpb: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """Logits (T, n) of a chunk of taps, minus infinity where ``inside`` is false."""
    logits = _product(affinity, weight, exact)
    if has_bias:
        logits += tl.load(bias + tap, mask=inside, other=0.0).to(tl.float32)[None, :]
    if has_rpb:
        pointer = rpb + entry[:, None] + tap_entry[None, :]
        logits += tl.load(pointer, mask=inside[None, :], other=0.0).to(tl.float32)
    return tl.where(inside[None, :], logits, float("-inf"))


@triton.jit
def forward_kernel(
    query, key, value, weight, bias, rpb, out, lse,
    query_b, query_g, query_t, value_b, value_g, value_t, out_b, out_g, out_t, out_c, groups, height, width,
    depth: tl.constexpr, channels: tl.constexpr, regions: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, regions_p: tl.constexpr, tokens: tl.constexpr, chunk: tl.constexpr,
    has_bias: tl.constexpr, has_rpb: tl.constexpr, exact: tl.constexpr, keep_lse: tl.constexpr,
):  # fmt: skip
    """One program: T tokens of one batch and group."""
    size = height * width
    tiles = tl.cdiv(size, tokens)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, group = pair // groups, pair % groups
    token = (tl.program_id(0) % tiles) * tokens + tl.arange(0, tokens)
    held = tl.minimum(token, size - 1)  # tokens beyond the map repeat the last one and are not stored
    corner, entry = _first_tap(held // width, held % width, height, width, kernel_height, kernel_width)
    rpb += group * (2 * kernel_height - 1) * (2 * kernel_width - 1)
    value += batch * value_b + group * value_g

    features = _load_columns(query + batch * query_b + group * query_g, held, query_t, depth, depth_p)
    affinity = _dot(features, _load_key(key, pair, depth, regions, depth_p, regions_p))
    channel = tl.arange(0, channels_p)[None, None, :]
    taps: tl.constexpr = kernel_height * kernel_width
    largest = tl.full([tokens], float("-inf"), tl.float32)
    total = tl.zeros([tokens], tl.float32)
    mixed = tl.zeros([tokens, chunk, channels_p], tl.float32)
    for start in range(0, taps, chunk):
        tap, inside, step, tap_entry = _chunk(start, width, taps, chunk, kernel_width)
        rows = _load_weight(weight, tap, inside, regions, regions_p)
        logits = _logits(affinity, rows, tap, inside, entry, tap_entry, bias, rpb, has_bias, has_rpb, exact)
        raised = tl.maximum(largest, tl.max(logits, 1))
        kernels = tl.exp(logits - raised[:, None])
        shrink = tl.exp(largest - raised)
        total = total * shrink + tl.sum(kernels, 1)
        position = corner[:, None] + step[None, :]
        values = tl.load(value + position[:, :, None] * value_t + channel, mask=channel < channels, other=0.0)
        mixed = mixed * shrink[:, None, None] + kernels[:, :, None] * values.to(tl.float32)
        largest = raised

    result = tl.sum(mixed, 1) / total[:, None]
    column = tl.arange(0, channels_p)[None, :]
    target = out + batch * out_b + group * out_g + token[:, None] * out_t + column * out_c
    tl.store(target, result.to(out.dtype.element_ty), mask=(token[:, None] < size) & (column < channels))
    if keep_lse:
        tl.store(lse + pair * size + token, largest + tl.log(total), mask=token < size)


@triton.jit
def query_kernel(
    grad, mixed, query, key, value, weight, bias, rpb, lse, delta, grad_query, grad_key,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, value_b, value_g, value_t, out_b, out_g, out_t, out_c,
    groups, height, width, splits,
    depth: tl.constexpr, channels: tl.constexpr, regions: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, regions_p: tl.constexpr, tokens: tl.constexpr, chunk: tl.constexpr,
    has_bias: tl.constexpr, has_rpb: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: every ``splits``-th tile of one batch and group. Gradients of query and, as one part, of key.

    With P the kernels, dP[t, n] = grad[t] . value[win(t) + n] and delta[t] = grad[t] . out[t]: dL = P (dP - delta). It
    also leaves delta for the kernel of the weight's gradient.
    """
    size = height * width
    pair = (tl.program_id(0) // splits).to(tl.int64)
    batch, group = pair // groups, pair % groups
    rpb += group * (2 * kernel_height - 1) * (2 * kernel_width - 1)
    value += batch * value_b + group * value_g
    channel = tl.arange(0, channels_p)[None, None, :]
    taps: tl.constexpr = kernel_height * kernel_width
    centres = _load_key(key, pair, depth, regions, depth_p, regions_p)
    column = tl.arange(0, depth_p)[None, :]
    part = tl.zeros([depth_p, regions_p], tl.float32)
    for tile in range(tl.program_id(0) % splits, tl.cdiv(size, tokens), splits):
        token = tile * tokens + tl.arange(0, tokens)
        held = tl.minimum(token, size - 1)
        corner, entry = _first_tap(held // width, held % width, height, width, kernel_height, kernel_width)
        features = _load_columns(query + batch * query_b + group * query_g, held, query_t, depth, depth_p)
        affinity = _dot(features, centres)
        grads = _load_columns(grad + batch * grad_b + group * grad_g, held, grad_t, channels, channels_p).to(tl.float32)
        mean = tl.sum(grads * _load_columns(mixed + pair * size * channels, held, channels, channels, channels_p), 1)
        tl.store(delta + pair * size + token, mean, mask=token < size)
        log_total = tl.load(lse + pair * size + held)

        grad_affinity = tl.zeros([tokens, regions_p], tl.float32)
        for start in range(0, taps, chunk):
            tap, inside, step, tap_entry = _chunk(start, width, taps, chunk, kernel_width)
            rows = _load_weight(weight, tap, inside, regions, regions_p)
            logits = _logits(affinity, rows, tap, inside, entry, tap_entry, bias, rpb, has_bias, has_rpb, exact)
            kernels = tl.exp(logits - log_total[:, None])
            position = corner[:, None] + step[None, :]
            values = tl.load(value + position[:, :, None] * value_t + channel, mask=channel < channels, other=0.0)
            grad_kernels = tl.sum(grads[:, None, :] * values.to(tl.float32), 2)
            grad_affinity += _product(kernels * (grad_kernels - mean[:, None]), tl.trans(rows), exact)

        target = grad_query + batch * out_b + group * out_g + token[:, None] * out_t + column * out_c
        result = _product(grad_affinity, tl.trans(centres), exact).to(grad_query.dtype.element_ty)
        tl.store(target, result, mask=(token[:, None] < size) & (column < depth))
        grad_affinity = tl.where(token[:, None] < size, grad_affinity, 0.0)
        part += _product(tl.trans(features), grad_affinity, exact)

    row = tl.arange(0, depth_p)[:, None]
    region = tl.arange(0, regions_p)[None, :]
    target = grad_key + (tl.program_id(0).to(tl.int64) * depth + row) * regions + region
    tl.store(target, part, mask=(row < depth) & (region < regions))


@triton.jit
def _slot_rows(slot, pieces, height, kernel_height: tl.constexpr):
    """Rows from, and to but without, of a slot: K // 2 single rows, ``pieces`` of the centred ones, the single rest."""
    half: tl.constexpr = kernel_height // 2
    centred = height - kernel_height + 1
    piece = tl.minimum(tl.maximum(slot - half, 0), pieces)
    first = tl.minimum(slot, half) + centred * piece // pieces + tl.maximum(slot - half - pieces, 0)
    single = (slot < half) | (slot >= half + pieces)
    return first, tl.where(single, first + 1, half + centred * (piece + 1) // pieces)


@triton.jit
def weight_kernel(
    grad, query, key, value, weight, bias, rpb, lse, delta, grad_weight, grad_bias, grad_shift,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, value_b, value_g, value_t,
    batches, groups, height, width, splits, slots, pieces,
    depth: tl.constexpr, channels: tl.constexpr, regions: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, regions_p: tl.constexpr, shifts_p: tl.constexpr,
    tokens: tl.constexpr, chunk: tl.constexpr,
    has_bias: tl.constexpr, has_rpb: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of taps, a group, every ``splits``-th image, and a slot of map rows. Sums of dL over tokens.

    A slot is one row at the top or bottom, where each row's windows are shifted differently, or one of ``pieces`` of
    the rows between, whose windows are centred. Within it the row offsets of a tap are the same for all tokens; for the
    column offsets, dL is summed by the shift of the token's window, as a product with a matrix of zeros and ones. So
    the gradient of the relative position bias needs no atomics (see ``triton_mix.sum_shifts``).
    """
    chunks: tl.constexpr = (kernel_height * kernel_width + chunk - 1) // chunk
    taps: tl.constexpr = kernel_height * kernel_width
    owner = (tl.program_id(0) // chunks).to(tl.int64)  # of a group, a split and a slot
    slot = (owner % slots).to(tl.int32)
    group = owner // slots // splits
    first_row, last_row = _slot_rows(slot, pieces, height, kernel_height)
    tap, inside, step, tap_entry = _chunk(tl.program_id(0) % chunks * chunk, width, taps, chunk, kernel_width)
    rows = _load_weight(weight, tap, inside, regions, regions_p)
    rpb += group * (2 * kernel_height - 1) * (2 * kernel_width - 1)
    channel = tl.arange(0, channels_p)[None, None, :]

    sum_weight = tl.zeros([chunk, regions_p], tl.float32)
    sum_bias = tl.zeros([chunk], tl.float32)
    sum_shift = tl.zeros([shifts_p, chunk], tl.float32)
    for batch in range(((owner // slots) % splits).to(tl.int32), batches, splits):
        pair = batch * groups + group
        centres = _load_key(key, pair, depth, regions, depth_p, regions_p)
        for start in range(first_row * width, last_row * width, tokens):
            token = start + tl.arange(0, tokens)
            held = tl.minimum(token, last_row * width - 1)
            column = held % width
            corner, entry = _first_tap(held // width, column, height, width, kernel_height, kernel_width)
            features = _load_columns(query + batch * query_b + group * query_g, held, query_t, depth, depth_p)
            affinity = _dot(features, centres)
            logits = _logits(affinity, rows, tap, inside, entry, tap_entry, bias, rpb, has_bias, has_rpb, exact)
            kernels = tl.exp(logits - tl.load(lse + pair * height * width + held)[:, None])
            grads = _load_columns(grad + batch * grad_b + group * grad_g, held, grad_t, channels, channels_p)
            position = corner[:, None] + step[None, :]
            pointer = value + batch * value_b + group * value_g + position[:, :, None] * value_t + channel
            values = tl.load(pointer, mask=channel < channels, other=0.0).to(tl.float32)
            grad_kernels = tl.sum(grads.to(tl.float32)[:, None, :] * values, 2)
            grad_logits = kernels * (grad_kernels - tl.load(delta + pair * height * width + held)[:, None])
            grad_logits = tl.where(token[:, None] < last_row * width, grad_logits, 0.0)
            sum_weight += _product(tl.trans(grad_logits), affinity, exact)
            sum_bias += tl.sum(grad_logits, 0)
            if has_rpb:
                shift = _window(column, width, kernel_width) - column + kernel_width - 1
                chosen = (tl.arange(0, shifts_p)[:, None] == shift[None, :]).to(tl.float32).to(tl.bfloat16)
                sum_shift += _product(chosen, grad_logits, exact)

    region = tl.arange(0, regions_p)[None, :]
    target = grad_weight + (owner * taps + tap[:, None]) * regions + region
    tl.store(target, sum_weight, mask=inside[:, None] & (region < regions))
    if has_bias:
        tl.store(grad_bias + owner * taps + tap, sum_bias, mask=inside)
    if has_rpb:
        shift = tl.arange(0, shifts_p)[:, None]
        target = grad_shift + (owner * kernel_width + shift) * taps + tap[None, :]
        tl.store(target, sum_shift, mask=inside[None, :] & (shift < kernel_width))


@triton.jit
def value_kernel(
    grad, query, key, weight, bias, rpb, lse, grad_value,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, out_b, out_g, out_t, out_c, groups, height, width,
    depth: tl.constexpr, channels: tl.constexpr, regions: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, regions_p: tl.constexpr, chunk: tl.constexpr,
    tokens: tl.constexpr, positions: tl.constexpr,
    has_bias: tl.constexpr, has_rpb: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: consecutive positions of one row of the map, and all the tokens whose windows hold them.

    Those tokens are an interval of rows and one of columns, since the start of the window never decreases. For each
    token row one row of taps matters; its kernels (T, K) are laid out by position, a band (T, positions), and the
    gradient is a matrix product of that band with the tokens' output gradients.
    """
    blocks = tl.cdiv(width, positions)
    pair = (tl.program_id(0) // (blocks * height)).to(tl.int64)
    batch, group = pair // groups, pair % groups
    row = tl.program_id(0) // blocks % height
    first = tl.program_id(0) % blocks * positions
    position = first + tl.arange(0, positions)
    last = tl.minimum(first + positions, width) - 1
    row_from = tl.where(row < kernel_height, 0, row - kernel_height + 1 + kernel_height // 2)
    row_to = tl.where(row < height - kernel_height, row + kernel_height // 2, height - 1)
    column_from = tl.where(first < kernel_width, 0, first - kernel_width + 1 + kernel_width // 2)
    column_to = tl.where(last < width - kernel_width, last + kernel_width // 2, width - 1)

    rpb += group * (2 * kernel_height - 1) * (2 * kernel_width - 1)
    query += batch * query_b + group * query_g
    grad += batch * grad_b + group * grad_g
    lse += pair * height * width
    centres = _load_key(key, pair, depth, regions, depth_p, regions_p)
    tap_column = tl.arange(0, chunk)
    inside = tap_column < kernel_width
    tap_column = tl.minimum(tap_column, kernel_width - 1)
    summed = tl.zeros([positions, channels_p], tl.float32)
    for token_row in range(row_from, row_to + 1):
        tap_row = row - _window(token_row, height, kernel_height)
        tap = tap_row * kernel_width + tap_column
        tap_entry = tap_row * (2 * kernel_width - 1) + tap_column
        rows = _load_weight(weight, tap, inside, regions, regions_p)
        for start in range(column_from, column_to + 1, tokens):
            column = start + tl.arange(0, tokens)
            held = tl.minimum(column, width - 1)
            _, entry = _first_tap(token_row, held, height, width, kernel_height, kernel_width)
            token = token_row * width + held
            affinity = _dot(_load_columns(query, token, query_t, depth, depth_p), centres)
            logits = _logits(affinity, rows, tap, inside, entry, tap_entry, bias, rpb, has_bias, has_rpb, exact)
            kernels = tl.exp(logits - tl.load(lse + token)[:, None])
            offset = position[None, :] - _window(held, width, kernel_width)[:, None]
            reached = (offset >= 0) & (offset < kernel_width) & (column[:, None] < width)
            band = tl.gather(kernels, tl.minimum(tl.maximum(offset, 0), kernel_width - 1), 1)
            band = tl.where(reached, band, 0.0)
            grads = _load_columns(grad, token, grad_t, channels, channels_p)
            summed += _product(tl.trans(band), grads, exact)

    channel = tl.arange(0, channels_p)[None, :]
    target = grad_value + batch * out_b + group * out_g + (row * width + position)[:, None] * out_t + channel * out_c
    tl.store(target, summed.to(grad_value.dtype.element_ty), mask=(position[:, None] < width) & (channel < channels))
