"""Object detection and instance segmentation: ``overlock.detection.mask_rcnn("overlock_t", num_classes=80)``."""

from overlock.dense_weights import load_weights
from overlock.tasks.cascade import cascade_mask_rcnn, cascade_rcnn
from overlock.tasks.detection import faster_rcnn, mask_rcnn

__all__ = ["cascade_mask_rcnn", "cascade_rcnn", "faster_rcnn", "load_weights", "mask_rcnn"]
