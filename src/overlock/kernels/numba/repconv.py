"""The training pass of Dilated RepConv on CPU: all branches and their statistics at once, then their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from overlock.kernels.numba.arguments import FLOAT64, INT64, MAP, POINTER
from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.kernels.numba.repconv_tiles import (
    BRANCHES,
    KEPT,
    MAPS,
    SPARE,
    ZERO,
    count_taps,
    cut,
    filter_rows,
    in_turn,
    pair_taps,
    pair_up,
    plane_of,
    read_rows,
    results,
    takes_pairs,
    tiles_of,
)
from overlock.kernels.numba.runtime import OPTIONS, floats, kernel, maps, run, task_range
from overlock.kernels.numba.simd import (
    LANES,
    aligned_zeros,
    broadcast,
    load,
    masked_load,
    masked_store,
    prefetch,
    store,
)
from overlock.kernels.numba.vector_tuples import load_all, multiply_add, repeat, store_all


@njit(**OPTIONS)
def keep_row(row, begin, columns, kept, to, sums, squares):
    """Write a branch's row to where it is kept, and add its sum and its squared distances from its mean to others."""
    both, apart = broadcast(ZERO), broadcast(ZERO)
    for x in range(columns):
        value = load(row, begin + x * LANES)
        store(kept, to + x * KEPT, value)
        both = both + value
    mean = both * broadcast(np.float32(1 / columns))
    for x in range(columns):
        value = load(row, begin + x * LANES) - mean
        apart = apart + value * value
    store(sums, 0, both)
    store(squares, 0, apart)


@njit(**OPTIONS)
def add_row(row_sums, row_squares, columns, i, sums, squares):
    """Add a row's sums to those of branch i: of all, and of the squares."""
    for c in range(LANES):
        both = np.float64(row_sums[c])
        sums[i, c] += both
        squares[i, c] += row_squares[c] + both * both / columns


@kernel(
    x=MAP,  # (B, H, W, C)
    taps=POINTER,  # (T, C), of one branch after the other
    kept=MAPS,  # (C / KEPT, B, H, W, KEPT): the branches' results, to be written
    statistics=POINTER,  # (splits, 3, N, C): count, mean, squared distances from it
    batch=INT64,
    height=INT64,
    width=INT64,
    channels=INT64,
    branches=INT64,
    sizes=BRANCHES,
    dilations=BRANCHES,
    reach=INT64,  # of the largest branch
    tile_rows=INT64,
    tile_columns=INT64,
    splits=INT64,  # of the tiles of all images
    in_pairs=INT64,  # whether filters of more than 3 x 3 take pairs
)
def filter_branches(call, thread, threads):
    """Convolutions of x by all branches. A task is LANES channels of some tiles."""
    batch, height, width, channels, branches = call.batch, call.height, call.width, call.channels, call.branches
    reach, splits, positions, tiles = call.reach, call.splits, height * width, call.tile_rows * call.tile_columns
    all_taps = count_taps(call.sizes, branches)
    images, weights = maps(call.x, (batch * positions * channels,)), floats(call.taps, (all_taps * channels,))
    statistics = floats(call.statistics, (splits, 3, branches, channels))
    most_rows, most_columns = -(-height // call.tile_rows), -(-width // call.tile_columns)
    stride = (most_columns + SPARE + 2 * reach) * LANES
    tile, taps = aligned_zeros((most_rows + 2 * reach) * stride), aligned_zeros(all_taps * LANES)
    rows, below = aligned_zeros(2 * (most_columns + SPARE) * LANES), (most_columns + SPARE) * LANES
    row_sums, row_squares = aligned_zeros(LANES), aligned_zeros(LANES)
    sums, squares = np.zeros((branches, LANES), np.float64), np.zeros((branches, LANES), np.float64)
    order = np.empty(branches, np.int64)
    unpaired = in_turn(call.sizes, branches, call.in_pairs, order)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        block, split = task // splits, task % splits
        lanes, count = min(LANES, channels - block * LANES), 0
        for n in range(all_taps):
            store(taps, n * LANES, masked_load(weights, n * channels + block * LANES, lanes))
        if call.in_pairs != 0:
            pair_taps(taps, call.sizes, branches)
        sums[:], squares[:] = 0, 0
        first_tile, last_tile = cut(batch * tiles, split, splits)
        for index in range(first_tile, last_tile):
            b, part = index // tiles, index % tiles
            y0, y1 = cut(height, part // call.tile_columns, call.tile_rows)
            x0, x1 = cut(width, part % call.tile_columns, call.tile_columns)
            top, bottom, left, right = (
                max(y0 - reach, 0), min(y1 + reach, height), max(x0 - reach, 0), min(x1 + reach, width),
            )  # fmt: skip
            tile[:] = 0
            read_rows(
                images, (b * positions + top * width + left) * channels + block * LANES, width * channels, channels,
                bottom - top, right - left, lanes, tile,
                (top - y0 + reach) * stride + (left - x0 + reach) * LANES, stride,
            )  # fmt: skip
            columns, neighbour = x1 - x0, 0
            begin_row, end_row = (top - y0 + reach) * stride, (bottom - y0 + reach) * stride
            for turn in range(branches):
                i, paired = order[turn], turn >= unpaired
                size, dilation, tap = call.sizes[i], call.dilations[i], count_taps(call.sizes, i) * LANES
                if paired and neighbour != dilation:
                    pair_up(tile, begin_row, end_row, dilation * LANES, neighbour != 0)
                    neighbour = dilation
                own = size // 2 * dilation
                kept, plane = results(call.kept[i], batch, positions, channels), plane_of(block, b, batch, positions)
                for band in range(y0, y1, 2 * dilation):
                    for y in range(band, min(band + dilation, y1)):
                        pair = 2 if y + dilation < y1 else 1
                        rows[:] = 0
                        filter_rows(
                            paired, tile, (y - y0 + reach - own) * stride + (reach - own) * LANES, stride, taps, tap,
                            size, dilation, own - y, height - y + own, columns, pair, rows, 0, below,
                        )  # fmt: skip
                        for n in range(pair):
                            to = plane + ((y + n * dilation) * width + x0) * KEPT
                            keep_row(rows, n * below, columns, kept, to, row_sums, row_squares)
                            add_row(row_sums, row_squares, columns, i, sums, squares)
            count += (y1 - y0) * columns
        for i in range(branches):
            for c in range(lanes):
                mean = sums[i, c] / count
                statistics[split, 0, i, block * LANES + c] = count
                statistics[split, 1, i, block * LANES + c] = mean
                statistics[split, 2, i, block * LANES + c] = max(squares[i, c] - mean * sums[i, c], 0.0)


@njit(**OPTIONS)
def merge_statistics(statistics, i, c):
    """Mean and variance of a branch and channel over all splits (Chan et al., 1983)."""
    count, mean, squares = 0.0, 0.0, 0.0
    for split in range(statistics.shape[0]):
        n, apart = np.float64(statistics[split, 0, i, c]), statistics[split, 1, i, c] - mean
        both = count + n
        squares += statistics[split, 2, i, c] + apart * apart * count * n / both
        mean += apart * n / both
        count = both
    return mean, squares / count


@kernel(
    kept=MAPS,  # (C / KEPT, B, H W, KEPT)
    statistics=POINTER,  # (splits, 3, N, C)
    scale=POINTER,  # (N, C)
    shift=POINTER,  # (N, C)
    mean=POINTER,  # (N, C), to be written
    variance=POINTER,  # (N, C), to be written
    out=MAP,  # (B, H W, C)
    eps=FLOAT64,
    batch=INT64,
    positions=INT64,
    channels=INT64,
    branches=INT64,
    splits=INT64,  # of the statistics
    parts=INT64,  # of all positions
)
def add_branches(call, thread, threads):
    """out = sum over the branches of their batch norms. A task is LANES channels of some positions."""
    batch, positions, channels, branches, parts = call.batch, call.positions, call.channels, call.branches, call.parts
    statistics = floats(call.statistics, (call.splits, 3, branches, channels))
    scale, shift = floats(call.scale, (branches, channels)), floats(call.shift, (branches, channels))
    means, variances = floats(call.mean, (branches, channels)), floats(call.variance, (branches, channels))
    out = maps(call.out, (batch * positions * channels,))
    factors, row, rest = aligned_zeros((branches + 1) * LANES), aligned_zeros(7 * LANES), aligned_zeros(LANES)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        block, part = task // parts, task % parts
        lanes = min(LANES, channels - block * LANES)
        rest[:] = 0
        for i in range(branches):
            for lane in range(lanes):
                c = block * LANES + lane
                mean, variance = merge_statistics(statistics, i, c)
                factor = scale[i, c] / math.sqrt(variance + call.eps)
                factors[i * LANES + lane] = factor
                rest[lane] += shift[i, c] - mean * factor
                if part == 0:
                    means[i, c], variances[i, c] = mean, variance
        first, last = cut(batch * positions, part, parts)
        while first < last:
            b, p = first // positions, first % positions
            here = min(7, last - first, positions - p)
            to, place = (b * positions + p) * channels + block * LANES, plane_of(block, b, batch, positions) + p * KEPT
            for x in range(here):
                prefetch(out, to + (7 + x) * channels)
            if here == 7:
                sums = repeat(load(rest, 0), 7)
                for i in range(branches):
                    values = load_all(results(call.kept[i], batch, positions, channels), place, KEPT, 7)
                    sums = multiply_add(sums, load(factors, i * LANES), values)
                store_all(row, 0, LANES, sums)
            else:
                for x in range(here):
                    one = load(rest, 0)
                    for i in range(branches):
                        kept = results(call.kept[i], batch, positions, channels)
                        one = one + load(factors, i * LANES) * load(kept, place + x * KEPT)
                    store(row, x * LANES, one)
            for x in range(here):
                masked_store(out, to + x * channels, load(row, x * LANES), lanes)
            first += here


def task_splits(blocks: int, most: int) -> int:
    """Into how many parts the work on a block of channels is cut, that the threads end together."""
    return max(1, min(most, -(-8 * torch.get_num_threads() // blocks)))


def forward(
    x: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, sizes: Sequence[int], dilations: Sequence[int], eps: float
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """See overlock.ops.repconv; channels last."""
    tokens, taps, scale, shift = to_tokens(x), taps.float().contiguous(), scale.float(), shift.float()
    batch, height, width, channels = tokens.shape
    blocks, (tile_rows, tile_columns) = -(-channels // LANES), tiles_of(height, width)
    splits = task_splits(blocks, batch * tile_rows * tile_columns)
    parts = task_splits(blocks, max(1, batch * height * width // 64))
    # One tensor a branch: the C library has the system map larger ones anew each time.
    kept = [x.new_empty(-(-channels // KEPT), batch, height, width, KEPT) for _ in sizes]
    statistics, out = taps.new_empty(splits, 3, len(sizes), channels), torch.empty_like(tokens)
    mean, variance = torch.empty_like(scale), torch.empty_like(scale)
    run(
        filter_branches, blocks * splits, x=tokens, taps=taps, kept=kept, statistics=statistics, batch=batch,
        height=height, width=width, channels=channels, branches=len(sizes), sizes=sizes, dilations=dilations,
        reach=max(k // 2 * r for k, r in zip(sizes, dilations, strict=True)), tile_rows=tile_rows,
        tile_columns=tile_columns, splits=splits, in_pairs=takes_pairs(x),
    )  # fmt: skip
    run(
        add_branches, blocks * parts, kept=kept, statistics=statistics, scale=scale, shift=shift, mean=mean,
        variance=variance, out=out, eps=eps, batch=batch, positions=height * width, channels=channels,
        branches=len(sizes), splits=splits, parts=parts,
    )  # fmt: skip
    return to_images(out), kept, mean, variance
