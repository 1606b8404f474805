"""Products of tokens and weights for numba, with what comes before and after them in the same pass.

A piece of the tokens is packed for the inner loop (tiles.py), and there is multiplied with one panel of the weights
after another; each tile of the result passes through its last steps while it is in the cache.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from overlock.ops.threads import OPTIONS, floats, kernel, share
from overlock.ops.tiles import DEPTH, PANEL, ROWS, STRIDE, multiply_half, multiply_panel
from overlock.ops.vectors import LANES, load, load_part, silu, store, store_part

# What is done in the same pass, added up: to x before the product, then to the result, in this order.
SCALED, GATED, RESIDUAL, SILU = 1, 2, 4, 8
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
def multiply(rows, packed, place, depth, weight, panel, width, tile):
    """tile (rows, PANEL) = bias + packed rows @ a panel of the weights, of whose columns ``width`` are used."""
    first = panel * (depth + 1) * PANEL
    for r in range(rows):
        store(tile, r * PANEL, load(weight, first))
        store(tile, r * PANEL + LANES, load(weight, first + LANES))
    first += PANEL
    for k in range(0, depth, DEPTH):
        x, steps = place + k * ROWS * STRIDE // DEPTH, min(DEPTH, depth - k)
        if width > LANES:
            multiply_panel(rows, packed, x, weight, first + k * PANEL, steps, tile, 0)
        else:
            multiply_half(rows, packed, x, weight, first + k * PANEL, steps, tile, 0)


@njit(**OPTIONS)
def finish(value, other, other_first, share, column, lanes, steps):
    """The last steps of a vector of the result."""
    if steps & RESIDUAL:
        value = value + load_part(other, other_first, lanes) * load_part(share, column, lanes)
    if steps & SILU:
        value = silu(value)
    return value


@kernel
def product(call, thread, threads):
    """out (M, N) = x (M, K) @ weight (K, N) + bias, with steps before and after.

    ``call`` holds from index 2 on: the addresses of x; scale (images, K); gate; the packed weight and bias; other,
    which is added times its share (N); its share; and out. Then M, K, N, the tokens of an image, the strides of
    rows of x, gate, other and out, the steps, and the pieces that rows and panels are cut into.
    """
    p = carray(call, 20)
    rows, depth, width, tokens, steps = p[9], p[10], p[11], p[12], p[17]
    everything, panels = (1 << 60,), (width + PANEL - 1) // PANEL
    x, scale, gate, weight = floats(p[2], everything), floats(p[3], everything), floats(p[4], everything), p[5]
    weights, other, part, out = (
        floats(weight, everything),
        floats(p[6], everything),
        floats(p[7], everything),
        floats(p[8], everything),
    )
    size = (depth + DEPTH - 1) // DEPTH * ROWS * STRIDE
    room = max(1, ROOM // size)
    packed, tile = np.empty(room * size, np.float32), np.empty(ROWS * PANEL, np.float32)
    begin, end = share(p, thread, threads)
    for job in range(begin, end):
        row_piece, panel_piece = job // p[19], job % p[19]
        top, bottom = rows * row_piece // p[18], rows * (row_piece + 1) // p[18]
        blocks = (bottom - top + ROWS - 1) // ROWS
        for start in range(0, blocks, room):
            stop = min(blocks, start + room)
            for block in range(start, stop):
                first, last = top + (bottom - top) * block // blocks, top + (bottom - top) * (block + 1) // blocks
                for r in range(first, last):
                    place = (block - start) * size + (r - first) * STRIDE
                    pack_row(x, r * p[13], scale, r // tokens * depth, gate, r * p[14], depth, steps, packed, place)
            for panel in range(panels * panel_piece // p[19], panels * (panel_piece + 1) // p[19]):
                column = panel * PANEL
                used = width - column
                for block in range(start, stop):
                    first, last = top + (bottom - top) * block // blocks, top + (bottom - top) * (block + 1) // blocks
                    multiply(last - first, packed, (block - start) * size, depth, weights, panel, used, tile)
                    for r in range(first, last):
                        for c in range(0, min(PANEL, used), LANES):
                            lanes, at = min(LANES, used - c), column + c
                            value = load(tile, (r - first) * PANEL + c)
                            value = finish(value, other, r * p[15] + at, part, at, lanes, steps)
                            if lanes == LANES:
                                store(out, r * p[16] + at, value)
                            else:
                                store_part(out, r * p[16] + at, value, lanes)


def pack_weight(weight: Tensor, bias: Tensor) -> Tensor:
    """Weight (N, K) and bias (N) as panels (ceil(N / PANEL), 1 + K, PANEL), the bias first, zeros beyond N."""
    width, depth = weight.shape
    panels = -(-width // PANEL)
    packed = weight.new_zeros(panels * PANEL, 1 + depth)
    packed[:width, 0], packed[:width, 1:] = bias, weight
    return packed.view(panels, PANEL, 1 + depth).transpose(1, 2).contiguous()


def cut(rows: int, depth: int, width: int) -> tuple[int, int]:
    """Pieces of the rows and of the panels of a product, enough for all threads."""
    threads, panels = torch.get_num_threads(), -(-width // PANEL)
    if rows < ROWS * threads:
        return 1, min(threads, panels)
    room = max(1, ROOM // (-(-depth // DEPTH) * ROWS * STRIDE)) * ROWS
    return -(-max(1, -(-rows // room)) // threads) * threads, 1
