"""Images with objects to find: boxes, masks and classes, out of annotations of any form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from overlock.data.annotations import Annotations, Array, listed
from overlock.data.files import is_image, read_image
from overlock.data.formats import read_part, read_parts
from overlock.data.image_sizes import SIDEWAYS, read_orientation, turn_masks
from overlock.data.images import TEST_SHARE, ImageData
from overlock.data.run_lengths import Masks, from_tensor
from overlock.object_files import ObjectFiles

Target = dict[str, Any]
LOOKED_AT = 256  # images whose sizes are compared with the file's before a run


class DetectionImages:
    """The images of a part of a data set, with their objects as targets.

    Labels are places in the classes, from 1 on; 0 is left to the background. Objects of other categories are left out.
    Boxes are cut to the image.

    Args:
        annotations: what is known of the images.
        classes: names of the labels from 1 on, some of the categories perhaps not among the file's.
        places: numbers of the images to take; all unless given.
        training: leave out crowds, objects smaller than a pixel, and images without an object.
        background: keep images without an object.

    Attributes:
        notes: what was left out, a line each.

    Raises:
        ValueError: where no image is left, or the sizes of most are not those that the file gives.
    """

    def __init__(
        self,
        annotations: Annotations,
        *,
        classes: Sequence[str],
        places: Array | None = None,
        training: bool = False,
        background: bool = False,
    ):
        self.annotations, self.classes, self.training = annotations, tuple(classes), training
        places = np.arange(len(annotations)) if places is None else np.asarray(places)
        notes = list(annotations.notes)
        labels = {name: label for label, name in enumerate(self.classes, start=1)}
        of_kind = np.array([labels.get(name, 0) for name in annotations.categories], dtype=np.int64)
        self._labels = of_kind[annotations.kinds]
        self._objects = np.flatnonzero(self._chosen(places, training, notes))
        counts = np.bincount(annotations.images[self._objects], minlength=len(annotations))
        empty = places[counts[places] == 0]
        if training and len(empty) and not background:
            places = places[counts[places] > 0]
            notes.append(f"{len(empty)} images have no object: left out (--background true keeps them)")
        elif len(empty):
            notes.append(f"{len(empty)} of {len(places)} images have no object")
        if not len(places):
            raise ValueError(f"{annotations.path}: no image{' with an object' if training else ''} to read")
        self.places, self._counts = places, counts
        self._starts = np.cumsum(counts) - counts
        if not training and len(self._objects) and annotations.crowds[self._objects].all():
            notes.append("all objects are crowds: there is none to find")
        present = set(np.unique(self._labels[self._objects]).tolist())
        absent = [name for name, label in labels.items() if label not in present]
        if absent and present:
            notes.append(f"{len(absent)} of {len(labels)} classes have no object here: {listed(absent)}")
        notes += self._compare_sizes()
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def image_ids(self) -> tuple[int | str, ...]:
        """The file's ids of the images."""
        return tuple(self.annotations.image_ids[place] for place in self.places)

    @property
    def category_ids(self) -> tuple[int | str | None, ...]:
        """The file's ids of the classes; None for one that it does not have."""
        known = dict(zip(self.annotations.categories, self.annotations.category_ids, strict=True))
        return tuple(known.get(name) for name in self.classes)

    def read(self, index: int) -> tuple[Image.Image, Target]:
        """An image as RGB, upright, and its target.

        The target has boxes (N, 4) as left, top, right, bottom, labels (N,), iscrowd (N,), area (N,), image_id, and
        masks (N, H, W) where they were read: in training, as the boxes, torchvision's tensors, which its transforms
        follow; else :class:`overlock.data.run_lengths.Masks`.

        Raises:
            ValueError: for an image that cannot be read or is of another size than the file says, or a mask that cannot
                be decoded, naming it.
        """
        place = int(self.places[index])
        image = read_image(self.annotations.files[place])
        turn = self._turn(place, image.size)
        width, height = image.size if turn == 1 else image.size[::-1]
        objects = self._objects[self._starts[place] : self._starts[place] + self._counts[place]]
        boxes = self.annotations.boxes[objects].clip(0, [width, height, width, height])
        left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        objects, boxes = objects[left], boxes[left]
        masks = self._masks(objects, boxes, (height, width), turn)
        target = dict(
            boxes=tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                turn_boxes(torch.from_numpy(boxes).float(), turn, (height, width)), format="XYXY",
                canvas_size=(image.height, image.width),
            ),
            labels=torch.from_numpy(self._labels[objects]),
            iscrowd=torch.from_numpy(self.annotations.crowds[objects].astype(np.int64)),
            area=torch.from_numpy(self.annotations.areas[objects]).float(),
            image_id=self.annotations.image_ids[place],
        )  # fmt: skip
        if masks is not None:
            target["masks"] = masks
        return image, target

    def name(self, index: int) -> str:
        """The file of an image."""
        return str(self.annotations.files[self.places[index]])

    def _masks(self, objects: Array, boxes: Array, size: tuple[int, int], turn: int) -> Tensor | Masks | None:
        shapes = self.annotations.shapes
        if shapes is None:
            return None
        places = list(zip(objects.tolist(), boxes.tolist(), strict=True))
        if self.training:
            masks = torch.zeros(len(places), *size, dtype=torch.uint8)
            for mask, (number, box) in zip(masks, places, strict=True):
                mask.copy_(shapes.decode(number, size=size, box=box))
            return tv_tensors.Mask(turn_masks(masks, turn))
        found = Masks(size, [shapes.runs_of(number, size=size, box=box) for number, box in places])
        if turn == 1:
            return found
        turned = [from_tensor(turn_masks(torch.from_numpy(mask)[None], turn)).runs[0] for mask in found]
        return Masks(size[::-1], turned)

    def _chosen(self, places: Array, training: bool, notes: list[str]) -> Array:
        """Which objects count (N,)."""
        known, here = self.annotations, np.zeros(len(self.annotations), dtype=bool)
        here[places] = True
        chosen = here[known.images]
        total, other = int(chosen.sum()), chosen & (self._labels == 0)
        left_out = [(other, "of categories that are not asked for")]
        if training:
            ends = np.where(known.sizes > 0, known.sizes, np.inf)[known.images]
            sides = np.minimum(known.boxes[:, 2:], ends) - known.boxes[:, :2].clip(0)
            small = (sides < 1).any(axis=1)
            crowds = chosen & ~other & known.crowds
            left_out += [
                (crowds, "crowds are not learnt from"),
                (chosen & ~other & ~crowds & small, "they are smaller than a pixel"),
            ]
        for gone, reason in left_out:
            chosen = chosen & ~gone
            if gone.any():
                notes.append(f"{int(gone.sum())} of {total} objects left out: {reason}")
        return chosen

    def _turn(self, place: int, size: tuple[int, int]) -> int:
        """The orientation of EXIF that the targets are still to be turned by: 1 for none.

        Raises:
            ValueError: for an image of another size than the file says.
        """
        width, height = self.annotations.sizes[place].tolist()
        if (width, height) in (size, (0, 0)):
            return 1
        path = self.annotations.files[place]
        orientation = read_orientation(path)[2]
        if orientation in SIDEWAYS and (height, width) == size and not self._stick_out(place, width, height):
            return orientation  # the boxes were drawn on the image as it is stored
        raise ValueError(
            f"{path}: the image is of {size[0]} x {size[1]} pixels, {self.annotations.path} says {width} x {height}, "
            "so that its boxes may be elsewhere; put the image back as it was, or right the file"
        )

    def _stick_out(self, place: int, width: int, height: int) -> bool:
        first = self._starts[place]
        boxes = self.annotations.boxes[self._objects[first : first + self._counts[place]]]
        return bool((boxes[:, 2:] > [width + 1, height + 1]).any())

    def _compare_sizes(self) -> list[str]:
        """Look at some of the images, spread over all.

        Raises:
            ValueError: where half of them are of another size.
        """
        chosen = self.places[np.unique(np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(int))]
        turned, wrong = 0, []
        for place in chosen.tolist():
            width, height, orientation = read_orientation(self.annotations.files[place])
            if width == 0:
                continue  # it is told when it is read
            size = (height, width) if orientation in SIDEWAYS else (width, height)
            try:
                turned += self._turn(place, size) != 1
            except ValueError as error:
                wrong.append(str(error))
        if wrong and 2 * len(wrong) >= len(chosen):
            raise ValueError(f"{wrong[0]} ({len(wrong)} of {len(chosen)} images that were looked at)")
        if turned:
            return [
                f"{turned} of {len(chosen)} images that were looked at are stored sideways, and their boxes with them: "
                "turned upright, as EXIF says"
            ]
        return []


def turn_boxes(boxes: Tensor, orientation: int, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) on an image as it is stored, of H, W, to those on it upright.

    The orientation is that of EXIF: 1, or one of those that lie sideways.
    """
    if orientation == 1:
        return boxes
    height, width = size
    left, top, right, bottom = boxes.unbind(1)
    x = (top, bottom) if orientation in (5, 8) else (height - bottom, height - top)
    y = (left, right) if orientation in (5, 6) else (width - right, width - left)
    return torch.stack([x[0], y[0], x[1], y[1]], dim=1)


def load_detection(
    train: ObjectFiles,
    test: ObjectFiles,
    *,
    masks: bool = True,
    categories: Sequence[str] = (),
    background: bool = False,
    seed: int = 0,
) -> ImageData:
    """The parts of a data set to train on and to test on.

    Where there is no part to test on, a fifth of the images is held out.

    Args:
        train: where the first part lies.
        test: where the second lies.
        masks: read the objects' masks too.
        categories: names of those to find; all unless given.
        background: keep images without an object in training.
        seed: of the images that are held out.

    Raises:
        ValueError: where there is no such part, a category is not there, or the test part has objects of categories
            that are not to train on; and as :class:`DetectionImages`.
    """
    first, second = read_parts(train, test, masks=masks)
    strange = [name for name in categories if name not in first.categories]
    if strange:
        raise ValueError(f"{first.path}: no category {strange[0]!r}; there are {', '.join(first.categories)}")
    classes = tuple(name for name in first.categories if not categories or name in categories)
    chosen: dict[str, Array | None] = dict(train=None, test=None)
    notes: list[str] = []
    if second is None:
        chosen, second = dict(zip(chosen, hold_out(first, seed), strict=True)), first
        sizes = [0 if part is None else len(part) for part in chosen.values()]
        notes.append(f"{first.path}: no part to test on: {sizes[1]} of {sum(sizes)} images held out (seed {seed})")
    elif both := set(first.files) & set(second.files):
        notes.append(f"{len(both)} images are in the parts to train on and to test on, {min(both).name} for one")
    if not categories:
        _check_categories(first, second)
    notes += _tell_unlisted(first, second)
    taught = DetectionImages(first, classes=classes, places=chosen["train"], training=True, background=background)
    tested = DetectionImages(second, classes=classes, places=chosen["test"])
    told = [f"{part.annotations.path}: {note}" for part in (taught, tested) for note in part.notes]
    return ImageData(classes=classes, train=taught, test=tested, notes=tuple(dict.fromkeys([*notes, *told])))


def _tell_unlisted(*parts: Annotations) -> list[str]:
    """Notes of images beside the others that no annotation file names."""
    known = {file for part in parts for file in part.files}
    notes = []
    for folder in sorted({part.folder for part in parts if part.path.suffix == ".json"}):
        count = sum(is_image(path) and path not in known for path in folder.iterdir())
        if count:
            notes.append(f"{count} images in {folder} are not in the annotations: left out")
    return notes


def load_detection_test(
    files: ObjectFiles, *, classes: Sequence[str], masks: bool = True, held_out: bool = False, seed: int = 0
) -> DetectionImages:
    """The part to test on alone, for a detector of given classes.

    Args:
        files: where it lies.
        classes: names of the labels from 1 on.
        masks: read the objects' masks too.
        held_out: of a folder without parts, take what :func:`load_detection` holds out; else all.
        seed: of those images.

    Raises:
        ValueError: where none of the classes is among the categories; and as :func:`load_detection`.
    """
    part, kind = read_part(files, masks=masks)
    if not set(classes) & set(part.categories):
        raise ValueError(
            f"{part.path}: none of the classes ({listed(classes)}) is among its categories ({listed(part.categories)})"
        )
    places = hold_out(part, seed)[1] if kind == "train" or (held_out and kind == "whole") else None
    return DetectionImages(part, classes=classes, places=places)


def hold_out(annotations: Annotations, seed: int) -> tuple[Array, Array]:
    """Numbers of the images to train on and to test on, a fifth.

    Raises:
        ValueError: for fewer than two images.
    """
    if len(annotations) < 2:
        raise ValueError(f"{annotations.path}: has one image; training and testing need one each")
    order = np.random.default_rng(seed).permutation(len(annotations))
    count = max(1, round(TEST_SHARE * len(order)))
    return np.sort(order[count:]), np.sort(order[:count])


def _check_categories(train: Annotations, test: Annotations) -> None:
    """The test part may have fewer, but no object of another."""
    counts = np.bincount(test.kinds, minlength=len(test.categories))
    strange = [
        name for name, count in zip(test.categories, counts, strict=True) if count and name not in train.categories
    ]
    if strange:
        raise ValueError(
            f"{test.path}: its categories ({listed(test.categories)}) are not those of {train.path} "
            f"({listed(train.categories)}): {strange[0]!r} is not to train on; choose with --categories, or rename it"
        )
