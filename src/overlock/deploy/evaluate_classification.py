"""Evaluation of classifiers, ours and timm's, on labelled images: accuracy, classes, confusions, speed."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from overlock.data import ImageData, make_eval_transform
from overlock.data.loaders import Batch, OnImage, make_test_loader
from overlock.deploy.evaluation import EvaluationOptions, Runner
from overlock.deploy.models import Source, load_network
from overlock.deploy.runtime import not_finite
from overlock.export.runtimes import ExportedNetwork
from overlock.figures import encode_figure, new_figure
from overlock.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Classification:
    """What a classifier did on labelled images."""

    name: str
    """Of the model or its file."""
    params: int
    """Parameters of the network as it runs, folded."""
    images: int
    """Images that could be read."""
    unreadable: tuple[str, ...]
    """Images that could not, and why."""
    top1: float
    """Share whose class has the highest logit."""
    top5: float
    """Share whose class is among the five highest."""
    speed: float
    """Images a second through the network alone, the batches at hand."""
    speed_with_loading: float
    """Images a second from the files on."""
    classes: tuple[str, ...]
    """Names of the data's classes."""
    confusion: np.ndarray[Any, Any]
    """How often an image of each class (row) was taken for each (column); the last column is for other classes."""

    def recalls(self) -> np.ndarray[Any, Any]:
        """Of each class, the share of its images that were told; NaN where there are none."""
        counts = self.confusion.sum(axis=1)
        right = np.diagonal(self.confusion).astype(float)
        return np.divide(right, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def match_classes(model: Sequence[str], data: Sequence[str]) -> list[int]:
    """The place of each of the data's classes among the model's.

    Names are compared; classes named by WordNet numbers are matched to a model's 1000 of ImageNet; and classes of the
    same number without names are taken in their order.

    Raises:
        ValueError: where the classes are not the same.
    """
    places = {name: i for i, name in enumerate(model)}
    if len(places) == len(model) and all(name in places for name in data):
        return [places[name] for name in data]
    if len(model) == 1000:
        synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        if all(name in synsets for name in data):
            return [synsets[name] for name in data]
    if len(model) == len(data) and all(name.isdigit() for name in model):
        return list(range(len(data)))
    unknown = next((name for name in data if name not in places), data[0])
    raise ValueError(
        f"the data's class {unknown!r} is none of the model's {len(model)} classes; give data of the same classes"
    )


def evaluate_classifier(
    source: Source,
    data: ImageData,
    *,
    model: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    **options: Any,
) -> Classification:
    """Evaluate a classifier on the images to test on.

    Args:
        source: see :func:`overlock.deploy.models.load_network`.
        data: whose test part is used.
        model: timm's name, for a file that does not say.
        image_size: side in pixels, the model's own unless given.
        crop_pct: share of the image that the centre crop keeps, the model's own unless given.
        options: those of :class:`overlock.deploy.evaluation.EvaluationOptions`, of which the first two are of no
            effect, the data being given; 64 images a pass unless given.

    Raises:
        ValueError: for models and data that do not fit, where no image can be read, or ``strict`` one cannot, and where
            the network gives no finite numbers.
    """
    given = EvaluationOptions(**options)
    name = str(source.path if isinstance(source, ExportedNetwork) else source)
    network, record = load_network(source, model=model)
    if record.task != "classify":
        raise ValueError(f"{name}: this is a {record.name}, of the task {record.task}, and not a classifier")
    counting = _Counting(match_classes(record.classes, data.classes), classes=len(record.classes))
    preprocessing: dict[str, Any] = dict(record.preprocessing)
    if image_size is not None:
        preprocessing["input_size"] = (preprocessing["input_size"][0], image_size, image_size)
    if crop_pct is not None:
        preprocessing["crop_pct"] = crop_pct
    runner = Runner(network, record, given)
    loader = make_test_loader(
        data.test, OnImage(make_eval_transform(preprocessing)), batch_size=given.batch_size or 64,
        workers=given.workers, pin_memory=runner.device.type == "cuda",
    )  # fmt: skip

    def step(batch: Batch) -> None:
        images = batch.images.to(runner.device, non_blocking=True)
        with runner.computing():
            logits = runner.network(images).float().cpu()
        if not logits.isfinite().all():
            raise not_finite(given.precision)
        counting.add(logits, batch.labels)
        if counting.largest is None or len(images) > len(counting.largest):
            counting.largest = images

    counts = runner.run(loader, step, name=name)
    assert counting.largest is not None
    with torch.inference_mode(), runner.cast:
        speed = measure_speed(runner.network, counting.largest)
    return Classification(
        name=name, params=runner.params, images=counts.images, unreadable=counts.unreadable, top1=counting.top1,
        top5=counting.top5, speed=speed, speed_with_loading=counts.images / counts.seconds,
        classes=tuple(data.classes), confusion=counting.confusion,
    )  # fmt: skip


class _Counting:
    """What a classifier takes the images for.

    Args:
        class_ids: the network's class of each of the data's.
        classes: of the network.
    """

    def __init__(self, class_ids: Sequence[int], *, classes: int):
        count = len(class_ids)
        self.class_ids = torch.tensor(class_ids)
        self.column = torch.full((classes,), count)
        self.column[self.class_ids] = torch.arange(count)
        self.confusion = np.zeros((count, count + 1), dtype=np.int64)
        self.within = 0  # the five best
        self.largest: Tensor | None = None  # batch, to time the network with

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count images: logits (B, the network's classes), labels (B,) of the data."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self.within += int((best == self.class_ids[labels][:, None]).sum())
        np.add.at(self.confusion, (labels.numpy(), self.column[best[:, 0]].numpy()), 1)

    @property
    def top1(self) -> float:
        """Share of the images whose class is the best one."""
        return float(np.diagonal(self.confusion).sum()) / int(self.confusion.sum())

    @property
    def top5(self) -> float:
        """Share of those whose class is among the five best."""
        return self.within / int(self.confusion.sum())


def measure_speed(network: Callable[[Tensor], Tensor], images: Tensor, *, seconds: float = 1.0) -> float:
    """Images a second through a network, over passes of a batch (B, C, H, W) for at least a given time."""

    def wait() -> None:
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    network(images)
    wait()
    passes, started = 0, time.perf_counter()
    while passes < 2 or time.perf_counter() - started < seconds:
        network(images)
        wait()
        passes += 1
    return passes * len(images) / (time.perf_counter() - started)


def write_per_class(evaluation: Classification, path: str | os.PathLike[str]) -> None:
    """A CSV file with a line for each class: images, right ones, shares, and what it is most often taken for."""
    counts, taken = evaluation.confusion.sum(axis=1), evaluation.confusion.sum(axis=0)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("class", "images", "right", "recall", "precision", "most_often_taken_for", "times"))
    for i, name in enumerate(evaluation.classes):
        row = evaluation.confusion[i].copy()
        right, row[i] = row[i], 0
        other = int(row.argmax())
        taken_for = (*evaluation.classes, "(another class)")[other] if row[other] else ""
        recall = f"{right / counts[i]:.4f}" if counts[i] else ""
        precision = f"{right / taken[i]:.4f}" if taken[i] else ""
        writer.writerow((name, counts[i], right, recall, precision, taken_for, row[other]))
    write_atomically(path, buffer.getvalue())


def draw_confusion(evaluation: Classification, path: str | os.PathLike[str]) -> None:
    """The confusion matrix as a PNG picture: rows are true classes, columns predicted ones, in shares of a row."""
    size = len(evaluation.classes)
    counts = evaluation.confusion[:, :size].astype(float)
    shares = counts / np.maximum(evaluation.confusion.sum(axis=1, keepdims=True), 1)
    side = min(12.0, max(4.0, 0.45 * size + 2))
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{Path(evaluation.name).name}: top-1 {100 * evaluation.top1:.2f} % of {evaluation.images} images")
    if size <= 40:
        axes.set_xticks(range(size), _short(evaluation.classes), rotation=90)
        axes.set_yticks(range(size), _short(evaluation.classes))
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=7)
    write_atomically(path, encode_figure(figure))


def _short(names: Iterable[str]) -> list[str]:
    return [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
