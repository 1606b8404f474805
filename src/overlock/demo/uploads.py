"""Photos as visitors send them; what is none, or too large, is told in a sentence before it is decoded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from overlock.data import read_image

SIDE = 1024  # longest of a photo that is kept, in pixels
ASPECT = 4  # most of it, or the network's image would be one long strip


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo that is looked at."""

    name: str
    """Of its file."""
    image: Image.Image
    """As RGB, upright, at most :data:`SIDE` pixels long."""
    note: str = ""
    """What was done to it, in a sentence; nothing where it is empty."""


def read_photo(path: str | os.PathLike[str], *, max_pixels: int) -> Photo:
    """A file as a photo; of an animation the first frame.

    Args:
        path: of the file.
        max_pixels: that it may have.

    Raises:
        ValueError: for a file that is no image or damaged, has too many pixels, or is a narrow strip.
    """
    name = Path(path).name
    try:
        with Image.open(path) as image:
            (width, height), animated = image.size, getattr(image, "is_animated", False)
    except Image.DecompressionBombError:
        width = height = 0
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise ValueError(f"{name} is no image, or a damaged one; send a photo as JPEG, PNG or WebP") from None
    if width * height > max_pixels or not width:
        size = f"{width} x {height} pixels" if width else "far too many pixels"
        raise ValueError(f"{name} has {size}, more than the {max_pixels / 1e6:g} million of this page; make it smaller")
    if max(width, height) > ASPECT * min(width, height):
        raise ValueError(
            f"{name} is a strip of {width} x {height} pixels; crop it so that the long side is at most {ASPECT} times "
            "the short one"
        )
    photo = read_image(path, name=name)
    photo.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    note = f"{name} is an animation; this is its first frame." if animated else ""
    return Photo(name=name, image=photo, note=note)


def find_photos(folder: Path | None) -> dict[str, Path]:
    """The images of a folder by their names; without one, those in ``examples/photos`` of a clone, if this is one."""
    from overlock.data.files import find_images  # noqa: PLC0415

    if folder is None:
        folder = Path(__file__).resolve().parents[3] / "examples" / "photos"
        if not folder.is_dir():
            return {}
    return {str(path.relative_to(folder)): path for path in find_images([folder])}
