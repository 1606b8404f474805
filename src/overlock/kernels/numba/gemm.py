"""Matrix products of tokens and weights on CPU, with a prologue and an epilogue in the same pass over memory.

Blocked as in BLIS: a part of the tokens is packed for the microkernel (gemm_microkernel.py), and there is multiplied
with one panel of the weights after another. The prologue is done to tokens while they are packed, the epilogue to each
tile of the result while it is in the cache. A convolution is such a product too, of the windows of an image, which are
made while it is packed (im2col without the columns in memory).

Weights are float32, or bfloat16: then what is packed is rounded to bfloat16 too, and products are summed in float32. A
place of what is packed has 32 bits, one number or two; sizes and strides of packed parts count places.
"""

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.numba.activations import gelu, silu
from overlock.kernels.numba.arguments import INT64, MAP, POINTER
from overlock.kernels.numba.flags import GATE, GELU, RESIDUAL, SCALE, SILU
from overlock.kernels.numba.gemm_microkernel import (
    HALF_MR,
    HALF_VECTOR,
    KC,
    MR,
    NR,
    ROW_STRIDE,
    multiply_half,
    multiply_three_halves,
    multiply_two_vectors,
    multiply_vector,
    numbers_of,
    packed_numbers,
    store_packed,
)
from overlock.kernels.numba.runtime import ANY, OPTIONS, floats, kernel, task_range
from overlock.kernels.numba.simd import LANES, aligned_empty, load, masked_load, masked_store, prefetch

LINE = 64  # bytes of the cache
PACKED_PLACES = 1 << 16  # of tokens: half of a second-level cache, with weights and results beside them


@njit(**OPTIONS)
def pack_row(x, first, scale, scale_first, gate, gate_first, depth, prologue, packed, place, numbers):
    """One row of x, after the prologue, to the microkernel's layout from a place on, of so many numbers each."""
    place, chunk = numbers * place, numbers * KC
    for k in range(0, depth, LANES):
        lanes = min(LANES, depth - k)
        value = masked_load(x, first + k, lanes)
        if prologue & SCALE:
            value = value * masked_load(scale, scale_first + k, lanes)
        if prologue & GATE:
            value = value * masked_load(gate, gate_first + k, lanes)
        store_packed(packed, place + k // chunk * numbers * MR * ROW_STRIDE + k % chunk, value)


@njit(**OPTIONS)
def pack_window(x, image, top, left, height, width, channels, size, span, chunk, packed, place, numbers):
    """One window of an image (H, W, C), whose rows are counted from ``image`` on, to the microkernel's layout.

    Zeros are packed for what is outside of the image. A row of the window is packed by spans of ``span`` numbers, the
    channels of one tap or a part of them, or whole, and as many spans together as ``chunk`` places hold.
    """
    whole = span == size * channels and left >= 0 and left + size <= width  # a row is one piece of memory
    taps, length = (1, span) if whole else (size, channels)
    step = min(span, length)
    place, chunk, block = numbers * place, numbers * chunk, numbers * MR * ROW_STRIDE
    end = place + chunk
    for y in range(top, top + size):
        for column in range(left, left + taps):
            inside = 0 <= y < height and 0 <= column < width
            first = ((image + y) * width + column) * channels
            start = 0
            while start < length:  # a range of an unknown step would be a division
                for c in range(0, step, LANES):
                    lanes = min(step - c, length - start - c) if inside else 0
                    store_packed(packed, place + c, masked_load(x, first + start + c, lanes))  # the next: over the rest
                place += step
                if place == end:
                    place += block - chunk
                    end = place + chunk
                start += step


@njit(**OPTIONS)
def pack_windows(x, first, last, height, width, channels, size, stride, span, chunk, packed, place, numbers):
    """The windows of some places of a convolution's result, counted over all images."""
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    row, column = first // out_width, first % out_width
    image, row = row // out_height * height, row % out_height
    for _ in range(first, last):
        top, left = row * stride - size // 2, column * stride - size // 2
        pack_window(x, image, top, left, height, width, channels, size, span, chunk, packed, place, numbers)
        place += ROW_STRIDE
        column += 1
        if column == out_width:
            column, row = 0, row + 1
            if row == out_height:
                row, image = 0, image + height


@njit(**OPTIONS)
def multiply_panel(weights, rows, packed, depth, chunk, panel, columns, tile, out, out_step, ahead, ahead_step):
    """out (rows, NR) = bias + packed rows @ a panel of the weights, of which the first ``columns`` are used.

    All are addresses; that of the weights tells their type. The tile holds the sums of a part of the depth, counted in
    places, which is packed by chunks. Meanwhile the lines from ``ahead`` on, by ``ahead_step`` bytes for each place,
    begin to come to the second-level cache.
    """
    start, start_step = panel, 0  # the bias comes first, the same for all rows
    x, weight = packed, panel + 4 * NR
    while depth > 0:  # a range of an unknown step would be a division
        count = min(chunk, depth)
        to, to_step = (out, out_step) if depth <= chunk else (tile, NR)
        if columns > 3 * HALF_VECTOR:
            multiply_two_vectors(weights, rows, x, weight, count, start, start_step, to, to_step, ahead, ahead_step)
        elif columns > LANES:
            for r in range(0, rows, HALF_MR):
                here, begin, end = min(HALF_MR, rows - r), start + 4 * r * start_step, to + 4 * r * to_step
                multiply_three_halves(
                    weights, here, x + 4 * r * ROW_STRIDE, weight, count, begin, start_step, end, to_step, ahead,
                    ahead_step,
                )  # fmt: skip
        elif columns > HALF_VECTOR:
            multiply_vector(weights, rows, x, weight, count, start, start_step, to, to_step, ahead, ahead_step)
        else:
            multiply_half(weights, rows, x, weight, count, start, start_step, to, to_step, ahead, ahead_step)
        start, start_step, ahead = tile, NR, ahead + chunk * ahead_step
        x, weight, depth = x + 4 * MR * ROW_STRIDE, weight + 4 * chunk * NR, depth - chunk


@njit(**OPTIONS)
def write_tile(
    tile, rows, columns, residual, residual_first, residual_stride, residual_scale, column,
    out, out_first, out_stride, epilogue,
):  # fmt: skip
    """A tile of the result, after the epilogue, to its place."""
    for c in range(0, min(NR, columns), LANES):
        lanes = min(LANES, columns - c)
        factor = masked_load(residual_scale, column + c, lanes)
        for r in range(rows):
            value = load(tile, r * NR + c)
            if epilogue & RESIDUAL:
                value = value + masked_load(residual, residual_first + r * residual_stride + c, lanes) * factor
            if epilogue & SILU:
                value = silu(value)
            if epilogue & GELU:
                value = gelu(value)
            masked_store(out, out_first + r * out_stride + c, value, lanes)


@njit(**OPTIONS)
def prefetch_tile(numbers, first, last, stride, column, columns):
    for r in range(first, last):
        for c in range(0, min(NR, columns), LANES):
            prefetch(numbers, r * stride + column + c)


@kernel(
    x=POINTER,  # (rows, depth), or the images of a convolution
    scale=POINTER,  # (images, depth)
    gate=POINTER,  # (rows, depth)
    weight=MAP,  # the panels of pack_panels, which hold the bias too
    residual=POINTER,  # (rows, columns)
    residual_scale=POINTER,  # (columns)
    out=POINTER,  # (rows, columns)
    rows=INT64,
    depth=INT64,
    columns=INT64,
    tokens=INT64,  # rows of an image, that have a scale together
    x_stride=INT64,
    gate_stride=INT64,
    residual_stride=INT64,
    out_stride=INT64,
    prologue=INT64,
    epilogue=INT64,
    row_splits=INT64,
    panel_splits=INT64,
    window=INT64,  # size of a convolution's, 0 for a plain product; what follows is the convolution's
    stride=INT64,
    height=INT64,
    width=INT64,
    channels=INT64,
    span=INT64,  # numbers of a window that are packed together
    chunk=INT64,  # places of the depth that are packed together
)
def gemm(call, thread, threads):
    """out = epilogue(prologue(x) @ weight + bias). A task is a part of the rows, or of the panels."""
    x, scale, gate, weight = floats(call.x, ANY), floats(call.scale, ANY), floats(call.gate, ANY), call.weight
    residual, out = floats(call.residual, ANY), floats(call.out, ANY)
    residual_scale = floats(call.residual_scale, ANY)
    rows, depth, columns, chunk, window = call.rows, call.depth, call.columns, call.chunk, call.window
    row_splits, panel_splits, epilogue = call.row_splits, call.panel_splits, call.epilogue
    numbers = numbers_of(weight)
    places = (depth + numbers - 1) // numbers
    panels, size = (columns + NR - 1) // NR, (places + chunk - 1) // chunk * MR * ROW_STRIDE
    held = max(1, PACKED_PLACES // size)  # blocks of MR rows
    packed, tile = packed_numbers(aligned_empty(held * size), weight), aligned_empty(MR * NR)
    packed_at, tile_at = packed.ctypes.data, tile.ctypes.data
    # Numbers of x from what is read for one row to that for the next, and of a window below its middle.
    advance, below = call.x_stride, 0
    if window:
        advance = call.stride * call.stride * call.channels
        below = window // 2 * call.width * call.channels
    ahead_step = min(LINE, 4 * MR * advance // places + 1)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        row_split, panel_split = task // panel_splits, task % panel_splits
        top, bottom = rows * row_split // row_splits, rows * (row_split + 1) // row_splits
        first_panel, last_panel = panels * panel_split // panel_splits, panels * (panel_split + 1) // panel_splits
        blocks = (bottom - top + MR - 1) // MR
        for start in range(0, blocks, held):
            stop = min(blocks, start + held)
            rows_here = (bottom - top) * stop // blocks - (bottom - top) * start // blocks
            for block in range(start, stop):
                first, last = top + (bottom - top) * block // blocks, top + (bottom - top) * (block + 1) // blocks
                place = (block - start) * size
                if window:
                    pack_windows(
                        x, first, last, call.height, call.width, call.channels, window, call.stride, call.span, chunk,
                        packed, place, numbers,
                    )  # fmt: skip
                else:
                    for r in range(first, last):
                        pack_row(
                            x, r * call.x_stride, scale, r // call.tokens * depth, gate, r * call.gate_stride, depth,
                            call.prologue, packed, place, numbers,
                        )  # fmt: skip
                        place += ROW_STRIDE
            for panel in range(first_panel, last_panel):
                column = panel * NR
                used = columns - column
                in_place = epilogue == 0 and (used >= NR or used % HALF_VECTOR == 0)
                for block in range(start, stop):
                    first, last = top + (bottom - top) * block // blocks, top + (bottom - top) * (block + 1) // blocks
                    # While these are multiplied, the rows of the next blocks arrive, and the lines of the result.
                    ahead = call.x + 4 * ((first + rows_here) * advance + below) if panel == first_panel else tile_at
                    prefetch_tile(out, first, last, call.out_stride, column, used)
                    if epilogue & RESIDUAL:
                        prefetch_tile(residual, first, last, call.residual_stride, column, used)
                    to, to_step = tile_at, NR
                    if in_place:
                        to, to_step = call.out + 4 * (first * call.out_stride + column), call.out_stride
                    multiply_panel(
                        weight, last - first, packed_at + 4 * (block - start) * size, places, chunk,
                        weight + 4 * panel * (places + 1) * NR, used, tile_at, to, to_step,
                        ahead, ahead_step if panel == first_panel else 0,
                    )  # fmt: skip
                    if not in_place:
                        write_tile(
                            tile, last - first, used, residual, first * call.residual_stride + column,
                            call.residual_stride, residual_scale, column, out, first * call.out_stride + column,
                            call.out_stride, epilogue,
                        )  # fmt: skip


def pack_panels(weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight (N, K) and bias (N) as panels of places of 32 bits, (ceil(N / NR), 1 + places, NR); zeros beyond N.

    The bias comes first, in float32; then the weight, where a place is a number in float32, or two of the depth in
    bfloat16, which doubles the last size.
    """
    numbers = weight if dtype == torch.float32 else F.pad(weight, (0, weight.shape[1] % 2)).to(dtype)
    bits = numbers.contiguous().view(torch.int32)
    width, places = bits.shape
    panels = -(-width // NR)
    packed = bits.new_zeros(panels * NR, 1 + places)
    packed[:width, 0], packed[:width, 1:] = bias.contiguous().view(torch.int32), bits
    return packed.view(panels, NR, 1 + places).transpose(1, 2).contiguous().view(dtype)


def spans_of(channels: int, size: int) -> tuple[int, int]:
    """How a convolution's windows are packed: by whole rows or equal spans of a tap's channels; and chunks of those."""
    span = size * channels if size * channels <= KC else -(-channels // -(-channels // KC))
    return span, KC // span * span


def convolution_matrix(weight: Tensor) -> Tensor:
    """A convolution's weight (N, C, K, K) as that of a product, its depth as the windows are packed."""
    span, _ = spans_of(*weight.shape[1:3])
    padded = F.pad(weight.permute(0, 2, 3, 1), (0, -weight.shape[1] % min(span, weight.shape[1])))
    return padded.flatten(1)


def splits_of(rows: int, chunks: int, columns: int) -> tuple[int, int]:
    """Into how many parts the rows and the panels of a product are cut, enough for all threads."""
    threads, panels = torch.get_num_threads(), -(-columns // NR)
    if rows < MR * threads:
        return 1, min(threads, panels)
    rows_at_once = max(1, PACKED_PLACES // (chunks * MR * ROW_STRIDE)) * MR
    return -(-max(1, -(-rows // rows_at_once)) // threads) * threads, 1
