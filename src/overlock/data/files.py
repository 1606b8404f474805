"""Image files of every kind, read as what a person sees in them."""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jfif", ".jpe",
    ".jp2", ".j2k", ".avif", ".tga",
)  # fmt: skip
"""Endings of the files that are taken for images, in lower case."""
# What systems and programs leave in folders, beside all that begins with a dot (.DS_Store, .ipynb_checkpoints, and
# macOS' ._NAME of each file NAME).
RUBBISH = frozenset({
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip
SIDECARS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".npz", ".npy")


# What PIL's readers raise for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
)


class ImageRangeError(ValueError):
    """An image of 16 or 32 bits has values that no range of brightness is known for."""


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
    except ImageRangeError as error:
        raise ValueError(f"{name}: {error}; scale it or remove the file") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"{name}: the image has more pixels than the limit of {limit}, which protects the memory; make it smaller, "
            "or raise the limit: overlock predict --max_pixels N, or half of it as PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
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
    """PIL's own conversion cuts values off at 255; the range is that of 16 bits, or for floats 0 to 1.

    Raises:
        ImageRangeError: for values that are of neither range, nor of 0 to 255.
    """
    values = np.asarray(image, dtype=np.float64)
    least, most = values.min(initial=0), values.max(initial=0)
    if not (np.isfinite(values).all() and least >= 0 and most <= 65535):
        raise ImageRangeError(
            f"its values go from {least:g} to {most:g}, where 0 to 1, 0 to 255 and 0 to 65535 can be read"
        )
    if image.mode == "F" and most <= 1:
        scaled = values * 255
    else:
        scaled = values / 257 if most > 255 or image.mode.startswith("I;") else values
    return Image.fromarray(scaled.round().astype(np.uint8))


def is_rubbish(name: str) -> bool:
    """Whether a file or folder of this name is left there by a system or a program, and none of a data set."""
    return name.startswith(".") or name.lower() in RUBBISH


def subfolders(folder: Path) -> list[Path]:
    """The folders of a folder and links to such, by name, without what systems leave there."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_rubbish(path.name))


def walk_files(folder: Path) -> Iterator[Path]:
    """All files in and below a folder, linked folders too, without what systems leave there; in no order."""
    for where, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if not is_rubbish(name) and not _leads_back(where, name)]
        yield from (Path(where, name) for name in files if not is_rubbish(name))


def _leads_back(where: str, name: str) -> bool:
    """Whether a folder is a link to one that it is in."""
    path = Path(where, name)
    return path.is_symlink() and path.resolve() in (Path(where).resolve() / name).parents


def is_image(path: Path) -> bool:
    """Whether a file has the ending of an image, in small letters or capitals, and a target where it is a link."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def images_in(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """The images in and below a folder, by name.

    Args:
        folder: to look in.
        left_out: takes the endings of other files, but for tables and texts, with their numbers.
    """
    found = []
    for path in walk_files(folder):
        if is_image(path):
            found.append(path)
        elif left_out is not None and path.suffix.lower() not in SIDECARS:
            left_out["link to nowhere" if not path.exists() else path.suffix.lower() or path.name] += 1
    return sorted(found)


def tell_left_out(where: object, left_out: Counter[str]) -> tuple[str, ...]:
    """A note of the files that are no images, to be told once; none where there are none."""
    if not left_out:
        return ()
    counts = ", ".join(f"{number} {ending}" for ending, number in left_out.most_common(8))
    heic = "; convert HEIC to JPEG or PNG" if {".heic", ".heif"} & set(left_out) else ""
    plural = "file is no image that can be read" if left_out.total() == 1 else "files are no images that can be read"
    return (f"{where}: {left_out.total()} {plural} and left out ({counts}){heic}",)


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
        inside = images_in(path)
        if not inside:
            raise ValueError(f"{path}: no images in this folder; known endings are {', '.join(IMAGE_SUFFIXES)}")
        found += inside
    return found
