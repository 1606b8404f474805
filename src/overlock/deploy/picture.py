"""A picture of predictions: each image as a card with its best classes and bars of their probabilities."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from overlock.deploy.results import Prediction
from overlock.files import write_atomically
from overlock.fonts import Font, font_for

WIDTH, HEIGHT = 272, 216  # of the space for an image
GAP, INSET = 20, 14  # between cards, and within one
ROWS, ROW, BAR_HEIGHT = 3, 34, 6
NAME_ROW = 24
CARD = HEIGHT + NAME_ROW + ROWS * ROW + INSET  # its height
PAGE, PAPER, FRAME, TRACK = "#eef0f4", "#ffffff", "#1d2129", "#e6e9ef"
INK, FAINT, BEST_BAR, BAR = "#1d2129", "#7b8494", "#2f6fde", "#a9c1ea"


def save_picture(path: str | os.PathLike[str], predictions: Sequence[Prediction]) -> None:
    """Write a grid of the predicted image files.

    Args:
        path: with the ending of an image format.
        predictions: of image files.

    Raises:
        ValueError: for an unknown ending or a place that cannot be written.
    """
    buffer = io.BytesIO()
    kind = check_picture(Path(path))
    draw_picture(predictions).save(buffer, format=kind)
    write_atomically(path, buffer.getvalue())


def check_picture(path: Path) -> str:
    """The image format of a name.

    Raises:
        ValueError: where it has none that can be written.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ValueError(f"{path}: no image format has this ending; end the name in .png or .jpg")
    return kind


def draw_picture(predictions: Sequence[Prediction]) -> Image.Image:
    """A grid, wider than high, of cards: an image, its name and its three best classes."""
    columns = min(len(predictions), math.ceil(math.sqrt(2 * len(predictions))))
    rows = math.ceil(len(predictions) / columns)
    picture = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, rows * (CARD + GAP) + GAP), PAGE)
    for i, prediction in enumerate(predictions):
        corner = (GAP + i % columns * (WIDTH + GAP), GAP + i // columns * (CARD + GAP))
        _draw_card(picture, prediction, corner)
    return picture


def _draw_card(picture: Image.Image, prediction: Prediction, corner: tuple[int, int]) -> None:
    x, y = corner
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x, y, x + WIDTH - 1, y + CARD - 1), fill=PAPER)
    draw.rectangle((x, y, x + WIDTH - 1, y + HEIGHT - 1), fill=FRAME)
    image = _fit(prediction.picture())
    picture.paste(image, (x + (WIDTH - image.width) // 2, y + (HEIGHT - image.height) // 2))
    left, right = x + INSET, x + WIDTH - INSET
    name = Path(prediction.source).name
    small, figures = font_for(name, 12), font_for("", 15)
    name = _shorten(name, right - left, draw, small)
    draw.text((left, y + HEIGHT + NAME_ROW // 2 + 2), name, fill=FAINT, font=small, anchor="lm")
    for i, (label, probability) in enumerate(zip(prediction.labels[:ROWS], prediction.probabilities, strict=False)):
        top = y + HEIGHT + NAME_ROW + i * ROW
        percent = f"{100 * probability:.1f} %"
        draw.text((right, top + 13), percent, fill=FAINT if i else INK, font=figures, anchor="rm")
        room = right - left - draw.textlength(percent, font=figures) - 8
        normal = font_for(label, 15)
        draw.text((left, top + 13), _shorten(label, room, draw, normal), fill=INK, font=normal, anchor="lm")
        bar = top + 24
        draw.rectangle((left, bar, right - 1, bar + BAR_HEIGHT - 1), fill=TRACK)
        filled = round(probability * (right - left))
        if filled:
            draw.rectangle((left, bar, left + filled - 1, bar + BAR_HEIGHT - 1), fill=BAR if i else BEST_BAR)


def _fit(image: Image.Image) -> Image.Image:
    """The whole image, as large as the space allows; pixels of tiny images stay pixels."""
    scale = min(WIDTH / image.width, HEIGHT / image.height)
    smooth = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), smooth)


def _shorten(text: str, room: float, draw: ImageDraw.ImageDraw, font: Font) -> str:
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(text + "...", font=font) > room:
        text = text[:-1]
    return text + "..."
