"""Evaluation of segmenters: mean IoU, accuracies, IoU of each class, speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from overlock.checkpoints import Record
from overlock.data.label_maps import load_label_test
from overlock.data.loaders import Batch, as_lists, make_test_loader
from overlock.data.segmentation_transforms import PrepareLabels, make_segmentation_transform
from overlock.deploy.evaluation import Evaluation, EvaluationOptions, Runner
from overlock.deploy.runtime import not_finite
from overlock.label_files import LabelFiles
from overlock.tasks.metrics import SegmentationMetrics
from overlock.tasks.sliding import check_testing, label_pixels


def evaluate_segmenter(
    network: nn.Module,
    record: Record,
    data: str | LabelFiles,
    *,
    name: str,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate a segmenter on the images to test on, one at a time in their own sizes.

    Args:
        network: as :func:`overlock.checkpoints.load_model` gives it.
        record: likewise.
        data: folder, in a form that training takes; or where in it, or elsewhere, the part to test on lies.
        name: what the result calls the network.
        scales: as :func:`overlock.tasks.sliding.segment` takes them, like the next three.
        flip: take the mean with the mirrored image.
        window: side of a sliding window.
        stride: its step.
        options: those of :class:`overlock.deploy.evaluation.EvaluationOptions`.

    Raises:
        ValueError: for data that cannot be read or is of other classes, and where the network gives no finite numbers.
    """
    stride = check_testing(scales, window, stride)
    given = EvaluationOptions(**options)
    runner = Runner(network, record, given)
    score = SegmentationMetrics(len(record.classes))
    files = LabelFiles(data=data) if isinstance(data, str) else data
    source = load_label_test(files, classes=record.classes, held_out=given.held_out, seed=given.seed)
    transform = make_segmentation_transform(training=False, scale=record.preprocessing["scale"])
    loader = make_test_loader(
        source, PrepareLabels(transform), batch_size=given.batch_size or 1, join=as_lists, workers=given.workers
    )

    def step(batch: Batch) -> None:
        for image, labels in zip(batch.images, batch.labels, strict=True):
            with runner.computing():
                found = label_pixels(
                    runner.network, image[None].to(runner.device), size=labels.shape, scales=scales, flip=flip,
                    window=window, stride=stride,
                )  # fmt: skip
            if (found < 0).any():
                raise not_finite(given.precision)
            score.update(found[0].cpu(), labels)

    counts = runner.run(loader, step, name=name)
    return Evaluation(
        name=name, params=runner.params, images=counts.images, unreadable=counts.unreadable, measures=score.measures(),
        classes=dict(zip(record.classes, score.iou().tolist(), strict=True)),
        notes=tuple(getattr(source, "notes", ())), speed_with_loading=counts.images / counts.seconds,
    )  # fmt: skip
