"""What evaluations have in common: their options, the way through the images, and the result for detectors and
segmenters."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from overlock.checkpoints import Record
from overlock.data.loaders import Batch, ImageLoader
from overlock.deploy.runtime import Precision, autocast_to, choose_device, inference_copy
from overlock.files import write_atomically
from overlock.fused.meanwhile import without_waiting


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """On which images, and how, a network is evaluated."""

    held_out: bool = False
    """Of a folder without a part to test on, take what training holds out."""
    seed: int = 0
    """Of those images."""
    batch_size: int | None = None
    """Images a pass; the task's own unless given."""
    workers: int = 2
    """Processes that load images."""
    device: str | None = None
    """'cpu', 'cuda' and so on; by default a GPU where there is one."""
    precision: Precision = "fp32"
    """Of the network's arithmetic."""
    show_progress: bool = False
    """On stderr."""
    strict: bool = False
    """Let an image that cannot be read be an error."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a detector or segmenter did on labelled images."""

    name: str
    """Of the model or its file."""
    params: int
    """Parameters of the network as it runs, folded; 0 for an exported file, which does not tell."""
    images: int
    """Images that could be read."""
    unreadable: tuple[str, ...]
    """Images that could not, and why."""
    measures: dict[str, float]
    """By their names: box_AP, mask_AP and so on, or mIoU, mAcc and aAcc."""
    classes: dict[str, float]
    """IoU of each class from segmenters, box AP from detectors; NaN for one that is nowhere."""
    notes: tuple[str, ...]
    """What was left out of the data, or read in another way than it stands there."""
    speed_with_loading: float
    """Images a second from the files on, scoring included."""
    found: tuple[dict[str, Any], ...] = ()
    """A detector's objects in COCO's own form of results, with the data's ids of images and categories, if kept."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What came of the images."""

    images: int
    unreadable: tuple[str, ...]
    seconds: float


class Runner:
    """A network where it is evaluated.

    Args:
        network: as :func:`overlock.checkpoints.load_model` gives it; it stays as it is.
        record: likewise.
        options: of the evaluation.

    Raises:
        ValueError: for a device that is not there, or another precision.
    """

    def __init__(self, network: nn.Module, record: Record, options: EvaluationOptions):
        self.options, self.device = options, choose_device(options.device)
        self.cast = autocast_to(options.precision, self.device)
        self.network = inference_copy(network, record, self.device)

    @property
    def params(self) -> int:
        """Parameters of the network as it runs."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def computing(self) -> ExitStack:
        """The context of a forward pass."""
        stack = ExitStack()
        stack.enter_context(self.cast)
        stack.enter_context(without_waiting(self.network))
        return stack

    def run(self, loader: ImageLoader, step: Callable[[Batch], None], *, name: str) -> Counts:
        """Give each batch with images to a step.

        Args:
            loader: of the images to test on.
            step: predicts and counts.
            name: of the progress bar.

        Raises:
            ValueError: where no image can be read, or of a strict evaluation one cannot.
        """
        unreadable: list[str] = []
        started, images = time.perf_counter(), 0
        bar = dict(description=name, transient=True, disable=not self.options.show_progress)
        total = len(loader) if hasattr(loader.dataset, "__len__") else None
        with torch.inference_mode(), loader.batches() as batches:
            for batch in track(batches, total=total, **bar):  # type: ignore[arg-type]
                unreadable += batch.unreadable
                if self.options.strict and unreadable:
                    raise ValueError(unreadable[0])
                images += len(batch.labels)
                if len(batch.labels):
                    step(batch)
        if images == 0:
            raise ValueError(f"none of the {len(unreadable)} images could be read; the first: {unreadable[0]}")
        return Counts(images=images, unreadable=tuple(unreadable), seconds=time.perf_counter() - started)


def write_classes(evaluation: Evaluation, path: Path) -> None:
    """A CSV file with a line for each class: its IoU, or box AP; empty for one that is nowhere."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("class", "IoU" if "mIoU" in evaluation.measures else "box_AP"))
    writer.writerows((name, "" if math.isnan(x) else f"{x:.4f}") for name, x in evaluation.classes.items())
    write_atomically(path, buffer.getvalue())
