"""Small image files made for the tests: classes of one colour each, easily told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 40, 200), "green": (30, 200, 40), "red": (200, 40, 30)}


def make_image(colour: str, seed: int, size: int = 32) -> Image.Image:
    """A noisy square of a colour."""
    noise = np.random.default_rng(seed).integers(-30, 31, (size, size, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def make_classes(root: Path, count: int, *, seed: int = 0, colours=tuple(COLOURS)) -> Path:
    """A folder for each colour, with images in it."""
    for i, colour in enumerate(colours):
        (root / colour).mkdir(parents=True)
        for j in range(count):
            make_image(colour, seed + 1000 * i + j).save(root / colour / f"{j}.png")
    return root
