"""Evaluation of detectors: COCO's average precisions, speed, and the objects as COCO's results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from overlock.checkpoints import Record
from overlock.data.detection import load_detection_test
from overlock.data.detection_transforms import PrepareObjects, make_detection_transform
from overlock.data.loaders import Batch, as_lists, make_test_loader
from overlock.deploy.coco_results import Id, describe_detections
from overlock.deploy.evaluation import Evaluation, EvaluationOptions, Runner
from overlock.deploy.objects import find_objects
from overlock.deploy.runtime import not_finite
from overlock.files import write_atomically
from overlock.object_files import ObjectFiles
from overlock.tasks.detection import check_limits
from overlock.tasks.metrics import DetectionMetrics


def evaluate_detector(
    network: nn.Module,
    record: Record,
    data: str | ObjectFiles,
    *,
    name: str,
    max_detections: int | None = None,
    nms_iou: float | None = None,
    keep_found: bool = False,
    **options: Any,
) -> Evaluation:
    """Evaluate a detector on the images to test on.

    Args:
        network: as :func:`overlock.checkpoints.load_model` gives it.
        record: likewise.
        data: folder, in a form that training takes; or where in it, or elsewhere, the part to test on lies.
        name: what the result calls the network.
        max_detections: as :func:`overlock.tasks.detection.find_objects` takes it, like the next.
        nms_iou: overlap of boxes of which one is dropped.
        keep_found: keep the objects in the result.
        options: those of :class:`overlock.deploy.evaluation.EvaluationOptions`; an image a pass unless given.

    Raises:
        ValueError: for data that cannot be read or is of other classes, and where the network gives no finite numbers.
        ImportError: without torchmetrics or pycocotools.
    """
    limits: dict[str, Any] = dict(max_detections=max_detections, nms_iou=nms_iou)
    check_limits(0, **limits)
    given = EvaluationOptions(**options)
    runner = Runner(network, record, given)
    masks = "mask" in str(record.head)
    score = DetectionMetrics(masks=masks, by_class=True)
    source: Any = load_detection_test(
        ObjectFiles(data=data) if isinstance(data, str) else data, classes=record.classes, masks=masks,
        held_out=given.held_out, seed=given.seed,
    )  # fmt: skip
    prepare = PrepareObjects(make_detection_transform(training=False))
    loader = make_test_loader(source, prepare, batch_size=given.batch_size or 1, join=as_lists, workers=given.workers)
    found: list[dict[str, Any]] = []

    def step(batch: Batch) -> None:
        images = [image.to(runner.device) for image in batch.images]
        try:
            with runner.computing():
                results = find_objects(runner.network, images, **limits)
        except FloatingPointError:
            raise not_finite(given.precision) from None
        score.update(results, batch.labels)
        for result, target in zip(results, batch.labels, strict=True) if keep_found else ():
            found.extend(dict(image_id=target["image_id"]) | one for one in _to_coco(result, source.category_ids))

    counts = runner.run(loader, step, name=name)
    precisions = score.class_measures()["box_AP"]
    return Evaluation(
        name=name, params=runner.params, images=counts.images, unreadable=counts.unreadable, measures=score.measures(),
        classes={c: precisions.get(label, math.nan) for label, c in enumerate(record.classes, start=1)},
        notes=tuple(getattr(source, "notes", ())), speed_with_loading=counts.images / counts.seconds,
        found=tuple(found),
    )  # fmt: skip


def _to_coco(result: Mapping[str, Any], category_ids: Sequence[Id | None]) -> Iterator[dict[str, Any]]:
    """The objects of an image as COCO's results, without those of classes that the data do not have."""
    categories = [category_ids[label - 1] for label in result["labels"].tolist()]
    return describe_detections(result["boxes"].tolist(), result["scores"].tolist(), categories, result.get("masks"))


def write_coco_results(evaluation: Evaluation, path: Path) -> None:
    """The objects found, as COCO's evaluation takes them."""
    write_atomically(path, json.dumps(evaluation.found, ensure_ascii=False))
