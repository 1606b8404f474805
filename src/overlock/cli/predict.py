"""``overlock predict IMAGE ... --checkpoint RUN``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from overlock.cli.command import Command


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("images", nargs="+", type=str, metavar="IMAGE", help="Image files, or folders of them.")
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="Folder of a run, its model.safetensors, or a file of weights."
    )
    parser.add_argument("--model", type=str | None, default=None, help="Model of a file that does not say.")
    parser.add_argument("--top", type=int, default=5, help="How many classes to show.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images a pass.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument("--save", type=str | None, default=None, help="Save a picture of the images and their classes.")


def run(options: Namespace, console: Console) -> None:
    from overlock.data import find_images  # noqa: PLC0415
    from overlock.deploy import Predictor  # noqa: PLC0415
    from overlock.deploy.picture import save_picture  # noqa: PLC0415

    paths = find_images(options.images)
    predictor = Predictor.from_checkpoint(options.checkpoint, model=options.model)
    predictions = predictor(paths, top=options.top, batch_size=options.batch_size)
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(p) for p in predictions], indent=2, ensure_ascii=False) + "\n")
    else:
        table = Table("image", *("class" if i == 0 else "" for i in range(len(predictions[0].labels))))
        for prediction in predictions:
            classes = zip(prediction.labels, prediction.probabilities, strict=True)
            table.add_row(Path(prediction.source).name, *(f"{label} {100 * share:.1f} %" for label, share in classes))
        console.print(table)
    if options.save:
        save_picture(options.save, predictions)


COMMAND = Command("Classify images.", add_options, run)
