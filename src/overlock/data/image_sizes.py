"""The sizes of image files, from their first bytes alone."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

SIDEWAYS = (5, 6, 7, 8)  # orientations whose upright image has the stored one's height as its width
THREADS = 8


def read_orientation(path: Path) -> tuple[int, int, int]:
    """Width and height as stored, and the orientation of EXIF, 1 for upright; zeros where the file cannot be read."""
    try:
        with Image.open(path) as image:
            # A PNG file that says it only after its pixels would have to be decoded for it.
            said = image.format != "PNG" or "exif" in image.info
            return *image.size, int(image.getexif().get(ExifTags.Base.Orientation, 1)) if said else 1
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return 0, 0, 0


def read_sizes(paths: Sequence[Path]) -> np.ndarray[Any, Any]:
    """Width and height of each image as it is seen, upright (N, 2); 0 for a file that cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = np.array(list(pool.map(read_orientation, paths, chunksize=64)), dtype=np.int64).reshape(-1, 3)
    return np.where(np.isin(found[:, 2:], SIDEWAYS), found[:, 1::-1], found[:, :2])


def turn_masks(masks: Tensor, orientation: int) -> Tensor:
    """Masks (N, H, W) of a stored image, turned as its orientation turns the image upright: 1 or :data:`SIDEWAYS`."""
    if orientation == 1:
        return masks
    masks = masks.transpose(1, 2)
    flipped = {5: [], 6: [2], 7: [1, 2], 8: [1]}[orientation]
    return masks.flip(flipped)
