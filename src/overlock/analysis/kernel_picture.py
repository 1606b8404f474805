"""The picture of the kernels of one point: each over the part of the image that it takes from."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from overlock.analysis.dynamic_kernels import Kernels, Mixing
from overlock.analysis.pictures import Box, caption, fit, mark, overlay
from overlock.drawing import join_pictures
from overlock.kernels.torch.reference import window_starts

SIDE = 132  # of an image in the picture
Point = tuple[float, float]


def position_of(point: Point, size: tuple[int, int], grid: Sequence[int]) -> tuple[int, int]:
    """Row and column of the map (H, W) that a point x, y of an image of this width and height lies in."""
    (x, y), (width, height), (rows, columns) = point, size, grid
    return min(int(y / height * rows), rows - 1), min(int(x / width * columns), columns - 1)


def window_box(position: tuple[int, int], kernels: Kernels, size: tuple[int, int]) -> Box:
    """The part of an image of this width and height that a position's kernel covers: left, top, right, bottom."""
    rows, columns, tall, wide = kernels.taps.shape[2:]
    top = int(window_starts(rows, tall)[position[0]])
    left = int(window_starts(columns, wide)[position[1]])
    across, down = size[0] / columns, size[1] / rows
    return round(left * across), round(top * down), round((left + wide) * across), round((top + tall) * down)


def draw_kernels(image: Image.Image, point: Point, mixings: Sequence[Mixing]) -> Image.Image:
    """A row for each block: the affinity to the regions, mean of the groups, then each group's large and small kernel.

    Args:
        image: as RGB.
        point: x, y in its pixels.
        mixings: of the image alone (B = 1).
    """
    small = fit(image, SIDE)
    scale = small.width / image.width
    place = (point[0] * scale, point[1] * scale)
    rows = []
    for mixing in mixings:
        i, j = position_of(place, small.size, mixing.affinity.shape[2:4])
        affinity = mixing.affinity[0, :, i, j].mean(dim=0).cpu()
        regions = overlay(small, affinity - affinity.min(), smooth=False)
        row = [caption(mark(regions, place), [mixing.name, "affinity"])]
        for kernels in reversed(mixing.kernels):
            box = window_box((i, j), kernels, small.size)
            for group, taps in enumerate(kernels.taps[0, :, i, j].cpu(), start=1):
                drawn = mark(overlay(small, taps, box=box, smooth=False), place)
                row.append(caption(drawn, [f"group {group}", " x ".join(map(str, taps.shape))]))
        rows.append(row)
    return join_pictures([[caption(mark(small, place), ["image"])], *rows])
