"""Semantic segmentation of whole images, by sliding windows, and at several scales (section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE = 32  # of the sides of what the network is given
AT_ONCE = 2**24  # shares of classes in memory
PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Of the multi-scale figures of Table 5, with mirrored images beside."""


@torch.no_grad()
def segment(
    network: nn.Module,
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Shares of the classes at each pixel, the mean over scales and mirrored images.

    At each scale the sides are rounded up to multiples of 32, and the logits resized to the result's size.

    Args:
        network: images (B, 3, H, W) to logits (B, classes, H, W); put into evaluation mode.
        images: (B, 3, H, W), normalised.
        scales: of the images.
        flip: segment the images in a mirror too.
        window: side of a sliding window, whose logits are averaged where windows overlap; whole images where it is
            None, and where a side is no longer than the window it is taken whole.
        stride: from window to window, two thirds of the window where it is None.
        size: height and width of the result; those of the images unless given.

    Returns:
        (B, classes, H, W) of that size, of sum 1 over the classes.

    Raises:
        ValueError: for a scale or a stride that leaves nothing or leaves gaps.
    """
    passes = _passes(network, images, scales, flip, window, check_testing(scales, window, stride))
    height, width = size or images.shape[2:]
    return _shares(passes, slice(0, height), (height, width))


@torch.no_grad()
def label_pixels(
    network: nn.Module,
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """The class of each pixel: the place of the largest of :func:`segment`'s shares, which it takes and raises as.

    The shares are computed some rows at a time, since those of a whole photograph and a hundred classes are gigabytes.

    Returns:
        (B, H, W) of int16; -1 everywhere where the network's output is no finite number.
    """
    given = list(_passes(network, images, scales, flip, window, check_testing(scales, window, stride)))
    height, width = size or images.shape[2:]
    labels = torch.full((len(images), height, width), -1, dtype=torch.int16, device=images.device)
    if not all(bool(logits.isfinite().all()) for logits in given):
        return labels
    step = max(1, AT_ONCE // (len(images) * given[0].shape[1] * width))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        labels[:, rows] = _shares(given, rows, (height, width)).argmax(dim=1)
    return labels


def check_testing(scales: Sequence[float], window: int | None, stride: int | None) -> int | None:
    """The stride, where it goes without saying.

    Raises:
        ValueError: as :func:`segment` does.
    """
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales must be above 0, got {list(scales)}")
    if window is None:
        if stride is not None:
            raise ValueError("a stride is that of a window; give window too")
        return None
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    stride = max(1, 2 * window // 3) if stride is None else stride
    if not 0 < stride <= window:
        raise ValueError(f"stride must be between 1 and the window's {window}, got {stride}")
    return stride


def _passes(
    network: nn.Module, images: Tensor, scales: Sequence[float], flip: bool, window: int | None, stride: int | None
) -> Iterator[Tensor]:
    """The logits of the images at each scale, and of the mirrored ones, turned back."""
    network.eval()
    for scale in scales:
        scaled = _resize(images, scale)
        for mirrored in (False, True) if flip else (False,):
            given = scaled.flip(3) if mirrored else scaled
            logits = network(given) if window is None or stride is None else _slide(network, given, window, stride)
            yield (logits.flip(3) if mirrored else logits).float()


def _shares(passes: Iterable[Tensor], rows: slice, size: tuple[int, int]) -> Tensor:
    """Some rows of the mean shares of logits that are resized to a size."""
    total: Tensor | int = 0
    count = 0
    for count, logits in enumerate(passes, start=1):  # noqa: B007  # their number is needed
        total = total + _resize_rows(logits, rows, size).softmax(dim=1)
    return total / count  # type: ignore[return-value]


def _resize_rows(logits: Tensor, rows: slice, size: tuple[int, int]) -> Tensor:
    """Some rows of what bilinear interpolation to a size gives."""
    if rows == slice(0, size[0]):
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    height = logits.shape[2]
    places = (torch.arange(rows.start, rows.stop, device=logits.device) + 0.5) * (height / size[0]) - 0.5
    places = places.clamp(0, height - 1)
    above = places.long()
    share = (places - above)[:, None]
    mixed = logits[:, :, above] * (1 - share) + logits[:, :, (above + 1).clamp(max=height - 1)] * share
    return F.interpolate(mixed, size=(len(places), size[1]), mode="bilinear", align_corners=False)


def _resize(images: Tensor, scale: float) -> Tensor:
    size = [max(MULTIPLE, -(-round(scale * side) // MULTIPLE) * MULTIPLE) for side in images.shape[2:]]
    if size == list(images.shape[2:]):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _slide(network: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Mean of the logits of all windows that a pixel lies in."""
    total: Tensor | None = None
    counts = images.new_zeros(1, 1, *images.shape[2:])
    for rows in _spans(images.shape[2], window, stride):
        for columns in _spans(images.shape[3], window, stride):
            logits = network(images[:, :, rows, columns]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
            total[:, :, rows, columns] += logits
            counts[:, :, rows, columns] += 1
    assert total is not None
    return total / counts


def _spans(side: int, window: int, stride: int) -> Iterator[slice]:
    """Windows from one end of a side to the other; the last ends where the side does."""
    for first in range(0, max(side - window, 0) + stride, stride):
        start = max(0, min(first, side - window))
        yield slice(start, min(start + window, side))
        if start + window >= side:
            return
