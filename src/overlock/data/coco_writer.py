"""Images with objects, of any known form of annotations, written in COCO's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlock.data.annotations import Annotations
from overlock.data.formats import read_parts
from overlock.files import Outputs
from overlock.object_files import ObjectFiles

PARTS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class PackedPart:
    """A part as it was written."""

    source: Path
    """What it was read from."""
    file: Path
    """Of the annotations, as written."""
    images: int
    objects: int
    notes: tuple[str, ...]
    """What was left out or read in another way than it stands there, a line each."""


def pack_objects(train: ObjectFiles, test: ObjectFiles, target: Path, *, overwrite: bool = False) -> list[PackedPart]:
    """Write the parts of a data set as ``annotations/instances_PART.json`` with the images in ``PART``.

    A run sees the same images and objects in both. Where there is no part to test on there is none afterwards, and a
    run holds out the same images. Images are copied as they are; names that occur twice get their folder's before.

    Args:
        train: where the part to train on lies.
        test: where the part to test on lies.
        target: a new or empty folder.
        overwrite: write to a folder that is not empty, and replace what is there.

    Raises:
        ValueError: for data that cannot be read, and a target that will not do.
    """
    parts = [part for part in read_parts(train, test, masks=True) if part is not None]
    outputs = Outputs([train.data, *(path for part in parts for path in part.files)], overwrite=overwrite)
    outputs.claim_folder(target)
    return [_write(part, name, target, outputs.write) for part, name in zip(parts, PARTS, strict=False)]


def _write(part: Annotations, name: str, target: Path, write: Callable[[Path, bytes | str], None]) -> PackedPart:
    names = _file_names(part)
    for source, file_name in zip(part.files, names, strict=True):
        try:
            image = source.read_bytes()
        except OSError as error:
            raise ValueError(f"{source}: cannot be read ({error.strerror})") from None
        write(target / name / file_name, image)
    file = target / "annotations" / f"instances_{name}.json"
    write(file, json.dumps(to_coco(part, names), ensure_ascii=False))
    return PackedPart(source=part.path, file=file, images=len(part), objects=len(part.images), notes=part.notes)


def _file_names(part: Annotations) -> list[str]:
    """Their own, or with those of their folders before, as many as it takes to tell them apart."""
    names = [file.name for file in part.files]
    for depth in range(2, 1 + max(len(file.parts) for file in part.files)):
        counts = Counter(name.lower() for name in names)
        if max(counts.values()) == 1:
            break
        names = [
            name if counts[name.lower()] == 1 else "_".join(file.parts[-depth:]).replace("/", "")
            for name, file in zip(names, part.files, strict=True)
        ]
    return names


def to_coco(part: Annotations, file_names: list[str]) -> dict[str, Any]:
    """The content of a file in COCO's form.

    Args:
        part: images and objects, with the shapes of the masks.
        file_names: of the images.
    """
    images = [
        dict(id=number, file_name=name) | (dict(width=width, height=height) if width and height else {})
        for number, name, (width, height) in zip(part.image_ids, file_names, part.sizes.tolist(), strict=True)
    ]
    objects = zip(
        part.images.tolist(), part.kinds.tolist(), part.boxes.tolist(), part.areas.tolist(), part.crowds.tolist(),
        strict=True,
    )  # fmt: skip
    annotations = []
    for number, (image, kind, (left, top, right, bottom), area, crowd) in enumerate(objects):
        one = dict(
            id=number + 1, image_id=part.image_ids[image], category_id=part.category_ids[kind],
            bbox=[left, top, right - left, bottom - top], area=area, iscrowd=int(crowd),
        )  # fmt: skip
        shape = None if part.shapes is None else part.shapes.segmentation(number)
        annotations.append(one if shape is None else one | dict(segmentation=shape))
    names = zip(part.category_ids, part.categories, strict=True)
    return dict(
        images=images, annotations=annotations, categories=[dict(id=number, name=name) for number, name in names]
    )
