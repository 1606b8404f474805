"""The first half of a ConvFFN on CPU by numba: a product, GELU and a 3 x 3 filter, a few rows of the images at once.

The product of those rows stays in the second cache, from which the filter reads it; of all rows it would be four times
as large as the images, to be written to memory and read again. The weights are read anew for every few rows, so that
this is for those that stay in the cache too.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from overlock.kernels.numba.depthwise import SQUARES, filter_three, write_row
from overlock.kernels.numba.gemm import multiply, pack_row
from overlock.kernels.numba.gemm_microkernel import DEPTH, PANEL, ROWS, STRIDE
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, share
from overlock.kernels.numba.simd import LANES, gelu, load, load_part, room, store, zeros

LARGEST_WEIGHT = 1 << 17  # numbers: half of a second cache
FEWEST_ROWS = 24  # of a piece, for those that its neighbours make a second time not to count
TOKENS = 256  # at once


@njit(**OPTIONS)
def expand_rows(
    x, first, count, scale, scale_first, depth, steps, packed, weight, channels, tile, lines, step, line, ring, row,
    width, out, out_bytes,
):  # fmt: skip
    """GELU(x @ weight) of ``count`` tokens from ``first`` on, a row of the ring and those below, into the lines.

    A block of LANES channels is ``step`` numbers from the one before, a row ``line`` numbers. Meanwhile the next tokens
    begin to come to the second cache, and ``out_bytes`` bytes from the address ``out`` on, which are written next.
    """
    size, panels = (depth + DEPTH - 1) // DEPTH * ROWS * STRIDE, (channels + PANEL - 1) // PANEL
    packed_at, tile_at, tiles = packed.ctypes.data, tile.ctypes.data, (count + ROWS - 1) // ROWS
    for r in range(count):
        place = r // ROWS * size + r % ROWS * STRIDE
        pack_row(x, (first + r) * depth, scale, scale_first, x, 0, depth, steps, packed, place)
    out_step = out_bytes // (max(panels - 1, 1) * tiles * depth) + 1
    for panel in range(panels):
        used, at = min(PANEL, channels - panel * PANEL), weight + 4 * panel * (depth + 1) * PANEL
        y, column = row, 0
        for n in range(tiles):
            rows = min(ROWS, count - n * ROWS)
            later, later_step = x.ctypes.data + 4 * (first + count + n * ROWS) * depth, 4 * ROWS
            if panel > 0:
                later, later_step = out + ((panel - 1) * tiles + n) * depth * out_step, out_step
            multiply(rows, packed_at + 4 * n * size, depth, DEPTH, at, used, tile_at, tile_at, PANEL, later, later_step)
            for r in range(rows):
                place = panel * (PANEL // LANES) * step + y * line + (column + 1) * LANES
                for c in range(0, used, LANES):
                    store(lines, place, gelu(load(tile, r * PANEL + c)))
                    place += step
                column += 1
                if column == width:
                    y, column = (y + 1) % ring, 0


@kernel
def expand_and_filter(call, thread, threads):
    """out = filter(GELU(scale * x @ weight + bias)) of images (B, H, W, K) to (B, H, W, N), and its squares' sums.

    ``call`` holds from index 2 on: the addresses of x, scale (B, K), the packed weight and bias, the filter's weights
    (9, N) and bias (N), out, and the sums (B, pieces, N); B, H, W, K, N, the steps before the product; the pieces that
    rows are cut into, and the rows to filter at once.
    """
    p = carray(call, 17)
    height, width, depth, channels = p[10], p[11], p[12], p[13]
    pieces, band, everything = p[15], p[16], (1 << 60,)
    x, scale, out = floats(p[2], everything), floats(p[3], everything), floats(p[7], everything)
    weights, bias, sums = floats(p[5], everything), floats(p[6], everything), floats(p[8], everything)
    ring, line = band + 2, (width + 2) * LANES
    step, blocks = (ring + 1) * line, (channels + PANEL - 1) // PANEL * (PANEL // LANES)
    lines = zeros(blocks * step)  # margins and the last line of a block stay zero
    packed = room((ring * width + ROWS - 1) // ROWS * ((depth + DEPTH - 1) // DEPTH) * ROWS * STRIDE)
    taps, tile, row = room(10 * LANES), room(ROWS * PANEL), room(width * LANES)
    squares, exact = zeros(LANES), np.zeros(blocks * LANES, np.float64)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        image, piece = job // pieces, job % pieces
        top, bottom = height * piece // pieces, height * (piece + 1) // pieces
        exact[:] = 0
        ready = max(top - 1, 0)
        for y in range(top, bottom, band):
            stop = min(y + band, bottom)
            until = min(stop + 1, height)
            expand_rows(
                x, (image * height + ready) * width, (until - ready) * width, scale, image * depth, depth, p[14],
                packed, p[4], channels, tile, lines, step, line, ring, ready % ring, width,
                p[7] + 4 * (image * height + y) * width * channels, 4 * (stop - y) * width * channels,
            )  # fmt: skip
            ready = until
            for channel in range(0, channels, LANES):
                lanes, place = min(LANES, channels - channel), channel // LANES * step
                for n in range(9):
                    store(taps, n * LANES, load_part(weights, n * channels + channel, lanes))
                store(taps, 9 * LANES, load_part(bias, channel, lanes))
                squares[:] = 0
                for r in range(y, stop):
                    above = place + ((r - 1) % ring if r > 0 else ring) * line
                    below = place + ((r + 1) % ring if r + 1 < height else ring) * line
                    filter_three(lines, taps, above, place + r % ring * line, below, width, row, 0)
                    to = (image * height + r) * width * channels + channel
                    write_row(row, 0, width, lanes, SQUARES, out, to, channels, squares, out)
                for c in range(LANES):
                    exact[channel + c] += squares[c]
        for c in range(channels):
            sums[job * channels + c] = exact[c]


def plan(batch: int, height: int, width: int, weight: int) -> tuple[int, int] | None:
    """Pieces of the rows and rows to filter at once for packed weights of some numbers; None where it does not pay."""
    pieces = -(-torch.get_num_threads() // batch)
    if weight > LARGEST_WEIGHT or height < FEWEST_ROWS * pieces:
        return None
    return pieces, max(1, TOKENS // width)
