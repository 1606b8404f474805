"""Tile sizes of ContMix's Triton kernels: one table, read from shapes alone, so that a call always gives the same bits.

The rows follow from the compiled code (registers, barriers, loads); a sweep on a GPU can replace them. Triton's own
autotuning is left out on purpose: it would tie the last bits of a result to a race of timings, and cannot run inside a
CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Tile(NamedTuple):
    """How a kernel is cut into programs.

    Attributes:
        size: rows of 16 tokens or positions (bands), images (bands, taps), tokens (windows); a power of two.
        chunk: what a step of the loop takes: tokens (bands, value), taps or positions (windows); a power of two.
        warps: of a program; for the taps of windows the tiles of a program too, one for each.
        stages: of Triton's pipelined loads.
    """

    size: int
    chunk: int
    warps: int
    stages: int


TILES: dict[str, Tile] = {
    "bands forward": Tile(4, 0, 2, 2),
    "bands query": Tile(2, 0, 2, 2),
    "bands value": Tile(4, 32, 2, 1),
    "bands taps": Tile(2, 0, 1, 1),
    "windows forward": Tile(64, 32, 2, 2),
    "windows query": Tile(64, 32, 4, 2),
    "windows value": Tile(64, 32, 4, 1),
    "windows taps": Tile(64, 32, 2, 1),
    "windows taps float32": Tile(32, 16, 4, 1),
}
"""A row for each kernel. Where one is best cut otherwise in float32, its name has `` float32`` after it."""


@contextlib.contextmanager
def use_tiles(rows: Mapping[str, Tile]) -> Iterator[None]:
    """Take these rows of the table inside a ``with`` block, as a sweep does."""
    before = dict(TILES)
    TILES.update(rows)
    try:
        yield
    finally:
        TILES.clear()
        TILES.update(before)


def tile_of(kernel: str, exact: bool) -> Tile:
    """The row of a kernel, for float32 (``exact``) its own if it has one."""
    return TILES.get(f"{kernel} float32", TILES[kernel]) if exact else TILES[kernel]
