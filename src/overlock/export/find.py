"""Objects in images by an exported detector, prepared and returned as by the network itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from overlock.checkpoints import Record
from overlock.export.detectors import OUTPUTS
from overlock.export.runtimes import ExportedNetwork
from overlock.tasks.detection import StripTransform, as_result, check_limits


def with_preparation(network: nn.Module, record: Record) -> Record:
    """The record of a detector, which prepares images and chooses objects by itself, with how it does.

    Its preprocessing has mean, std, min_size (what the short side is brought to, in pixels), max_size (what the long
    one may be at most), and what the last heads leave of the objects of an image: those of scores above score_thresh,
    without the less sure of two of a class that overlap by more than nms_thresh, and the surest detections_per_img.
    """
    own: Any = network
    least = own.transform.min_size
    heads = getattr(own.roi_heads, "stages", [own.roi_heads])[-1]
    prepared = dict(
        mean=tuple(own.transform.image_mean),
        std=tuple(own.transform.image_std),
        min_size=least[-1] if isinstance(least, Sequence) else least,
        max_size=own.transform.max_size,
        score_thresh=heads.score_thresh,
        nms_thresh=heads.nms_thresh,
        detections_per_img=heads.detections_per_img,
    )
    return replace(record, preprocessing={**record.preprocessing, **prepared})


def find_in_file(
    exported: ExportedNetwork,
    images: Sequence[Tensor],
    *,
    threshold: float | None = None,
    max_detections: int | None = None,
    nms_iou: float | None = None,
) -> list[dict[str, Any]]:
    """As :func:`overlock.tasks.detection.find_objects`, by a file of a detector, an image at a time.

    Args:
        exported: the file.
        images: (C, H, W) each, of 0 to 1.
        threshold: score from which on an object counts, from the file's own on.
        max_detections: objects of an image, the surest; up to the file's own number.
        nms_iou: only None, since it is fixed in the file.

    Raises:
        ValueError: for a limit that will not do, a file of another task, and images that it does not take.
    """
    check_limits(0 if threshold is None else threshold, max_detections, nms_iou)
    if exported.spec.task != "detect":
        raise ValueError(f"{exported.path}: a file of --task {exported.spec.task}; objects need one of --task detect")
    own = exported.spec.record.preprocessing
    if "score_thresh" not in own:
        raise ValueError(f"{exported.path}: written before files held the limits of their objects; export it anew")
    least, most = own["score_thresh"], own["detections_per_img"]
    fixed = dict(
        nms_iou=nms_iou is not None,
        threshold=threshold is not None and threshold < least,
        max_detections=max_detections is not None and max_detections > most,
    )
    for name in (name for name, is_fixed in fixed.items() if is_fixed):
        raise ValueError(
            f"{name} cannot be so with an exported file, which keeps up to {most} objects, of scores above "
            f"{least:g}; leave it out, or take the checkpoint"
        )
    transform = _make_transform(exported)
    results = []
    for image in images:
        prepared, _ = transform([image.cpu().float()])
        (given,) = prepared.image_sizes
        pixels = prepared.tensors[:, :, : given[0], : given[1]]
        if exported.spec.with_preprocessing:
            pixels = (255 * pixels).round().clamp(0, 255).to(torch.uint8)
        found = _limited(dict(zip(OUTPUTS, exported.run(pixels), strict=False)), threshold, max_detections)
        results.append(as_result(found, given, (image.shape[1], image.shape[2])))
    return results


def _make_transform(exported: ExportedNetwork) -> GeneralizedRCNNTransform:
    """The network's own, less the normalisation where that is in the file."""
    given = exported.spec.record.preprocessing
    mean, std = given["mean"], given["std"]
    if exported.spec.with_preprocessing:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    return StripTransform(given["min_size"], given["max_size"], mean, std).eval()


def _limited(found: Mapping[str, Tensor], threshold: float | None, most: int | None) -> dict[str, Tensor]:
    """The surest of the objects, which are in the order of their scores."""
    count = len(found["scores"])
    if threshold is not None:
        count = int((found["scores"] >= float(np.float32(threshold))).sum())
    return {name: values[: count if most is None else min(most, count)] for name, values in found.items()}
