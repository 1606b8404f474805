"""``overlock pack FOLDER OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command, add_overwrite
from overlock.object_files import Format, ObjectFiles

OF_OBJECTS = ("format", "annotations", "images", "test_annotations", "test_images", "train_split", "val_split")
OF_CLASSES = ("shard_images", "seed")


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "source", type=str, metavar="FOLDER", help="Images by class, or with annotations of objects, as for training."
    )
    parser.add_argument("target", type=str, metavar="OUT", help="New folder for shards, or for objects in COCO's form.")
    parser.add_argument(
        "--shard_images", type=int | None, default=None, help="classes: images a shard; 10000 unless given."
    )
    parser.add_argument(
        "--seed", type=int | None, default=None, help="classes: of the order, and of the split where there is none."
    )
    parser.add_argument(
        "--format", type=Format | None, default=None, help="objects: form of the annotations; told by what lies there."
    )
    for name, what in (("", "to train on"), ("test_", "to test on")):
        parser.add_argument(
            f"--{name}annotations", type=str | None, default=None,
            help=f"objects: file of the annotations {what}, or folder of such files.",
        )  # fmt: skip
        parser.add_argument(f"--{name}images", type=str | None, default=None, help="objects: folder of their images.")
    parser.add_argument("--train_split", type=str | None, default=None, help="objects: name of the part to train on.")
    parser.add_argument("--val_split", type=str | None, default=None, help="objects: name of the part to test on.")
    add_overwrite(parser)


def run(options: Namespace, console: Console) -> None:
    from overlock.data.formats import holds_objects  # noqa: PLC0415

    given = {name: options[name] for name in (*OF_OBJECTS, *OF_CLASSES) if options[name] is not None}
    train, test = (
        ObjectFiles(
            data=options.source, format=options.format, split=options[f"{part}_split"],
            annotations=options[f"{prefix}annotations"], images=options[f"{prefix}images"],
        )
        for part, prefix in (("train", ""), ("val", "test_"))
    )  # fmt: skip
    objects = bool(given.keys() & set(OF_OBJECTS)) or holds_objects(train)
    strange = sorted(given.keys() & set(OF_CLASSES))
    if objects and strange:
        raise ValueError(f"--{strange[0]} is for images by class; {options.source} has images with objects")
    if objects:
        _pack_objects(train, test, options, console)
    else:
        _pack_classes(given, options, console)


def _pack_objects(train: ObjectFiles, test: ObjectFiles, options: Namespace, console: Console) -> None:
    from overlock.data.coco_writer import pack_objects  # noqa: PLC0415

    for part in pack_objects(train, test, Path(options.target), overwrite=options.overwrite):
        for note in part.notes:
            console.print(f"{part.source}: {note}")
        console.print(f"{part.file}: {part.images} images, {part.objects} objects")
    console.print(f"train on them with --data {options.target}")


def _pack_classes(given: dict[str, int], options: Namespace, console: Console) -> None:
    from overlock.data.shards import pack  # noqa: PLC0415

    shards = pack(
        Path(options.source), Path(options.target), **given, overwrite=options.overwrite, tell=console.print,
    )  # fmt: skip
    console.print(f"{len(shards)} shards; train on them with --data wds:{options.target}")


COMMAND = Command("Pack images by class into WebDataset shards, or write objects in COCO's form.", add_options, run)
