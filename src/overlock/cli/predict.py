"""``overlock predict IMAGE ...``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Column, Table

from overlock.cli.command import Command

if TYPE_CHECKING:
    from overlock.deploy import Predictor


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="Image files, or folders of them.")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="Folder of a run, its model.safetensors, or a file of weights; without it the package's own small "
        "model of the ten classes of CIFAR-10, in builds that have one.",
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a checkpoint that does not say.")
    parser.add_argument("--top", type=int, default=5, help="How many classes to show.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images a pass.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument("--save", type=str | None, default=None, help="Save a picture of the images and their classes.")


def run(options: Namespace, console: Console) -> None:
    from overlock.data import find_images  # noqa: PLC0415
    from overlock.deploy import Predictor  # noqa: PLC0415
    from overlock.deploy.picture import save_picture  # noqa: PLC0415

    if options.model is not None and options.checkpoint is None:
        raise ValueError(f"--model {options.model} says what a checkpoint holds; give one with --checkpoint")
    paths = find_images(options.images)
    if options.checkpoint is not None:
        predictor = Predictor.from_checkpoint(options.checkpoint, model=options.model)
    else:
        predictor = Predictor.default()
        _introduce(predictor)
    predictions = predictor(paths, top=options.top, batch_size=options.batch_size)
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(p) for p in predictions], indent=2, ensure_ascii=False) + "\n")
    else:
        titles = ("class" if i == 0 else "" for i in range(len(predictions[0].labels)))
        table = Table(Column("image", overflow="fold"), *titles)
        for prediction in predictions:
            classes = zip(prediction.labels, prediction.probabilities, strict=True)
            table.add_row(Path(prediction.source).name, *(f"{label} {100 * share:.1f} %" for label, share in classes))
        console.print(table)
    if options.save:
        save_picture(options.save, predictions)


def _introduce(predictor: Predictor) -> None:
    """Tell on stderr, so that the output stays what it is, which model answers and what it knows."""
    *most, last = predictor.record.classes
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"using {predictor.record.model}, trained on CIFAR-10, of the package itself (--checkpoint for another); "
        f"it knows {', '.join(most)} and {last}, and gives anything else one of these names"
    )


COMMAND = Command("Classify images.", add_options, run)
