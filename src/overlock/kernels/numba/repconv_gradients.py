"""Gradients of Dilated RepConv's training pass on CPU: of its batch norms' sums first, then of all filters at once.

With z a branch's result, the gradient that reaches it is p (g - mean(g) - n mean(g n)), where g is the gradient of the
sum, n = (z - mean) / deviation and p = scale / deviation. It is made of g and z for one tile after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from overlock.kernels.numba.arguments import FLOAT64, INT64, MAP, POINTER
from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.kernels.numba.repconv import task_splits
from overlock.kernels.numba.repconv_tiles import (
    BRANCHES,
    KEPT,
    MAPS,
    SPARE,
    ZERO,
    correlate_tile,
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

LONGEST = 64  # positions summed up in float32 before they join a sum in float64


@kernel(
    grads=MAP,  # (B, H W, C)
    kept=MAPS,  # (C / KEPT, B, H W, KEPT)
    mean=POINTER,  # (N, C)
    sums=POINTER,  # (parts, N + 1, C): of g (z - mean), and last of g
    batch=INT64,
    positions=INT64,
    channels=INT64,
    branches=INT64,
    parts=INT64,  # of all positions
)
def sum_gradients(call, thread, threads):
    """Sums that the gradients of the batch norms are made of. A task is LANES channels of some positions."""
    batch, positions, channels, branches, parts = call.batch, call.positions, call.channels, call.branches, call.parts
    grads = maps(call.grads, (batch * positions * channels,))
    means = floats(call.mean, (branches * channels,))
    sums = floats(call.sums, (parts, branches + 1, channels))
    row, lane = aligned_zeros(LONGEST * LANES), aligned_zeros(LANES)
    exact = np.zeros((branches + 1, LANES), np.float64)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        block, part = task // parts, task % parts
        lanes = min(LANES, channels - block * LANES)
        exact[:] = 0
        first, last = cut(batch * positions, part, parts)
        while first < last:
            b, p = first // positions, first % positions
            here = min(LONGEST, last - first, positions - p)
            place, both = plane_of(block, b, batch, positions) + p * KEPT, broadcast(ZERO)
            for x in range(here):
                at = (first + x) * channels + block * LANES
                prefetch(grads, at + LONGEST * channels)
                value = masked_load(grads, at, lanes)
                store(row, x * LANES, value)
                both = both + value
            store(lane, 0, both)
            for c in range(LANES):
                exact[branches, c] += lane[c]
            for i in range(branches):
                kept = results(call.kept[i], batch, positions, channels)
                mean = masked_load(means, i * channels + block * LANES, lanes)
                both = other = broadcast(ZERO)
                for x in range(0, here - 1, 2):
                    both = both + load(row, x * LANES) * (load(kept, place + x * KEPT) - mean)
                    other = other + load(row, x * LANES + LANES) * (load(kept, place + x * KEPT + KEPT) - mean)
                if here % 2:
                    both = both + load(row, (here - 1) * LANES) * (load(kept, place + (here - 1) * KEPT) - mean)
                store(lane, 0, both + other)
                for c in range(LANES):
                    exact[i, c] += lane[c]
            first += here
        for i in range(branches + 1):
            for c in range(lanes):
                sums[part, i, block * LANES + c] = exact[i, c]


@njit(**OPTIONS)
def merge_gradients(sums, means, variances, scale, eps, count, block, lanes, factors, norm_grads):
    """Factors (N, 4, LANES) that make a branch's gradient of g and z, and gradients (2, N, C) of scale and shift.

    The factors are of g, of z less the mean, the rest, and the mean.
    """
    branches = means.shape[0]
    for i in range(branches):
        for lane in range(lanes):
            c, of_grad, of_both = block * LANES + lane, 0.0, 0.0
            for part in range(sums.shape[0]):
                of_both += sums[part, i, c]
                of_grad += sums[part, branches, c]
            inverse = 1 / math.sqrt(variances[i, c] + eps)
            factor, at = scale[i, c] * inverse, 4 * i * LANES + lane
            factors[at] = factor
            factors[at + LANES] = -factor * inverse * inverse * of_both / count
            factors[at + 2 * LANES] = -factor * of_grad / count
            factors[at + 3 * LANES] = means[i, c]
            norm_grads[0, i, c], norm_grads[1, i, c] = of_both * inverse, of_grad


@njit(**OPTIONS)
def make_branch_gradients(
    grads, grads_at, grads_step, kept, kept_at, kept_step, rows, columns, factors, i, out, to, stride
):
    """A tile's gradients of a branch's results."""
    of_grad, of_kept = load(factors, 4 * i * LANES), load(factors, (4 * i + 1) * LANES)
    rest, mean = load(factors, (4 * i + 2) * LANES), load(factors, (4 * i + 3) * LANES)
    for y in range(rows):
        grad, z, o = grads_at + y * grads_step, kept_at + y * kept_step, to + y * stride
        for x in range(columns):
            value = of_grad * load(grads, grad + x * LANES) + rest
            store(out, o + x * LANES, value + of_kept * (load(kept, z + x * KEPT) - mean))


@njit(**OPTIONS)
def read_reversed(weights, place, channels, lanes, sizes, branches, taps):
    """Each filter from its last tap to its first."""
    tap = 0
    for i in range(branches):
        square = sizes[i] * sizes[i]
        for n in range(square):
            store(taps, (tap + n) * LANES, masked_load(weights, place + (tap + square - 1 - n) * channels, lanes))
        tap += square


@njit(**OPTIONS)
def write_reversed(taps, sizes, branches, weights, place, channels, lanes):
    """The same back."""
    tap = 0
    for i in range(branches):
        square = sizes[i] * sizes[i]
        for n in range(square):
            masked_store(weights, place + (tap + square - 1 - n) * channels, load(taps, (tap + n) * LANES), lanes)
        tap += square


@njit(**OPTIONS)
def filter_tile(paired, tile, at, stride, taps, tap, size, dilation, above, height, rows, columns, out, out_stride):
    """Add a filter's results to all of a tile. The first row of the image is ``above`` rows from the first read."""
    for band in range(0, rows, 2 * dilation):
        for y in range(band, min(band + dilation, rows)):
            filter_rows(
                paired, tile, at + y * stride, stride, taps, tap, size, dilation, above - y, above + height - y,
                columns, 2 if y + dilation < rows else 1, out, y * out_stride, dilation * out_stride,
            )  # fmt: skip


@njit(**OPTIONS)
def end_rows(values, stride, rows, columns):
    """Zeros after the last column of a tile, where pairs of an odd row read."""
    for y in range(rows):
        store(values, y * stride + columns * LANES, broadcast(ZERO))


@njit(**OPTIONS)
def write_rows(tile, stride, rows, columns, images, first, row_step, channels, lanes):
    """Rows and columns of up to LANES channels from a tile."""
    for y in range(rows):
        for x in range(columns):
            masked_store(images, first + y * row_step + x * channels, load(tile, y * stride + x * LANES), lanes)


@kernel(
    x=MAP,  # (B, H, W, C)
    grads=MAP,  # (B, H, W, C)
    taps=POINTER,  # (T, C), of one branch after the other
    kept=MAPS,  # (C / KEPT, B, H, W, KEPT): the branches' results
    mean=POINTER,  # (N, C)
    variance=POINTER,  # (N, C)
    scale=POINTER,  # (N, C)
    sums=POINTER,  # (parts, N + 1, C)
    of_x=MAP,  # (B, H, W, C), to be written; or nothing
    of_taps=POINTER,  # (splits, T, C), to be written; or nothing
    of_norms=POINTER,  # (2, N, C), to be written: gradients of scale and shift
    eps=FLOAT64,
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
    parts=INT64,
    splits=INT64,  # of the tiles of all images
    in_pairs=INT64,  # whether filters of more than 3 x 3 take pairs
)
def branch_gradients(call, thread, threads):  # noqa: PLR0915 - its buffers, by name
    """Gradients of x and of the taps. A task is LANES channels of some tiles."""
    batch, height, width, channels, branches = call.batch, call.height, call.width, call.channels, call.branches
    reach, splits, positions, tiles = call.reach, call.splits, height * width, call.tile_rows * call.tile_columns
    all_taps = count_taps(call.sizes, branches)
    numbers = (batch * positions * channels,)
    images, grads, of_x = maps(call.x, numbers), maps(call.grads, numbers), maps(call.of_x, numbers)
    weights, of_taps = (
        floats(call.taps, (all_taps * channels,)),
        floats(call.of_taps, (splits * all_taps * channels,)),
    )
    means, variances = floats(call.mean, (branches, channels)), floats(call.variance, (branches, channels))
    scale, sums = floats(call.scale, (branches, channels)), floats(call.sums, (call.parts, branches + 1, channels))
    norm_grads = floats(call.of_norms, (2, branches, channels))
    most_rows, most_columns = -(-height // call.tile_rows), -(-width // call.tile_columns)
    most_around = min(most_columns + 2 * reach, width)
    stride, own_stride, around_stride = (
        (most_columns + SPARE + 2 * reach) * LANES,
        (most_columns + SPARE) * LANES,
        most_around * LANES,
    )
    tile, around = (
        aligned_zeros((most_rows + 2 * reach) * stride),
        aligned_zeros(min(most_rows + 2 * reach, height) * around_stride),
    )
    values, added = aligned_zeros(most_rows * own_stride), aligned_zeros(most_rows * own_stride)
    taps, tap_sums = aligned_zeros(all_taps * LANES), aligned_zeros(all_taps * LANES)
    factors, order = aligned_zeros(4 * branches * LANES), np.empty(branches, np.int64)
    unpaired = in_turn(call.sizes, branches, call.in_pairs, order)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        block, split = task // splits, task % splits
        lanes = min(LANES, channels - block * LANES)
        read_reversed(weights, block * LANES, channels, lanes, call.sizes, branches, taps)
        if call.in_pairs != 0:
            pair_taps(taps, call.sizes, branches)
        tap_sums[:] = 0
        merge_gradients(
            sums, means, variances, scale, call.eps, batch * positions, block, lanes, factors, norm_grads
        )  # fmt: skip
        first_tile, last_tile = cut(batch * tiles, split, splits)
        for index in range(first_tile, last_tile):
            b, part = index // tiles, index % tiles
            y0, y1 = cut(height, part // call.tile_columns, call.tile_rows)
            x0, x1 = cut(width, part % call.tile_columns, call.tile_columns)
            top, bottom, left, right = (
                max(y0 - reach, 0), min(y1 + reach, height), max(x0 - reach, 0), min(x1 + reach, width),
            )  # fmt: skip
            columns, origin = x1 - x0, b * positions * channels + block * LANES
            tile[:], added[:] = 0, 0
            read_rows(
                grads, origin + (top * width + left) * channels, width * channels, channels, bottom - top,
                right - left, lanes, around, 0, around_stride,
            )  # fmt: skip
            read_rows(
                images, origin + (y0 * width + x0) * channels, width * channels, channels, y1 - y0, columns, lanes,
                values, 0, own_stride,
            )  # fmt: skip
            end_rows(values, own_stride, y1 - y0, columns)
            begin_row, end_row = (top - y0 + reach) * stride, (bottom - y0 + reach) * stride
            for turn in range(branches):
                i, paired = order[turn], turn >= unpaired
                size, dilation, tap = call.sizes[i], call.dilations[i], count_taps(call.sizes, i) * LANES
                own = size // 2 * dilation
                up, down = max(y0 - own, 0), min(y1 + own, height)
                kept, plane = results(call.kept[i], batch, positions, channels), plane_of(block, b, batch, positions)
                tile[begin_row if paired else end_row : end_row] = 0  # pairs have filled the places beside the image
                make_branch_gradients(
                    around, (up - top) * around_stride, around_stride, kept, plane + (up * width + left) * KEPT,
                    width * KEPT, down - up, right - left, factors, i, tile,
                    (up - y0 + reach) * stride + (left - x0 + reach) * LANES, stride,
                )  # fmt: skip
                at = (reach - own) * (stride + LANES)
                if paired:
                    pair_up(tile, begin_row, end_row, dilation * LANES, False)
                if call.of_x != 0:
                    filter_tile(
                        paired, tile, at, stride, taps, tap, size, dilation, own - y0, height, y1 - y0, columns, added,
                        own_stride,
                    )  # fmt: skip
                if call.of_taps == 0:
                    continue
                if turn == unpaired:
                    pair_up(values, 0, (y1 - y0) * own_stride, LANES, False)
                if paired and dilation > 1:
                    pair_up(tile, begin_row, end_row, LANES, True)
                correlate_tile(
                    paired, values, own_stride, tile, at, stride, size, dilation, y1 - y0, columns, own - y0,
                    height - y0 + own, tap_sums, tap,
                )  # fmt: skip
            if call.of_x != 0:
                place = origin + (y0 * width + x0) * channels
                write_rows(added, own_stride, y1 - y0, columns, of_x, place, width * channels, channels, lanes)
        if call.of_taps != 0:
            place = split * all_taps * channels + block * LANES
            write_reversed(tap_sums, call.sizes, branches, of_taps, place, channels, lanes)


def backward(
    grad: Tensor, x: Tensor, taps: Tensor, scale: Tensor, kept: list[Tensor], mean: Tensor, variance: Tensor,
    sizes: Sequence[int], dilations: Sequence[int], eps: float, wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, where the first is wanted, of the taps, where the second is, of scale and of shift."""
    grads, tokens, taps, scale = to_tokens(grad.to(x.dtype)), to_tokens(x), taps.float().contiguous(), scale.float()
    batch, height, width, channels = tokens.shape
    blocks, (tile_rows, tile_columns) = -(-channels // LANES), tiles_of(height, width)
    splits = task_splits(blocks, batch * tile_rows * tile_columns)
    parts = task_splits(blocks, max(1, batch * height * width // LONGEST))
    sums = taps.new_empty(parts, len(sizes) + 1, channels)
    of_x = torch.empty_like(tokens) if wanted[0] else None
    of_taps = taps.new_empty(splits, *taps.shape) if wanted[1] else None
    of_norms = taps.new_empty(2, len(sizes), channels)
    run(
        sum_gradients, blocks * parts, grads=grads, kept=kept, mean=mean, sums=sums, batch=batch,
        positions=height * width, channels=channels, branches=len(sizes), parts=parts,
    )  # fmt: skip
    run(
        branch_gradients, blocks * splits, x=tokens, grads=grads, taps=taps, kept=kept, mean=mean, variance=variance,
        scale=scale, sums=sums, of_x=of_x, of_taps=of_taps, of_norms=of_norms, eps=eps, batch=batch, height=height,
        width=width, channels=channels, branches=len(sizes), sizes=sizes, dilations=dilations,
        reach=max(k // 2 * r for k, r in zip(sizes, dilations, strict=True)), tile_rows=tile_rows,
        tile_columns=tile_columns, parts=parts, splits=splits, in_pairs=takes_pairs(x),
    )  # fmt: skip
    both = None if of_taps is None else of_taps[0] if splits == 1 else of_taps.sum(0)
    return None if of_x is None else to_images(of_x), both, of_norms[0], of_norms[1]
