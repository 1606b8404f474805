"""From images and their boxes and masks to what detectors take: the paper's pipeline on torchvision's transforms."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from overlock.data.transforms import draw_number, to_tensor_steps


def make_detection_transform(*, training: bool, crop: bool = False) -> v2.Compose:
    """For detectors, which normalise and resize by themselves.

    Args:
        training: mirror half of the images.
        crop: crop half of the images in training, first brought to a short side of 400, 500 or 600 pixels, to 384 to
            600 pixels of each side (the 3x schedules).
    """
    steps: list[v2.Transform] = []
    if training:
        steps.append(v2.RandomHorizontalFlip())
    if training and crop:
        resize = v2.RandomShortestSize([400, 500, 600], max_size=4200)
        steps.append(v2.RandomApply([resize, RandomRangeCrop(384, 600)], p=0.5))
    if training:
        steps.append(v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_of_objects))
    return v2.Compose([*to_tensor_steps(normalise=False), *steps])


def _of_objects(sample: Any) -> Any:
    """All that goes when an object's box is cropped away."""
    target = sample[1] if isinstance(sample, tuple) else sample
    return tuple(target[name] for name in ("labels", "iscrowd", "area"))


class RandomRangeCrop(v2.Transform):
    """A crop of random size, each side between two numbers or as long as the image."""

    def __init__(self, smallest: int, largest: int):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.functional.get_size(flat_inputs[0])
        height, width = (
            min(side, self.smallest + draw_number(max(1, min(side, self.largest) - self.smallest + 1)))
            for side in sides
        )
        return dict(
            top=draw_number(sides[0] - height + 1), left=draw_number(sides[1] - width + 1), height=height, width=width
        )

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class PrepareObjects:
    """A transform of image and target, to tensors that are no longer torchvision's own.

    Args:
        transform: of both.
    """

    def __init__(self, transform: Any):
        self.transform = transform

    def __call__(self, image: Image.Image, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        prepared, objects = self.transform(image, target)
        plain = {name: x.as_subclass(Tensor) if isinstance(x, Tensor) else x for name, x in objects.items()}
        return prepared.as_subclass(Tensor), plain
