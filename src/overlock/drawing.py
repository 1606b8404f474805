"""Pictures of what detectors and segmenters find: boxes, masks and coloured pixels over the image, with names."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

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
            scores (N,) and masks (N, H, W) of booleans.
        classes: names of the labels from 1 on.
    """
    labels = [int(label) for label in objects["labels"]]
    colours = [colour_of(label - 1) for label in labels]
    if labels and "masks" in objects:
        masks = torch.as_tensor(objects["masks"]).bool().cpu()
        image = to_pil_image(draw_segmentation_masks(pil_to_tensor(image), masks, alpha=0.5, colors=colours))
    picture = image.copy()
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    scores = objects.get("scores")
    for i, (box, label, colour) in enumerate(zip(objects["boxes"], labels, colours, strict=True)):
        left, top, right, bottom = (float(side) for side in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        text = classes[label - 1] + ("" if scores is None else f" {100 * float(scores[i]):.0f}")
        corner = (max(0.0, min(left, picture.width - font.getlength(text) - 6)) + 3, max(0.0, top - TEXT - 3))
        x0, y0, x1, y1 = draw.textbbox(corner, text, font=font)
        draw.rectangle((x0 - 3, y0 - 2, x1 + 3, y1 + 2), fill=colour)
        draw.text(corner, text, font=font, fill=_readable_on(colour))
    return picture


def draw_labels(image: Image.Image, labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """Each pixel's class as a colour over the image; pixels of no class stay as they are.

    Args:
        image: as RGB.
        labels: (H, W), places in the classes; others are of no class.
        classes: their names.
    """
    pixels = np.asarray(image, dtype=np.float32)
    table = np.array([colour_of(label) for label in range(len(classes))], dtype=np.float32)
    places = labels.cpu().numpy()
    known = (places >= 0) & (places < len(classes))
    mixed = np.where(known[..., None], 0.4 * pixels + 0.6 * table[np.where(known, places, 0)], pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_legend(classes: Sequence[str], shown: Sequence[int], *, height: int) -> Image.Image:
    """A column of names and their colours, as many as the height has room for."""
    font = ImageFont.load_default(TEXT)
    width = max([round(font.getlength(classes[label])) for label in shown], default=0) + SWATCH + 3 * GAP
    legend = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(legend)
    for i, label in enumerate(shown[: max(1, height // (SWATCH + GAP))]):
        top = GAP // 2 + i * (SWATCH + GAP)
        draw.rectangle((GAP, top, GAP + SWATCH, top + SWATCH), fill=colour_of(label))
        draw.text((2 * GAP + SWATCH, top + SWATCH // 2), classes[label], font=font, fill=INK, anchor="lm")
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
