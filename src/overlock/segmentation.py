"""Semantic segmentation: ``overlock.segmentation.upernet("overlock_t", num_classes=150)``."""

from overlock.dense_weights import load_weights
from overlock.tasks.segmentation import UperNet, segmentation_loss, upernet

__all__ = ["UperNet", "load_weights", "segmentation_loss", "upernet"]
