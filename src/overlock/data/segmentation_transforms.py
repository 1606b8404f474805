"""From images and label maps to what segmenters take: the paper's pipeline on torchvision's transforms."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from overlock.data.label_values import IGNORED
from overlock.data.transforms import draw_number, to_tensor_steps


def make_segmentation_transform(
    *, training: bool, crop: int = 512, scale: tuple[int, int] = (2048, 512), ratio: tuple[float, float] = (0.5, 2.0)
) -> v2.Compose:
    """For segmenters: normalised images, labels (H, W).

    Args:
        training: resize at random, crop, mirror and distort the colours; else resize alone.
        crop: side of the crop; smaller images are padded, with ignored labels.
        scale: longest and shortest side that an image is brought within, keeping its aspect.
        ratio: of which a random share of the scale is taken in training.
    """
    if not training:
        return v2.Compose([ResizeWithin(scale), *to_tensor_steps(normalise=True)])
    return v2.Compose(
        [
            ResizeWithin(scale, ratio),
            VariedCrop(crop),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(brightness=(0.875, 1.125), contrast=(0.5, 1.5), p=0.5),
            *to_tensor_steps(normalise=True),
            PadTo(crop),
        ]
    )


class ResizeWithin(v2.Transform):
    """Resize to fit a longest and a shortest side, times a random number where a range is given.

    Label maps are resized without blending; in evaluation they are left as they are, since scores are taken at the
    images' own size.
    """

    def __init__(self, scale: tuple[int, int], ratio: tuple[float, float] | None = None):
        super().__init__()
        self.scale, self.ratio = scale, ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        factor = 1.0 if self.ratio is None else float(torch.empty(1).uniform_(*self.ratio))
        times = min(max(self.scale) / max(height, width), min(self.scale) / min(height, width)) * factor
        return dict(size=[max(1, round(height * times)), max(1, round(width * times))])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if self.ratio is None and isinstance(inpt, tv_tensors.Mask):
            return inpt
        return self._call_kernel(v2.functional.resize, inpt, **params, interpolation=v2.InterpolationMode.BILINEAR)


class VariedCrop(v2.Transform):
    """A random crop, drawn again up to ten times while one class has more than three quarters of its pixels."""

    def __init__(self, size: int, most: float = 0.75, tries: int = 10):
        super().__init__()
        self.size, self.most, self.tries = size, most, tries

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        labels = next((x for x in flat_inputs if isinstance(x, tv_tensors.Mask)), None)
        place = dict(height=min(self.size, height), width=min(self.size, width))
        for _ in range(self.tries):
            place["top"], place["left"] = (
                draw_number(height - place["height"] + 1),
                draw_number(width - place["width"] + 1),
            )
            if labels is None or self._varied(labels, place):
                break
        return place

    def _varied(self, labels: Tensor, place: dict[str, int]) -> bool:
        top, left = place["top"], place["left"]
        part = labels[..., top : top + place["height"], left : left + place["width"]]
        counts = torch.unique(part[part != IGNORED], return_counts=True)[1]
        return counts.numel() > 1 and float(counts.max() / counts.sum()) < self.most

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class PadTo(v2.Transform):
    """Pad at the right and below: images with zeros, label maps with what is ignored."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        return dict(padding=[0, 0, max(0, self.size - width), max(0, self.size - height)])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = IGNORED if isinstance(inpt, tv_tensors.Mask) else 0
        return self._call_kernel(v2.functional.pad, inpt, **params, fill=fill)


class PrepareLabels:
    """A transform of image and label map, to tensors that are no longer torchvision's own.

    Args:
        transform: of both.
    """

    def __init__(self, transform: Any):
        self.transform = transform

    def __call__(self, image: Image.Image, labels: Tensor) -> tuple[Tensor, Tensor]:
        prepared, map_ = self.transform(image, labels)
        return prepared.as_subclass(Tensor), map_.as_subclass(Tensor).long()
