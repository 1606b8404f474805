"""``overlock predict IMAGE ...``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from overlock.cli.command import Command

if TYPE_CHECKING:
    from overlock.checkpoint import Record
    from overlock.deploy import Predictor


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="Image files, or folders of them.")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="Folder of a run, hf-hub:USER/NAME, or a file of weights; without it a small model that comes with "
        "the package and knows the ten classes of CIFAR-10.",
    )
    parser.add_argument(
        "--task",
        type=Literal["classify", "detect", "segment"] | None,
        default=None,
        help="What the checkpoint is for; it says so itself.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    parser.add_argument("--top", type=int, default=5, help="classify: how many classes to show.")
    parser.add_argument("--threshold", type=float, default=0.5, help="detect: score from which on an object counts.")
    parser.add_argument("--scales", type=list[float], default=[1.0], help="segment: e.g. [0.5,1,1.5], their mean.")
    parser.add_argument("--flip", action="store_true", help="segment: take the mean with the mirrored image.")
    parser.add_argument("--window", type=int | None, default=None, help="segment: slide a window of this side.")
    parser.add_argument("--stride", type=int | None, default=None, help="segment: its step, by default two thirds.")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Images a pass: 32 unless given; detect: 1."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--save",
        type=str | None,
        default=None,
        help="classify: save a picture of the images and their classes; detect, segment: a folder for a picture "
        "of each image, and for the objects in COCO's form or the label maps.",
    )


def run(options: Namespace, console: Console) -> None:
    from overlock.data import find_images  # noqa: PLC0415

    if options.checkpoint is None and options.model is not None:
        raise ValueError(f"--model {options.model} says what a checkpoint holds; give one with --checkpoint")
    if options.checkpoint is None and options.task not in (None, "classify"):
        raise ValueError(f"--task {options.task} needs a trained network; give one with --checkpoint")
    paths = find_images(options.images)
    if options.checkpoint is None:
        from overlock.deploy import Predictor  # noqa: PLC0415

        predictor = Predictor.default()
        _introduce(predictor)
        _classify(predictor, paths, options, console)
        return
    from overlock.checkpoint import load_model  # noqa: PLC0415
    from overlock.hub import find_weights  # noqa: PLC0415

    network, record = load_model(find_weights(options.checkpoint), model=options.model)
    if options.task not in (None, record.task):
        raise ValueError(f"{options.checkpoint}: a {record.name} is for --task {record.task}, not {options.task}")
    if record.task == "classify":
        from overlock.deploy import Predictor  # noqa: PLC0415

        _classify(Predictor(network, record), paths, options, console)
    else:
        _find(network, record, paths, options, console)


def _classify(predictor: Predictor, paths: list[Path], options: Namespace, console: Console) -> None:
    from overlock.deploy.picture import save_picture  # noqa: PLC0415

    predictions = predictor(paths, top=options.top, batch_size=options.batch_size or 32)
    if options.json:
        _print_json([dataclasses.asdict(p) for p in predictions])
    else:
        titles = ("class" if i == 0 else "" for i in range(len(predictions[0].labels)))
        table = Table(Column("image", overflow="fold"), *titles)
        for prediction in predictions:
            classes = zip(prediction.labels, prediction.probabilities, strict=True)
            table.add_row(Path(prediction.source).name, *(f"{label} {100 * share:.1f} %" for label, share in classes))
        console.print(table)
    if options.save:
        save_picture(options.save, predictions)


def _find(network: Any, record: Record, paths: list[Path], options: Namespace, console: Console) -> None:
    """Objects or the classes of pixels, image by image, so that a folder may be of any length."""
    from overlock.deploy.dense import Detector, Segmenter  # noqa: PLC0415
    from overlock.deploy.dense_files import ResultFolder, describe_objects  # noqa: PLC0415

    detects = record.task == "detect"
    folder = ResultFolder(options.save, record.classes) if options.save else None
    table = Table(Column("image", overflow="fold"), "objects" if detects else "classes of the pixels")
    predictor: Any = Detector(network, record) if detects else Segmenter(network, record)
    testing = {name: options[name] for name in (("threshold",) if detects else ("scales", "flip", "window", "stride"))}
    rows: list[Any] = []
    bar = Console(stderr=True)
    progress = track(paths, description=record.task, console=bar, transient=True, disable=not bar.is_terminal)
    try:
        for result in _in_batches(predictor, progress, options.batch_size or 1, testing):
            name = Path(result.source).name
            if detects:
                counts = Counter(result.labels)
                table.add_row(name, ", ".join(f"{count} {label}" for label, count in counts.items()) or "none")
            else:
                counts = result.shares()
                table.add_row(name, ", ".join(f"{label} {100 * share:.0f} %" for label, share in counts.items()))
            if options.json:
                rows.append(
                    dict(source=result.source, **(describe_objects(result) if detects else dict(shares=counts)))
                )
            if folder is not None:
                (folder.add_objects if detects else folder.add_labels)(result)
    finally:  # a damaged image in the midst of many costs none of those before it
        if folder is not None:
            folder.finish()
    if options.json:
        _print_json(rows)
    else:
        console.print(table)


def _in_batches(predictor: Any, paths: Iterable[Path], size: int, testing: dict[str, Any]) -> Iterator[Any]:
    remaining = iter(paths)
    while batch := list(islice(remaining, size)):
        yield from predictor(batch, **testing)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _introduce(predictor: Predictor) -> None:
    """Tell on stderr, so that the output stays what it is, which model answers and what it knows."""
    *most, last = predictor.record.classes
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"using {predictor.record.model}, trained on CIFAR-10, of the package itself (--checkpoint for another); "
        f"it knows {', '.join(most)} and {last}, and gives anything else one of these names"
    )


COMMAND = Command("Classify images, find objects in them, or tell the class of each pixel.", add_options, run)
