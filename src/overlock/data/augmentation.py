"""How training images are changed: the settings alone, which a command's help needs without PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from overlock.settings import check_types


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to training images. Raises ValueError for values that cannot be."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop takes, from and to."""
    ratio: tuple[float, float] = (0.75, 1.3333333)
    """Width over height of the crop, from and to."""
    padding: int = 0
    """For images of few pixels: crop from the whole image, with so many mirrored pixels added at each side, instead."""
    hflip: bool | None = None
    """Flip half of the images horizontally: yes unless given, but not digits."""
    rand_augment: str | None = None
    """timm's RandAugment: rand-m9-mstd0.5-inc1 is of magnitude 9, varying by 0.5, more severe as it rises."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation, where there is no RandAugment."""
    erasing: float = 0.0
    """Share of the images of which a rectangle is replaced by noise."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """How the crop is resized."""
    repeats: int = 1
    """Repeated augmentation: versions of each image in an epoch, which takes that many times fewer images."""

    def __post_init__(self) -> None:
        check_types(self, "augment.")
        for name, (low, high) in dict(scale=self.scale, ratio=self.ratio).items():
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"augment.{name} must be a range above 0, scale up to 1, got {low:g} to {high:g}")
        if self.padding < 0 or self.repeats < 1 or self.color_jitter < 0:
            raise ValueError("augment.padding and color_jitter must be at least 0, repeats at least 1")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"augment.erasing must be in 0 to 1, got {self.erasing}")
        if self.rand_augment is not None:
            _check_rand_augment(self.rand_augment)


def _check_rand_augment(text: str) -> None:
    """Raise ValueError for what timm would pass over or clip without a word."""
    parts = r"-(t(weights|3aw?)|(m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?)"
    if not re.fullmatch(rf"rand({parts})+", text):
        raise ValueError(
            "augment.rand_augment must be like rand-m9-mstd0.5-inc1, its parts m, n, p, mstd, mmax, inc with a number "
            f"or tweights, t3a, t3aw, got {text!r}"
        )
    given = {name: int(number) for name, number in re.findall(r"-(m|mmax)(\d+)(?=-|$)", text)}
    largest = given.get("mmax", 10)
    if given.get("m", 0) > largest:
        raise ValueError(
            f"augment.rand_augment has the magnitude {given['m']}, of which timm takes {largest} at most; lower m, or "
            "raise mmax"
        )
