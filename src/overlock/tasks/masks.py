"""Masks of a detector's head, brought into their image as run lengths."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

from overlock.data.run_lengths import Array, Masks, encode

__all__ = ["Masks", "paste"]

SURE = 0.5  # share from which on a pixel is the object's


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Masks:
    """The masks of a detector's head, brought into their boxes as torchvision does, one at a time.

    Args:
        masks: (N, 1, M, M) of shares.
        boxes: (N, 4) as left, top, right, bottom in the image's pixels.
        size: height and width of the image.
    """
    padded, scale = expand_masks(masks.float(), 1)
    corners = expand_boxes(boxes.float(), scale).long().tolist()
    return Masks(size, [_paste(mask, corner, size) for mask, corner in zip(padded, corners, strict=True)])


def _paste(mask: Tensor, box: list[int], size: tuple[int, int]) -> Array:
    left, top, right, bottom = box
    shape = (max(bottom - top + 1, 1), max(right - left + 1, 1))
    rows = slice(max(-top, 0), max(min(shape[0], size[0] - top), 0))
    columns = slice(max(-left, 0), max(min(shape[1], size[1] - left), 0))
    whole = F.interpolate(mask[None], size=shape, mode="bilinear", align_corners=False)[0, 0]
    part = (whole[rows, columns] > SURE).cpu().numpy()
    return encode(part, (max(top, 0), max(left, 0)), size)
