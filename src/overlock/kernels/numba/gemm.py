"""Products of tokens and weights for numba, with what comes before and after them in the same pass.

A piece of the tokens is packed for the inner loop (gemm_microkernel.py), and there is multiplied with one panel of the
weights after another; each tile of the result passes through its last steps while it is in the cache. A convolution is
such a product too, of the windows of an image, which are made while it is packed.
"""

from __future__ import annotations

import torch
from numba import carray, njit
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.numba.gemm_microkernel import (
    DEPTH,
    HALF,
    HALF_ROWS,
    PANEL,
    ROWS,
    STRIDE,
    multiply_half,
    multiply_panel,
    multiply_three_halves,
    multiply_vector,
)
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, share
from overlock.kernels.numba.simd import LANES, gelu, load, load_part, prefetch, room, silu, store, store_part

# What is done in the same pass, added up: to x before the product, then to the result, in this order.
SCALED, GATED, RESIDUAL, SILU, GELU = 1, 2, 4, 8, 16
LINE = 64  # bytes of the cache
ROOM = 1 << 16  # numbers of packed tokens: half of a second cache, with weights and results beside them


@njit(**OPTIONS)
def pack_row(x, first, scale, scale_first, gate, gate_first, depth, steps, packed, place):
    """One row of x, scaled and gated where asked for, to the tiles' layout."""
    for k in range(0, depth, LANES):
        lanes = min(LANES, depth - k)
        value = load_part(x, first + k, lanes)
        if steps & SCALED:
            value = value * load_part(scale, scale_first + k, lanes)
        if steps & GATED:
            value = value * load_part(gate, gate_first + k, lanes)
        store(packed, place + k // DEPTH * ROWS * STRIDE + k % DEPTH, value)


@njit(**OPTIONS)
def pack_window(x, image, top, left, height, width, channels, size, span, chunk, packed, place):
    """One window of an image (H, W, C), whose rows are counted from ``image`` on, to the tiles' layout.

    Zeros are packed for what is outside of the image. A row of the window is packed by spans of ``span`` numbers, the
    channels of one tap or a part of them, or whole, and as many spans together as ``chunk`` has numbers.
    """
    whole = span == size * channels and left >= 0 and left + size <= width  # a row is one piece of memory
    taps, length = (1, span) if whole else (size, channels)
    step = min(span, length)
    end = place + chunk
    for y in range(top, top + size):
        for column in range(left, left + taps):
            inside = 0 <= y < height and 0 <= column < width
            first = ((image + y) * width + column) * channels
            start = 0
            while start < length:  # a range of an unknown step would be a division
                for c in range(0, step, LANES):
                    lanes = min(step - c, length - start - c) if inside else 0
                    store(packed, place + c, load_part(x, first + start + c, lanes))  # the next goes over the rest
                place += step
                if place == end:
                    place += ROWS * STRIDE - chunk
                    end = place + chunk
                start += step


@njit(**OPTIONS)
def pack_windows_of(x, first, last, height, width, channels, size, stride, span, chunk, packed, place):
    """The windows of some places of a convolution's result, counted over all images."""
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    row, column = first // out_width, first % out_width
    image, row = row // out_height * height, row % out_height
    for _ in range(first, last):
        top, left = row * stride - size // 2, column * stride - size // 2
        pack_window(x, image, top, left, height, width, channels, size, span, chunk, packed, place)
        place += STRIDE
        column += 1
        if column == out_width:
            column, row = 0, row + 1
            if row == out_height:
                row, image = 0, image + height


@njit(**OPTIONS)
def multiply(rows, packed, depth, chunk, panel, width, tile, out, out_step, later, later_step):
    """out (rows, PANEL) = bias + packed rows @ a panel of the weights, of whose columns ``width`` are used.

    All are addresses; the tile has room for the sums of a part of the depth, which is packed by chunks. Meanwhile the
    lines from ``later`` on, by ``later_step`` bytes for each step of the depth, begin to come to the second cache.
    """
    start, start_step = panel, 0  # the bias comes first, the same for all rows
    x, weight = packed, panel + 4 * PANEL
    while depth > 0:  # a range of an unknown step would be a division
        steps = min(chunk, depth)
        to, to_step = (out, out_step) if depth <= chunk else (tile, PANEL)
        if width > 3 * HALF:
            multiply_panel(rows, x, weight, steps, start, start_step, to, to_step, later, later_step)
        elif width > LANES:
            for r in range(0, rows, HALF_ROWS):
                here, begin, end = min(HALF_ROWS, rows - r), start + 4 * r * start_step, to + 4 * r * to_step
                multiply_three_halves(
                    here, x + 4 * r * STRIDE, weight, steps, begin, start_step, end, to_step, later, later_step
                )
        elif width > HALF:
            multiply_vector(rows, x, weight, steps, start, start_step, to, to_step, later, later_step)
        else:
            multiply_half(rows, x, weight, steps, start, start_step, to, to_step, later, later_step)
        start, start_step, later = tile, PANEL, later + chunk * later_step
        x, weight, depth = x + 4 * ROWS * STRIDE, weight + 4 * chunk * PANEL, depth - chunk


@njit(**OPTIONS)
def write_tile(tile, rows, width, other, other_first, other_step, share, column, out, out_first, out_step, steps):
    """The last steps of a tile of the result, and then to its place."""
    for c in range(0, min(PANEL, width), LANES):
        lanes = min(LANES, width - c)
        part = load_part(share, column + c, lanes)
        for r in range(rows):
            value = load(tile, r * PANEL + c)
            if steps & RESIDUAL:
                value = value + load_part(other, other_first + r * other_step + c, lanes) * part
            if steps & SILU:
                value = silu(value)
            if steps & GELU:
                value = gelu(value)
            store_part(out, out_first + r * out_step + c, value, lanes)


@njit(**OPTIONS)
def prefetch_tile(out, first, last, step, column, width):
    for r in range(first, last):
        for c in range(0, min(PANEL, width), LANES):
            prefetch(out, r * step + column + c)


@kernel
def product(call, thread, threads):
    """out (M, N) = x (M, K) @ weight (K, N) + bias, with steps before and after.

    ``call`` holds from index 2 on: the addresses of x; scale (images, K); gate; the packed weight and bias; other,
    which is added times its share (N); its share; and out. Then M, K, N, the tokens of an image, the strides of
    rows of x, gate, other and out, the steps, and the pieces that rows and panels are cut into. A convolution's x are
    images: their height, width and channels, the size of its windows (0 for a plain product) and stride, the span and
    the chunk that they are packed by.
    """
    p = carray(call, 27)
    rows, depth, width, tokens, steps = p[9], p[10], p[11], p[12], p[17]
    everything, panels = (1 << 60,), (width + PANEL - 1) // PANEL
    x, scale, gate, weight = floats(p[2], everything), floats(p[3], everything), floats(p[4], everything), p[5]
    other, part, out = floats(p[6], everything), floats(p[7], everything), floats(p[8], everything)
    chunk = p[26]
    size = (depth + chunk - 1) // chunk * ROWS * STRIDE
    held = max(1, ROOM // size)  # blocks of rows
    packed, tile = room(held * size), room(ROWS * PANEL)
    packed_at, tile_at = packed.ctypes.data, tile.ctypes.data
    # Numbers of x from what is read for one row to that for the next, and of a window below its middle.
    advance, below = (p[24] * p[24] * p[22], p[23] // 2 * p[21] * p[22]) if p[23] else (p[13], 0)
    later_step = min(LINE, 4 * ROWS * advance // depth + 1)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        row_piece, panel_piece = job // p[19], job % p[19]
        top, bottom = rows * row_piece // p[18], rows * (row_piece + 1) // p[18]
        blocks = (bottom - top + ROWS - 1) // ROWS
        for start in range(0, blocks, held):
            stop = min(blocks, start + held)
            ahead = (bottom - top) * stop // blocks - (bottom - top) * start // blocks
            for block in range(start, stop):
                first, last = top + (bottom - top) * block // blocks, top + (bottom - top) * (block + 1) // blocks
                place = (block - start) * size
                if p[23]:
                    pack_windows_of(x, first, last, p[20], p[21], p[22], p[23], p[24], p[25], chunk, packed, place)
                else:
                    for r in range(first, last):
                        pack_row(x, r * p[13], scale, r // tokens * depth, gate, r * p[14], depth, steps, packed, place)
                        place += STRIDE
            first_panel, last_panel = panels * panel_piece // p[19], panels * (panel_piece + 1) // p[19]
            for panel in range(first_panel, last_panel):
                column = panel * PANEL
                used = width - column
                at_once = steps & (RESIDUAL | SILU | GELU) == 0 and (used >= PANEL or used % HALF == 0)
                for block in range(start, stop):
                    first, last = top + (bottom - top) * block // blocks, top + (bottom - top) * (block + 1) // blocks
                    # While these are multiplied, the rows of the next blocks arrive, and the lines of the result.
                    later = p[2] + 4 * ((first + ahead) * advance + below) if panel == first_panel else tile_at
                    prefetch_tile(out, first, last, p[16], column, used)
                    if steps & RESIDUAL:
                        prefetch_tile(other, first, last, p[15], column, used)
                    to, to_step = (p[8] + 4 * (first * p[16] + column), p[16]) if at_once else (tile_at, PANEL)
                    multiply(
                        last - first, packed_at + 4 * (block - start) * size, depth, chunk,
                        weight + 4 * panel * (depth + 1) * PANEL, used, tile_at, to, to_step,
                        later, later_step if panel == first_panel else 0,
                    )  # fmt: skip
                    if not at_once:
                        write_tile(
                            tile, last - first, used, other, first * p[15] + column, p[15], part, column,
                            out, first * p[16] + column, p[16], steps,
                        )  # fmt: skip


def pack_weight(weight: Tensor, bias: Tensor) -> Tensor:
    """Weight (N, K) and bias (N) as panels (ceil(N / PANEL), 1 + K, PANEL), the bias first, zeros beyond N."""
    width, depth = weight.shape
    panels = -(-width // PANEL)
    packed = weight.new_zeros(panels * PANEL, 1 + depth)
    packed[:width, 0], packed[:width, 1:] = bias, weight
    return packed.view(panels, PANEL, 1 + depth).transpose(1, 2).contiguous()


def spans_of(channels: int, size: int) -> tuple[int, int]:
    """How a convolution's windows are packed: by whole rows or equal spans of a tap's channels; and chunks of those."""
    span = size * channels if size * channels <= DEPTH else -(-channels // -(-channels // DEPTH))
    return span, DEPTH // span * span


def pack_windows(weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution's weight (N, C, K, K) and bias (N) as panels, its depth as the windows are packed."""
    span, _ = spans_of(*weight.shape[1:3])
    padded = F.pad(weight.permute(0, 2, 3, 1), (0, -weight.shape[1] % min(span, weight.shape[1])))
    return pack_weight(padded.flatten(1), bias)


def cut(rows: int, chunks: int, width: int) -> tuple[int, int]:
    """Pieces of the rows and of the panels of a product, enough for all threads."""
    threads, panels = torch.get_num_threads(), -(-width // PANEL)
    if rows < ROWS * threads:
        return 1, min(threads, panels)
    rows_at_once = max(1, ROOM // (chunks * ROWS * STRIDE)) * ROWS
    return -(-max(1, -(-rows // rows_at_once)) // threads) * threads, 1
