"""Pictures of what detectors and segmenters find: boxes, masks and coloured pixels over the image, with names."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from overlock.fonts import as_line, font_for

INK, PAPER = "#1d2129", "#ffffff"
TEXT, SWATCH, GAP = 13, 12, 8  # sizes in pixels
GOLDEN = 0.618034  # steps of the hue that never come close to an earlier one


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour that a class has in every picture."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.55 + 0.4 * (label % 3) / 2, 0.95 - 0.3 * (label % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(image: Image.Image, objects: Mapping[str, Any], classes: Sequence[str]) -> Image.Image:
    """Boxes with names and, where given, scores and masks.

    Args:
        image: as RGB.
        objects: boxes (N, 4) as left, top, right, bottom in the image's pixels, labels (N,) from 1 on, and perhaps
            scores (N,) and masks, (N, H, W) of booleans or :class:`overlock.data.run_lengths.Masks`.
        classes: names of the labels from 1 on.
    """
    labels = [int(label) for label in objects["labels"]]
    colours = [colour_of(label - 1) for label in labels]
    if labels and "masks" in objects:
        image = _draw_masks(image, objects["masks"], colours)
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    scores = objects.get("scores")
    for i, (box, label, colour) in enumerate(zip(objects["boxes"], labels, colours, strict=True)):
        left, top, right, bottom = (float(side) for side in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        text = as_line(classes[label - 1]) + ("" if scores is None else f" {100 * float(scores[i]):.0f}")
        font = font_for(text, TEXT)
        corner = (max(0.0, min(left, picture.width - font.getlength(text) - 6)) + 3, max(0.0, top - TEXT - 3))
        x0, y0, x1, y1 = draw.textbbox(corner, text, font=font)
        draw.rectangle((x0 - 3, y0 - 2, x1 + 3, y1 + 2), fill=colour)
        draw.text(corner, text, font=font, fill=_readable_on(colour))
    return picture


def _draw_masks(image: Image.Image, masks: Iterable[Any], colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Masks in half transparent colours, the later ones above, one at a time in memory."""
    painted = np.array(image)
    for mask, colour in zip(masks, colours, strict=True):
        painted[np.asarray(mask, dtype=bool)] = colour
    return Image.blend(image, Image.fromarray(painted), 0.5)


def draw_labels(image: Image.Image, labels: Tensor | np.ndarray[Any, Any], classes: Sequence[str]) -> Image.Image:
    """Each pixel's class as a colour over the image; pixels of no class stay as they are.

    Args:
        image: as RGB.
        labels: (H, W), places in the classes; others are of no class.
        classes: their names.
    """
    painted = np.array(image)
    table = np.array([colour_of(label) for label in range(len(classes))], dtype=np.uint8)
    places = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    known = (places >= 0) & (places < len(classes))
    painted[known] = table[places[known]]
    return Image.blend(image, Image.fromarray(painted), 0.6)


def draw_legend(classes: Sequence[str], shown: Sequence[int], *, height: int) -> Image.Image:
    """A column of names and their colours, as many as the height has room for."""
    names = [as_line(classes[label]) for label in shown]
    fonts = [font_for(name, TEXT) for name in names]
    lengths = [font.getlength(name) for font, name in zip(fonts, names, strict=True)]
    width = round(max(lengths, default=0)) + SWATCH + 3 * GAP
    legend = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(legend)
    room = max(1, height // (SWATCH + GAP))
    for i, (label, name, font) in enumerate(zip(shown[:room], names, fonts, strict=False)):
        top = GAP // 2 + i * (SWATCH + GAP)
        draw.rectangle((GAP, top, GAP + SWATCH, top + SWATCH), fill=colour_of(label))
        draw.text((2 * GAP + SWATCH, top + SWATCH // 2), name, font=font, fill=INK, anchor="lm")
    return legend


def join_pictures(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows, each row's beginning at the left."""
    width = max(sum(picture.width + GAP for picture in row) for row in rows) + GAP
    height = sum(max(picture.height for picture in row) + GAP for row in rows) + GAP
    whole, top = Image.new("RGB", (width, height), PAPER), GAP
    for row in rows:
        left = GAP
        for picture in row:
            whole.paste(picture, (left, top))
            left += picture.width + GAP
        top += max(picture.height for picture in row) + GAP
    return whole


def _readable_on(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else PAPER
