"""Images with objects: annotation files in COCO's form (boxes, polygons, run lengths, crowds)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from overlock.data.files import read_image
from overlock.data.images import ImageData

Target = dict[str, Any]
TRAIN_PARTS, TEST_PARTS = ("train", "train2017"), ("val", "val2017", "valid", "validation", "test")
LAYOUTS = (  # annotation file and folder of images
    ("annotations/instances_{part}.json", "{part}"),
    ("annotations/instances_{part}.json", "images/{part}"),
    ("instances_{part}.json", "{part}"),
    ("{part}/_annotations.coco.json", "{part}"),
)


class CocoImages:
    """The images of an annotation file.

    Categories become labels from 1 on, in the order of their ids; 0 is left to the background. Boxes are cut to the
    image; objects without a pixel there are left out, and so are crowds in training.

    Args:
        annotations: the file.
        folder: of the images that it names.
        masks: read the objects' masks too.
        training: leave out crowds, and images without an object.
        categories: names of those to read; all unless given.

    Attributes:
        classes: names of the labels from 1 on.

    Raises:
        ValueError: for a file that cannot be read or is not of this form, or names images that are not there.
    """

    def __init__(
        self,
        annotations: str | Path,
        folder: str | Path,
        *,
        masks: bool = True,
        training: bool = False,
        categories: Sequence[str] = (),
    ):
        self.path, self.folder, self.masks, self.training = Path(annotations), Path(folder), masks, training
        content = self._read()
        known = {str(one["name"]): one["id"] for one in sorted(content["categories"], key=lambda one: one["id"])}
        strange = [name for name in categories if name not in known]
        if strange:
            raise ValueError(f"{self.path}: no category {strange[0]!r}; there are {', '.join(known)}")
        self.classes = tuple(name for name in known if not categories or name in categories)
        self._labels = {known[name]: i for i, name in enumerate(self.classes, start=1)}
        self._objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for one in content["annotations"]:
            if one["category_id"] in self._labels:
                self._objects[one["image_id"]].append(one)
        self.images = [image for image in content["images"] if not training or self._has_objects(image)]
        if not self.images:
            raise ValueError(f"{self.path}: no image{' with an object' if training else ''} to read")
        self._check()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, Target]:
        """An image as RGB, and its target.

        The target has boxes (N, 4) as left, top, right, bottom, labels (N,), iscrowd (N,), area (N,), image_id, and
        masks (N, H, W) where asked for; boxes and masks as torchvision's tensors, which its transforms follow.

        Raises:
            ValueError: for an image that cannot be read, or a mask that cannot be decoded, naming it.
        """
        entry = self.images[index]
        image = read_image(self.folder / entry["file_name"])
        width, height = image.size
        kept, boxes, masks = [], [], []
        for one in self._objects[entry["id"]]:
            box = _clip(one["bbox"], width, height)
            if box is None or (self.training and one.get("iscrowd", 0)):
                continue
            kept.append(one)
            boxes.append(box)
            if self.masks:
                masks.append(self._mask(one, box, height, width))
        target = dict(
            boxes=tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
            ),
            labels=torch.tensor([self._labels[one["category_id"]] for one in kept], dtype=torch.int64),
            iscrowd=torch.tensor([int(one.get("iscrowd", 0)) for one in kept], dtype=torch.int64),
            area=torch.tensor([_area(one) for one in kept], dtype=torch.float32),
            image_id=entry["id"],
        )
        if self.masks:
            stacked = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
            target["masks"] = tv_tensors.Mask(stacked)
        return image, target

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            known = {category["id"] for category in content["categories"]}
            for name in ("images", "annotations"):
                if not isinstance(content[name], list):
                    raise TypeError(f"{name} is no list")
            strange = {one["category_id"] for one in content["annotations"]} - known
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not an annotation file in COCO's form ({error!r})") from None
        if strange:
            raise ValueError(f"{self.path}: category {min(strange)} of an object is not among its categories")
        return content

    def _check(self) -> None:
        absent = [image["file_name"] for image in self.images if not (self.folder / image["file_name"]).is_file()]
        if absent:
            raise ValueError(
                f"{self.path}: {len(absent)} of its {len(self.images)} images are not in {self.folder} (first: "
                f"{', '.join(absent[:3])}); check the folder"
            )

    def _has_objects(self, image: dict[str, Any]) -> bool:
        return any(not one.get("iscrowd", 0) and min(one["bbox"][2:]) > 0 for one in self._objects[image["id"]])

    def _mask(self, one: dict[str, Any], box: list[float], height: int, width: int) -> Tensor:
        """(H, W), from polygons or run lengths; the box itself where there is neither."""
        try:
            from pycocotools import mask as coco  # noqa: PLC0415
        except ImportError:
            raise ImportError("masks need pycocotools: pip install 'overlock[detect]'") from None
        shape = one.get("segmentation")
        if not shape:
            mask = torch.zeros(height, width, dtype=torch.uint8)
            left, top, right, bottom = (round(x) for x in box)
            mask[top : max(bottom, top + 1), left : max(right, left + 1)] = 1
            return mask
        try:
            if isinstance(shape, list):
                if any(len(polygon) < 6 or len(polygon) % 2 for polygon in shape):
                    raise ValueError("a polygon has fewer than three corners")
                lengths = coco.merge(coco.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                lengths = coco.frPyObjects(shape, *shape["size"])
            else:
                lengths = shape
            decoded = np.ascontiguousarray(coco.decode(lengths))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{self.path}: the mask of object {one.get('id')} cannot be decoded ({error})") from None
        if decoded.shape != (height, width):
            found = " x ".join(map(str, decoded.shape))
            raise ValueError(
                f"{self.path}: the mask of object {one.get('id')} is of {found} pixels, its image of {height} x {width}"
            )
        return torch.from_numpy(decoded)


def load_coco(
    data: str | Path,
    *,
    train_split: str | None = None,
    val_split: str | None = None,
    masks: bool = True,
    categories: Sequence[str] = (),
) -> ImageData:
    """The parts of a folder in COCO's form to train on and to test on.

    Args:
        data: the folder; see LAYOUTS for where annotations and images may lie in it.
        train_split: name of the first part; the usual names are tried unless given.
        val_split: name of the second.
        masks: read the objects' masks too.
        categories: names of those to read; all unless given.

    Raises:
        ValueError: where there is no such part, or the parts are of other categories; and as :class:`CocoImages`.
    """
    train = CocoImages(
        *_find_part(Path(data), (train_split,) if train_split else TRAIN_PARTS),
        masks=masks, training=True, categories=categories,
    )  # fmt: skip
    test = load_coco_part(data, part=val_split, masks=masks, categories=categories)
    if test.classes != train.classes:
        raise ValueError(
            f"{test.path}: its categories ({', '.join(test.classes)}) are not those of {train.path} "
            f"({', '.join(train.classes)})"
        )
    return ImageData(classes=train.classes, train=train, test=test)


def load_coco_part(
    data: str | Path, *, part: str | None = None, masks: bool = True, categories: Sequence[str] = ()
) -> CocoImages:
    """The part to test on alone; arguments and errors as those of :func:`load_coco`."""
    where = _find_part(Path(data), (part,) if part else TEST_PARTS)
    return CocoImages(*where, masks=masks, categories=categories)


def _find_part(root: Path, parts: Sequence[str]) -> tuple[Path, Path]:
    """The first annotation file that is there, and the folder of its images."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of images and annotations")
    places = [tuple(root / name.format(part=part) for name in layout) for part in parts for layout in LAYOUTS]
    found = [(path, folder) for path, folder in places if path.is_file()]
    if found:
        return next((where for where in found if where[1].is_dir()), found[0])
    tried = dict.fromkeys(str(path.relative_to(root)) for path, _ in places)
    raise ValueError(f"{root}: no annotations found; looked for {', '.join(tried)}")


def _clip(box: list[float], width: int, height: int) -> list[float] | None:
    """Left, top, right, bottom within the image; None where nothing is left."""
    left, top = max(0.0, float(box[0])), max(0.0, float(box[1]))
    right, bottom = min(float(width), float(box[0] + box[2])), min(float(height), float(box[1] + box[3]))
    return [left, top, right, bottom] if right > left and bottom > top else None


def _area(one: dict[str, Any]) -> float:
    return float(one.get("area", one["bbox"][2] * one["bbox"][3]))
