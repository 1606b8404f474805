"""The columns of the paper's tables of detection and segmentation: parameters and multiply-adds of the whole models.

Counted as :mod:`overlock.analysis.cost` does, on merged backbones, at the tables' sizes: 1000 regions go through the
box heads (of each stage) and 100 through the mask heads; UperNet's auxiliary head is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overlock.analysis.cost import Cost, count_call
from overlock.detection import cascade_mask_rcnn, mask_rcnn
from overlock.network import VARIANTS
from overlock.segmentation import upernet

REGIONS, MASKED = 1000, 100
Work = tuple[str, list[nn.Module], Callable[..., Any], Any]


@dataclass(frozen=True, kw_only=True)
class DenseTask:
    """A table of the paper."""

    table: int
    """Its number."""
    build: Callable[..., nn.Module]
    """The model, of a backbone's name and ``num_classes``."""
    num_classes: int
    """Of the table's data set."""
    image_size: tuple[int, int]
    """Height and width of the table's images."""
    paper: dict[str, tuple[float, float]]
    """Multiply-adds in G and parameters in M that the table prints for each backbone."""


DENSE_TASKS = {
    "mask_rcnn": DenseTask(
        table=3, build=mask_rcnn, num_classes=80, image_size=(800, 1280),
        paper={"overlock_t": (281, 52), "overlock_s": (366, 75), "overlock_b": (511, 114)},
    ),
    "cascade_mask_rcnn": DenseTask(
        table=4, build=cascade_mask_rcnn, num_classes=80, image_size=(800, 1280),
        paper={"overlock_t": (760, 90), "overlock_s": (857, 114), "overlock_b": (1008, 154)},
    ),
    "upernet": DenseTask(
        table=5, build=upernet, num_classes=150, image_size=(512, 2048),
        paper={"overlock_t": (969, 63), "overlock_s": (1051, 85), "overlock_b": (1202, 124)},
    ),
}  # fmt: skip
"""Detectors and segmenters of Tables 3 to 5 by name, each with the figures that the paper prints."""


def count_dense_cost(model: str, task: str, *, image_size: tuple[int, int] | None = None) -> list[Cost]:
    """Count on shapes alone, without memory or time for the values.

    Args:
        model: the backbone, a name in ``overlock.VARIANTS``.
        task: a name in ``DENSE_TASKS``.
        image_size: height and width; the table's where it is None.

    Returns:
        A cost for each part, and the total last.

    Raises:
        ValueError: for an unknown model or task, or images that are too small.
        ImportError: for UperNet without transformers.
    """
    for name, known in ((model, VARIANTS), (task, DENSE_TASKS)):
        if name not in known:
            raise ValueError(f"unknown {name!r}; there are {', '.join(known)}")
    settings = DENSE_TASKS[task]
    with torch.device("meta"):
        network = settings.build(model, num_classes=settings.num_classes, deploy=True).eval()
        images = torch.empty(1, 3, *(image_size or settings.image_size))
        parts = _segmentation_parts if task == "upernet" else _detection_parts
        costs = [count_call(*work) for work in parts(network, images)]
    total = {name: sum(getattr(cost, name) for cost in costs) for name in ("params", "macs", "mixing")}
    return [*costs, Cost(name="total", **total)]


def _detection_parts(network: Any, images: torch.Tensor) -> Iterator[Work]:
    body, pyramid, proposals, heads = network.backbone.body, network.backbone.fpn, network.rpn.head, network.roi_heads
    yield "backbone", [body], body, images
    features = {str(i): x for i, x in enumerate(body(images))}
    yield "feature pyramid", [pyramid], pyramid, features
    yield "proposals", [proposals], proposals, list(pyramid(features).values())
    stages = getattr(heads, "stages", [heads])
    width = network.backbone.out_channels
    boxes = torch.empty(REGIONS, width, *stages[0].box_roi_pool.output_size)
    yield from _heads("box", stages, boxes)
    yield from _heads("mask", stages, torch.empty(MASKED, width, *stages[0].mask_roi_pool.output_size))


def _heads(kind: str, stages: Any, regions: torch.Tensor) -> Iterator[Work]:
    for i, stage in enumerate(stages, start=1):
        head, predictor = getattr(stage, f"{kind}_head"), getattr(stage, f"{kind}_predictor")
        name = f"{kind} head" if len(stages) == 1 else f"{kind} head {i}"
        yield name, [head, predictor], lambda x, f=head, g=predictor: g(f(x)), regions


def _segmentation_parts(network: Any, images: torch.Tensor) -> Iterator[Work]:
    yield "backbone", [network.backbone], network.backbone, images
    yield "head", [network.decode_head], network.decode_head, network.backbone(images)
