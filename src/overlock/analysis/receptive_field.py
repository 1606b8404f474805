"""The effective receptive field: how much each input pixel contributes to a feature at the middle of the map.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", 2016; Figure 2a. The
scores of an image are the gradient of the central feature with respect to the input, of all channels together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SHARES = (0.2, 0.3, 0.5, 0.99)
Gradient = Literal["relu", "abs"]
Point = tuple[float, float]


def central_scores(features: Tensor, images: Tensor, gradient: Gradient = "relu") -> Tensor:
    """Contribution of each pixel to the feature in the middle of a map.

    Args:
        features: (B, C, H', W'), computed of the images.
        images: (B, Cin, H, W), which require gradients.
        gradient: 'relu' takes positive features and positive gradients, as large-kernel networks are compared since
            RepLKNet; 'abs' all features, and the size of the gradients.

    Returns:
        (B, H, W), from 0 on, float64.

    Raises:
        ValueError: where a gradient is no finite number.
    """
    row, column = features.shape[2] // 2, features.shape[3] // 2
    centre = features[:, :, row, column]
    target = (centre.relu() if gradient == "relu" else centre).sum()
    (slopes,) = torch.autograd.grad(target, images, retain_graph=True)
    if not slopes.isfinite().all():
        raise ValueError("the gradient of the feature is no finite number; try --precision bf16 or fp32")
    return (slopes.relu() if gradient == "relu" else slopes.abs()).double().sum(dim=1)


def find_centre(scores: Tensor) -> Point:
    """Row and column, in pixels from the upper left corner, with half of the scores (H, W) on either side.

    Where a feature looks is not (i + 0.5) strides for every network: after padded 3x3 convolutions of stride 2 it is
    half a pixel more than i strides. So it is measured.
    """
    return _median(scores.sum(dim=1)), _median(scores.sum(dim=0))


def _median(weights: Tensor) -> float:
    total = weights.cumsum(0) / weights.sum()
    place = int((total < 0.5).sum())
    before = float(total[place - 1]) if place else 0.0
    return place + (0.5 - before) / max(float(total[place]) - before, 1e-12)


def square_curve(scores: Tensor, centre: Point) -> Tensor:
    """Share of the scores in the centred square of each side, pixels being squares of which it may hold a part.

    Args:
        scores: (H, W), from 0 on.
        centre: row and column.

    Returns:
        (N + 1,): entry s is that of the square of side s; the last square holds all.
    """
    scores = scores.double().cpu()
    most = max(max(2 * middle, 2 * (n - middle)) for n, middle in zip(scores.shape, centre, strict=True))
    sides = torch.arange(int(most) + 2, dtype=torch.float64)[:, None]
    rows, columns = (_held(n, middle, sides) for n, middle in zip(scores.shape, centre, strict=True))
    return ((rows @ scores) * columns).sum(dim=1) / scores.sum()


def _held(size: int, middle: float, sides: Tensor) -> Tensor:
    """How much of each row (or column) lies within the squares: (N + 1, size)."""
    edge = torch.arange(size, dtype=torch.float64)
    return ((edge + 1).minimum(middle + sides / 2) - edge.maximum(middle - sides / 2)).clamp(0, 1)


def side_of(curve: Tensor, share: float) -> float:
    """The side at which a curve reaches a share, between two whole sides by a straight line."""
    after = int((curve < share - 1e-9).sum())
    if after == 0:
        return 0.0
    low, high = float(curve[after - 1]), float(curve[after])
    return after - 1 + (share - low) / max(high - low, 1e-12)


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """Of one stage, over many images."""

    stage: int
    scores: Tensor
    """(H, W), the mean of the images, of which each sums to 1."""
    centre: Point
    """Row and column of its middle, in pixels."""
    curves: Tensor
    """(images, N + 1): the share in the centred square of each side, in pixels."""

    def side(self, share: float) -> tuple[float, float]:
        """Side in pixels of the square that holds a share: that of the mean scores, and its deviation over images."""
        sides = torch.tensor([side_of(curve, share) for curve in self.curves])
        return side_of(self.curves.mean(dim=0), share), float(sides.std(correction=min(1, len(sides) - 1)))


def measure_fields(
    stages: Callable[[Tensor], list[Tensor]],
    batches: Iterable[Tensor],
    *,
    wanted: Sequence[int] = (3, 4),
    gradient: Gradient = "relu",
) -> list[ReceptiveField]:
    """Effective receptive fields over images of one size.

    Args:
        stages: images to the maps of stages 1, 2 and so on; see :func:`overlock.analysis.backbones.make_stages`.
        batches: images (B, C, H, W), normalised, all of one size. The scores of all are kept, 8 H W bytes each.
        wanted: numbers of the stages.
        gradient: see :func:`central_scores`.

    Raises:
        ValueError: for a stage that there is not, no images, a feature that nothing contributes to, and gradients that
            are no finite numbers.
    """
    kept: dict[int, list[Tensor]] = {stage: [] for stage in wanted}
    for batch in batches:
        images = batch.detach().clone().requires_grad_()
        maps = stages(images)
        for stage in wanted:
            if not 1 <= stage <= len(maps):
                raise ValueError(f"stages are 1 to {len(maps)}, got {stage}")
            scores = central_scores(maps[stage - 1], images, gradient).cpu()
            total = scores.sum(dim=(1, 2), keepdim=True)
            if (total <= 0).any():
                raise ValueError(f"nothing in the image contributes to the middle of stage {stage}; try --gradient abs")
            kept[stage] += list(scores / total)
    if not all(kept.values()):
        raise ValueError("there are no images; give some")
    return [_summarise(stage, torch.stack(scores)) for stage, scores in kept.items()]


def _summarise(stage: int, scores: Tensor) -> ReceptiveField:
    mean = scores.mean(dim=0)
    centre = find_centre(mean)
    curves = torch.stack([square_curve(one, centre) for one in scores])
    return ReceptiveField(stage=stage, scores=mean, centre=centre, curves=curves)
