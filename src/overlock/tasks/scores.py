"""What :mod:`overlock.tasks.metrics` was called in version 0.1."""

from overlock.tasks.metrics import DetectionMetrics as DetectionScore
from overlock.tasks.metrics import SegmentationMetrics as SegmentationScore

__all__ = ["DetectionScore", "SegmentationScore"]
