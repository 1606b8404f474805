"""Evaluation of detectors and segmenters by what they are for."""

from __future__ import annotations

from typing import Any

from torch import nn

from overlock.checkpoints import Record
from overlock.deploy.evaluate_detection import evaluate_detector
from overlock.deploy.evaluate_segmentation import evaluate_segmenter
from overlock.deploy.evaluation import Evaluation
from overlock.label_files import LabelFiles
from overlock.object_files import ObjectFiles


def evaluate_by_task(
    network: nn.Module, record: Record, data: str | ObjectFiles | LabelFiles, *, name: str, **options: Any
) -> Evaluation:
    """:func:`evaluate_detector` or :func:`evaluate_segmenter`, as the record says, with their arguments."""
    evaluate: Any = dict(detect=evaluate_detector, segment=evaluate_segmenter)[record.task]
    result: Evaluation = evaluate(network, record, data, name=name, **options)
    return result
