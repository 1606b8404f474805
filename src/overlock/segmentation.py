"""Semantic segmentation: ``overlock.segmentation.upernet("overlock_t", num_classes=150)``."""

from overlock.tasks.segmentation import UperNet, segmentation_loss, upernet
from overlock.weights import load_weights

__all__ = ["UperNet", "load_weights", "segmentation_loss", "upernet"]
