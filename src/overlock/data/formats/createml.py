"""Annotation files of Apple's CreateML: one JSON list of images for a part, boxes by their centres."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from overlock.data.coco_masks import as_number
from overlock.data.formats.common import Gathering, ImageFinder, Part, read_json

FILE = "_annotations.createml.json"


def find(root: Path, parts: Sequence[str] | None) -> Part | None:
    """The first part's file that is there; parts are None for a folder without."""
    for folder in [root] if parts is None else [root / part for part in parts]:
        path = folder / FILE
        if path.is_file():
            return Part(path=path, folder=folder, read=partial(read, path, path.parent))
    return None


def read(path: Path, folder: Path) -> dict[str, Any]:
    """The content of a file in COCO's form.

    Raises:
        ValueError: for a file that cannot be read or is not of this form, naming the image of what is wrong.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ValueError(f"{path}: not an annotation file of CreateML's form (a list of images)")
    gathering, finder = Gathering(folder), ImageFinder(folder)
    for entry in entries:
        image = entry.get("image") or entry.get("imagefilename")
        if not isinstance(image, str):
            raise ValueError(f"{path}: an entry has no image ({str(entry)[:80]})")
        gathering.add_image(finder.find(image, path))
        objects = entry.get("annotations") or entry.get("annotation") or []
        for number, one in enumerate(objects, start=1):
            name = f"{image}, object {number}"
            label, box = (one.get("label"), one.get("coordinates")) if isinstance(one, dict) else (None, None)
            if label is None or not isinstance(box, dict):
                missing = "label" if label is None else "coordinates"
                raise ValueError(f"{path}: {name}, has no {missing}")
            try:
                x, y, width, height = (as_number(box.get(side)) for side in ("x", "y", "width", "height"))
            except ValueError as error:
                raise ValueError(f"{path}: {name}, has {error} among its coordinates, which is no number") from None
            gathering.add_object(str(label), name, [x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return gathering.content()
