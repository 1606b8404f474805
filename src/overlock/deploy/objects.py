"""Objects in images by a detector, be it a network or an exported file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from overlock.export.find import find_in_file
from overlock.export.runtimes import ExportedNetwork
from overlock.tasks import detection


def find_objects(network: nn.Module, images: Sequence[Tensor], **limits: Any) -> list[dict[str, Any]]:
    """:func:`overlock.tasks.detection.find_objects`, strict, or :func:`overlock.export.find.find_in_file`.

    Args:
        network: a detector, or a file of one.
        images: (3, H, W) each, of 0 to 1, of any sizes.
        limits: threshold, max_detections and nms_iou, as they take them.

    Raises:
        ValueError: for a limit that will not do, and images that a file does not take.
        FloatingPointError: where the network's features are no finite numbers.
    """
    if isinstance(network, ExportedNetwork):
        return find_in_file(network, images, **limits)
    return detection.find_objects(network, images, strict=True, **limits)
