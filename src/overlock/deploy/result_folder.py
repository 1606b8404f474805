"""A folder of results of detection and segmentation: pictures, COCO's JSON, label maps as PNG files."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from overlock.deploy.coco_results import describe_detections
from overlock.deploy.inputs import Failure
from overlock.deploy.results import LabelMap, Objects, Result
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
        self.numbers: dict[str, int] = {}  # of the names that several images have, the last one's

    def add(self, result: Result | Failure) -> None:
        """Write the picture of an image, and its label map beside it, or note its objects for :meth:`close`."""
        if not isinstance(result, (Objects, LabelMap)):
            return
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
        ids = [class_id + 1 for class_id in objects.class_ids]
        entries = list(describe_detections(objects.boxes, objects.scores, ids, objects.masks))
        areas = [box[2] * box[3] for box in (entry["bbox"] for entry in entries)]
        for entry, area in zip(entries, areas if objects.masks is None else objects.masks.areas(), strict=True):
            self.objects.add(dict(id=self.objects.count + 1, image_id=number) | entry | dict(iscrowd=0, area=area))

    def _free_name(self, name: str, suffixes: Sequence[str]) -> str:
        """Of the files for an image: its own, with a number where one of them may not be written."""
        tried, number = name, self.numbers.get(name, 1)
        while any(self.outputs.objection(self.folder / f"{tried}{suffix}") for suffix in suffixes):
            number += 1
            tried = f"{name}_{number}"
            self.numbers[name] = number
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
