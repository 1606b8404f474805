"""What a predictor takes: a path, a PIL image, an array, a tensor, or one of these with a name of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from overlock.data import read_image, to_rgb

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
SINGLE = (str, os.PathLike, Image.Image, np.ndarray, Tensor)


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image, and what its result is called."""

    image: ImageLike
    """As a predictor takes it."""
    source: str
    """The path of the file that it comes from."""
    name: str
    """Of files for its result: a path within a folder of results, without an ending."""
    frame: int | None = None
    """Its number in a video, from 0 on."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An image without a result."""

    source: str
    """The image's path, or what it was given as."""
    reason: str
    """Why there is none, and what mends it."""
    frame: int | None = None
    """Its number in a video, from 0 on."""

    @property
    def sentence(self) -> str:
        """Image and reason."""
        place = "" if self.frame is None else f", frame {self.frame}"
        return f"{self.source}{place}: {self.reason}"


def as_item(image: ImageLike | Item) -> Item:
    """An image with its own name."""
    if isinstance(image, Item):
        return image
    source = name_of(image)
    return Item(
        image=image, source=source, name=Path(source).stem if isinstance(image, (str, os.PathLike)) else "image"
    )


def as_pil(image: ImageLike) -> Image.Image:
    """Any accepted image as 8-bit RGB.

    Raises:
        ValueError: for what is no image.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, name=name_of(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        if image.dim() != 3:
            raise ValueError(f"an image tensor must be (C, H, W), got {tuple(image.shape)}; give a batch as a list")
        return to_rgb(_array_to_pil(image.detach().cpu().permute(1, 2, 0).numpy()))
    if isinstance(image, np.ndarray):
        return to_rgb(_array_to_pil(image))
    raise ValueError(f"an image must be a path, a PIL image, an array or a tensor, got {type(image).__name__}")


def name_of(image: ImageLike) -> str:
    """A path as it can be printed, or the kind of what was given."""
    if not isinstance(image, (str, os.PathLike)):
        return f"<{type(image).__name__}>"
    return os.fspath(image).encode(errors="surrogateescape").decode(errors="replace")


def _array_to_pil(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an image array must be (H, W) or (H, W, C) with 1, 3 or 4 channels, got {array.shape}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"an image must hold uint8 of 0 to 255 or floats of 0 to 1, got {array.dtype}")
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"a floating-point image must lie in 0 to 1, got {array.min():.3g} to {array.max():.3g}")
        array = (array.astype(np.float32) * 255).round().astype(np.uint8)
    return to_pil_image(np.ascontiguousarray(array))
