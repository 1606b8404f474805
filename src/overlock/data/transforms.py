"""From an image to the network's input: timm's transforms, and grey images for networks of one channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from overlock.data.augmentation import Augmentation


def make_eval_transform(preprocessing: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Resize, centre crop, normalise.

    Args:
        preprocessing: timm's data configuration: input_size (C, H, W), mean, std, interpolation, crop_pct, and a
            crop_mode where it is another than 'center'.

    Returns:
        A function from a PIL image to (C, H, W).
    """
    transform = create_transform(is_training=False, **_arguments(preprocessing))
    return transforms.Compose([*_to_channels(preprocessing), transform])


def make_train_transform(
    preprocessing: Mapping[str, Any], augmentation: Augmentation | None = None, *, hflip: bool = True
) -> Callable[[Image.Image], Tensor]:
    """Random changes that leave the class as it is, then normalise.

    Args:
        preprocessing: as in :func:`make_eval_transform`.
        augmentation: which changes.
        hflip: whether horizontally flipped images keep their class, where the augmentation does not say.

    Returns:
        A function from a PIL image to (C, H, W), random by the generators of random, numpy and torch.
    """
    changes = augmentation or Augmentation()
    flip = 0.5 if (hflip if changes.hflip is None else changes.hflip) else 0.0
    arguments = _arguments(preprocessing)
    del arguments["crop_pct"], arguments["crop_mode"], arguments["interpolation"]
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
    names = ("input_size", "mean", "std", "interpolation", "crop_pct")
    return {name: preprocessing[name] for name in names} | {"crop_mode": preprocessing.get("crop_mode")}


def _to_channels(preprocessing: Mapping[str, Any]) -> list[Any]:
    return [transforms.Grayscale()] if preprocessing["input_size"][0] == 1 else []


def to_tensor_steps(normalise: bool) -> list[v2.Transform]:
    """From an image to a tensor of 0 to 1, perhaps normalised as ImageNet's are."""
    steps: list[v2.Transform] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return [*steps, v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)] if normalise else steps


def draw_number(count: int) -> int:
    """A whole number from 0 to below ``count``, by torch's generator."""
    return int(torch.randint(count, ()))
