"""A picture of results: each image as a card with its best classes and bars of their shares."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from overlock.deploy.results import LabelMap, Objects, Prediction, Result
from overlock.files import write_atomically
from overlock.fonts import Font, as_line, font_for

WIDTH, HEIGHT = 272, 216  # of the space for an image
GAP, INSET = 20, 14  # between cards, and within one
ROWS, ROW, BAR_HEIGHT = 3, 34, 6
NAME_ROW = 24
CARD = HEIGHT + NAME_ROW + ROWS * ROW + INSET  # its height
PAGE, PAPER, FRAME, TRACK = "#eef0f4", "#ffffff", "#1d2129", "#e6e9ef"
INK, FAINT, BEST_BAR, BAR = "#1d2129", "#7b8494", "#2f6fde", "#a9c1ea"


class Card(NamedTuple):
    """What is drawn of a result."""

    image: Image.Image
    name: str
    rows: list[tuple[str, float]]
    """Classes and shares of 1: their probabilities, best scores, or parts of the image."""


def save_picture(path: str | os.PathLike[str], predictions: Sequence[Prediction]) -> None:
    """Write a grid of the predicted image files.

    Args:
        path: with the ending of an image format.
        predictions: of image files.

    Raises:
        ValueError: for an unknown ending or a place that cannot be written.
    """
    check_picture(Path(path))
    write_atomically(path, encode(draw_picture(predictions), Path(path)))


def check_picture(path: Path) -> str:
    """The image format of a name.

    Raises:
        ValueError: where it has none that can be written.
    """
    kind = find_format(path)
    if kind is None:
        raise ValueError(f"{path}: no image format has this ending; end the name in .png or .jpg")
    return kind


def find_format(path: Path) -> str | None:
    """The image format of a name, if Pillow can write it."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind if kind in Image.SAVE else None


def encode(picture: Image.Image, path: Path) -> bytes:
    """The content of an image file, in the format that its name says."""
    buffer = io.BytesIO()
    picture.save(buffer, format=check_picture(path))
    return buffer.getvalue()


def draw_picture(predictions: Sequence[Prediction]) -> Image.Image:
    """A grid, wider than high, of cards: an image, its name and its three best classes."""
    return draw_cards([make_card(prediction) for prediction in predictions])


def make_card(result: Result) -> Card:
    """The card of a result, its image made small."""
    if isinstance(result, Prediction):
        image, rows = result.picture(), list(zip(result.labels, result.probabilities, strict=True))
    elif isinstance(result, LabelMap):
        image, rows = result.draw(legend=False), list(result.shares().items())
    else:
        assert isinstance(result, Objects)
        image, best = result.draw(), dict(zip(reversed(result.labels), reversed(result.scores), strict=True))
        counts = Counter(result.labels)  # in the order of the scores
        rows = [(f"{count} {label}" if count > 1 else label, best[label]) for label, count in counts.items()]
    frame = "" if result.frame is None else f" #{result.frame}"
    shown = [(as_line(label), share) for label, share in rows[:ROWS]]
    return Card(_fit(image), as_line(Path(result.source).name) + frame, shown)


def draw_cards(cards: Sequence[Card]) -> Image.Image:
    """A grid of cards, wider than high."""
    columns = min(len(cards), math.ceil(math.sqrt(2 * len(cards))))
    rows = math.ceil(len(cards) / columns)
    picture = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, rows * (CARD + GAP) + GAP), PAGE)
    for i, card in enumerate(cards):
        _draw_card(picture, card, (GAP + i % columns * (WIDTH + GAP), GAP + i // columns * (CARD + GAP)))
    return picture


def _draw_card(picture: Image.Image, card: Card, corner: tuple[int, int]) -> None:
    x, y = corner
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x, y, x + WIDTH - 1, y + CARD - 1), fill=PAPER)
    draw.rectangle((x, y, x + WIDTH - 1, y + HEIGHT - 1), fill=FRAME)
    picture.paste(card.image, (x + (WIDTH - card.image.width) // 2, y + (HEIGHT - card.image.height) // 2))
    left, right = x + INSET, x + WIDTH - INSET
    small, figures = font_for(card.name, 12), font_for("", 15)
    name = _shorten(card.name, right - left, draw, small)
    draw.text((left, y + HEIGHT + NAME_ROW // 2 + 2), name, fill=FAINT, font=small, anchor="lm")
    for i, (label, share) in enumerate(card.rows):
        top = y + HEIGHT + NAME_ROW + i * ROW
        percent = f"{100 * share:.1f} %"
        draw.text((right, top + 13), percent, fill=FAINT if i else INK, font=figures, anchor="rm")
        room = right - left - draw.textlength(percent, font=figures) - 8
        normal = font_for(label, 15)
        draw.text((left, top + 13), _shorten(label, room, draw, normal), fill=INK, font=normal, anchor="lm")
        bar = top + 24
        draw.rectangle((left, bar, right - 1, bar + BAR_HEIGHT - 1), fill=TRACK)
        filled = round(share * (right - left))
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
