"""The first half of a ConvFFN on CPU: a matrix product, GELU and a 3 x 3 filter, a few rows of the images at once.

The product of those rows stays in the second-level cache, from which the filter reads it; of all rows it would be four
times as large as the images, to be written to memory and read again. The weights are read anew for every few rows, so
that this is for those that stay in the cache too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from overlock.kernels.numba.activations import gelu
from overlock.kernels.numba.arguments import INT64, MAP, POINTER
from overlock.kernels.numba.depthwise import filter_three, write_row
from overlock.kernels.numba.flags import SUM_SQUARES
from overlock.kernels.numba.gemm import multiply_panel, pack_row
from overlock.kernels.numba.gemm_microkernel import KC, MR, NR, ROW_STRIDE, numbers_of, packed_numbers
from overlock.kernels.numba.runtime import ANY, OPTIONS, floats, kernel, task_range
from overlock.kernels.numba.simd import LANES, aligned_empty, aligned_zeros, load, masked_load, store

LARGEST_WEIGHT = 1 << 19  # bytes: half of a second-level cache
FEWEST_ROWS = 24  # of a split, for those that its neighbours make a second time not to count
TOKENS = 256  # at once


class Ring(NamedTuple):
    """Some rows of a map, the oldest written over by the next: blocks of LANES channels, with margins of zeros."""

    lines: Any
    block: Any  # numbers from one block to the next
    line: Any  # numbers of a row
    rows: Any
    width: Any


@njit(**OPTIONS)
def pack_tokens(x, first, count, scale, scale_first, depth, prologue, packed, numbers):
    """Tokens from ``first`` on, after the prologue, to the microkernel's layout, so many numbers at a place."""
    size = (depth + numbers * KC - 1) // (numbers * KC) * MR * ROW_STRIDE
    for r in range(count):
        place = r // MR * size + r % MR * ROW_STRIDE
        pack_row(x, (first + r) * depth, scale, scale_first, x, 0, depth, prologue, packed, place, numbers)


@njit(**OPTIONS)
def expand_tokens(packed, count, places, weight, channels, tile, ring, row, following, result, result_bytes):
    """GELU(x @ weight) of ``count`` packed tokens of some places, to the ring's rows from one on.

    Meanwhile memory from the address ``following`` on begins to come to the second-level cache, which holds the tokens
    that are packed next, and then ``result_bytes`` bytes from ``result`` on, which are written next.
    """
    size, panels = (places + KC - 1) // KC * MR * ROW_STRIDE, (channels + NR - 1) // NR
    packed_at, tile_at, tiles = packed.ctypes.data, tile.ctypes.data, (count + MR - 1) // MR
    result_step = result_bytes // (max(panels - 1, 1) * tiles * places) + 1
    for panel in range(panels):
        used, at = min(NR, channels - panel * NR), weight + 4 * panel * (places + 1) * NR
        ahead, ahead_step = following, 4 * MR * numbers_of(weight)
        if panel > 0:
            ahead, ahead_step = result + (panel - 1) * tiles * places * result_step, result_step
        y, column = row, 0
        for n in range(tiles):
            rows, come = min(MR, count - n * MR), ahead + n * places * ahead_step
            multiply_panel(
                weight, rows, packed_at + 4 * n * size, places, KC, at, used, tile_at, tile_at, NR, come, ahead_step
            )
            for r in range(rows):
                place = panel * (NR // LANES) * ring.block + y * ring.line + (column + 1) * LANES
                for c in range(0, NR, LANES):  # of a part of a panel more than is read
                    store(ring.lines, place, gelu(load(tile, r * NR + c)))
                    place += ring.block
                column += 1
                if column == ring.width:
                    y, column = y + 1, 0
                    if y == ring.rows:  # a remainder would be checked for a divisor of 0, in loops of their own
                        y = 0


@kernel(
    x=POINTER,  # (B, H, W, K)
    scale=POINTER,  # (B, K)
    weight=MAP,  # the panels of pack_panels, which hold the bias too
    filter_weight=POINTER,  # (9, N)
    filter_bias=POINTER,  # (N)
    out=POINTER,  # (B, H, W, N)
    sums=POINTER,  # (B, splits, N), of the squares of the results
    height=INT64,
    width=INT64,
    depth=INT64,  # K
    channels=INT64,  # N
    prologue=INT64,
    splits=INT64,  # of the rows
    band=INT64,  # rows that are filtered at once
)
def expand_and_filter(call, thread, threads):
    """out = filter(GELU(prologue(x) @ weight + bias)). A task is some rows of an image."""
    height, width, depth, channels = call.height, call.width, call.depth, call.channels
    splits, band = call.splits, call.band
    x, scale, out, sums = floats(call.x, ANY), floats(call.scale, ANY), floats(call.out, ANY), floats(call.sums, ANY)
    weights, bias = floats(call.filter_weight, ANY), floats(call.filter_bias, ANY)
    line, blocks = (width + 2) * LANES, (channels + NR - 1) // NR * (NR // LANES)
    block_size = (band + 3) * line  # the last line of a block stays zero
    ring = Ring(aligned_zeros(blocks * block_size), block_size, line, band + 2, width)
    numbers = numbers_of(call.weight)
    places = (depth + numbers - 1) // numbers
    packed_size = (ring.rows * width + MR - 1) // MR * ((places + KC - 1) // KC) * MR * ROW_STRIDE
    packed = packed_numbers(aligned_empty(packed_size), call.weight)
    taps, tile, row = aligned_empty(10 * LANES), aligned_empty(MR * NR), aligned_empty(width * LANES)
    squares, exact = aligned_zeros(LANES), np.zeros(blocks * LANES, np.float64)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        image, split = task // splits, task % splits
        top, bottom = height * split // splits, height * (split + 1) // splits
        exact[:] = 0
        ready = max(top - 1, 0)
        for y in range(top, bottom, band):
            stop = min(y + band, bottom)
            until = min(stop + 1, height)
            first, count = (image * height + ready) * width, (until - ready) * width
            pack_tokens(x, first, count, scale, image * depth, depth, call.prologue, packed, numbers)
            expand_tokens(
                packed, count, places, call.weight, channels, tile, ring, ready % ring.rows,
                call.x + 4 * (first + count) * depth, call.out + 4 * (image * height + y) * width * channels,
                4 * (stop - y) * width * channels,
            )  # fmt: skip
            ready = until
            for channel in range(0, channels, LANES):
                lanes, place = min(LANES, channels - channel), channel // LANES * ring.block
                for n in range(9):
                    store(taps, n * LANES, masked_load(weights, n * channels + channel, lanes))
                store(taps, 9 * LANES, masked_load(bias, channel, lanes))
                squares[:] = 0
                for r in range(y, stop):
                    above = place + ((r - 1) % ring.rows if r > 0 else ring.rows) * line
                    below = place + ((r + 1) % ring.rows if r + 1 < height else ring.rows) * line
                    filter_three(ring.lines, taps, above, place + r % ring.rows * line, below, width, row, 0)
                    to = (image * height + r) * width * channels + channel
                    write_row(row, 0, width, lanes, SUM_SQUARES, out, to, channels, squares, out)
                for c in range(LANES):
                    exact[channel + c] += squares[c]
        for c in range(channels):
            sums[task * channels + c] = exact[c]


def splits_and_band(batch: int, height: int, width: int, weight: int) -> tuple[int, int] | None:
    """Splits of the rows and rows to filter at once for packed weights of some bytes; None where it does not pay."""
    splits = -(-torch.get_num_threads() // batch)
    if weight > LARGEST_WEIGHT or height < FEWEST_ROWS * splits:
        return None
    return splits, max(1, TOKENS // width)
