"""Matplotlib's figures, without a window and as the bytes of a file. It is imported on use: prediction needs it not."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from overlock.extras import needing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches.

    Raises:
        ImportError: without matplotlib.
    """
    with needing("a picture needs matplotlib", "train"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def encode_figure(figure: Figure, ending: str = "png") -> bytes:
    """The file that a figure makes, in the format of an ending."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending.lstrip("."))
    return buffer.getvalue()
