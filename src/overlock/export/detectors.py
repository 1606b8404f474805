"""A detector's proposals and heads in operations that can be traced, of one image of any size.

They compute what torchvision's do in evaluation, of the same layers. Theirs ask how many boxes are left at each step,
which a graph cannot know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import clip_boxes_to_image, nms, remove_small_boxes

Maps = dict[str, Tensor]
Size = tuple[int, int]

OUTPUTS = ("boxes", "labels", "scores", "masks")
"""Of a file, in their order; masks where the detector has some."""
SMALLEST_SIDE = 1e-2
"""Of a box that torchvision's heads keep, in pixels."""


def detect(network: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """The objects of one image, as the network finds them after its own preparation.

    Args:
        network: a detector, with torchvision's proposals and heads or those of this module.
        images: (1, C, H, W), resized and normalised.

    Returns:
        Boxes (N, 4) as left, top, right, bottom in pixels, labels (N,) from 1 on, scores (N,) from the highest on, and
        of detectors with masks the shares (N, 1, 28, 28) of each box.
    """
    model: Any = network
    height, width = images.shape[2:]
    unit = model.transform.size_divisible
    padded = F.pad(images, (0, _up(width, unit) - width, 0, _up(height, unit) - height))
    features = model.backbone(padded)
    proposals, _ = model.rpn(ImageList(padded, [(height, width)]), features)
    found, _ = model.roi_heads(features, proposals, [(height, width)])
    return tuple(found[0][name] for name in OUTPUTS if name in found[0])


def _up(side: int, unit: int) -> int:
    """The next multiple of a unit."""
    return (side + unit - 1) // unit * unit


class PlainProposals(nn.Module):
    """torchvision's ``RegionProposalNetwork``, called as it, for one image.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: RegionProposalNetwork):
        super().__init__()
        own: Any = network
        self.head, self.anchors, self.box_coder = own.head, own.anchor_generator, own.box_coder
        self.before, self.after = own.pre_nms_top_n(), own.post_nms_top_n()
        self.overlap, self.least_side, self.least_score = own.nms_thresh, own.min_size, own.score_thresh

    def forward(self, images: ImageList, features: Maps) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = list(features.values())
        (size,) = images.image_sizes
        sides = [one.shape[2:] for one in maps]
        strides: Any = [[a // b for a, b in zip(images.tensors.shape[2:], own, strict=True)] for own in sides]
        anchors = self.anchors.grid_anchors(sides, strides)
        logits, shifts = self.head(maps)
        levels = [self._level(a, b, c, size) for a, b, c in zip(logits, shifts, anchors, strict=True)]
        boxes, scores = (torch.cat(parts) for parts in zip(*levels, strict=True))
        best = scores.sort(descending=True).indices[: self.after]
        return [boxes[best]], {}

    def _level(self, logits: Tensor, shifts: Tensor, anchors: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Logits (1, A, H, W), shifts (1, 4 A, H, W) and anchors (H W A, 4) of a map to boxes (N, 4) and scores."""
        logits = logits.permute(0, 2, 3, 1).flatten()
        shifts = shifts.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(0, 3)
        logits, best = logits.topk(torch.sym_min(self.before, logits.shape[0]))
        boxes = clip_boxes_to_image(self.box_coder.decode_single(shifts[best], anchors[best]), size)
        boxes, scores = _choose(boxes, logits.sigmoid(), remove_small_boxes(boxes, self.least_side))
        boxes, scores = _choose(boxes, scores, torch.where(scores >= self.least_score)[0])
        return _choose(boxes, scores, suppress(boxes, scores, self.overlap))


class PlainHeads(nn.Module):
    """torchvision's ``RoIHeads``, or the stages of a cascade, called as they, for one image.

    Args:
        heads: in evaluation mode.
    """

    def __init__(self, heads: nn.Module):
        super().__init__()
        self.stages: Any = nn.ModuleList(getattr(heads, "stages", [heads]))

    def forward(
        self, features: Maps, proposals: list[Tensor], image_shapes: list[Size]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        (boxes,), (size,) = proposals, image_shapes
        shares: list[Tensor] = []
        for number, stage in enumerate(self.stages, start=1):
            logits, shifts = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, [boxes], image_shapes)))
            shares.append(logits.softmax(dim=1))
            moved = clip_boxes_to_image(stage.box_coder.decode_single(shifts, boxes).unflatten(1, (-1, 4)), size)
            if number < len(self.stages):
                likeliest = logits[:, 1:].argmax(dim=1) + 1
                boxes = moved.gather(1, likeliest[:, None, None].expand(-1, 1, 4))[:, 0]
        found = self._choose(torch.stack(shares).mean(dim=0), moved, size)
        if self.stages[-1].has_mask():
            found["masks"] = self._masks(features, found, image_shapes)
        return [found], {}

    def _choose(self, shares: Tensor, boxes: Tensor, size: Size) -> dict[str, Tensor]:
        """Shares (R, classes) and boxes (R, classes, 4), both with the background, to the objects."""
        last, classes = self.stages[-1], shares.shape[1] - 1
        scores, boxes = shares[:, 1:].flatten(), boxes[:, 1:].flatten(0, 1)
        sure = torch.where(scores > last.score_thresh)[0]
        sure = sure[remove_small_boxes(boxes[sure], SMALLEST_SIDE)]
        boxes, scores, labels = boxes[sure], scores[sure], sure % classes + 1
        apart = labels * (max(size) + 1)  # boxes of different classes, which so do not meet
        best = suppress(boxes + apart[:, None], scores, last.nms_thresh)[: last.detections_per_img]
        return dict(boxes=boxes[best], labels=labels[best], scores=scores[best])

    def _masks(self, features: Maps, found: dict[str, Tensor], sizes: list[Size]) -> Tensor:
        boxes, labels = found["boxes"], found["labels"]
        logits = [
            stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, [boxes], sizes)))
            for stage in self.stages
        ]
        shares = torch.stack([one.sigmoid() for one in logits]).mean(dim=0)
        return shares.gather(1, labels[:, None, None, None].expand(-1, 1, *shares.shape[2:]))


def suppress(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """torchvision's ``nms`` of any number of boxes inside an image, also of none.

    Of torch.export, at least two boxes are kept. Two that meet none and are the last make that so.
    """
    apart = boxes.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    kept = nms(torch.cat([boxes, apart]), torch.cat([scores, scores.new_full((2,), -1)]), overlap)
    return kept[:-2]


def _choose(boxes: Tensor, scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[chosen], scores[chosen]
