"""From an image to the network's input: timm's transforms, and grey images for networks of one channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torchvision import transforms


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to training images. Raises ValueError for values that cannot be."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop takes, from and to."""
    ratio: tuple[float, float] = (0.75, 1.3333333)
    """Width over height of the crop, from and to."""
    padding: int = 0
    """For images of few pixels: crop from the whole image, with so many mirrored pixels added at each side, instead."""
    mirror: bool | None = None
    """Mirror half of the images: yes unless given, but not digits."""
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
        for name, (low, high) in dict(scale=self.scale, ratio=self.ratio).items():
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"augment.{name} must be a range above 0, scale up to 1, got {low:g} to {high:g}")
        if self.padding < 0 or self.repeats < 1 or self.color_jitter < 0:
            raise ValueError("augment.padding and color_jitter must be at least 0, repeats at least 1")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"augment.erasing must be in 0 to 1, got {self.erasing}")
        if self.rand_augment is not None and not self.rand_augment.startswith("rand-"):
            raise ValueError(f"augment.rand_augment must be like rand-m9-mstd0.5-inc1, got {self.rand_augment!r}")


def make_eval_transform(preprocessing: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Resize, centre crop, normalise.

    Args:
        preprocessing: timm's data configuration: input_size (C, H, W), mean, std, interpolation, crop_pct.

    Returns:
        A function from a PIL image to (C, H, W).
    """
    transform = create_transform(is_training=False, **_arguments(preprocessing))
    return transforms.Compose([*_to_channels(preprocessing), transform])


def make_train_transform(
    preprocessing: Mapping[str, Any], augmentation: Augmentation | None = None, *, mirror: bool = True
) -> Callable[[Image.Image], Tensor]:
    """Random changes that leave the class as it is, then normalise.

    Args:
        preprocessing: as in :func:`make_eval_transform`.
        augmentation: which changes.
        mirror: whether images seen in a mirror keep their class, where the augmentation does not say.

    Returns:
        A function from a PIL image to (C, H, W), random by the generators of random, numpy and torch.
    """
    changes = augmentation or Augmentation()
    flip = 0.5 if (mirror if changes.mirror is None else changes.mirror) else 0.0
    arguments = _arguments(preprocessing)
    del arguments["crop_pct"], arguments["interpolation"]
    crop, change, finish = create_transform(
        is_training=True,
        separate=True,
        hflip=flip,
        scale=changes.scale,
        ratio=changes.ratio,
        auto_augment=changes.rand_augment,
        color_jitter=changes.color_jitter or None,
        re_prob=changes.erasing,
        re_mode="pixel",
        interpolation=changes.interpolation,
        **arguments,
    )
    _keep_a_bit(change)
    if changes.padding:
        size = preprocessing["input_size"][1:]
        crop = transforms.Compose(
            [
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(size, padding=changes.padding, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(flip),
            ]
        )
    # RandAugment works on colours, so images turn grey after it.
    return transforms.Compose([crop, change, *_to_channels(preprocessing), finish])


def _keep_a_bit(change: Any) -> None:
    """Let timm's RandAugment posterise to one bit at least; it asks for none now and then, which Pillow 12 refuses."""
    for augment in change.transforms:
        for op in getattr(augment, "ops", ()):
            if op.aug_fn is auto_augment.posterize:
                op.level_fn = partial(_at_least_a_bit, op.level_fn)


def _at_least_a_bit(level_fn: Callable[..., tuple[int, ...]], level: float, hparams: Any) -> tuple[int, ...]:
    return (max(1, level_fn(level, hparams)[0]),)


def _arguments(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    return {name: preprocessing[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct")}


def _to_channels(preprocessing: Mapping[str, Any]) -> list[Any]:
    return [transforms.Grayscale()] if preprocessing["input_size"][0] == 1 else []
