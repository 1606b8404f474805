"""What the kernels of Dilated RepConv in training share: tiles of images, and filters of any dilation on them.

A tile is some rows and columns of LANES channels, copied together so that each load is of one line of the cache. Around
what belongs to it lies as much as the largest filter reaches over, zeros outside of the image. All branches read it.

Of maps in bfloat16, filters of more than 3 x 3 take two taps of a row at once (``in_pairs``): in the place of each
number of the tile are then it and the neighbour that the next tap meets, and the processor adds the dot product of two
such pairs to a sum in float32.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from overlock.kernels.numba import simd
from overlock.kernels.numba.arguments import MAP, Kind
from overlock.kernels.numba.pairs import first_of, pair_of
from overlock.kernels.numba.runtime import OPTIONS, maps
from overlock.kernels.numba.simd import LANES, broadcast, load, masked_load, prefetch, store
from overlock.kernels.numba.vector_tuples import add_all, add_dot_products, load_all, multiply_add, repeat, store_all

MOST = 8  # branches, the large kernel among them
SIDE = 64  # most rows and columns of a tile; with what lies around it, it fits the second cache
SPARE = 3  # columns that filters may write beyond a tile's own
UNPAIRED = 3  # sides of filters for which pairs do not pay
KEPT = 16  # channels that lie side by side in the branches' results, whatever the machine
ZERO = np.float32(0)


def _branches(value: Any) -> list[Any]:
    return [operator.index(value[i]) if i < len(value) else 0 for i in range(MOST)]


def _addresses(value: Any) -> list[Any]:
    return [MAP.convert(value[i] if i < len(value) else None) for i in range(MOST)]


BRANCHES = Kind((np.int64, MOST), f"{MOST}q", _branches, is_several=True)  # a number for each branch
MAPS = Kind((np.int64, MOST), f"{MOST}q", _addresses, is_several=True, is_map=True)  # a map for each branch


def takes_pairs(x: Tensor) -> bool:
    """Whether filters of more than 3 x 3 take pairs."""
    return simd.HAS_BFLOAT16 and x.dtype == torch.bfloat16


def tiles_of(height: int, width: int) -> tuple[int, int]:
    """Into how many rows and columns of tiles a map is cut."""
    return -(-height // SIDE), -(-width // SIDE)


@njit(**OPTIONS)
def cut(length, part, parts):
    """Begin and end of a part of a length."""
    return length * part // parts, length * (part + 1) // parts


@njit(**OPTIONS)
def count_taps(sizes, branches):
    """Of all branches."""
    taps = 0
    for i in range(branches):
        taps += sizes[i] * sizes[i]
    return taps


@njit(**OPTIONS)
def plane_of(block, image, batch, positions):
    """Where an image's results of a branch (C / KEPT, B, H W, KEPT) begin, for a block of LANES channels."""
    channel = block * LANES
    return (channel // KEPT * batch + image) * positions * KEPT + channel % KEPT


@njit(**OPTIONS)
def results(address, batch, positions, channels):
    """A branch's results (C / KEPT, B, H W, KEPT)."""
    return maps(address, ((channels + KEPT - 1) // KEPT * batch * positions * KEPT,))


@njit(**OPTIONS)
def read_rows(images, first, row_step, channels, rows, columns, lanes, tile, place, stride):
    """Rows and columns of up to LANES channels into a tile, from ``place`` on."""
    for y in range(rows):
        at = first + y * row_step
        for x in range(columns):
            prefetch(images, at + row_step + x * channels)  # too far apart for the machine to foresee
            store(tile, place + y * stride + x * LANES, masked_load(images, at + x * channels, lanes))


@njit(**OPTIONS)
def in_turn(sizes, branches, in_pairs, order):
    """Write the order of branches: those whose filters take no pairs first, of which the number is returned."""
    count = 0
    for i in range(branches):
        if in_pairs == 0 or sizes[i] <= UNPAIRED:
            order[count] = i
            count += 1
    both = count
    for i in range(branches):
        if in_pairs != 0 and sizes[i] > UNPAIRED:
            order[both] = i
            both += 1
    return count


@njit(**OPTIONS)
def pair_up(tile, begin, end, step, again):
    """Put each number of a part of a tile, and the one ``step`` on, in its place; ``again``, if pairs are there."""
    for at in range(begin, end, LANES):
        first, second = load(tile, at), broadcast(ZERO)
        if at + step < end:
            second = load(tile, at + step)
        if again:
            first, second = first_of(first), first_of(second)
        store(tile, at, pair_of(first, second))


@njit(**OPTIONS)
def pair_taps(taps, sizes, branches):
    """Two taps of a row in the place of the first, in the filters that take pairs; an odd one is with 0."""
    tap = 0
    for i in range(branches):
        size = sizes[i]
        if size > UNPAIRED:
            for row in range(tap, tap + size * size, size):
                for j in range(0, size, 2):
                    second = broadcast(ZERO)
                    if j + 1 < size:
                        second = load(taps, (row + j + 1) * LANES)
                    store(taps, (row + j) * LANES, pair_of(load(taps, (row + j) * LANES), second))
        tap += size * size


def _filter_pair(count, add, each):
    """Two rows of ``count`` neighbours, the second as far below the first as the filter is dilated.

    ``each`` taps of a row, a constant, are added at once, by ``add``.
    """

    @njit(**OPTIONS)
    def filter_pair(tile, at, row_step, step, taps, tap, size, begin, end, out, to, below):
        """Add the sums to ``out``. Each input is read once for row k of the filter, and for row k - 1."""
        upper, lower = load_all(out, to, LANES, count), load_all(out, to + below, LANES, count)
        for k in range(begin, end):
            x, first, second = at + k * row_step, tap + k * size * LANES, tap + (k - 1) * size * LANES
            if 0 < k < size:
                for j in range(0, size, each):
                    values = load_all(tile, x + j * step, LANES, count)
                    upper = add(upper, load(taps, first + j * LANES), values)
                    lower = add(lower, load(taps, second + j * LANES), values)
            elif k == 0:
                for j in range(0, size, each):
                    upper = add(upper, load(taps, first + j * LANES), load_all(tile, x + j * step, LANES, count))
            else:
                for j in range(0, size, each):
                    lower = add(lower, load(taps, second + j * LANES), load_all(tile, x + j * step, LANES, count))
        store_all(out, to, LANES, upper)
        store_all(out, to + below, LANES, lower)

    return filter_pair


def _filter_single(count, add, each):
    @njit(**OPTIONS)
    def filter_single(tile, at, row_step, step, taps, tap, size, begin, end, out, to):
        sums = load_all(out, to, LANES, count)
        for k in range(begin, end):
            for j in range(0, size, each):
                values = load_all(tile, at + k * row_step + j * step, LANES, count)
                sums = add(sums, load(taps, tap + (k * size + j) * LANES), values)
        store_all(out, to, LANES, sums)

    return filter_single


def _filter_rows(add, each):
    filter_two_by_seven, filter_two_by_four = _filter_pair(7, add, each), _filter_pair(4, add, each)
    filter_seven, filter_four = _filter_single(7, add, each), _filter_single(4, add, each)

    @njit(**OPTIONS)
    def filter_rows(tile, at, stride, taps, tap, size, dilation, above, rows, columns, count, out, to, below):
        """Add one filtered row, or two of them as far apart as the filter is dilated, to ``out``.

        ``at`` is where the first tap of the first result reads; ``above`` and ``rows`` are how many rows before that
        one, seen from it, belong to no image, and where the image's rows end.
        """
        begin, end = max(0, -(-above // dilation)), min(size + count - 1, (rows - 1) // dilation + 1)
        row_step, step, x = dilation * stride, dilation * LANES, 0
        while x < columns:
            wide, place = columns - x > 4 and columns - x != 8, x * LANES
            if count == 2 and wide:
                filter_two_by_seven(
                    tile, at + place, row_step, step, taps, tap, size, begin, end, out, to + place, below
                )
            elif count == 2:
                filter_two_by_four(
                    tile, at + place, row_step, step, taps, tap, size, begin, end, out, to + place, below
                )
            elif wide:
                filter_seven(tile, at + place, row_step, step, taps, tap, size, begin, end, out, to + place)
            else:
                filter_four(tile, at + place, row_step, step, taps, tap, size, begin, end, out, to + place)
            x += 7 if wide else 4

    return filter_rows


_filter_rows_one_by_one, _filter_rows_in_pairs = _filter_rows(multiply_add, 1), _filter_rows(add_dot_products, 2)


@njit(**OPTIONS)
def filter_rows(in_pairs, tile, at, stride, taps, tap, size, dilation, above, rows, columns, count, out, to, below):
    """See _filter_rows."""
    if in_pairs:
        _filter_rows_in_pairs(
            tile, at, stride, taps, tap, size, dilation, above, rows, columns, count, out, to, below
        )  # fmt: skip
    else:
        _filter_rows_one_by_one(
            tile, at, stride, taps, tap, size, dilation, above, rows, columns, count, out, to, below
        )  # fmt: skip


def _correlate_pair(count, add, each):
    """``count`` taps of two rows of a filter. ``each`` values of a row, a constant, are added at once, by ``add``."""

    @njit(**OPTIONS)
    def correlate_pair(values, value, value_step, earlier, lines, line, stride, step, rows, columns, sums, to, second):
        first = later = repeat(broadcast(ZERO), count)
        for y in range(rows):
            v, at = value + y * value_step, line + y * stride
            for x in range(0, columns * LANES, each * LANES):
                neighbours = load_all(lines, at + x, step, count)
                first = add(first, load(values, v + x), neighbours)
                later = add(later, load(values, v + x - earlier), neighbours)
        add_all(sums, to, LANES, first)
        add_all(sums, second, LANES, later)

    return correlate_pair


def _correlate_single(count, add, each):
    @njit(**OPTIONS)
    def correlate_single(values, value, value_step, lines, line, stride, step, rows, columns, sums, to):
        added = repeat(broadcast(ZERO), count)
        for y in range(rows):
            v, at = value + y * value_step, line + y * stride
            for x in range(0, columns * LANES, each * LANES):
                added = add(added, load(values, v + x), load_all(lines, at + x, step, count))
        add_all(sums, to, LANES, added)

    return correlate_single


def _correlate(count, add, each):
    two_rows, one_row = _correlate_pair(count, add, each), _correlate_single(count, add, each)

    @njit(**OPTIONS)
    def correlate(
        both, values, value, value_step, earlier, lines, line, stride, step, rows, columns, sums, to, second
    ):  # fmt: skip
        """``count`` taps of one row, or of two."""
        if both:
            two_rows(
                values, value, value_step, earlier, lines, line, stride, step, rows, columns, sums, to, second
            )  # fmt: skip
        else:
            one_row(values, value, value_step, lines, line, stride, step, rows, columns, sums, to)

    return correlate


def _correlate_rows(add, each):
    three, five, seven = (_correlate(count, add, each) for count in (3, 5, 7))

    @njit(**OPTIONS)
    def correlate_rows(values, value_step, lines, at, stride, size, dilation, k, begin, end, columns, sums, to, both):
        """Add products of values and their neighbours to the sums of row k of a filter, and with ``both`` of k + 1.

        Of the values those of the rows from ``begin`` to ``end`` count for row k, and those ``dilation`` rows before
        them, which meet the same neighbours, for row k + 1.
        """
        rows, v, line = end - begin, begin * value_step, at + (begin + k * dilation) * stride
        step, below, earlier, j = dilation * LANES, size * LANES, dilation * value_step, 0
        while j < size and rows > 0:
            left, x, place = size - j, line + j * step, to + (k * size + j) * LANES
            second = place + below
            if left == 7 or left >= 12:
                seven(both, values, v, value_step, earlier, lines, x, stride, step, rows, columns, sums, place, second)
                j += 7
            elif left in {5, 8, 10, 11}:
                five(both, values, v, value_step, earlier, lines, x, stride, step, rows, columns, sums, place, second)
                j += 5
            else:
                three(both, values, v, value_step, earlier, lines, x, stride, step, rows, columns, sums, place, second)
                j += 3

    return correlate_rows


def _correlate_tile(add, each):
    correlate_rows = _correlate_rows(add, each)

    @njit(**OPTIONS)
    def correlate(values, value_step, lines, at, stride, size, dilation, rows, columns, top, bottom, sums, to):
        """Add the products of a tile of values and their neighbours, ``size`` x ``size`` of them, to as many sums.

        ``at`` is where the first neighbour of the first value lies. ``top`` and ``bottom`` are the first and last
        (exclusive) row of neighbours of the image, seen from there.
        """
        for k in range(0, size, 2):
            begin, end = top - k * dilation, bottom - k * dilation  # rows of values whose neighbours are the image's
            both = k + 1 < size
            for part in range(3):
                row, first, last = k, max(begin, dilation if both else 0), min(end, rows)
                if part == 1:  # row k alone
                    first, last = max(begin, 0), min(end, dilation, rows)
                elif part == 2:  # row k + 1 alone
                    row, first, last = k + 1, max(begin - dilation, rows - dilation, 0), min(end - dilation, rows)
                if part == 0 or both:
                    correlate_rows(
                        values, value_step, lines, at, stride, size, dilation, row, first, last, columns, sums, to,
                        both and part == 0,
                    )  # fmt: skip

    return correlate


_correlate_one_by_one, _correlate_in_pairs = _correlate_tile(multiply_add, 1), _correlate_tile(add_dot_products, 2)


@njit(**OPTIONS)
def correlate_tile(
    in_pairs, values, value_step, lines, at, stride, size, dilation, rows, columns, top, bottom, sums, to
):  # fmt: skip
    """See _correlate_tile. Pairs are of neighbouring columns, whatever the dilation."""
    if in_pairs:
        _correlate_in_pairs(
            values, value_step, lines, at, stride, size, dilation, rows, columns, top, bottom, sums, to
        )  # fmt: skip
    else:
        _correlate_one_by_one(
            values, value_step, lines, at, stride, size, dilation, rows, columns, top, bottom, sums, to
        )  # fmt: skip
