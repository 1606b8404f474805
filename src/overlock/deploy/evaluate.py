"""Evaluation of classifiers, ours and timm's, on labelled images: accuracy, classes, confusions, speed."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import nn

from overlock.checkpoint import Record, build, default_classes, default_preprocessing, load_classifier
from overlock.data import ImageData, make_eval_transform
from overlock.data.loaders import Batch, OnImage, make_test_loader
from overlock.deploy.machine import Precision, cast_to, choose_device, settle
from overlock.files import write_atomically
from overlock.fused.meanwhile import without_waiting


@dataclass(frozen=True, kw_only=True)
class Evaluation:
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


def load_by_name(source: str, *, model: str | None = None) -> tuple[nn.Module, Record]:
    """A run's folder, a file of weights, or a model of timm's by name with its published weights.

    Raises:
        ValueError: for what is none of these.
    """
    if Path(source).exists() or source.endswith((".safetensors", ".pth", ".pt")):
        return load_classifier(source, model=model)
    try:
        network = build(source, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{source}: no such file, and no published weights could be fetched ({reason})") from None
    timm_config: Any = network.pretrained_cfg
    preprocessing = default_preprocessing(network, in_chans=timm_config["input_size"][0])
    classes = default_classes(timm_config["num_classes"])
    return network.eval(), Record(model=source, classes=classes, preprocessing=preprocessing)


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


@torch.inference_mode()
def evaluate(
    source: str,
    data: ImageData,
    *,
    model: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    precision: Precision = "fp32",
    strict: bool = False,
) -> Evaluation:
    """Evaluate a classifier on the images to test on.

    Args:
        source: see :func:`load_by_name`.
        data: whose test part is used.
        model: timm's name, for a file that does not say.
        image_size: side in pixels, the model's own unless given.
        crop_pct: share of the image that the centre crop keeps, the model's own unless given.
        batch_size: images a pass.
        workers: processes that load images.
        device: 'cpu', 'cuda' and so on; by default a GPU where there is one.
        precision: of the network's arithmetic.
        strict: let an image that cannot be read be an error.

    Raises:
        ValueError: for models and data that do not fit, or where no image can be read, or ``strict`` one cannot.
    """
    network, record = load_by_name(source, model=model)
    places = match_classes(record.classes, data.classes)
    preprocessing: dict[str, Any] = dict(record.preprocessing)
    if image_size is not None:
        preprocessing["input_size"] = (preprocessing["input_size"][0], image_size, image_size)
    if crop_pct is not None:
        preprocessing["crop_pct"] = crop_pct
    where = choose_device(device)
    network = settle(network, record, where)
    loader = make_test_loader(
        data.test, OnImage(make_eval_transform(preprocessing)), batch_size=batch_size, workers=workers,
        pin_memory=where.type == "cuda",
    )  # fmt: skip
    cast = cast_to(precision, where)
    started = time.perf_counter()
    with loader.batches() as batches:
        counts = _count(network, batches, places, classes=len(record.classes), cast=cast, device=where, strict=strict)
    seconds = time.perf_counter() - started
    count = int(counts.confusion.sum())
    if counts.images is None:
        raise ValueError(
            f"none of the {len(counts.unreadable)} images could be read; the first: {counts.unreadable[0]}"
        )
    with cast:
        speed = measure_speed(network, counts.images)
    return Evaluation(
        name=source, params=sum(p.numel() for p in network.parameters()), images=count,
        unreadable=tuple(counts.unreadable), top1=float(np.diagonal(counts.confusion).sum()) / count,
        top5=counts.within / count, speed=speed, speed_with_loading=count / seconds, classes=tuple(data.classes),
        confusion=counts.confusion,
    )  # fmt: skip


@dataclass
class _Counts:
    confusion: np.ndarray[Any, Any]
    within: int = 0
    unreadable: list[str] = field(default_factory=list)
    images: torch.Tensor | None = None  # the largest batch, to time the network with


def _count(
    network: nn.Module, batches: Iterable[Batch], places: list[int], *, classes: int, cast: Any, device: torch.device,
    strict: bool,
) -> _Counts:  # fmt: skip
    """Go through the images once.

    Args:
        network: images to logits (B, classes).
        batches: whose labels are those of the data.
        places: the network's class of each of the data's.
        classes: of the network.
        cast: context of the arithmetic.
        device: of the network.
        strict: let an image that cannot be read be an error.
    """
    column = torch.full((classes,), len(places))
    column[torch.tensor(places)] = torch.arange(len(places))
    counts = _Counts(np.zeros((len(places), len(places) + 1), dtype=np.int64))
    for batch in batches:
        counts.unreadable += batch.unreadable
        if strict and counts.unreadable:
            raise ValueError(counts.unreadable[0])
        if not len(batch.labels):
            continue
        images = batch.images.to(device, non_blocking=True)
        with cast, without_waiting(network):
            logits = network(images).float().cpu()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        counts.within += int((best == torch.tensor(places)[batch.labels][:, None]).sum())
        np.add.at(counts.confusion, (batch.labels.numpy(), column[best[:, 0]].numpy()), 1)
        if counts.images is None or len(images) > len(counts.images):
            counts.images = images
    return counts


def measure_speed(network: nn.Module, images: torch.Tensor, *, seconds: float = 1.0) -> float:
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


def write_per_class(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
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


def draw_confusion(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """The confusions as a PNG picture: rows are the classes, columns what they were taken for, in shares of a row."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise ValueError("a picture needs matplotlib; install it with: pip install 'overlock[train]'") from None
    size = len(evaluation.classes)
    counts = evaluation.confusion[:, :size].astype(float)
    shares = counts / np.maximum(evaluation.confusion.sum(axis=1, keepdims=True), 1)
    side = min(12.0, max(4.0, 0.45 * size + 2))
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.set_title(f"{Path(evaluation.name).name}: top-1 {100 * evaluation.top1:.2f} % of {evaluation.images} images")
    if size <= 40:
        axes.set_xticks(range(size), _short(evaluation.classes), rotation=90)
        axes.set_yticks(range(size), _short(evaluation.classes))
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _short(names: Iterable[str]) -> list[str]:
    return [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
