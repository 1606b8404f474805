"""What detection and segmentation leave in a folder: pictures, COCO's JSON, label maps as PNG files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from overlock.deploy.dense import LabelMap, Objects
from overlock.deploy.predict import as_pil
from overlock.drawing import draw_labels, draw_legend, draw_objects, join_pictures
from overlock.files import write_atomically

OBJECTS_FILE = "objects.json"


class ResultFolder:
    """Writes results into a folder, a picture each, under the names of the images.

    Args:
        folder: made where it is not there.
        classes: names of the classes.

    Raises:
        ValueError: where the folder cannot be written.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str]):
        self.folder, self.classes = Path(folder), tuple(classes)
        self.taken: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: the folder cannot be made ({error.strerror}); choose another one") from None
        self.content: dict[str, list[dict[str, Any]]] = dict(
            images=[], annotations=[], categories=[dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
        )

    def add_objects(self, objects: Objects) -> None:
        """Write the picture of an image, and note its objects for :meth:`finish`."""
        places = {name: i for i, name in enumerate(self.classes, start=1)}
        labels = [places[name] for name in objects.labels]
        drawn: dict[str, Any] = dict(boxes=objects.boxes, labels=labels, scores=objects.scores)
        if objects.masks is not None:
            drawn["masks"] = torch.from_numpy(objects.masks)
        name = self._name(objects.source)
        self._write(f"{name}.png", draw_objects(as_pil(objects.source), drawn, self.classes))
        number = len(self.content["images"]) + 1
        height, width = objects.size
        self.content["images"].append(dict(id=number, file_name=objects.source, height=height, width=width))
        for i, (label, score, box) in enumerate(zip(labels, objects.scores, objects.boxes, strict=True)):
            mask = None if objects.masks is None else objects.masks[i]
            self.content["annotations"].append(
                dict(id=len(self.content["annotations"]) + 1, image_id=number)
                | describe_object(label, score, box, mask)
            )

    def add_labels(self, labels: LabelMap) -> None:
        """Write the picture of an image with its legend, and the label map beside it."""
        name, image = self._name(labels.source), as_pil(labels.source)
        shown = [self.classes.index(one) for one in labels.shares()]
        picture = draw_labels(image, torch.from_numpy(labels.labels), self.classes)
        self._write(f"{name}.png", join_pictures([[picture, draw_legend(self.classes, shown, height=image.height)]]))
        kind = np.uint8 if len(self.classes) <= 256 else np.uint16
        self._write(f"{name}_labels.png", Image.fromarray(labels.labels.astype(kind)))

    def finish(self) -> None:
        """Write the objects of all images, in COCO's form with scores."""
        if self.content["images"]:
            write_atomically(self.folder / OBJECTS_FILE, json.dumps(self.content, ensure_ascii=False))

    def _name(self, source: str) -> str:
        """Of the files for an image: its own without the ending, with a number where that is taken."""
        stem = Path(source).stem
        name = next(
            one for one in (stem, *(f"{stem}_{i}" for i in range(2, 2 + len(self.taken)))) if one not in self.taken
        )
        self.taken.add(name)
        return name

    def _write(self, name: str, picture: Image.Image) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        write_atomically(self.folder / name, buffer.getvalue())


def describe_object(
    label: int, score: float, box: Sequence[float], mask: np.ndarray[Any, Any] | None
) -> dict[str, Any]:
    """An object as COCO's results have it: category_id, bbox as left, top, width and height, score, and where there is
    a mask its segmentation in compressed run lengths and its area."""
    left, top, right, bottom = box
    entry: dict[str, Any] = dict(
        category_id=label, bbox=[left, top, right - left, bottom - top], score=score, iscrowd=0,
        area=(right - left) * (bottom - top),
    )  # fmt: skip
    if mask is not None:
        from pycocotools import mask as coco  # noqa: PLC0415

        lengths = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        entry["segmentation"] = dict(size=list(mask.shape), counts=lengths["counts"].decode())
        entry["area"] = int(mask.sum())
    return entry


def describe_objects(objects: Objects) -> dict[str, Any]:
    """The objects of an image as plain lists, without their masks."""
    return dict(
        objects=[
            dict(label=label, score=score, box=list(box))
            for label, score, box in zip(objects.labels, objects.scores, objects.boxes, strict=True)
        ]
    )
