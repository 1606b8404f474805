"""Whether an exported file computes what PyTorch computes, on photographs, at shapes that it was not traced at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from overlock.data import read_image
from overlock.export.graphs import Entry, normalisation
from overlock.export.runtimes import ExportedNetwork
from overlock.export.spec import Spec
from overlock.ops import backend

PHOTO = Path(__file__).parent / "assets" / "photo.jpg"
"""examples/photos/cat.jpg, for those who give no images."""
TOLERANCES = dict(fp32=1e-4, fp16=2e-2, bf16=1e-1)
"""Largest difference over the largest output, by precision. What int8 loses is told by accuracy, on many images."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an output of a file is from PyTorch's."""

    shape: tuple[int, ...]
    """Of the images, (B, C, H, W)."""
    output: int
    """Its number."""
    difference: float
    """The largest, over the largest output."""


def compare(entry: Entry, exported: ExportedNetwork, photos: Sequence[Path] = (PHOTO,)) -> list[Agreement]:
    """The outputs of a file beside PyTorch's.

    Args:
        entry: of the network as it was trained, neither folded nor fused.
        exported: the file.
        photos: files of images.

    Raises:
        ValueError: where they differ by more than the precision explains, the file gives what is no number, or a
            detector finds nothing to compare.
    """
    spec = exported.spec
    found = []
    for batch, size in shapes(spec):
        images = make_images(spec, photos, batch, size)
        with torch.no_grad(), backend("torch"):
            expected = entry(images)
        given = exported.run(images)
        if spec.task == "detect":
            given = in_order_of(expected, given)
        for i, (ours, wanted) in enumerate(zip(given, expected, strict=True)):
            if ours.shape != wanted.shape:
                raise ValueError(
                    f"output {i} is {tuple(ours.shape)} for {tuple(images.shape)}, not {tuple(wanted.shape)}"
                )
            if not wanted.numel():
                continue
            difference = float((ours - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            found.append(Agreement(shape=tuple(images.shape), output=i, difference=difference))
            limit = TOLERANCES.get(spec.precision, float("inf"))
            if not difference <= limit:
                raise ValueError(
                    f"the {spec.format} file differs from PyTorch by {difference:.1e} of the largest output, where "
                    f"{limit:.0e} is allowed in {spec.precision}; export it in another format or precision"
                )
    if not found:
        raise ValueError("the detector finds nothing in the images to compare on; give --images of its classes")
    return found


def in_order_of(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
    """The objects of an image in the order of others, each the nearest of its class: scores may be equal.

    Args:
        wanted: boxes (N, 4), labels (N,), scores (N,), and perhaps masks.
        given: likewise.

    Returns:
        Those given; as they are, where they cannot be the same objects.
    """
    (boxes, labels, scores), (own_boxes, own_labels, own_scores) = wanted[:3], given[:3]
    if len(boxes) != len(own_boxes) or len(boxes) == 0:
        return given
    apart = (boxes[:, None] - own_boxes).abs().amax(dim=2) / boxes.max() + (scores[:, None] - own_scores).abs()
    nearest = (apart + (labels[:, None] != own_labels)).argmin(dim=1)
    return [values[nearest] for values in given] if len(nearest.unique()) == len(nearest) else given


def shapes(spec: Spec) -> Iterator[tuple[int, tuple[int, int]]]:
    """Batches and sizes that a file is checked at: where they are free, others than it was traced at."""
    height, width = spec.image_size
    yield 1, (height, width)
    batch = 3 if "batch" in spec.dynamic else 1
    if "size" in spec.dynamic:
        yield 1, (height + 64, width + 32)
        yield batch, (height + 37, width + 90)
    elif batch > 1:
        yield batch, (height, width)


def make_images(spec: Spec, photos: Sequence[Path], batch: int, size: tuple[int, int]) -> Tensor:
    """Photographs as a file takes them, (B, C, H, W); where there are too few, mirrored ones too."""
    images = []
    for i in range(batch):
        image = read_image(photos[i % len(photos)])
        image = ImageOps.mirror(image) if i // len(photos) % 2 else image
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        images.append(pil_to_tensor(image.convert("L") if spec.record.channels == 1 else image))
    pixels = torch.stack(images)
    if spec.with_preprocessing:
        return pixels
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in normalisation(spec.record))
    return (pixels / 255 - mean) / std
