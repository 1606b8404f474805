"""Object detection and instance segmentation: ``overlock.detection.mask_rcnn("overlock_t", num_classes=80)``."""

from overlock.tasks.cascade import cascade_mask_rcnn, cascade_rcnn
from overlock.tasks.detection import faster_rcnn, mask_rcnn
from overlock.weights import load_weights

__all__ = ["cascade_mask_rcnn", "cascade_rcnn", "faster_rcnn", "load_weights", "mask_rcnn"]
