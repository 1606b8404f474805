"""What detection and segmentation leave in a folder: pictures, COCO's JSON, label maps as PNG files."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from overlock.deploy.results import LabelMap, Objects
from overlock.files import Outputs, unwritable

OBJECTS_FILE = "objects.json"


class ResultFolder:
    """Writes results into a folder while they come, a picture each, under the names of the images.

    Args:
        folder: as :meth:`overlock.files.Outputs.claim_folder` gives it.
        classes: names of the classes.
        outputs: what may be written.

    Raises:
        ValueError: where a file cannot be written.
    """

    def __init__(self, folder: Path, classes: Sequence[str], outputs: Outputs):
        self.folder, self.classes, self.outputs = folder, tuple(classes), outputs
        self.images, self.objects = _JsonList(), _JsonList()

    def add(self, result: Objects | LabelMap) -> None:
        """Write the picture of an image, and its label map beside it, or note its objects for :meth:`close`."""
        suffixes = (".png",) if isinstance(result, Objects) else (".png", "_labels.png")
        name = self._free_name(result.name, suffixes)
        self._write(f"{name}.png", result.draw())
        if isinstance(result, LabelMap):
            self._write(f"{name}_labels.png", result.as_image())
        else:
            self._note(result)

    def close(self) -> None:
        """Write the objects of all images, in COCO's form with scores."""
        if not self.images.count:
            return
        categories = [dict(id=i, name=name) for i, name in enumerate(self.classes, start=1)]
        path = self.outputs.claim(self.folder / OBJECTS_FILE)
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write('{"images": ')
                self.images.copy_to(file)
                file.write(', "annotations": ')
                self.objects.copy_to(file)
                file.write(f', "categories": {json.dumps(categories, ensure_ascii=False)}}}')
        except OSError as error:
            raise unwritable(path, error) from None

    def _note(self, objects: Objects) -> None:
        height, width = objects.size
        number = self.images.count + 1
        self.images.add(dict(id=number, file_name=objects.source, height=height, width=width))
        for entry in describe_objects(objects):
            self.objects.add(dict(id=self.objects.count + 1, image_id=number) | entry)

    def _free_name(self, name: str, suffixes: Sequence[str]) -> str:
        """Of the files for an image: its own, with a number where one of them may not be written."""
        tried, number = name, 2
        while any(self.outputs.objection(self.folder / f"{tried}{suffix}") for suffix in suffixes):
            tried, number = f"{name}_{number}", number + 1
        return tried

    def _write(self, name: str, picture: Image.Image) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        self.outputs.write(self.folder / name, buffer.getvalue())


class _JsonList:
    """A list that is kept on disk as it grows."""

    def __init__(self) -> None:
        self.file: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed with the process
        self.count = 0

    def add(self, entry: dict[str, Any]) -> None:
        self.file.write((", " if self.count else "") + json.dumps(entry, ensure_ascii=False))
        self.count += 1

    def copy_to(self, file: IO[str]) -> None:
        self.file.seek(0)
        file.write("[")
        shutil.copyfileobj(self.file, file)
        file.write("]")


def describe_objects(objects: Objects) -> list[dict[str, Any]]:
    """The objects of an image as COCO's results have them.

    Each has category_id, bbox as left, top, width and height, score, and where there are masks its segmentation in
    compressed run lengths and its area.
    """
    entries = []
    for place, score, (left, top, right, bottom) in zip(objects.places, objects.scores, objects.boxes, strict=True):
        box = [left, top, right - left, bottom - top]
        entries.append(dict(category_id=place + 1, bbox=box, score=score, iscrowd=0, area=box[2] * box[3]))
    if objects.masks is not None:
        runs, areas = objects.masks.to_coco(), objects.masks.areas()
        for entry, lengths, area in zip(entries, runs, areas, strict=True):
            entry["segmentation"] = dict(size=lengths["size"], counts=lengths["counts"].decode())
            entry["area"] = area
    return entries
