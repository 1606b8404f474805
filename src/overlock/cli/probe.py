"""``overlock probe DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command
from overlock.cli.duplicates import add_threshold
from overlock.cli.subjects import print_rows


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("index", type=str, metavar="DIR", help="Folder that overlock embed wrote, of images by class.")
    parser.add_argument("--neighbours", type=int, default=20, help="Nearest neighbours that vote.")
    parser.add_argument(
        "--test_size", type=float, default=0.2, help="Share to test on, of data without parts train and val or test."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of that split.")
    add_threshold(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def run(options: Namespace, console: Console) -> None:
    from overlock.embeddings.probe import probe  # noqa: PLC0415
    from overlock.embeddings.shards import Embeddings  # noqa: PLC0415

    result = probe(
        Embeddings(Path(options.index)), neighbours=options.neighbours, test_size=options.test_size,
        threshold=options.threshold, seed=options.seed,
    )  # fmt: skip
    if options.json:
        rows = [asdict(one) | dict(accuracy=one.accuracy) for one in result.accuracies]
        sys.stdout.write(json.dumps(asdict(result) | dict(accuracies=rows), indent=2) + "\n")
        return
    rows = [
        {
            "classifier": one.name, "accuracy, %": f"{100 * one.accuracy:.2f}",
            "95 % interval": f"{100 * one.low:.2f} to {100 * one.high:.2f}",
        }
        for one in result.accuracies
    ]  # fmt: skip
    print_rows(console, rows, title=f"{result.test} images of {result.classes} classes, trained on {result.train}")
    console.print(f"split {result.split}")
    console.print(f"the linear probe took C = {result.strength:g}, chosen on the training part")


COMMAND = Command("Tell how well embeddings separate classes: nearest neighbours and a linear probe.", add_options, run)
