"""Cascade R-CNN and Cascade Mask R-CNN: three stages of heads, each on the boxes of the one before (section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

from overlock.tasks.detection import make_mask_parts, make_settings, take_strips

Target = dict[str, Tensor]
Maps = dict[str, Tensor]


class Stage(NamedTuple):
    """Settings of a stage."""

    iou: float
    """Overlap with an object from which on a box is one of its own."""
    weight: float
    """Of its losses."""
    box_weights: tuple[float, float, float, float]
    """One over the deviations of the shifts and scales that it predicts."""


# As in the cascade's paper.
STAGES = (
    Stage(0.5, 1.0, (10.0, 10.0, 5.0, 5.0)),
    Stage(0.6, 0.5, (20.0, 20.0, 10.0, 10.0)),
    Stage(0.7, 0.25, (30.0, 30.0, 15.0, 15.0)),
)
GIOU_WEIGHT = 10.0


class CascadeStage(RoIHeads):
    """torchvision's heads of one stage, with a loss on the decoded boxes where ``giou`` is set."""

    def __init__(self, *, giou: bool, **parts: Any):
        super().__init__(**parts)
        self.giou = giou

    def predict(self, features: Maps, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and shifts (N, 4 classes) of all images' boxes."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, sizes)))

    def mask_logits(self, features: Maps, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """(N, classes, 28, 28)"""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, sizes)))

    def box_loss(self, boxes: Tensor, shifts: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """GIoU of the objects' decoded boxes, over the count of all boxes.

        Args:
            boxes: (N, 4).
            shifts: (N, 4 classes), as predicted.
            labels: (N,), 0 for the background.
            targets: (N, 4), the shifts that lead to the objects.
        """
        objects = torch.where(labels > 0)[0]
        predicted = shifts.unflatten(1, (-1, 4))[objects, labels[objects]]
        decoded, wanted = (self.decode(boxes[objects], x) for x in (predicted, targets[objects]))
        return GIOU_WEIGHT * generalized_box_iou_loss(decoded, wanted, reduction="sum") / max(1, labels.numel())

    def decode(self, boxes: Tensor, shifts: Tensor) -> Tensor:
        """Boxes (N, 4) moved by shifts (N, 4)."""
        return self.box_coder.decode_single(shifts.float(), boxes.float())

    def refine(
        self, boxes: list[Tensor], logits: Tensor, shifts: Tensor, sizes: list[tuple[int, int]], labels: Tensor | None
    ) -> list[Tensor]:
        """Each box moved as its class wants it: that of its object, or else the likeliest."""
        kind = logits[:, 1:].argmax(dim=1) + 1
        if labels is not None:
            kind = torch.where(labels > 0, labels, kind)
        rows = torch.arange(len(kind), device=kind.device)
        moved = self.decode(torch.cat(boxes), shifts.unflatten(1, (-1, 4))[rows, kind])
        parts = moved.detach().split([len(x) for x in boxes])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


class CascadeHeads(nn.Module):
    """Stages of heads in the place of torchvision's ``RoIHeads``, and called like it.

    In training each stage is trained on the boxes of the one before. In a test the classes are the mean of all stages'
    on the boxes that each was given, the boxes are the last stage's, and the masks the mean of all stages'.

    Args:
        stages: the heads.
        weights: of their losses.
    """

    def __init__(self, stages: Sequence[CascadeStage], weights: Sequence[float]):
        super().__init__()
        self.stages: Any = nn.ModuleList(stages)
        self.weights = list(weights)

    def forward(
        self,
        features: Maps,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], Target]:
        """Detections of each image and losses, of which training gives the latter and a test the former."""
        if self.training:
            if targets is None:
                raise ValueError("a detector in training needs targets; call eval() to detect")
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self, features: Maps, proposals: list[Tensor], sizes: list[tuple[int, int]], targets: list[Target]
    ) -> Target:
        losses: Target = {}
        for number, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True), start=1):
            boxes, matched, labels, shifts_wanted = stage.select_training_samples(proposals, targets)
            logits, shifts = stage.predict(features, boxes, sizes)
            of_classes, of_boxes = fastrcnn_loss(logits, shifts, labels, shifts_wanted)
            all_labels = torch.cat(labels)
            if stage.giou:
                of_boxes = stage.box_loss(torch.cat(boxes), shifts, all_labels, torch.cat(shifts_wanted))
            losses[f"loss_classifier_{number}"] = weight * of_classes
            losses[f"loss_box_reg_{number}"] = weight * of_boxes
            if stage.has_mask():
                losses[f"loss_mask_{number}"] = weight * _mask_loss(
                    stage, features, boxes, sizes, targets, labels, matched
                )
            refined = stage.refine(boxes, logits, shifts, sizes, all_labels)
            proposals = [
                _without(new, old, target["boxes"])
                for new, old, target in zip(refined, boxes, targets, strict=True)
            ]  # fmt: skip
        return losses

    def _detect(self, features: Maps, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[Target]:
        shares: list[Tensor] = []
        for number, stage in enumerate(self.stages, start=1):
            logits, shifts = stage.predict(features, boxes, sizes)
            shares.append(F.softmax(logits.float(), dim=1))
            if number < len(self.stages):
                boxes = stage.refine(boxes, logits, shifts, sizes, None)
        mean = torch.stack(shares).mean(dim=0)
        logits = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        found = self.stages[-1].postprocess_detections(logits, shifts, boxes, sizes)
        results = [dict(zip(("boxes", "scores", "labels"), x, strict=True)) for x in zip(*found, strict=True)]
        if self.stages[-1].has_mask():
            self._add_masks(results, features, sizes)
        return results

    def _add_masks(self, results: list[Target], features: Maps, sizes: list[tuple[int, int]]) -> None:
        boxes, labels = [x["boxes"] for x in results], torch.cat([x["labels"] for x in results])
        each = [stage.mask_logits(features, boxes, sizes).sigmoid() for stage in self.stages]
        rows = torch.arange(len(labels), device=labels.device)
        masks = torch.stack(each).mean(dim=0)[rows, labels][:, None]
        for result, part in zip(results, masks.split([len(x) for x in boxes]), strict=True):
            result["masks"] = part


def _mask_loss(
    stage: CascadeStage, features: Maps, boxes: list[Tensor], sizes: list[tuple[int, int]], targets: list[Target],
    labels: list[Tensor], matched: list[Tensor],
) -> Tensor:  # fmt: skip
    """torchvision's, on the boxes of objects."""
    objects = [torch.where(x > 0)[0] for x in labels]
    chosen, ids = ([x[i] for x, i in zip(group, objects, strict=True)] for group in (boxes, matched))
    masks, kinds = ([target[name] for target in targets] for name in ("masks", "labels"))
    return maskrcnn_loss(stage.mask_logits(features, chosen, sizes), chosen, masks, kinds, ids)


def _without(refined: Tensor, boxes: Tensor, given: Tensor) -> Tensor:
    """Refined boxes, less those that came of an object's own box, which each stage is given anew."""
    own = (boxes[:, None] == given[None].to(boxes)).all(dim=2).any(dim=1)
    return refined[~own]


def cascade_rcnn(backbone: str = "overlock_t", *, num_classes: int, masks: bool = False, **options: Any) -> FasterRCNN:
    """Cascade R-CNN with Swin's heads, called as torchvision's detectors are.

    Args:
        backbone: name of the backbone, any that timm knows.
        num_classes: of the objects; label 0 is the background, theirs begin at 1.
        masks: predict the objects' masks too.
        options: further arguments, which like the errors are those of
            :func:`overlock.tasks.detection.make_settings`.
    """
    settings = make_settings(backbone, num_classes=num_classes, **options)
    count = settings.pop("num_classes")
    model = take_strips(  # the stages take the place of the heads
        FasterRCNN(box_head=nn.Identity(), box_predictor=nn.Identity(), **settings)
    )
    width = model.backbone.out_channels
    stages = [_make_stage(stage, model.roi_heads, width, count, masks) for stage in STAGES]
    model.roi_heads = CascadeHeads(stages, [stage.weight for stage in STAGES])
    return model


def cascade_mask_rcnn(backbone: str = "overlock_t", *, num_classes: int, **options: Any) -> FasterRCNN:
    """Cascade Mask R-CNN; arguments and errors are those of :func:`cascade_rcnn`."""
    return cascade_rcnn(backbone, num_classes=num_classes, masks=True, **options)


def _make_stage(stage: Stage, like: RoIHeads, width: int, classes: int, masks: bool) -> CascadeStage:
    """A stage of Swin's heads, four 3x3 convolutions with batch norm and a layer of 1024, else like other heads."""
    size = like.box_roi_pool.output_size[0]
    return CascadeStage(
        giou=True,
        box_roi_pool=like.box_roi_pool,
        box_head=FastRCNNConvFCHead((width, size, size), [width] * 4, [1024], norm_layer=nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(1024, classes),
        fg_iou_thresh=stage.iou,
        bg_iou_thresh=stage.iou,
        batch_size_per_image=like.fg_bg_sampler.batch_size_per_image,
        positive_fraction=like.fg_bg_sampler.positive_fraction,
        bbox_reg_weights=stage.box_weights,
        score_thresh=like.score_thresh,
        nms_thresh=like.nms_thresh,
        detections_per_img=like.detections_per_img,
        **(make_mask_parts(width, classes) if masks else {}),
    )
