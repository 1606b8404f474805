"""Scores of detectors and segmenters, from torchmetrics, pycocotools and a confusion matrix."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from overlock.data.label_values import IGNORED
from overlock.data.run_lengths import Masks, from_tensor
from overlock.extras import needing

Result = dict[str, Any]
# What torchmetrics' precisions end in, and ours: at all overlaps, at 0.5 and 0.75, of small, medium and large objects.
SIZES = {"": "", "_50": "50", "_75": "75", "_small": "S", "_medium": "M", "_large": "L"}


class SegmentationMetrics:
    """Mean IoU, mean accuracy and accuracy of all pixels, in shares.

    Classes that neither the labels nor the predictions have are left out of the means.

    Args:
        num_classes: of the labels.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = IGNORED):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add images.

        Args:
            predicted: classes of the pixels, of any shape.
            labels: of the same shape.

        Raises:
            ValueError: for a label that is neither a class nor ignored, or another shape.
        """
        if predicted.shape != labels.shape:
            raise ValueError(f"predictions of shape {tuple(predicted.shape)} for labels of {tuple(labels.shape)}")
        counted = labels != self.ignore_index
        true, guess = labels[counted].long().cpu(), predicted[counted].long().cpu()
        if true.numel() == 0:
            return
        wrong = true[(true < 0) | (true >= self.num_classes)]
        if wrong.numel() > 0:
            raise ValueError(
                f"a label is {int(wrong[0])}, where classes go from 0 to {self.num_classes - 1} "
                f"and {self.ignore_index} is ignored; check num_classes and reduce_zero_label"
            )
        pairs = torch.bincount(self.num_classes * true + guess, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes)

    def measures(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc; NaN before the first pixel."""
        right, true, guessed = self.counts.diag().double(), self.counts.sum(1).double(), self.counts.sum(0).double()
        return dict(
            mIoU=float((right / (true + guessed - right)).nanmean()),
            mAcc=float((right / true).nanmean()),
            aAcc=float(right.sum() / true.sum()),
        )

    def iou(self) -> Tensor:
        """Of each class; NaN for one that is nowhere."""
        right = self.counts.diag().double()
        return right / (self.counts.sum(0) + self.counts.sum(1) - right)


class DetectionMetrics:
    """COCO's average precisions, by pycocotools: AP, AP50, AP75 and those of small, medium and large objects.

    Classes without an object to find, or with crowds alone, are left out of the means.

    Args:
        masks: score the masks too.
        by_class: compute :meth:`class_measures` too, which takes as long again.

    Raises:
        ImportError: without torchmetrics or pycocotools.
    """

    def __init__(self, *, masks: bool = False, by_class: bool = False):
        with needing("detection scores need torchmetrics", "detect"):
            from torchmetrics.detection import MeanAveragePrecision  # noqa: PLC0415
        self.kinds = ("bbox", "segm") if masks else ("bbox",)
        # COCO's own thresholds: torchmetrics' are rounded to float32, which decides where an overlap is just 0.6.
        self.metric: Any = MeanAveragePrecision(
            iou_type=cast(Any, self.kinds), backend="pycocotools", iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(), sync_on_compute=False, class_metrics=by_class,
        )  # fmt: skip
        self.metric.warn_on_many_detections = False

    def update(self, results: list[Result], targets: list[Result]) -> None:
        """Add images.

        Args:
            results: of a detector in evaluation: boxes (N, 4) as left, top, right, bottom, scores, labels, and masks,
                (N, 1, H, W) of shares or :class:`overlock.data.run_lengths.Masks`.
            targets: boxes, labels, masks, (N, H, W) or ``Masks``, and where known iscrowd and area.
        """
        names = ("boxes", "scores", "labels")
        found = [{name: result[name].cpu() for name in names} for result in results]
        given = ("boxes", "labels", "iscrowd", "area")
        wanted = [{name: target[name].cpu() for name in given if name in target} for target in targets]
        if "segm" not in self.kinds:
            self.metric.update(found, wanted)
            return
        # torchmetrics takes pixels, gigabytes of a large image, but keeps run lengths, which it is given instead.
        for item in (*found, *wanted):
            item["masks"] = torch.zeros(len(item["labels"]), 1, 1, dtype=torch.bool)
        self.metric.update(found, wanted)
        for state, items in ((self.metric.detection_mask, results), (self.metric.groundtruth_mask, targets)):
            if items:
                state[-len(items) :] = [_run_lengths(item["masks"]) for item in items]

    def state(self) -> dict[str, list[Any]]:
        """All that has been added so far, for :meth:`merge`."""
        return {name: list(part) for name, part in self.metric.metric_state.items()}

    def merge(self, states: list[dict[str, list[Any]]]) -> None:
        """Take the states of several of these, say of other processes, in place of its own."""
        for name in states[0]:
            setattr(self.metric, name, [one for state in states for one in state[name]])
        self.metric._update_count = 1  # else it warns that nothing was added

    def measures(self) -> dict[str, float]:
        """'box_AP', 'box_AP50' and so on, 'mask_AP' and so on; NaN where there are no such objects to find."""
        computed = self.metric.compute()
        return {
            f"{name}_AP{ours}": _measured(computed[f"{prefix}map{theirs}"])
            for prefix, name in self._names()
            for theirs, ours in SIZES.items()
        }

    def class_measures(self) -> dict[str, dict[int, float]]:
        """'box_AP' and perhaps 'mask_AP' of each label that was found or there to find; NaN for one not there."""
        computed = self.metric.compute()
        labels = computed["classes"].reshape(-1).tolist()
        return {
            f"{name}_AP": dict(zip(labels, map(_measured, computed[f"{prefix}map_per_class"].reshape(-1)), strict=True))
            if labels
            else {}
            for prefix, name in self._names()
        }

    def _names(self) -> list[tuple[str, str]]:
        """What torchmetrics' names begin with, and ours."""
        if len(self.kinds) == 1:
            return [("", "box")]
        return [("bbox_", "box"), ("segm_", "mask")]


def _run_lengths(masks: Masks | Tensor) -> tuple[tuple[tuple[int, int], bytes], ...]:
    """Sizes and compressed run lengths, as torchmetrics keeps them."""
    if isinstance(masks, Tensor):
        masks = from_tensor(masks[:, 0] > 0.5 if masks.dim() == 4 else masks)
    return tuple(((mask["size"][0], mask["size"][1]), mask["counts"]) for mask in masks.to_coco())


def _measured(share: Tensor) -> float:
    """pycocotools' -1 is no share: it stands for objects that are not there."""
    return float(share) if share >= 0 else math.nan
