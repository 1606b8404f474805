"""A picture of predictions: each image with its best classes and bars of their probabilities."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from overlock.deploy.predict import Prediction, as_pil
from overlock.files import write_atomically

SIDE, MARGIN, LINE = 200, 14, 24
BARS = 3
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK, BAR, BEST_BAR = "#202020", "#c9d6e8", "#7aa6e0"


def save_picture(path: str | os.PathLike[str], predictions: Sequence[Prediction]) -> None:
    """Write a grid of the predicted image files.

    Args:
        path: with the ending of an image format.
        predictions: of image files.

    Raises:
        ValueError: for an unknown ending or a place that cannot be written.
    """
    path = Path(path)
    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: no image format has this ending; end the name in .png or .jpg")
    buffer = io.BytesIO()
    draw_picture(predictions).save(buffer, format=formats[path.suffix.lower()])
    write_atomically(path, buffer.getvalue())


def draw_picture(predictions: Sequence[Prediction]) -> Image.Image:
    """A grid, near square, of the images with their three best classes below."""
    columns = min(len(predictions), math.ceil(math.sqrt(1.5 * len(predictions))))
    rows = math.ceil(len(predictions) / columns)
    width, height = SIDE + MARGIN, SIDE + BARS * LINE + 2 * MARGIN
    picture = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for i, prediction in enumerate(predictions):
        corner = (MARGIN + i % columns * width, MARGIN + i // columns * height)
        _draw_one(picture, prediction, corner)
    return picture


def _draw_one(picture: Image.Image, prediction: Prediction, corner: tuple[int, int]) -> None:
    x, y = corner
    image = as_pil(prediction.source)
    scale = SIDE / max(image.size)
    # Pixels of tiny images stay pixels.
    smooth = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), smooth)
    picture.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for i, (label, probability) in enumerate(zip(prediction.labels[:BARS], prediction.probabilities, strict=False)):
        top = y + SIDE + 6 + i * LINE
        percent = f"{100 * probability:.1f} %"
        draw.rectangle((x, top, x + round(probability * SIDE), top + LINE - 4), fill=BAR if i else BEST_BAR)
        draw.text((x + SIDE - 4, top + LINE // 2 - 2), percent, fill=INK, font=font, anchor="rm")
        room = SIDE - 12 - draw.textlength(percent, font=font)
        draw.text((x + 4, top + LINE // 2 - 2), _shorten(label, room, draw, font), fill=INK, font=font, anchor="lm")


def _shorten(text: str, room: float, draw: ImageDraw.ImageDraw, font: Font) -> str:
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(text + "...", font=font) > room:
        text = text[:-1]
    return text + "..."
