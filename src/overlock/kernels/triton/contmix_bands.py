"""ContMix's Triton kernels where each token has a window of its own: tiles of rows x 16 tokens, tap row by tap row.

The kernels of 16 neighbours for one row of taps, laid out by the positions of their windows, are a band: a matrix
(16, P), zero outside the taps. So the weighted sum is a product of matrices, band times values, on tensor cores.
Letters and conventions as in contmix_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from overlock.kernels.triton.contmix_kernels import LN2, dot, key_product, load_keys, load_rows, product, shift, window


@triton.jit
def _place(token_row, token_column, height, width, kernel_height: tl.constexpr, kernel_width: tl.constexpr):
    """Number of a token's shifts in the table."""
    return shift(token_row, height, kernel_height) * kernel_width + shift(token_column, width, kernel_width)


@triton.jit
def forward_kernel(
    query, keys, value, table, out,
    query_b, query_g, query_t, value_b, value_g, value_t, out_b, out_g, out_t, out_c, half, groups, height, width,
    depth: tl.constexpr, channels: tl.constexpr, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, pitch: tl.constexpr, taps_p: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, positions: tl.constexpr,
    unit: tl.constexpr, out_unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: ``rows`` x ``columns`` tokens of one batch and group. Softmax is kept up to date tap row by row."""
    tokens: tl.constexpr = rows * columns
    row_blocks, column_blocks = tl.cdiv(height, rows), tl.cdiv(width, columns)
    pair = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    batch, group = pair // groups, pair % groups
    first_row = tl.program_id(0) // column_blocks % row_blocks * rows
    first_column = tl.program_id(0) % column_blocks * columns
    token = tl.arange(0, tokens)
    token_row = tl.minimum(first_row + token // columns, height - 1)
    token_column = tl.minimum(first_column + token % columns, width - 1)

    # the band: position p of the region that begins at ``start`` is tap p - (window - start) of its token
    start = window(first_column, width, kernel_width)
    position = tl.arange(0, positions)
    offset = start + position[None, :] - window(token_column, width, kernel_width)[:, None]
    reached = (offset >= 0) & (offset < kernel_width)
    offset = tl.minimum(tl.maximum(offset, 0), pitch - 1)

    place = _place(token_row, token_column, height, width, kernel_height, kernel_width)
    entry = tl.arange(0, pitch)
    table += group * kernel_height * kernel_width * taps_p
    biases = table + place[:, None] * taps_p + entry[None, :]
    keys += (pair * taps_p + entry[None, :]) * depth_p + tl.arange(0, depth_p)[:, None]
    features = load_rows(
        query + (batch * query_b + group * query_g) * unit,
        token_row * width + token_column, query_t * unit, depth, depth_p,
    )  # fmt: skip
    channel = tl.arange(0, channels_p)[None, None, :]
    value_row = window(tl.minimum(first_row + tl.arange(0, rows), height - 1), height, kernel_height)
    value_column = tl.minimum(start + position, width - 1)
    value += (batch * value_b + group * value_g) * unit
    values = value + (value_row[:, None, None] * width + value_column[None, :, None]) * (value_t * unit) + channel

    largest = tl.full([tokens], float("-inf"), tl.float32)
    total = tl.zeros([tokens], tl.float32)
    mixed = tl.zeros([rows, columns, channels_p], tl.float32)
    for tap_row in range(kernel_height):
        high, low = load_keys(keys + tap_row * pitch * depth_p, half, exact)
        logits = key_product(features, high, low, False, exact) + tl.load(biases + tap_row * pitch)
        raised = tl.maximum(largest, tl.max(logits, 1))
        kernels = tl.exp2(logits - raised[:, None])
        shrink = tl.exp2(largest - raised)
        total = total * shrink + tl.sum(kernels, 1)
        largest = raised
        seen = tl.load(values + tap_row * width * value_t * unit, mask=channel < channels, other=0.0)
        band = tl.where(reached, tl.gather(kernels, offset, 1), 0.0).to(seen.dtype)
        mixed = mixed * shrink.reshape(rows, columns)[:, :, None]
        mixed += dot(band.reshape(rows, columns, positions), seen, exact)

    result = mixed / total.reshape(rows, columns)[:, :, None]
    row = first_row + tl.arange(0, rows)[:, None, None]
    column = first_column + tl.arange(0, columns)[None, :, None]
    target = out + (batch * out_b + group * out_g) * out_unit
    target += (row * width + column) * (out_t * out_unit) + channel * out_c
    inside = (row < height) & (column < width) & (channel < channels)
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def query_kernel(  # noqa: PLR0915 - a kernel is one function
    grad, query, keys, value, table, lse, delta, grad_query,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, value_b, value_g, value_t, out_b, out_g, out_t, out_c,
    half, groups, height, width,
    depth: tl.constexpr, channels: tl.constexpr, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, pitch: tl.constexpr, taps_p: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, positions: tl.constexpr,
    unit: tl.constexpr, out_unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: tokens as in the forward kernel. Gradient of query; leaves lse and delta for the other kernels.

    With P the kernels, dP[t, n] = grad[t] . value[win(t) + n] and delta[t] = sum over n of P dP, the gradient of the
    query is sum over n of P (dP - delta) keys. Both sums and delta are kept up to date in one pass over the taps.
    """
    tokens: tl.constexpr = rows * columns
    row_blocks, column_blocks = tl.cdiv(height, rows), tl.cdiv(width, columns)
    pair = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    batch, group = pair // groups, pair % groups
    first_row = tl.program_id(0) // column_blocks % row_blocks * rows
    first_column = tl.program_id(0) % column_blocks * columns
    index = tl.arange(0, tokens)
    row, column = first_row + index // columns, first_column + index % columns
    inside = (row < height) & (column < width)
    row, column = tl.minimum(row, height - 1), tl.minimum(column, width - 1)
    token = row * width + column

    # a tap of a token in the band of the region that begins at ``start``
    start = window(first_column, width, kernel_width)
    entry = tl.arange(0, pitch)
    offset = (window(column, width, kernel_width) - start)[:, None] + entry[None, :]
    offset = tl.minimum(offset, positions - 1)  # beyond the taps, where kernels are zero

    place = _place(row, column, height, width, kernel_height, kernel_width)
    table += group * kernel_height * kernel_width * taps_p
    biases = table + place[:, None] * taps_p + entry[None, :]
    keys += (pair * taps_p + entry[None, :]) * depth_p + tl.arange(0, depth_p)[:, None]
    features = load_rows(query + (batch * query_b + group * query_g) * unit, token, query_t * unit, depth, depth_p)
    grads = load_rows(grad + (batch * grad_b + group * grad_g) * unit, token, grad_t * unit, channels, channels_p)
    grads = grads.reshape(rows, columns, channels_p)
    channel = tl.arange(0, channels_p)[None, None, :]
    value_row = window(tl.minimum(first_row + tl.arange(0, rows), height - 1), height, kernel_height)
    value_column = tl.minimum(start + tl.arange(0, positions), width - 1)
    value += (batch * value_b + group * value_g) * unit
    values = value + (value_row[:, None, None] * width + value_column[None, :, None]) * (value_t * unit) + channel

    largest = tl.full([tokens], float("-inf"), tl.float32)
    total = tl.zeros([tokens], tl.float32)
    mean = tl.zeros([tokens], tl.float32)
    sum_scaled = tl.zeros([tokens, depth_p], tl.float32)
    sum_keys = tl.zeros([tokens, depth_p], tl.float32)
    for tap_row in range(kernel_height):
        high, low = load_keys(keys + tap_row * pitch * depth_p, half, exact)
        logits = key_product(features, high, low, False, exact) + tl.load(biases + tap_row * pitch)
        raised = tl.maximum(largest, tl.max(logits, 1))
        kernels = tl.exp2(logits - raised[:, None])
        shrink = tl.exp2(largest - raised)
        largest = raised
        seen = tl.load(values + tap_row * width * value_t * unit, mask=channel < channels, other=0.0)
        grad_band = dot(grads, tl.trans(seen, 0, 2, 1), exact).reshape(tokens, positions)
        scaled = kernels * tl.gather(grad_band, offset, 1)
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
    grad_b, grad_g, grad_t, query_b, query_g, query_t, out_b, out_g, out_t, out_c, half, groups, height, width,
    depth: tl.constexpr, channels: tl.constexpr, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, pitch: tl.constexpr, taps_p: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, tokens: tl.constexpr,
    unit: tl.constexpr, out_unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: ``rows`` x ``columns`` positions of one batch and group, and all tokens whose windows hold them.

    Those tokens are an interval of rows and one of columns, since the start of a window never decreases. A row of
    tokens reaches each row of positions by one row of taps; the kernels of these, laid out by position, are bands
    again, and the gradient is the product of the bands, turned over, with the tokens' output gradients.
    """
    row_blocks, column_blocks = tl.cdiv(height, rows), tl.cdiv(width, columns)
    pair = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    batch, group = pair // groups, pair % groups
    first_row = tl.program_id(0) // column_blocks % row_blocks * rows
    first_column = tl.program_id(0) % column_blocks * columns
    last_row = tl.minimum(first_row + rows, height) - 1
    last_column = tl.minimum(first_column + columns, width) - 1
    row_from = tl.where(first_row < kernel_height, 0, first_row - kernel_height + 1 + kernel_height // 2)
    row_to = tl.where(last_row < height - kernel_height, last_row + kernel_height // 2, height - 1)
    column_from = tl.where(first_column < kernel_width, 0, first_column - kernel_width + 1 + kernel_width // 2)
    column_to = tl.where(last_column < width - kernel_width, last_column + kernel_width // 2, width - 1)

    query += (batch * query_b + group * query_g) * unit
    grad += (batch * grad_b + group * grad_g) * unit
    lse += pair * height * width
    table += group * kernel_height * kernel_width * taps_p
    keys += pair * taps_p * depth_p + tl.arange(0, depth_p)[:, None]
    entry = tl.arange(0, rows * pitch)
    position = first_column + tl.arange(0, columns)[None, None, :]
    row = tl.arange(0, rows)[None, :, None]
    summed = tl.zeros([rows * columns, channels_p], tl.float32)
    for token_row in range(row_from, row_to + 1):
        tap_row = first_row - window(token_row, height, kernel_height)  # of the first row of positions
        reached_row = (tap_row + row >= 0) & (tap_row + row < kernel_height)
        tap = tl.minimum(tl.maximum(tap_row + entry // pitch, 0), kernel_height - 1) * pitch + entry % pitch
        high, low = load_keys(keys + tap[None, :] * depth_p, half, exact)
        for start in range(column_from, column_to + 1, tokens):
            column = start + tl.arange(0, tokens)
            inside = column < width
            column = tl.minimum(column, width - 1)
            token = token_row * width + column
            place = _place(token_row, column, height, width, kernel_height, kernel_width)
            features = load_rows(query, token, query_t * unit, depth, depth_p)
            logits = key_product(features, high, low, False, exact)
            logits += tl.load(table + place[:, None] * taps_p + tap[None, :])
            kernels = tl.exp2(logits - tl.load(lse + token)[:, None]).reshape(tokens, rows, pitch)
            offset = position - window(column, width, kernel_width)[:, None, None]
            reached = reached_row & (offset >= 0) & (offset < kernel_width) & inside[:, None, None]
            offset = tl.minimum(tl.maximum(offset, 0), kernel_width - 1).broadcast_to(tokens, rows, columns)
            grads = load_rows(grad, token, grad_t * unit, channels, channels_p)
            band = tl.where(reached, tl.gather(kernels, offset, 2), 0.0).to(grads.dtype)
            summed += dot(tl.trans(band.reshape(tokens, rows * columns)), grads, exact)

    index = tl.arange(0, rows * columns)
    row, column = (first_row + index // columns)[:, None], (first_column + index % columns)[:, None]
    channel = tl.arange(0, channels_p)[None, :]
    target = grad_value + (batch * out_b + group * out_g) * out_unit
    target += (row * width + column) * (out_t * out_unit) + channel * out_c
    inside = (row < height) & (column < width) & (channel < channels)
    tl.store(target, summed.to(grad_value.dtype.element_ty), mask=inside)


@triton.jit
def taps_kernel(  # noqa: PLR0915 - a kernel is one function
    grad, query, keys, value, table, lse, delta, grad_keys, grad_table,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, value_b, value_g, value_t,
    half, batches, groups, height, width, splits, pieces,
    depth: tl.constexpr, channels: tl.constexpr, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, pitch: tl.constexpr, taps_p: tl.constexpr,
    images: tl.constexpr, columns: tl.constexpr, positions: tl.constexpr, shifts_p: tl.constexpr,
    unit: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: a row of taps, a group, one of ``pieces`` of the map's rows and of ``splits`` of the images.

    Gradients of the keys, (pieces, BG, taps, D), and of the table, (splits, G, Kh - 1 + pieces, Kw, taps), at first
    zeros. The shift of a window's rows is the same for all tokens of a row. Summing by that of the columns is a product
    with a matrix of zeros and ones. So a program needs no atomics: it adds to the table when its rows' shift changes.
    Only that of centred windows is the shift of several rows, so there each piece has a row of the table of its own.
    """
    tokens: tl.constexpr = images * columns
    tap_row = tl.program_id(0) % kernel_height
    piece = tl.program_id(0) // kernel_height % pieces
    split = tl.program_id(0) // kernel_height // pieces % splits
    group = (tl.program_id(0) // kernel_height // pieces // splits).to(tl.int64)
    first_row, last_row = height * piece // pieces, height * (piece + 1) // pieces
    image = tl.arange(0, images)
    entry = tl.arange(0, pitch)
    channel = tl.arange(0, channels_p)[None, None, :]
    feature = tl.arange(0, depth_p)
    table += group * kernel_height * kernel_width * taps_p + tap_row * pitch
    shifts = tl.arange(0, shifts_p)
    centre: tl.constexpr = (kernel_height - 1) // 2
    sums = grad_table + (split * groups + group) * (kernel_height - 1 + pieces) * kernel_width * taps_p
    sums += tap_row * pitch + shifts[:, None] * taps_p + entry[None, :]

    for first_image in range(split * images, batches, splits * images):
        exists = first_image + image < batches
        batch = tl.minimum(first_image + image, batches - 1).to(tl.int64)[:, None, None]
        pair = batch * groups + group
        start = keys + (pair * taps_p + tap_row * pitch) * depth_p
        high, low = load_keys(start + entry[None, None, :] * depth_p + feature[None, :, None], half, exact)
        sum_keys = tl.zeros([images, pitch, depth_p], tl.float32)
        sum_shifts = tl.zeros([shifts_p, pitch], tl.float32)
        for row in range(first_row, last_row):
            value_row = window(row, height, kernel_height) + tap_row
            for first_column in range(0, width, columns):
                column = first_column + tl.arange(0, columns)
                inside = exists[:, None] & (column < width)[None, :]
                column = tl.minimum(column, width - 1)
                token = (row * width + column)[None, :, None]
                first = query + (batch * query_b + group * query_g) * unit
                pointer = first + token * (query_t * unit) + feature[None, None, :]
                features = tl.load(pointer, mask=(feature < depth)[None, None, :], other=0.0)
                logits = key_product(features, high, low, False, exact)
                place = _place(row, column, height, width, kernel_height, kernel_width)
                logits += tl.load(table + place[:, None] * taps_p + entry[None, :])[None, :, :]
                where = pair * (height * width) + token
                kernels = tl.exp2(logits - tl.load(lse + where))

                begin = window(first_column, width, kernel_width)
                value_column = tl.minimum(begin + tl.arange(0, positions), width - 1)
                pointer = value + (batch * value_b + group * value_g) * unit + channel
                pointer += (value_row * width + value_column)[None, :, None] * (value_t * unit)
                seen = tl.load(pointer, mask=channel < channels, other=0.0)
                pointer = grad + (batch * grad_b + group * grad_g) * unit + token * (grad_t * unit) + channel
                grads = tl.load(pointer, mask=channel < channels, other=0.0)
                grad_band = dot(grads, tl.trans(seen, 0, 2, 1), exact)
                offset = (window(column, width, kernel_width) - begin)[:, None] + entry[None, :]
                offset = tl.minimum(offset, positions - 1)[None, :, :].broadcast_to(images, columns, pitch)
                grad_kernels = tl.gather(grad_band, offset, 2)
                grad_logits = tl.where(inside[:, :, None], kernels * (grad_kernels - tl.load(delta + where)), 0.0)
                sum_keys += product(tl.trans(grad_logits, 0, 2, 1), features, exact)
                chosen = shift(column, width, kernel_width)[None, :] == shifts[:, None]
                chosen = chosen[:, None, :].broadcast_to(shifts_p, images, columns).reshape(shifts_p, tokens)
                chosen = chosen.to(tl.float32)
                if exact:
                    sum_shifts += dot(chosen, grad_logits.reshape(tokens, pitch), exact)
                else:
                    chosen = chosen.to(tl.bfloat16)
                    sum_shifts += product(chosen, grad_logits.reshape(tokens, pitch), exact)
            row_shift = shift(row, height, kernel_height)
            if (row + 1 == last_row) | (row_shift != shift(row + 1, height, kernel_height)):
                slot = row_shift + tl.where(row_shift > centre, pieces - 1, tl.where(row_shift == centre, piece, 0))
                target = sums + slot * kernel_width * taps_p
                real = (shifts < kernel_width)[:, None] & (entry < pitch)[None, :]
                tl.debug_barrier()  # what is read was written by other threads of this program
                tl.store(target, tl.load(target, mask=real, other=0.0) + sum_shifts, mask=real)
                sum_shifts = tl.zeros([shifts_p, pitch], tl.float32)

        target = grad_keys + (piece * batches * groups + pair) * taps_p * depth_p + tap_row * pitch * depth_p
        target += entry[None, :, None] * depth_p + feature[None, None, :]
        tl.store(target, sum_keys, mask=exists[:, None, None])
