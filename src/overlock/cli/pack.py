"""``overlock pack FOLDER OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("source", type=str, metavar="FOLDER", help="Images by class, as for training.")
    parser.add_argument("target", type=str, metavar="OUT", help="New folder for the shards.")
    parser.add_argument("--shard_images", type=int, default=10_000, help="Images a shard.")
    parser.add_argument("--seed", type=int, default=0, help="Of the order, and of the split where there is none.")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    from overlock.data.shards import pack  # noqa: PLC0415

    shards = pack(
        Path(options.source), Path(options.target), shard_images=options.shard_images, seed=options.seed,
        overwrite=options.overwrite,
    )  # fmt: skip
    console.print(f"{len(shards)} shards; train on them with --data wds:{options.target}")


COMMAND = Command("Pack a folder of images into WebDataset shards.", add_options, run)
