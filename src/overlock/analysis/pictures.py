"""Heat maps over images, with captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from overlock.drawing import INK, PAPER, TEXT
from overlock.fonts import as_line, font_for

# Five of the colours of matplotlib's inferno, which brightens evenly.
INFERNO = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)
Box = tuple[int, int, int, int]


def heat(values: Tensor | np.ndarray, *, top: float | None = None) -> Image.Image:
    """A map (H, W) of values from 0 on as colours, a pixel each.

    Args:
        values: the map.
        top: value of the brightest colour, the largest unless given.
    """
    array = np.nan_to_num(np.asarray(values, dtype=np.float64))
    most = float(array.max(initial=0)) if top is None else top
    places = (array / most if most > 0 else array).clip(0, 1) * (len(INFERNO) - 1)
    below = np.minimum(places.astype(int), len(INFERNO) - 2)
    share = (places - below)[..., None]
    colours = INFERNO[below] * (1 - share) + INFERNO[below + 1] * share
    return Image.fromarray(colours.round().astype(np.uint8))


def overlay(image: Image.Image, values: Tensor | np.ndarray, *, box: Box | None = None, smooth: bool = True,
            strength: float = 0.6) -> Image.Image:  # fmt: skip
    """An image under a heat map.

    Args:
        image: as RGB.
        values: (H, W), from 0 on.
        box: left, top, right, bottom of the map in the image; all of it unless given.
        smooth: enlarge the map bicubically, else its cells stay cells.
        strength: of the map, 0 to 1.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    size = (max(1, right - left), max(1, bottom - top))
    coloured = heat(values).resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
    picture = image.copy()
    below = picture.crop((left, top, left + size[0], top + size[1]))
    picture.paste(Image.blend(below, coloured, strength), (left, top))
    if box is not None:
        ImageDraw.Draw(picture).rectangle((left, top, left + size[0] - 1, top + size[1] - 1), outline=PAPER)
    return picture


def mark(image: Image.Image, point: tuple[float, float]) -> Image.Image:
    """An image with a cross at a point x, y."""
    picture, (x, y), arm = image.copy(), point, max(3, min(image.size) // 30)
    draw = ImageDraw.Draw(picture)
    for colour, width in ((INK, 3), (PAPER, 1)):
        draw.line((x - arm, y, x + arm, y), fill=colour, width=width)
        draw.line((x, y - arm, x, y + arm), fill=colour, width=width)
    return picture


def fit(image: Image.Image, side: int) -> Image.Image:
    """An image whose long side is this many pixels; those of tiny ones stay squares."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS)


def caption(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """A picture with lines of text above it, cut off at its width."""
    row = TEXT + 4
    whole = Image.new("RGB", (picture.width, picture.height + row * len(lines)), PAPER)
    draw = ImageDraw.Draw(whole)
    for i, line in enumerate(lines):
        text = as_line(line)
        draw.text((0, i * row), text, fill=INK, font=font_for(text, TEXT))
    whole.paste(picture, (0, row * len(lines)))
    return whole
