"""What papers print of ImageNet classifiers, detectors and segmenters: published.csv, beside this file.

Each row names its source: a table of the OverLoCK paper, the UniConvNet paper, or timm's own results (for which the
accuracy was measured by timm with the published weights). All classifiers were trained on ImageNet-1K alone; where a
larger network taught them, the note says 'distilled'.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib.resources import files

SCORES = {
    "classify": ("top1", "ImageNet-1K top-1, %"),
    "mask_rcnn": ("box_ap_3x", "COCO box AP, Mask R-CNN, 3x"),
    "cascade_mask_rcnn": ("box_ap_3x", "COCO box AP, Cascade Mask R-CNN, 3x"),
    "upernet": ("miou", "ADE20K mIoU, UperNet, single scale, %"),
}
"""The column by which the networks of a task are compared, and what it is."""
METRICS = ("top1", "box_ap_1x", "mask_ap_1x", "box_ap_3x", "mask_ap_3x", "miou", "miou_multi_scale")


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A row of a table."""

    task: str
    """A name in ``SCORES``."""
    method: str
    """As its table has it."""
    model: str
    """timm's name of the network, or of the backbone; empty where timm has none."""
    image_size: int | None
    """Side in pixels of a classifier's images; None for the tables of other tasks, see ``DENSE_TASKS``."""
    macs: float
    """Multiply-adds in G."""
    params: float
    """Parameters in M."""
    metrics: dict[str, float]
    """Those that are printed, by their column."""
    note: str
    source: str

    @property
    def score(self) -> float | None:
        """The one that networks of its task are compared by, if it is printed."""
        return self.metrics.get(SCORES[self.task][0])


@functools.cache
def read_published() -> tuple[PublishedModel, ...]:
    """All rows."""
    with files("overlock.analysis").joinpath("published.csv").open(encoding="utf-8") as file:
        return tuple(_parse(row) for row in csv.DictReader(file))


def _parse(row: dict[str, str]) -> PublishedModel:
    return PublishedModel(
        task=row["task"], method=row["method"], model=row["model"],
        image_size=int(row["image_size"]) if row["image_size"] else None,
        macs=float(row["macs"]), params=float(row["params"]),
        metrics={name: float(row[name]) for name in METRICS if row[name]}, note=row["note"], source=row["source"],
    )  # fmt: skip


def find_published(model: str) -> PublishedModel | None:
    """What is published of a classifier, by timm's name; one without a tag stands for the first of its architecture."""
    named = [row for row in read_published() if row.task == "classify" and row.model]
    exact = [row for row in named if row.model == model]
    of_architecture = [row for row in named if "." not in model and row.model.partition(".")[0] == model]
    return next(iter(exact + of_architecture), None)
