"""The picture of the kernels of one point: each over the part of the image that it takes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class Canvas:
    """An image made small, and a point in it, to draw what ContMix makes at this point.

    Args:
        image: as RGB.
        point: x, y in its pixels.
        side: of the drawings, the longer one in pixels.
    """

    def __init__(self, image: Image.Image, point: Point, *, side: int = SIDE):
        self.image = fit(image, side)
        scale = self.image.width / image.width
        self.place = (point[0] * scale, point[1] * scale)

    def alone(self) -> Image.Image:
        """The image with the point."""
        return mark(self.image, self.place)

    def affinity(self, mixing: Mixing) -> Image.Image:
        """To the regions, mean of the groups, from its least on."""
        i, j = position_of(self.place, self.image.size, mixing.affinity.shape[2:4])
        affinity = mixing.affinity[0, :, i, j].mean(dim=0).cpu()
        return mark(overlay(self.image, affinity - affinity.min(), smooth=False), self.place)

    def kernels(self, kernels: Kernels) -> list[Image.Image]:
        """Of each group."""
        i, j = position_of(self.place, self.image.size, kernels.taps.shape[2:4])
        box = window_box((i, j), kernels, self.image.size)
        groups = kernels.taps[0, :, i, j].cpu()
        return [mark(overlay(self.image, taps, box=box, smooth=False), self.place) for taps in groups]


def size_of(kernels: Kernels) -> str:
    """Height and width in words."""
    return " x ".join(map(str, kernels.taps.shape[4:]))


def draw_kernels(image: Image.Image, point: Point, mixings: Mapping[str, Sequence[Mixing]]) -> Image.Image:
    """What ContMix makes at a point, and then the same with other context priors.

    First a row for each block: the affinity to the regions, mean of the groups, then each group's large and small
    kernel. Below a row for each block: affinity and large kernel of the first group with each of the priors.

    Args:
        image: as RGB.
        point: x, y in its pixels.
        mixings: of the image alone (B = 1), by the names of the priors, the network's own first.
    """
    canvas = Canvas(image, point)
    own = next(iter(mixings.values()))
    rows = [[caption(canvas.alone(), ["image"])]]
    for mixing in own:
        row = [caption(canvas.affinity(mixing), [mixing.name, "affinity"])]
        for kernels in reversed(mixing.kernels):
            drawn = enumerate(canvas.kernels(kernels), start=1)
            row += [caption(one, [f"group {i}", size_of(kernels)]) for i, one in drawn]
        rows.append(row)
    for block in zip(*mixings.values(), strict=True):
        row = []
        for name, mixing in zip(mixings, block, strict=True):
            row.append(caption(canvas.affinity(mixing), [f"prior: {name}", mixing.name]))
            row.append(caption(canvas.kernels(mixing.kernels[-1])[0], ["", "group 1"]))
        rows.append(row)
    return join_pictures(rows)
