"""Objects of images as a few arrays, out of a content in COCO's form: each number checked, what is left out counted."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from overlock.data.coco_masks import LARGEST, Shapes, as_number, bounds, find_area, pack_shapes
from overlock.data.image_sizes import read_sizes

Array = np.ndarray[Any, Any]
Content = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The images of a part of a data set, and their objects in the order of the images.

    Loading processes share these arrays, where they would copy lists of dicts bit by bit.
    """

    path: Path
    """The file, or folder of files, that the objects are from."""
    folder: Path
    """Of the images."""
    files: tuple[Path, ...]
    """The images (M,)."""
    image_ids: tuple[int | str, ...]
    """Their ids in the file (M,)."""
    sizes: Array
    """Width and height that the file gives the images, else their own (M, 2); 0 where they cannot be read."""
    categories: tuple[str, ...]
    """Names (K,), in the order of their ids."""
    category_ids: tuple[int | str, ...]
    """The ids (K,)."""
    images: Array
    """Number of each object's image (N,), rising."""
    kinds: Array
    """Number of its category (N,)."""
    boxes: Array
    """Left, top, right, bottom in pixels of the image, which they may stick out of (N, 4)."""
    areas: Array
    """Pixels of the object (N,)."""
    crowds: Array
    """Whether it stands for a crowd (N,)."""
    shapes: Shapes | None
    """Of the masks, where they were asked for."""
    notes: tuple[str, ...]
    """What was left out or read in another way than it stands there, a line each."""

    def __len__(self) -> int:
        return len(self.files)


def make_annotations(content: Content, path: Path, folder: Path, *, masks: bool) -> Annotations:
    """Check a content in COCO's form and pack it.

    Objects without an area, outside of their image, or of an image that is not listed are left out, and counted.

    Args:
        content: with ``images``, ``annotations`` and ``categories``, and perhaps ``notes`` of its reader.
        path: what it was read from, for messages.
        folder: of the images.
        masks: keep what the objects' masks are made from.

    Raises:
        ValueError: for what cannot be, naming the file and the object, image or category.
    """
    return _Packing(path=path, folder=folder, masks=masks, notes=list(content.get("notes", ()))).pack(content)


def as_id(value: Any) -> int | str | None:
    """An id, as a number where its text is one; None for what is no id."""
    if type(value) is int:  # nearly all are
        return value
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        plain = value.strip()
        return int(plain) if plain.lstrip("-").isdecimal() and str(int(plain)) == plain else plain or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def listed(names: Sequence[Any], most: int = 3) -> str:
    """The first few of some names."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


@dataclass(kw_only=True)
class _Packing:
    """The work of :func:`make_annotations`."""

    path: Path
    folder: Path
    masks: bool
    notes: list[str]
    files: list[Path] = field(default_factory=list)
    image_ids: list[int | str] = field(default_factory=list)

    def pack(self, content: Content) -> Annotations:
        names, category_of = self._categories(content)
        sizes, image_of = self._images(content)
        total = len(content["annotations"])
        kept, images, kinds = self._places(content["annotations"], image_of, category_of)
        boxes = self._boxes(kept)
        if len(boxes) and boxes.min() >= 0 and boxes.max() <= 1:
            raise ValueError(
                f"{self.path}: all boxes lie between 0 and 1, as shares of the image; COCO's form has pixels: left, "
                "top, width, height"
            )
        crowds = self._crowds(kept)
        sound = self._sound(boxes, sizes[images] if len(images) else sizes[:0], total)
        order = np.flatnonzero(sound)[np.argsort(images[sound], kind="stable")]
        kept, boxes, images, kinds = [kept[i] for i in order.tolist()], boxes[order], images[order], kinds[order]
        crowds = crowds[order]
        self._tell_twice(np.column_stack([images, kinds, crowds, boxes]))
        areas = self._areas(kept, boxes)
        shapes = self._shapes(kept, boxes) if self.masks else None
        return Annotations(
            path=self.path, folder=self.folder, files=tuple(self.files), image_ids=tuple(self.image_ids), sizes=sizes,
            categories=names, category_ids=tuple(category_of), images=images, kinds=kinds,
            boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), areas=areas, crowds=crowds,
            shapes=shapes, notes=tuple(self.notes),
        )  # fmt: skip

    def _categories(self, content: Content) -> tuple[tuple[str, ...], dict[int | str, int]]:
        """Names, and each id's place among them."""
        names: dict[int | str, str] = {}
        used = {as_id(one.get("category_id")) for one in content["annotations"]}
        for one in content["categories"]:
            number, name = as_id(one.get("id")), one.get("name")
            if number is None or name is None or not str(name).strip():
                raise ValueError(f"{self.path}: a category has no {'id' if number is None else 'name'} ({one})")
            if number in names and names[number] != str(name):
                raise ValueError(
                    f"{self.path}: categories {names[number]!r} and {str(name)!r} have the same id {number!r}; "
                    "give each its own"
                )
            names[number] = str(name)
        for name, count in Counter(names.values()).items():
            same = [number for number in names if names[number] == name]
            empty = [number for number in same if number not in used]
            if count > 1 and len(same) - len(empty) > 1:
                raise ValueError(
                    f"{self.path}: two categories are called {name!r} (ids {listed(same)}); give each its own name, or "
                    "their objects one id"
                )
            for number in empty[: count - 1]:
                del names[number]
                self.notes.append(f"category {number!r} has the name of another, {name!r}, and no object: left out")
        order = sorted(names, key=lambda number: (isinstance(number, str), number))
        return tuple(names[number] for number in order), {number: i for i, number in enumerate(order)}

    def _images(self, content: Content) -> tuple[Array, dict[int | str, int]]:
        """Their sizes, and each id's place among them; notes the files and the ids."""
        sizes: list[tuple[int, int]] = []
        named: dict[int | str, str] = {}
        twice = 0
        for one in content["images"]:
            number, name = as_id(one.get("id")), one.get("file_name")
            if number is None or not isinstance(name, str) or not name.strip():
                raise ValueError(f"{self.path}: an image has no {'id' if number is None else 'file_name'} ({one})")
            if number in named:
                if named[number] != name:
                    raise ValueError(
                        f"{self.path}: images {named[number]} and {name} have the same id {number!r}; give each its own"
                    )
                twice += 1
                continue
            named[number] = name
            sizes.append((self._size(one, "width"), self._size(one, "height")))
        if twice:
            self.notes.append(f"{twice} images are listed twice, with the same file: taken once")
        self.image_ids = list(named)
        self.files = self._locate(list(named.values()))
        seen: dict[Path, int | str] = {}
        for number, file in zip(named, self.files, strict=True):
            if file in seen:
                raise ValueError(
                    f"{self.path}: images {seen[file]!r} and {number!r} are the same file, {file.name}; join "
                    "their entries"
                )
            seen[file] = number
        known = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        absent = np.flatnonzero((known <= 0).any(axis=1))
        if len(absent):
            known[absent] = read_sizes([self.files[i] for i in absent])
        return known, {number: i for i, number in enumerate(named)}

    def _size(self, one: Content, name: str) -> int:
        """0 for one that is not given."""
        value = one.get(name)
        if value is None or value == "":
            return 0
        try:
            return round(as_number(value))
        except ValueError as error:
            raise ValueError(
                f"{self.path}: the {name} of image {one['id']!r} is {error}, which is no number of pixels"
            ) from None

    def _locate(self, names: list[str]) -> list[Path]:
        """The files of the images: as named, else with the slashes of this system, else by their last part."""
        # Path takes ten times as long, a second for each 100 000.
        found = [os.path.join(self.folder, name) for name in names]  # noqa: PTH118
        absent = [i for i, path in enumerate(found) if not os.path.isfile(path)]  # noqa: PTH113
        if absent and self.folder.is_dir():
            inside: dict[str, list[str]] = {}
            for where, _, files in os.walk(self.folder):
                for file in files:
                    inside.setdefault(file, []).append(os.path.join(where, file))  # noqa: PTH118
            for i in absent:
                places = inside.get(names[i].replace("\\", "/").rpartition("/")[2], ())
                if len(places) == 1:
                    found[i] = places[0]
            lost = [i for i in absent if not os.path.isfile(found[i])]  # noqa: PTH113
            if len(lost) < len(absent):
                self.notes.append(
                    f"{len(absent) - len(lost)} of {len(names)} images lie elsewhere in {self.folder} than the file "
                    "says: found by their names alone"
                )
            absent = lost
        if absent:
            raise ValueError(
                f"{self.path}: {len(absent)} of its {len(names)} images are not in {self.folder} (first: "
                f"{listed([names[i] for i in absent])}); check the folder"
            )
        return [Path(path) for path in found]

    def _places(
        self, annotations: list[Content], image_of: dict[int | str, int], category_of: dict[int | str, int]
    ) -> tuple[list[Content], Array, Array]:
        """The objects of images that are listed, and the numbers of their images and categories."""
        kept, images, kinds, lost = [], [], [], []
        for one in annotations:
            image, category = as_id(one.get("image_id")), as_id(one.get("category_id"))
            if image is None or category is None:
                name = "image_id" if image is None else "category_id"
                raise ValueError(f"{self.path}: object {one.get('id')!r} has no {name} ({one.get(name)!r})")
            if category not in category_of:
                raise ValueError(
                    f"{self.path}: category {category!r} of an object is not among its categories (object "
                    f"{one.get('id')!r})"
                )
            if image not in image_of:
                lost.append(one)
                continue
            kept.append(one)
            images.append(image_of[image])
            kinds.append(category_of[category])
        if lost and not kept:
            raise ValueError(
                f"{self.path}: its objects are of images that it does not list (the first, {lost[0].get('id')!r}, of "
                f"image {lost[0]['image_id']!r}); check the ids"
            )
        if lost:
            self._left_out(len(lost), len(annotations), "of images that the file does not list")
        return kept, np.array(images, dtype=np.int64), np.array(kinds, dtype=np.int64)

    def _boxes(self, kept: list[Content]) -> Array:
        """Left, top, width, height (N, 4)."""
        given = [one.get("bbox") for one in kept]
        try:
            boxes = np.array(given, dtype=np.float64)
        except (ValueError, TypeError):
            boxes = np.empty(0)
        if boxes.shape != (len(given), 4) or not bool((np.abs(boxes) <= LARGEST).all()):
            boxes = np.array([self._box(one) for one in kept], dtype=np.float64)
        return boxes.reshape(-1, 4)

    def _box(self, one: Content) -> list[float]:
        """One by itself, by its mask where there is none."""
        box, where = one.get("bbox"), f"{self.path}: the box of object {one.get('id')!r}"
        if box is None or box == []:
            shape = one.get("segmentation")
            if not shape:
                raise ValueError(
                    f"{self.path}: object {one.get('id')!r} has no bbox, nor a segmentation to take it from"
                )
            left, top, right, bottom = bounds(shape, f"{self.path}: the mask of object {one.get('id')!r}")
            return [left, top, right - left, bottom - top]
        if not isinstance(box, (list, tuple)) or len(box) != 4:
            raise ValueError(f"{where} is {box!r}; it must be four numbers: left, top, width, height")
        try:
            return [as_number(value) for value in box]
        except ValueError as error:
            raise ValueError(f"{where} has {error}, which is no number of pixels") from None

    def _crowds(self, kept: list[Content]) -> Array:
        given = [one.get("iscrowd") for one in kept]
        for one, value in zip(kept, given, strict=True):
            if value not in (0, 1, None, "0", "1", ""):
                raise ValueError(f"{self.path}: iscrowd of object {one.get('id')!r} is {value!r}; it must be 0 or 1")
        return np.array([value in (1, "1") for value in given], dtype=bool)

    def _areas(self, kept: list[Content], boxes: Array) -> Array:
        """As the file gives them, else of the masks, else of the boxes (N,)."""
        try:
            areas = np.array([one.get("area") for one in kept], dtype=np.float64)
        except (ValueError, TypeError):
            areas = np.full(len(kept), np.nan)
        for i in np.flatnonzero(~((areas >= 0) & (areas < np.inf))).tolist():
            areas[i] = self._area(kept[i])
        return np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)

    def _area(self, one: Content) -> float:
        """NaN for that of the box."""
        area = one.get("area")
        if area is None or area == "":
            return find_area(one.get("segmentation"))
        try:
            pixels = float(area)
        except (ValueError, TypeError):
            pixels = math.nan
        if not 0 <= pixels < math.inf:
            raise ValueError(
                f"{self.path}: the area of object {one.get('id')!r} is {area!r}, which is no number of pixels"
            )
        return pixels

    def _sound(self, boxes: Array, sizes: Array, total: int) -> Array:
        """Which objects have an area within their image (N,)."""
        areal = (boxes[:, 2:] > 0).all(axis=1)
        ends = boxes[:, :2] + boxes[:, 2:]
        known = (sizes > 0).all(axis=1)
        outside = known & areal & ((ends <= 0) | (boxes[:, :2] >= sizes)).any(axis=1)
        cut = known & areal & ~outside & ((boxes[:, :2] < -1) | (ends > sizes + 1)).any(axis=1)
        self._left_out(int((~areal).sum()), total, "their boxes have no area")
        self._left_out(int(outside.sum()), total, "they lie outside of their images")
        if cut.any():
            mend = " (are the boxes left, top, right, bottom, where COCO has left, top, width, height?)"
            many = 4 * int(cut.sum()) > total
            self.notes.append(
                f"{int(cut.sum())} of {total} objects stick out of their images: cut there{mend if many else ''}"
            )
        return np.asarray(areal & ~outside)

    def _tell_twice(self, rows: Array) -> None:
        """Note objects that are there again: in a test the second of them can't be found."""
        twice = len(rows) - len(np.unique(rows, axis=0))
        if twice:
            self.notes.append(f"{twice} of {len(rows)} objects are there twice, with the same class and box: kept")

    def _shapes(self, kept: list[Content], boxes: Array) -> Shapes:
        shapes, broken = pack_shapes(kept, self.path)
        apart = shapes.apart_from(boxes)
        if apart:
            self.notes.append(f"{apart} of {len(kept)} objects have a mask that lies outside of their box")
        if broken:
            self.notes.append(f"{broken} polygons have fewer than three corners: left out of their masks")
        without = int((~shapes.given).sum())
        if without:
            self.notes.append(f"{without} of {len(kept)} objects have no mask: their boxes stand for it")
        return shapes

    def _left_out(self, count: int, total: int, reason: str) -> None:
        if count:
            self.notes.append(f"{count} of {total} objects left out: {reason}")
