"""ContMix's dynamic convolution for CUDA: one fused Triton kernel forward, and three more backward.

Letters: B batch, G groups, D query and key channels of a group, C value channels of a group, H x W the map, M = HW its
tokens, S^2 region centres, K x K the kernel, N = K^2 taps, T the tokens of a tile, n a chunk of taps.

A program holds the affinities of T tokens, (T, S^2), and walks over the taps in chunks: logits (T, n) by a matrix product
with that chunk's rows of the weight, softmax kept up to date in float32, values (T, n, C) read straight from the shifted
windows. Nothing of size M N reaches memory. Backward computes the kernels again, from the log-sum-exp of each token.
Every sum has one owner and a fixed order, and tile sizes follow from shapes alone: the same call gives the same bits.

What it costs, a (batch, group) pair, against the bytes that must move (each map once, b bytes a number):

    forward     M S^2 (D + N) + M N C  multiply-adds        M (D + 2 C) b + D S^2 b + N S^2 b
    backward    about 4.5 times that                        M (2 D + 3 C) b, and partial sums of a few MB

At 50 x 80, G = 8, D = C = 16, K 13 that is 0.4 GMAC and 3 MB in bfloat16: arithmetic is some microseconds on a current
GPU and memory one, so what counts is instructions. Hence: channels last, so that one load brings 8 channels of a tap;
chunks of 16 taps summed into a (T, n, C) accumulator that is reduced over n only once, at the end, because the taps of
a chunk lie in different lanes and a reduction costs more than a chunk's arithmetic; T as large as that accumulator allows
at 64 numbers a thread, since the weight is read once a tile. Triton's own autotuning is left out on purpose: it would
tie the result's last bits to a race of timings, and cannot run inside a CUDA graph.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

LARGEST = {"query channels of a group": 128, "value channels of a group": 128, "region centres": 256}
PROGRAMS = 264  # fewer leave a large GPU idle: two for each of 132 multiprocessors


# ---- pieces of the kernels ------------------------------------------------------------------------------------------


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

    16-bit matrix units are many times faster than the float32 path, but rounding an affinity or a logit to their 8 or 11
    bits would show, and float16 overflows. So a number is split in two bfloat16 (high + low), and low x low dropped.
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


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
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
        tap = start + tl.arange(0, chunk)
        inside = tap < taps
        tap = tl.minimum(tap, taps - 1)
        tap_row, tap_column = tap // kernel_width, tap % kernel_width
        rows = _load_weight(weight, tap, inside, regions, regions_p)
        tap_entry = tap_row * (2 * kernel_width - 1) + tap_column
        logits = _logits(affinity, rows, tap, inside, entry, tap_entry, bias, rpb, has_bias, has_rpb, exact)
        raised = tl.maximum(largest, tl.max(logits, 1))
        kernels = tl.exp(logits - raised[:, None])
        shrink = tl.exp(largest - raised)
        total = total * shrink + tl.sum(kernels, 1)
        position = corner[:, None] + (tap_row * width + tap_column)[None, :]
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
def _query_kernel(
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
            tap = start + tl.arange(0, chunk)
            inside = tap < taps
            tap = tl.minimum(tap, taps - 1)
            tap_row, tap_column = tap // kernel_width, tap % kernel_width
            rows = _load_weight(weight, tap, inside, regions, regions_p)
            tap_entry = tap_row * (2 * kernel_width - 1) + tap_column
            logits = _logits(affinity, rows, tap, inside, entry, tap_entry, bias, rpb, has_bias, has_rpb, exact)
            kernels = tl.exp(logits - log_total[:, None])
            position = corner[:, None] + (tap_row * width + tap_column)[None, :]
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
def _weight_kernel(
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

    A slot is one row at the top or bottom, where each row's windows are shifted differently, or one of ``pieces`` of the
    rows between, whose windows are centred. Within it the row offsets of a tap are the same for all tokens; for the column
    offsets, dL is summed by the shift of the token's window, as a product with a matrix of zeros and ones. So the
    gradient of the relative position bias needs no atomics (see ``_sum_shifts``).
    """
    chunks: tl.constexpr = (kernel_height * kernel_width + chunk - 1) // chunk
    taps: tl.constexpr = kernel_height * kernel_width
    owner = (tl.program_id(0) // chunks).to(tl.int64)  # of a group, a split and a slot
    slot = (owner % slots).to(tl.int32)
    group = owner // slots // splits
    half: tl.constexpr = kernel_height // 2
    inner = height - kernel_height + 1
    piece = tl.minimum(tl.maximum(slot - half, 0), pieces)
    border = (slot < half) | (slot >= half + pieces)
    first_row = tl.minimum(slot, half) + inner * piece // pieces + tl.maximum(slot - half - pieces, 0)
    last_row = tl.where(border, first_row + 1, half + inner * (piece + 1) // pieces)

    tap = (tl.program_id(0) % chunks) * chunk + tl.arange(0, chunk)
    inside = tap < taps
    tap = tl.minimum(tap, taps - 1)
    tap_row, tap_column = tap // kernel_width, tap % kernel_width
    tap_entry = tap_row * (2 * kernel_width - 1) + tap_column
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
            position = corner[:, None] + (tap_row * width + tap_column)[None, :]
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
def _value_kernel(
    grad, query, key, weight, bias, rpb, lse, grad_value,
    grad_b, grad_g, grad_t, query_b, query_g, query_t, out_b, out_g, out_t, out_c, groups, height, width,
    depth: tl.constexpr, channels: tl.constexpr, regions: tl.constexpr,
    kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    depth_p: tl.constexpr, channels_p: tl.constexpr, regions_p: tl.constexpr, chunk: tl.constexpr,
    tokens: tl.constexpr, positions: tl.constexpr,
    has_bias: tl.constexpr, has_rpb: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """One program: consecutive positions of one row of the map, and all the tokens whose windows hold them.

    Those tokens are an interval of rows and one of columns, since the start of the window never decreases. For each token
    row one row of taps matters; its kernels (T, K) are laid out by position, a band (T, positions), and the gradient is a
    matrix product of that band with the tokens' output gradients.
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


# ---- calls ----------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Tokens of a program, taps of a chunk, and warps, such that (T, n, C) is about 64 float32 numbers a thread."""

    tokens: int
    chunk: int
    warps: int


def padded(size: int, least: int = 1) -> int:
    """Next power of two, as tensors of a kernel must be, and at least what a matrix product takes."""
    return max(least, triton.next_power_of_2(size))


def tile_for(pairs: int, tokens: int, channels: int) -> Tile:
    """Tile sizes from shapes alone, smaller where the map would leave a large GPU without programs."""
    chunk, wide = 16, padded(channels)
    largest = min(max(16384 // (chunk * wide), 16), 64, padded(tokens, 16))
    while largest > 16 and pairs * triton.cdiv(tokens, largest) < PROGRAMS:
        largest //= 2
    return Tile(largest, chunk, min(max(largest * chunk * wide // 2048, 2), 16))


def by_token(x: Tensor) -> Tensor:
    """(B, G, C, H, W) -> (B, G, HW, C): a view where the strides allow, a copy elsewhere."""
    return x.permute(0, 1, 3, 4, 2).flatten(2, 3)


def channels_first_in_memory(x: Tensor) -> Tensor:
    """As :func:`by_token`, with the channels of a token side by side: what makes one load of several channels."""
    x = by_token(x)
    return x if x.stride(3) == 1 else x.contiguous()


class Mixing:
    """What forward and backward share: inputs as the kernels take them, and the sizes compiled into the kernels."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
        kernel_height: int, kernel_width: int,
    ):  # fmt: skip
        self.batch, self.groups, depth, self.height, self.width = query.shape
        self.depth, self.channels, self.regions = depth, value.shape[2], key.shape[3]
        self.kernel = (kernel_height, kernel_width)
        self.pairs, self.tokens = self.batch * self.groups, self.height * self.width
        self.dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        self.query = channels_first_in_memory(query.to(self.dtype))
        self.key = key.to(self.dtype).contiguous()
        self.value = channels_first_in_memory(value.to(self.dtype))
        self.weight = weight.contiguous()
        self.bias = self.weight if bias is None else bias.contiguous()  # never read where there is none
        self.rpb = self.weight if rpb is None else rpb.contiguous()
        self.sizes = {
            "depth": depth, "channels": self.channels, "regions": self.regions,
            "kernel_height": kernel_height, "kernel_width": kernel_width,
            "depth_p": padded(depth, 16), "channels_p": padded(self.channels), "regions_p": padded(self.regions, 16),
            "has_bias": bias is not None, "has_rpb": rpb is not None, "exact": self.dtype == torch.float32,
        }  # fmt: skip
        self.tile = tile_for(self.pairs, self.tokens, self.channels)

    def device(self) -> contextlib.AbstractContextManager:
        """Triton launches on the current device, which need not be the tensors'."""
        return torch.cuda.device(self.value.device) if self.value.is_cuda else contextlib.nullcontext()

    def forward(self, out: Tensor, lse: Tensor | None) -> None:
        """Write the result into ``out`` (B, G, HW, C) and each token's log-sum-exp into ``lse`` (BG, HW)."""
        tokens, chunk, warps = self.tile
        _forward_kernel[(self.pairs * triton.cdiv(self.tokens, tokens),)](
            self.query, self.key, self.value, self.weight, self.bias, self.rpb, out, out if lse is None else lse,
            *self.query.stride()[:3], *self.value.stride()[:3], *out.stride(), self.groups, self.height, self.width,
            **self.sizes, tokens=tokens, chunk=chunk, keep_lse=lse is not None, num_warps=warps,
        )  # fmt: skip

    def start_backward(self, grad: Tensor) -> None:
        """Compute the result and each token's log-sum-exp again, and set up what the gradient kernels share."""
        self.float32 = {"dtype": torch.float32, "device": grad.device}
        self.grad = channels_first_in_memory(grad.to(self.dtype))
        self.mixed = torch.empty(self.batch, self.groups, self.tokens, self.channels, **self.float32)
        self.lse = torch.empty(self.pairs, self.tokens, **self.float32)
        self.delta = torch.empty_like(self.lse)
        self.forward(self.mixed, self.lse)
        self.strides = (*self.grad.stride()[:3], *self.query.stride()[:3])
        self.biases = (self.weight, self.bias, self.rpb)

    def query_gradients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of query and key; leaves ``delta`` for the weight's."""
        tokens, chunk, warps = self.tile
        splits = min(triton.cdiv(self.tokens, tokens), triton.cdiv(4 * PROGRAMS, self.pairs))
        grad_query = torch.empty_like(like)
        target = by_token(grad_query)
        parts = torch.empty(self.batch, self.groups, splits, self.depth, self.regions, **self.float32)
        _query_kernel[(self.pairs * splits,)](
            self.grad, self.mixed, self.query, self.key, self.value, *self.biases, self.lse, self.delta, target, parts,
            *self.strides, *self.value.stride()[:3], *target.stride(), self.groups, self.height, self.width, splits,
            **self.sizes, tokens=tokens, chunk=chunk, num_warps=warps,
        )  # fmt: skip
        return settle(grad_query, target), parts.sum(2)

    def value_gradient(self, like: Tensor) -> Tensor:
        side = min(padded(self.width, 16), 32)
        grad_value = torch.empty_like(like)
        target = by_token(grad_value)
        _value_kernel[(self.pairs * self.height * triton.cdiv(self.width, side),)](
            self.grad, self.query, self.key, *self.biases, self.lse, target,
            *self.strides, *target.stride(), self.groups, self.height, self.width,
            **self.sizes | {"channels_p": padded(self.channels, 16)},
            chunk=padded(self.kernel[1], 16), tokens=side, positions=side, num_warps=4,
        )  # fmt: skip
        return settle(grad_value, target)

    def weight_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of weight, bias and rpb, the latter two without meaning where those are absent."""
        (kernel_height, kernel_width), taps = self.kernel, self.kernel[0] * self.kernel[1]
        tokens, chunk, warps = self.tile
        tokens = min(tokens, padded(self.width, 16))  # a slot at the border has one row
        inner, chunks = self.height - kernel_height + 1, triton.cdiv(taps, chunk)
        wanted = triton.cdiv(8 * PROGRAMS, self.groups * chunks)
        pieces = min(inner, max(1, wanted - kernel_height + 1))
        slots = kernel_height - 1 + pieces
        splits = min(self.batch, triton.cdiv(wanted, slots))
        grad_weight = torch.empty(self.groups, splits, slots, taps, self.regions, **self.float32)
        grad_bias = torch.empty(self.groups, splits, slots, taps, **self.float32)
        grad_shift = torch.empty(self.groups, splits, slots, kernel_width, *self.kernel, **self.float32)
        _weight_kernel[(self.groups * splits * slots * chunks,)](
            self.grad, self.query, self.key, self.value, *self.biases, self.lse, self.delta,
            grad_weight, grad_bias, grad_shift, *self.strides, *self.value.stride()[:3],
            self.batch, self.groups, self.height, self.width, splits, slots, pieces,
            **self.sizes, shifts_p=padded(kernel_width, 16), tokens=tokens, chunk=chunk, num_warps=warps,
        )  # fmt: skip
        return grad_weight.sum((0, 1, 2)), grad_bias.sum((0, 1, 2)), sum_shifts(grad_shift.sum(1), pieces)


def settle(out: Tensor, by_tokens: Tensor) -> Tensor:
    """``out``, whose numbers a kernel wrote through the view ``by_tokens``; they are copied if it is no view."""
    if by_tokens.data_ptr() != out.data_ptr():
        out.copy_(by_tokens.unflatten(2, out.shape[3:]).permute(0, 1, 4, 2, 3))
    return out


def sum_shifts(parts: Tensor, pieces: int) -> Tensor:
    """Gradient of the relative position bias, from dL summed by the windows' shifts (G, slots, Kw, Kh, Kw).

    With the shift counted as s = win(t) - t + K - 1, a tap n reads the entry s + n: a sum over anti-diagonals. Slots come
    by descending shift, those of centred rows in ``pieces``.
    """
    half = parts.shape[3] // 2
    centred = parts[:, half : half + pieces].sum(1, keepdim=True)
    by_shift = torch.cat([parts[:, :half], centred, parts[:, half + pieces :]], dim=1).flip(1)
    return _antidiagonals(_antidiagonals(by_shift.permute(0, 2, 4, 1, 3)).permute(0, 3, 1, 2))


def _antidiagonals(x: Tensor) -> Tensor:
    """(..., K, K) -> (..., 2K - 1): in rows lengthened by K and read as rows of 2K - 1, row s has moved s to the right."""
    size = x.shape[-1]
    skewed = F.pad(x, (0, size)).flatten(-2)[..., : size * (2 * size - 1)]
    return skewed.unflatten(-1, (size, 2 * size - 1)).sum(-2)


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See :func:`overlock.ops.reference.contmix`. Returns (B, G, C, H, W) in the layout and dtype of ``value``."""
    mixing = Mixing(query, key, value, weight, bias, rpb, kernel_height, kernel_width)
    out = torch.empty_like(value)
    target = by_token(out)
    with mixing.device():
        mixing.forward(target, None)
    return settle(out, target)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, weight, bias and rpb, each in the dtype of its input."""
    mixing = Mixing(query, key, value, weight, bias, rpb, kernel_height, kernel_width)
    with mixing.device():
        mixing.start_backward(grad)
        grad_query, grad_key = mixing.query_gradients(query)
        grad_value = mixing.value_gradient(value)
        grad_weight, grad_bias, grad_rpb = mixing.weight_gradients()
    return (
        grad_query,
        grad_key.to(key.dtype),
        grad_value,
        grad_weight.to(weight.dtype),
        None if bias is None else grad_bias.to(bias.dtype),
        None if rpb is None else grad_rpb.to(rpb.dtype),
    )


def why_not(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> str | None:  # fmt: skip
    """Reason why these kernels cannot run a call, or None."""
    tensors = [x for x in (query, key, value, weight, bias, rpb) if x is not None]
    for x in tensors:
        if not x.is_cuda and not INTERPRETED.value:
            return f"it needs tensors on a CUDA device, not on {x.device.type}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    if value.is_cuda and torch.cuda.get_device_capability(value.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    sizes = (query.shape[2], value.shape[2], key.shape[3])
    for (name, largest), size in zip(LARGEST.items(), sizes, strict=True):
        if size > largest:
            return f"it takes at most {largest} {name}, not {size}: a program keeps them in registers"
    if max(kernel_height, kernel_width) > 64:
        return f"it takes kernels of at most 64 x 64, not {kernel_height} x {kernel_width}"
    return None
