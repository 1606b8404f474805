"""Detections in COCO's forms: the list of results that pycocotools' ``loadRes`` takes, and the ids of its images."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from overlock.data.formats.common import read_json
from overlock.deploy.inputs import Failure
from overlock.deploy.results import Objects, Result
from overlock.deploy.tables import JsonArray
from overlock.tasks.masks import Masks

Id = int | str
_log = logging.getLogger(__name__)


def describe_detections(
    boxes: Sequence[Sequence[float]], scores: Sequence[float], category_ids: Sequence[Id | None], masks: Masks | None
) -> Iterator[dict[str, Any]]:
    """Detections of an image as COCO has them, but for the image's id.

    Args:
        boxes: left, top, right, bottom of each.
        scores: of each.
        category_ids: of each; those of None are left out.
        masks: of each, if any.

    Yields:
        category_id, bbox as left, top, width and height, score, and of masks segmentation, as compressed run lengths.
    """
    segmentations = [None] * len(boxes) if masks is None else masks.to_coco()
    for box, score, category, runs in zip(boxes, scores, category_ids, segmentations, strict=True):
        if category is None:
            continue
        left, top, right, bottom = box
        entry: dict[str, Any] = dict(category_id=category, bbox=[left, top, right - left, bottom - top], score=score)
        if runs is not None:
            entry["segmentation"] = dict(size=runs["size"], counts=runs["counts"].decode())
        yield entry


class ImageIds:
    """The ids that an annotation file, or a list of images without annotations, gives to images and categories.

    Args:
        path: of a JSON file with COCO's ``images`` and ``categories``.

    Raises:
        ValueError: for a file that cannot be read or lacks them.
    """

    def __init__(self, path: Path):
        self.path = path
        content = read_json(path)
        try:
            self.categories: dict[str, Id] = {str(one["name"]): one["id"] for one in content["categories"]}
            images = [(PurePath(one["file_name"]), one["id"]) for one in content["images"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a file of images in COCO's form ({error}); it needs images with id and file_name, and "
                "categories with id and name"
            ) from None
        self._images: defaultdict[str, list[tuple[PurePath, Id]]] = defaultdict(list)
        for file, number in images:
            self._images[file.name].append((file, number))

    def of_image(self, source: str) -> Id | None:
        """Of the image whose file name the path ends in; of several the one whose folders fit too."""
        path = PurePath(source)
        same = self._images.get(path.name, [])
        fitting = [number for file, number in same if path.parts[-len(file.parts) :] == file.parts]
        if len(fitting) == 1:
            return fitting[0]
        return same[0][1] if len(same) == 1 else None

    def of_classes(self, classes: Sequence[str]) -> list[Id | None]:
        """Of classes by their names; None for one that is no category.

        Raises:
            ValueError: where none is.
        """
        ids = [self.categories.get(name) for name in classes]
        if not any(one is not None for one in ids):
            known = ", ".join(list(self.categories)[:10])
            raise ValueError(f"{self.path}: none of its categories ({known}) is a class of the detector")
        return ids


class CocoFile:
    """A JSON file of COCO's results, written while they come.

    Args:
        path: of the file.
        classes: names of the detector's classes.
        ids: of images and categories. Unless given, an image's id is its name, as a number where it is one, or the
            frame's number in a video, and classes count from 1.

    Raises:
        ValueError: where the file cannot be written, or no class is a category.
    """

    def __init__(self, path: Path, classes: Sequence[str], ids: ImageIds | None = None):
        self.path, self.classes, self.ids = path, tuple(classes), ids
        self.category_ids = list(range(1, len(classes) + 1)) if ids is None else ids.of_classes(classes)
        self.seen: set[int] = set()  # hashes of ids
        self.left_out: Counter[str] = Counter()
        self.array = JsonArray(path)

    def add(self, outcome: Result | Failure) -> None:
        """Add the objects of an image.

        Raises:
            ValueError: where an earlier image has its id.
        """
        if not isinstance(outcome, Objects):
            return
        number = self._id_of(outcome)
        if number is None:
            self.left_out["images that are not in the file of --annotations"] += 1
            return
        if hash(number) in self.seen:
            mend = "give each image once" if self.ids else "give a file that says the ids with --annotations"
            raise ValueError(f"{outcome.source}: another image has its id {number} in {self.path}; {mend}")
        self.seen.add(hash(number))
        categories = [self.category_ids[class_id] for class_id in outcome.class_ids]
        for label, category in zip(outcome.labels, categories, strict=True):
            if category is None:
                self.left_out[f"objects of the class {label}, which is no category there"] += 1
        for entry in describe_detections(outcome.boxes, outcome.scores, categories, outcome.masks):
            self.array.add(dict(image_id=number) | entry)

    def close(self) -> None:
        """End the list, and tell what is not in it."""
        self.array.close()
        if self.left_out:
            counts = ", ".join(f"{count} {what}" for what, count in self.left_out.most_common(8))
            _log.warning("%s: without %s", self.path, counts)

    def _id_of(self, objects: Objects) -> Id | None:
        if objects.frame is not None:
            return objects.frame
        if self.ids is not None:
            return self.ids.of_image(objects.source)
        stem = PurePath(objects.source).stem
        return int(stem) if stem.isascii() and stem.isdecimal() else stem
