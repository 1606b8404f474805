"""Evaluation of detectors and segmenters: average precisions, mean IoU, speed."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from overlock.checkpoint import Record
from overlock.data.dense_transforms import (
    PrepareLabels,
    PrepareObjects,
    make_detection_transform,
    make_segmentation_transform,
)
from overlock.data.detection import load_detection_test
from overlock.data.label_maps import load_label_test
from overlock.data.loaders import as_lists, make_test_loader
from overlock.deploy.machine import Precision, cast_to, choose_device, settle
from overlock.files import write_atomically
from overlock.fused.meanwhile import without_waiting
from overlock.label_files import LabelFiles
from overlock.object_files import ObjectFiles
from overlock.tasks.detection import find_objects
from overlock.tasks.scores import DetectionScore, SegmentationScore
from overlock.tasks.sliding import segment


@dataclass(frozen=True, kw_only=True)
class DenseEvaluation:
    """What a detector or segmenter did on labelled images."""

    name: str
    """Of the model or its file."""
    params: int
    """Parameters of the network as it runs, folded."""
    images: int
    """Images that could be read."""
    unreadable: tuple[str, ...]
    """Images that could not, and why."""
    measures: dict[str, float]
    """By their names: box_AP, mask_AP and so on, or mIoU, mAcc and aAcc."""
    classes: dict[str, float]
    """IoU of each class from segmenters, box AP from detectors; NaN for one that is nowhere."""
    notes: tuple[str, ...]
    """What was left out of the data, or read in another way than it stands there."""
    speed_with_loading: float
    """Images a second from the files on, scoring included."""
    found: tuple[dict[str, Any], ...] = ()
    """A detector's objects in COCO's own form of results, with the data's ids of images and categories, if kept."""


@torch.inference_mode()
def evaluate_dense(
    network: nn.Module,
    record: Record,
    data: str | ObjectFiles | LabelFiles,
    *,
    name: str,
    held_out: bool = False,
    seed: int = 0,
    batch_size: int = 1,
    workers: int = 2,
    device: str | None = None,
    precision: Precision = "fp32",
    show_progress: bool = False,
    strict: bool = False,
    keep_found: bool = False,
    **testing: Any,
) -> DenseEvaluation:
    """Evaluate a detector or segmenter on the images to test on.

    Args:
        network: as :func:`overlock.checkpoint.load_model` gives it.
        record: likewise.
        data: folder, in a form that training takes; or where in it, or elsewhere, the part to test on lies, for a
            detector as :class:`overlock.object_files.ObjectFiles`, for a segmenter as
            :class:`overlock.label_files.LabelFiles`.
        name: what the result calls the network.
        held_out: of a folder without a part to test on, take what training holds out.
        seed: of those images.
        batch_size: images a pass, of detectors.
        workers: processes that load images.
        device: 'cpu', 'cuda' and so on; by default a GPU where there is one.
        precision: of the network's arithmetic.
        show_progress: on stderr.
        strict: let an image that cannot be read be an error.
        keep_found: keep a detector's objects in the result.
        testing: of segmenters: scales, flip, window and stride, as :func:`overlock.tasks.sliding.segment` takes them;
            of detectors: max_detections and nms_iou of :func:`overlock.tasks.detection.find_objects`.

    Raises:
        ValueError: for data that cannot be read, or is of other classes.
        ImportError: of a detector, without torchmetrics or pycocotools.
    """
    where = choose_device(device)
    network = settle(network, record, where)
    masks = "mask" in str(record.head)
    source: Any
    score: DetectionScore | SegmentationScore
    if record.task == "detect":
        score = DetectionScore(masks=masks, by_class=True)
        files = ObjectFiles(data=data) if isinstance(data, str) else data
        assert isinstance(files, ObjectFiles)
        source = load_detection_test(files, classes=record.classes, masks=masks, held_out=held_out, seed=seed)
        prepare: Any = PrepareObjects(make_detection_transform(training=False))
    else:
        score = SegmentationScore(len(record.classes))
        maps = LabelFiles(data=data) if isinstance(data, str) else data
        assert isinstance(maps, LabelFiles)
        source = load_label_test(maps, classes=record.classes, held_out=held_out, seed=seed)
        prepare = PrepareLabels(make_segmentation_transform(training=False, scale=record.preprocessing["scale"]))
    loader = make_test_loader(source, prepare, batch_size=batch_size, join=as_lists, workers=workers)
    unreadable: list[str] = []
    kept: list[dict[str, Any]] = []
    started, count = time.perf_counter(), 0
    with loader.batches() as batches:
        for batch in track(batches, total=len(loader), description=name, transient=True, disable=not show_progress):
            unreadable += batch.unreadable
            if strict and unreadable:
                raise ValueError(unreadable[0])
            count += len(batch.labels)
            if isinstance(score, DetectionScore):
                if len(batch.labels):
                    with cast_to(precision, where), without_waiting(network):
                        found = find_objects(network, [image.to(where) for image in batch.images], **testing)
                    score.update(found, batch.labels)
                    for result, target in zip(found, batch.labels, strict=True) if keep_found else ():
                        kept += _to_coco(result, target["image_id"], source.category_ids)
                continue
            for image, labels in zip(batch.images, batch.labels, strict=True):
                with cast_to(precision, where), without_waiting(network):
                    shares = segment(network, image[None].to(where), size=labels.shape, **testing)
                score.update(shares[0].argmax(dim=0), labels)
    if count == 0:
        raise ValueError(f"none of the {len(unreadable)} images could be read; the first: {unreadable[0]}")
    speed = count / (time.perf_counter() - started)
    if isinstance(score, SegmentationScore):
        by_class = dict(zip(record.classes, score.iou().tolist(), strict=True))
    else:
        precisions = score.class_measures()["box_AP"]
        by_class = {c: precisions.get(label, math.nan) for label, c in enumerate(record.classes, start=1)}
    return DenseEvaluation(
        name=name, params=sum(p.numel() for p in network.parameters()), images=count, unreadable=tuple(unreadable),
        measures=score.measures(), classes=by_class, notes=getattr(source, "notes", ()), speed_with_loading=speed,
        found=tuple(kept),
    )  # fmt: skip


def _to_coco(result: dict[str, Any], image_id: Any, category_ids: Sequence[Any]) -> list[dict[str, Any]]:
    """The objects of an image in the form that pycocotools' loadRes takes."""
    masks = result["masks"].to_coco() if "masks" in result else None
    entries = []
    for i, (label, score, box) in enumerate(
        zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist(), strict=True)
    ):
        left, top, right, bottom = box
        entry = dict(
            image_id=image_id, category_id=category_ids[label - 1], bbox=[left, top, right - left, bottom - top],
            score=score,
        )  # fmt: skip
        if masks is not None:
            entry["segmentation"] = dict(size=masks[i]["size"], counts=masks[i]["counts"].decode())
        if entry["category_id"] is not None:  # a class that the data do not have
            entries.append(entry)
    return entries


def write_classes(evaluation: DenseEvaluation, path: Path) -> None:
    """A CSV file with a line for each class: its IoU, or box AP; empty for one that is nowhere."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("class", "IoU" if "mIoU" in evaluation.measures else "box_AP"))
    writer.writerows((name, "" if math.isnan(x) else f"{x:.4f}") for name, x in evaluation.classes.items())
    write_atomically(path, buffer.getvalue())


def write_coco_results(evaluation: DenseEvaluation, path: Path) -> None:
    """The objects found, as COCO's evaluation takes them."""
    write_atomically(path, json.dumps(evaluation.found, ensure_ascii=False))
