"""How good activation maps are: their energy within boxes, and what inserting and deleting their pixels does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

STEPS = 20
Box = tuple[float, float, float, float]


def box_energy(cam: np.ndarray[Any, Any], boxes: Sequence[Box]) -> tuple[float, float]:
    """Share of a map that lies within boxes, and their share of the image, which a flat map would have.

    Args:
        cam: (H, W), from 0 on.
        boxes: left, top, right, bottom, of an image of W x H; where they overlap, pixels count once.

    Raises:
        ValueError: for no boxes.
    """
    if not boxes:
        raise ValueError("there are no boxes; the energy within them needs one at least")
    rows, columns = np.arange(cam.shape[0])[:, None] + 0.5, np.arange(cam.shape[1])[None] + 0.5
    inside = np.zeros(cam.shape, dtype=bool)
    for left, top, right, bottom in boxes:
        inside |= (left <= columns) & (columns < right) & (top <= rows) & (rows < bottom)
    total = float(cam.sum())
    return (float(cam[inside].sum()) / total if total else 0.0), float(inside.mean())


@torch.no_grad()
def insertion_deletion(
    predict: Callable[[Tensor], Tensor], image: Tensor, cam: np.ndarray[Any, Any], label: int, *, steps: int = STEPS
) -> tuple[float, float]:
    """Areas under the curves of the class's probability, as pixels come or go in the order of a map.

    Petsiuk et al., "RISE", 2018: pixels are inserted into a blurred image, and deleted to the mean colour. The better
    the map, the larger the first and the smaller the second.

    Args:
        predict: images (B, C, H, W) to logits (B, N).
        image: (1, C, H, W), normalised, so that 0 is the mean colour.
        cam: (H, W) of the same size.
        label: the class.
        steps: into which the pixels are divided.

    Returns:
        Insertion and deletion, 0 to 1.
    """
    order = np.argsort(-cam.flatten(), kind="stable")
    rank = torch.empty(cam.size, dtype=torch.long)
    rank[torch.from_numpy(order)] = torch.arange(cam.size)
    rank = rank.view(cam.shape).to(image.device)
    side = 2 * (min(image.shape[2:]) // 10) + 1
    blurred = gaussian_blur(image, [side, side], [side / 4] * 2)
    areas = []
    for start, end in ((blurred, image), (image, torch.zeros_like(image))):
        mixed = [torch.where(rank < round(cam.size * step / steps), end, start) for step in range(steps + 1)]
        shares = predict(torch.cat(mixed)).float().softmax(dim=1)[:, label].tolist()
        areas.append((sum(shares) - (shares[0] + shares[-1]) / 2) / steps)  # trapezoids
    return areas[0], areas[1]
