"""Packed images on the GPU, and their random changes there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.data.images import PackedImages


def decode(path: Path, side: int, count: int | None = None) -> dict[str, np.ndarray]:
    """The images of a packed file in the upper left of (N, side, side, 3), their sizes (N, 2) and labels (N,).

    Args:
        path: of the file.
        side: no image is larger.
        count: only so many, drawn at random.
    """
    packed = PackedImages(path)
    chosen = np.arange(len(packed)) if count is None else np.random.default_rng(0).permutation(len(packed))[:count]
    pixels = np.zeros((len(chosen), side, side, 3), np.uint8)
    sizes = np.zeros((len(chosen), 2), np.int64)

    def read(place: int) -> None:
        image = np.asarray(packed.read(int(chosen[place]))[0])
        sizes[place] = image.shape[:2]
        pixels[place, : image.shape[0], : image.shape[1]] = image

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(chosen)), chunksize=64))
    return dict(pixels=pixels, sizes=sizes, labels=packed.labels[chosen].astype(np.int64))


def save_decoded(source: Path, folder: Path, side: int, count: int | None = None) -> None:
    """Both parts of a data set as arrays that processes can map."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        for name, array in decode(source / f"{part}.npz", side, count).items():
            np.save(folder / f"{part}_{name}.npy", array)


def load_decoded(folder: Path, part: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (N, 3, side, side) in channels-last order, sizes and labels, on the device."""
    pixels, sizes, labels = (
        torch.from_numpy(np.array(np.load(folder / f"{part}_{name}.npy", mmap_mode="r"))).to(device)
        for name in ("pixels", "sizes", "labels")
    )
    return pixels.permute(0, 3, 1, 2), sizes, labels


class Normalise:
    """Values of 0 to 255 as the network takes them.

    Args:
        preprocessing: of the network's record: ``mean`` and ``std``.
        device: of the images.
    """

    def __init__(self, preprocessing: dict, device: str):
        self.mean, self.std = (
            255 * torch.tensor(preprocessing[name], device=device).view(-1, 1, 1) for name in ("mean", "std")
        )

    def __call__(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def draw_order(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` numbers below ``count``: all in random order, then all again in another."""
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
    return torch.cat(passes)[:size]


class ShiftedImages:
    """Small images enlarged, shifted over their mirrored borders, and half of them flipped: batches by number of step.

    They follow from the seed alone, so that networks which differ learn from the same.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,).
        normalise: what comes last.
        side: of the batches' images.
        padding: the most that an image is shifted.
        batch: images of a step.
        steps: how many there can be.
        seed: of order and changes.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, normalise: Normalise, *, side: int, padding: int, batch: int,
        steps: int, seed: int,
    ):  # fmt: skip
        self.images, self.labels, self.normalise, self.side = images, labels, normalise, side
        generator, device = torch.Generator().manual_seed(seed), images.device
        self.order = draw_order(len(images), steps * batch, generator).view(steps, batch).to(device)
        moves = torch.randint(-padding, padding + 1, (2, steps, batch), generator=generator)
        places = (moves[..., None] + torch.arange(side)).abs()
        places = torch.where(places < side, places, 2 * (side - 1) - places)  # reflected
        flips = torch.rand(steps, batch, generator=generator) < 0.5
        places[1] = torch.where(flips[..., None], places[1].flip(-1), places[1])
        self.rows, self.columns = places.to(torch.uint8).to(device)

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        order = self.order[at].squeeze(0)
        images = enlarge(self.images[order], self.side)
        rows, columns = (x[at].squeeze(0).long() for x in (self.rows, self.columns))
        images = images.gather(2, rows[:, None, :, None].expand_as(images))
        images = images.gather(3, columns[:, None, None, :].expand_as(images))
        return self.normalise(images), self.labels[order]


def enlarge(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) uint8 to (B, 3, side, side) float32 of whole numbers, as Pillow's bicubic filter has it."""
    images = images.float()
    if images.shape[2] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
    return images


class CroppedImages:
    """Photographs cropped at random, flipped, changed in colour, and mixed by CutMix: batches by number of step.

    Args:
        images: (N, 3, S, S) uint8, each in the upper left.
        sizes: (N, 2) of them.
        labels: (N,).
        normalise: what comes last.
        side: of the batches' images.
        batch: images of a step.
        steps: how many there can be.
        seed: of order and changes.
        scale: share of an image that a crop has.
        jitter: most change of brightness, contrast and saturation.
        cutmix: share of the batches that are mixed.
    """

    def __init__(
        self, images: Tensor, sizes: Tensor, labels: Tensor, normalise: Normalise, *, side: int, batch: int,
        steps: int, seed: int, scale: tuple[float, float], jitter: float, cutmix: float, classes: int,
    ):  # fmt: skip
        self.images, self.labels, self.normalise, self.side = images, labels, normalise, side
        self.targets = torch.eye(classes, device=images.device)[labels]
        generator, device = torch.Generator().manual_seed(seed), images.device
        order = draw_order(len(images), steps * batch, generator)
        self.order = order.view(steps, batch).to(device)
        boxes = draw_crops(sizes.cpu()[order], scale, generator)
        flips = 1 - 2 * (torch.rand(len(order), generator=generator) < 0.5).float()
        # from places in the crop, -1 to 1, to places in the whole square
        centre, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        whole = images.shape[3] / 2
        theta = torch.zeros(len(order), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = flips * half[:, 0] / whole, half[:, 1] / whole
        theta[:, :, 2] = centre / whole - 1
        self.theta = theta.view(steps, batch, 2, 3).to(device)
        self.colours = (1 + jitter * (2 * torch.rand(3, steps, batch, 1, 1, 1, generator=generator) - 1)).to(device)
        self.mixed = draw_mixes(steps, side, cutmix, generator).to(device)

    def __call__(self, at: Tensor) -> tuple[Tensor, Tensor]:
        order = self.order[at].squeeze(0)
        theta = self.theta[at].squeeze(0)
        grid = F.affine_grid(theta, [len(order), 3, self.side, self.side], align_corners=False)
        images = F.grid_sample(self.images[order].float(), grid, mode="bilinear", align_corners=False)
        brightness, contrast, saturation = self.colours[:, at].squeeze(1)
        images = images * brightness
        grey = images.mean(dim=1, keepdim=True)
        images = torch.lerp(grey, images, saturation)
        images = torch.lerp(grey.mean(dim=(2, 3), keepdim=True), images, contrast).clamp(0, 255)
        left, top, right, bottom = self.mixed[at].squeeze(0)
        steps = torch.arange(self.side, device=images.device)
        inside = ((steps >= top) & (steps < bottom))[:, None] & ((steps >= left) & (steps < right))[None, :]
        images = torch.where(inside, images.flip(0), images)
        share = inside.float().mean()
        targets = self.targets[order]
        return self.normalise(images), torch.lerp(targets, targets.flip(0), share)


def draw_crops(sizes: Tensor, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Boxes (N, 4) of left, top, right, bottom within images of sizes (N, 2), as torchvision's RandomResizedCrop.

    Sides beyond the image are cut to it, where torchvision tries again.
    """
    height, width = sizes.float().unbind(1)
    share, shape, across, down = torch.rand(4, len(sizes), generator=generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    ratio = torch.exp((2 * shape - 1) * np.log(4 / 3))
    wide, high = torch.minimum((area * ratio).sqrt(), width), torch.minimum((area / ratio).sqrt(), height)
    left, top = across * (width - wide), down * (height - high)
    return torch.stack([left, top, left + wide, top + high], dim=1)


def draw_mixes(steps: int, side: int, probability: float, generator: torch.Generator) -> Tensor:
    """A box (left, top, right, bottom) a step for CutMix with alpha 1; of no area where nothing is mixed."""
    kept, which, *centre = torch.rand(4, steps, generator=generator)
    half = (1 - kept).sqrt() * side / 2 * (which < probability)
    x, y = (side * c for c in centre)
    return torch.stack([x - half, y - half, x + half, y + half], dim=1).round().clamp(0, side)


def middle_crops(
    images: Tensor, sizes: Tensor, labels: Tensor, side: int, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images cut to the square in their middle, in batches, with their labels."""
    starts = ((sizes - side).clamp(min=0).float() / 2).round().long()
    steps = torch.arange(side, device=images.device)
    for some, start, named in zip(images.split(batch), starts.split(batch), labels.split(batch), strict=True):
        rows, columns = (start[:, i, None] + steps for i in (0, 1))
        cut = some.gather(2, rows[:, None, :, None].expand(-1, 3, -1, some.shape[3]))
        yield cut.gather(3, columns[:, None, None, :].expand(-1, 3, side, -1)), named
