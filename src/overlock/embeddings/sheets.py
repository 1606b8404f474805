"""Contact sheets: rows of small pictures with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from overlock.analysis.pictures import caption, fit
from overlock.drawing import PAPER, join_pictures
from overlock.embeddings.sources import ImageList

SIDE = 128
ROWS = 40
"""Of a sheet at most."""


class Tile(NamedTuple):
    """A picture of a sheet."""

    image: Image.Image
    lines: tuple[str, ...]
    """Above it."""


def draw_sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Rows of tiles, each of the same width."""
    return join_pictures([[_draw(tile) for tile in row] for row in rows[:ROWS]])


def _draw(tile: Tile) -> Image.Image:
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    small = fit(tile.image, SIDE)
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return caption(square, tile.lines)


def read_small(images: ImageList, place: int) -> Image.Image:
    """An image of the source, or a grey square where it can no longer be read."""
    try:
        return images.read(place)[0]
    except ValueError:
        return Image.new("RGB", (SIDE, SIDE), "#c8c8c8")
