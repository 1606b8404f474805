"""Receptive fields as heat maps, and how much of them centred squares hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from overlock.analysis.pictures import caption, fit, heat
from overlock.analysis.receptive_field import ReceptiveField
from overlock.drawing import INK, PAPER, TEXT, colour_of, join_pictures
from overlock.fonts import as_line, font_for

MAP, WIDTH, HEIGHT = 224, 460, 300  # pixels of a heat map, and of the curves
DECADES = 3  # of the scores that the colours tell apart
DRAWN = (0.5, 0.99)


class Labelled(NamedTuple):
    """A field, and whose it is."""

    name: str
    size: int
    field: ReceptiveField


def draw_fields(fields: Sequence[Labelled]) -> Image.Image:
    """A row for each image size: a heat map for each network and stage, and the curves.

    The colours are the logarithm of the scores, from the largest down to its thousandth. The squares hold 50 and 99 %.
    """
    rows = []
    for size in dict.fromkeys(one.size for one in fields):
        of_size = [one for one in fields if one.size == size]
        maps = [_draw_map(one) for one in of_size]
        rows.append([*maps, draw_curves(of_size)])
    return join_pictures(rows)


def _draw_map(one: Labelled) -> Image.Image:
    scores = one.field.scores.numpy()
    decades = np.log10(np.maximum(scores / scores.max(), 10.0**-DECADES)) + DECADES
    picture = fit(heat(decades, top=DECADES), MAP)
    scale = picture.width / scores.shape[1]
    draw = ImageDraw.Draw(picture)
    row, column = one.field.centre
    for share in DRAWN:
        half = one.field.side(share)[0] / 2
        box = tuple(scale * edge for edge in (column - half, row - half, column + half, row + half))
        draw.rectangle(box, outline=PAPER)
    side, error = one.field.side(DRAWN[0])
    told = f"50 %: {side:.0f} ± {error:.0f} of {one.size} px"
    return caption(picture, [one.name, f"stage {one.field.stage}, {told}"])


def draw_curves(fields: Sequence[Labelled]) -> Image.Image:
    """Share in the centred square over its side, with a band of one deviation over the images."""
    left, bottom = 40, HEIGHT - 22
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    size = fields[0].size

    def place(side: float, share: float) -> tuple[float, float]:
        return left + side / size * (WIDTH - left - 8), bottom - share * (bottom - 8)

    for i, one in enumerate(fields):
        curves = one.field.curves[:, : size + 1]
        mean, error = curves.mean(dim=0), curves.std(dim=0, correction=min(1, len(curves) - 1))
        upper = [place(s, min(1.0, x)) for s, x in enumerate((mean + error).tolist())]
        lower = [place(s, max(0.0, x)) for s, x in enumerate((mean - error).tolist())]
        band = picture.copy()
        ImageDraw.Draw(band).polygon([*upper, *reversed(lower)], fill=colour_of(i))
        picture = Image.blend(picture, band, 0.3)
        ImageDraw.Draw(picture).line([place(s, x) for s, x in enumerate(mean.tolist())], fill=colour_of(i), width=2)
    draw = ImageDraw.Draw(picture)
    font = font_for("", TEXT - 2)
    for share in (0, 0.2, 0.3, 0.5, 0.99):
        x, y = place(0, share)
        draw.text((x - 6, y), f"{100 * share:.0f} %", fill=INK, font=font, anchor="rm")
    for i in range(5):
        x, y = place(size * i / 4, 0)
        draw.text((x, y + 6), f"{size * i / 4:.0f}", fill=INK, font=font, anchor="mt")
    draw.line([place(0, 1), place(0, 0), place(size, 0)], fill=INK)
    for i, one in enumerate(fields):
        text = as_line(f"{one.name}, stage {one.field.stage}")
        draw.text((WIDTH - 12, bottom - 10 - (TEXT + 2) * (len(fields) - i)), text, fill=colour_of(i),
                  font=font_for(text, TEXT - 1), anchor="ra")  # fmt: skip
    return caption(picture, [f"share of the contributions in a centred square of this side, {size} px"])
