"""Semantic segmentation: ``overlock.segmentation.upernet("overlock_t", num_classes=150)``."""

from overlock.tasks.segmentation import UperNet, segmentation_loss, upernet

__all__ = ["UperNet", "segmentation_loss", "upernet"]
