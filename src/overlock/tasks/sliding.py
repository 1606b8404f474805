"""Semantic segmentation of whole images, by sliding windows, and at several scales (section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE = 32  # of the sides of what the network is given
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
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be above 0, got {list(scales)}")
    if window is not None:
        stride = max(1, 2 * window // 3) if stride is None else stride
        if not 0 < stride <= window:
            raise ValueError(f"stride must be between 1 and the window's {window}, got {stride}")
    elif stride is not None:
        raise ValueError("a stride is that of a window; give window too")
    network.eval()
    total: Tensor | int = 0
    for scale in scales:
        scaled = _resize(images, scale)
        for mirrored in (False, True) if flip else (False,):
            given = scaled.flip(3) if mirrored else scaled
            logits = network(given) if window is None or stride is None else _slide(network, given, window, stride)
            logits = logits.flip(3) if mirrored else logits
            logits = F.interpolate(
                logits.float(), size=tuple(size or images.shape[2:]), mode="bilinear", align_corners=False
            )
            total = total + logits.softmax(dim=1)
    return total / (len(scales) * (1 + flip))  # type: ignore[return-value]


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
