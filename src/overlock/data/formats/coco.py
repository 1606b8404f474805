"""Annotation files in COCO's form: one JSON file of images, categories and objects for a part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from overlock.data.formats.common import Part, read_json

LAYOUTS = (  # annotation file and folder of images
    ("annotations/instances_{part}.json", "{part}"),
    ("annotations/instances_{part}.json", "images/{part}"),
    ("annotations/{part}.json", "images/{part}"),
    ("annotations/{part}.json", "{part}"),
    ("instances_{part}.json", "{part}"),
    ("{part}/_annotations.coco.json", "{part}"),
)
WHOLE = (  # the same for a folder without parts: Label Studio's, CVAT's, Roboflow's
    ("result.json", "images"),
    ("annotations/instances_default.json", "images/default"),
    ("annotations/instances_default.json", "images"),
    ("_annotations.coco.json", "."),
    ("annotations.json", "images"),
    ("annotations.json", "."),
    ("result.json", "."),
)
LISTS = ("images", "annotations", "categories")


def find(root: Path, parts: Sequence[str] | None) -> Part | None:
    """The first annotation file that is there, and the folder of its images; parts are None for a folder without."""
    layouts = WHOLE if parts is None else [tuple(x.format(part=part) for x in y) for part in parts for y in LAYOUTS]
    found = [(root / file, root / folder) for file, folder in layouts if (root / file).is_file()]
    if not found:
        return None
    path, folder = next((where for where in found if where[1].is_dir()), found[0])
    return Part(path=path, folder=folder, read=partial(read, path))


def read(path: Path, _: Path | None = None) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ValueError: for a file that cannot be read or is not of this form.
    """
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: it is a {type(content).__name__}, not a dict")
        missing = [name for name in LISTS if content.get(name) is None]
        if missing:
            raise ValueError(f"{path}: it has no {' and no '.join(missing)}")
        for name in LISTS:
            if not isinstance(content[name], list) or not all(isinstance(one, dict) for one in content[name]):
                raise ValueError(f"{path}: its {name} are no list of dicts")
    except ValueError as error:
        if "cannot be read" in str(error):
            raise
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not an annotation file in COCO's form ({reason})") from None
    return {name: content[name] for name in LISTS}
