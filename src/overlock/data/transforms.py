"""From an image to the network's input: timm's transforms, and grey images for networks of one channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

Augmentation = Literal["none", "light", "strong"]
# Strong is the augmentation of the paper's ImageNet training.
_CHANGES: dict[str, dict[str, Any]] = {
    "light": dict(scale=(0.6, 1.0), ratio=(0.8, 1.25), color_jitter=None),
    "strong": dict(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, re_prob=0.25, re_mode="pixel"),
}


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
    preprocessing: Mapping[str, Any], *, augmentation: Augmentation = "light", mirror: bool = True
) -> Callable[[Image.Image], Tensor]:
    """Random changes that leave the class as it is, then normalise.

    Args:
        preprocessing: as in :func:`make_eval_transform`.
        augmentation: 'none'; 'light', random crops; 'strong', also RandAugment and random erasing.
        mirror: flip half of the images, unless there is no augmentation.

    Returns:
        A function from a PIL image to (C, H, W).
    """
    if augmentation == "none":
        return make_eval_transform(preprocessing)
    arguments = _arguments(preprocessing)
    del arguments["crop_pct"]
    crop, change, finish = create_transform(
        is_training=True, separate=True, hflip=0.5 if mirror else 0.0, **arguments, **_CHANGES[augmentation]
    )
    # RandAugment works on colours, so images turn grey after it.
    return transforms.Compose([crop, change, *_to_channels(preprocessing), finish])


def _arguments(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    return {name: preprocessing[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct")}


def _to_channels(preprocessing: Mapping[str, Any]) -> list[Any]:
    return [transforms.Grayscale()] if preprocessing["input_size"][0] == 1 else []
