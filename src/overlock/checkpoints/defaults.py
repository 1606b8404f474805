"""What is taken for granted of weights that come without a record: names of classes, and the preparation of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

PAPER_SCALE = (2048, 512)
"""Longest and shortest side of ADE20K's images, which the released segmenters were trained at."""


def default_classes(count: int) -> tuple[str, ...]:
    """Names for the classes of weights that come without: ImageNet's for 1000, else numbers."""
    if count == 1000:
        names = ImageNetInfo()
        return tuple(names.index_to_description(i).split(",")[0] for i in range(count))
    return tuple(str(i) for i in range(count))


def default_preprocessing(
    model: nn.Module | str,
    *,
    in_chans: int,
    image_size: int | None = None,
    crop_pct: float | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """timm's data configuration of a model; other channels than colours are normalised by the average of the three.

    Args:
        model: with its ``pretrained_cfg``, or timm's name of it.
        in_chans: channels of the images.
        image_size: another one than the model's.
        crop_pct: another share of the image that the evaluation crop keeps.
        arguments: of timm's ``train.py``, which go before the model's configuration.

    Raises:
        ValueError: for arguments with a mean or deviation for another number of channels.
    """
    names = ("input_size", "img_size", "interpolation", "mean", "std", "crop_mode")
    given = {key: (arguments or {}).get(key) for key in names} | dict(in_chans=in_chans)
    if isinstance(given["input_size"], int):  # as other trainers name the side
        given |= dict(input_size=None, img_size=given["input_size"])
    for key in ("mean", "std"):
        values: Any = given[key]
        if values is not None and len(values) not in (1, in_chans):
            raise ValueError(f"{key} must have 1 or {in_chans} values, as the images have channels, got {values}")
    crop_pct = crop_pct or (arguments or {}).get("crop_pct")
    own: Any = timm.get_pretrained_cfg(model).to_dict() if isinstance(model, str) else model.pretrained_cfg
    config = resolve_data_config(given, pretrained_cfg=own)
    size = (in_chans, *((image_size, image_size) if image_size else config["input_size"][1:]))
    mean, std = config["mean"], config["std"]
    if len(mean) != in_chans:
        mean, std = ((sum(values) / len(values),) * in_chans for values in (mean, std))
    return dict(
        input_size=size,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=config["interpolation"],
        crop_pct=crop_pct or config["crop_pct"],
        **({} if config["crop_mode"] == "center" else dict(crop_mode=config["crop_mode"])),
    )


def objects_of_coco(count: int) -> tuple[str, ...]:
    """Names for the classes of a detector that comes without: COCO's for 80, else numbers."""
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    coco = tuple(name for name in coco if name not in ("__background__", "N/A"))
    return coco if count == len(coco) else default_classes(count)
