"""Small pictures with captions in a grid that fits any width, and tables of numbers, as HTML of their own."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from PIL import Image


class Figure(NamedTuple):
    """A picture of a grid."""

    picture: Image.Image
    caption: str


def as_grid(title: str, figures: Iterable[Figure]) -> str:
    """Figures under a heading."""
    cells = "".join(
        f'<figure><img alt="{escape(title)}: {escape(one.caption)}" src="{_as_url(one.picture)}">'
        f"<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in figures
    )
    return f'<section class="figures"><h3>{escape(title)}</h3><div>{cells}</div></section>'


class Swatch(NamedTuple):
    """The text of a cell, and the colour that it has in a picture."""

    text: str
    colour: tuple[int, int, int]


Cell = str | float | Swatch


def as_table(title: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Rows under a heading; numbers are written with three digits and stand at the right, as their column's name."""
    rows = list(rows)
    numbers = [isinstance(value, float) for value in rows[0]]
    top = "".join(
        f'<th scope="col"{_NUMBER if number else ""}>{escape(name)}</th>'
        for name, number in zip(head, numbers, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<section class="numbers"><h3>{escape(title)}</h3>'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def as_note(text: str) -> str:
    """A sentence between pictures."""
    return f'<p class="note">{escape(text)}</p>'


_NUMBER = ' class="number"'


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return f"<td{_NUMBER}>{value:.3f}</td>"
    if isinstance(value, Swatch):
        return f'<td><span class="swatch" style="background-color: rgb{value.colour}"></span>{escape(value.text)}</td>'
    return f"<td>{escape(value)}</td>"


def _as_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
