"""Image files of every kind, read as what a person sees in them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


# What PIL's readers raise for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(source: str | os.PathLike[str] | IO[bytes], *, name: str | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    Args:
        source: a path, or an open file.
        name: what the message calls it; the path unless given.

    Raises:
        ValueError: for a missing or damaged file, naming it.
    """
    if isinstance(source, (str, os.PathLike)):
        name = name or str(source)
        if not Path(source).is_file():
            raise ValueError(f"{name}: no such image; check the path")
    try:
        with Image.open(source) as image:
            return to_rgb(image)
    except _DAMAGE as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"the image is damaged ({error})"
        raise ValueError(f"{name}: {reason}; replace or remove the file") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: turned as its EXIF data say, 16 bits scaled to 8, what is transparent made white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """PIL's own conversion cuts values off at 255; the range is that of 16 bits, or for floats 0 to 1."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        scaled = values * 255 if values.max(initial=0) <= 1 else values
    else:
        scaled = values / 257 if values.max(initial=0) > 255 or image.mode != "I" else values
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, and of each folder the images in and below it, by name.

    Raises:
        ValueError: for a missing path, and a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"{path}: no such image or folder; check the path")
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not inside:
            raise ValueError(f"{path}: no images in this folder; known endings are {', '.join(IMAGE_SUFFIXES)}")
        found += inside
    return found
