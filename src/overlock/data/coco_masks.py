"""Masks of objects in COCO's form, polygons and run lengths: packed for many, decoded for one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overlock.data.run_lengths import Masks, encode, import_coco, unpack

Array = np.ndarray[Any, Any]
CORNERS = 6  # numbers of a polygon with an area
LARGEST = 1e5  # pixels: no coordinate of an image is beyond; farther ones would take memory without end


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the masks of N objects are made from."""

    points: Array
    """x, y, x, y, ... of all polygons."""
    polygons: Array
    """Where each polygon begins in them, and the end (P + 1,)."""
    objects: Array
    """Where each object's polygons begin, and the end (N + 1,)."""
    lengths: bytes
    """Run lengths of the objects that have some, each as JSON."""
    runs: dict[int, slice]
    """Where they are in it, by the objects' numbers."""
    names: Array
    """What messages call the objects (N,)."""
    path: Path
    """What they were read from."""

    @property
    def given(self) -> Array:
        """Which objects have a mask of their own (N,)."""
        own = np.diff(self.objects) > 0
        own[list(self.runs)] = True
        return own

    def apart_from(self, boxes: Array) -> int:
        """How many objects have polygons that lie outside of their boxes (N, 4), left, top, width, height."""
        owners = np.flatnonzero(np.diff(self.objects))
        if not len(owners):
            return 0
        corners, firsts = self.points.reshape(-1, 2), self.polygons[self.objects[owners]] // 2
        least, most = np.minimum.reduceat(corners, firsts), np.maximum.reduceat(corners, firsts)
        box = boxes[owners]
        return int(((most < box[:, :2]) | (least > box[:, :2] + box[:, 2:])).any(axis=1).sum())

    def segmentation(self, number: int) -> Any:
        """An object's mask as COCO's files have it, polygons or run lengths; None where it has none."""
        if number in self.runs:
            return json.loads(self.lengths[self.runs[number]])
        places = range(self.objects[number], self.objects[number + 1])
        return [self.points[self.polygons[i] : self.polygons[i + 1]].tolist() for i in places] or None

    def runs_of(self, number: int, *, size: tuple[int, int], box: Sequence[float]) -> Array:
        """The run lengths of an object's mask, as :class:`Masks` takes them; of the box where it has none.

        Args:
            number: of the object.
            size: H, W.
            box: left, top, right, bottom, within the image.

        Raises:
            ValueError: for run lengths that cannot be decoded, or of another size, naming the object.
            ImportError: without pycocotools.
        """
        first, last = self.objects[number], self.objects[number + 1]
        if number not in self.runs and first == last:
            left, top, right, bottom = (round(x) for x in box)
            inside = np.ones((max(bottom - top, 1), max(right - left, 1)), dtype=bool)
            top, left = min(top, size[0] - 1), min(left, size[1] - 1)
            return encode(inside[: size[0] - top, : size[1] - left], (top, left), size)
        if number in self.runs:
            compressed = _encode(
                json.loads(self.lengths[self.runs[number]]),
                size,
                f"{self.path}: the mask of object {self.names[number]}",
            )
        else:
            coco = import_coco()
            compressed = coco.merge(coco.frPyObjects(self.segmentation(number), *size))
        return np.array(unpack(compressed["counts"]), dtype=np.int64)

    def decode(self, number: int, *, size: tuple[int, int], box: Sequence[float]) -> Tensor:
        """The mask of an object (H, W) of 0 and 1; arguments and errors are those of :meth:`runs_of`."""
        mask = Masks(size, [self.runs_of(number, size=size, box=box)])[0]
        return torch.from_numpy(np.ascontiguousarray(mask)).to(torch.uint8)


def pack_shapes(objects: Sequence[Mapping[str, Any]], path: Path) -> tuple[Shapes, int]:
    """The shapes of objects, and how many polygons were left out since they have fewer than three corners.

    Raises:
        ValueError: for what is no shape, or a corner that is no pixel, naming the object.
    """
    polygons: list[Sequence[float]] = []
    ends, lengths, runs, broken = [0], bytearray(), {}, 0
    for number, one in enumerate(objects):
        shape = one.get("segmentation") or ()
        if isinstance(shape, Mapping):
            # Kept as bytes: a list of its own would keep the memory of the whole file from being given back.
            start = len(lengths)
            lengths += json.dumps(dict(shape), default=_as_text).encode()
            runs[number] = slice(start, len(lengths))
        else:
            parts = _polygons(shape, f"{path}: the mask of object {one.get('id')!r}")
            whole = [part for part in parts if len(part) >= CORNERS and len(part) % 2 == 0]
            broken += len(parts) - len(whole)
            polygons += whole
        ends.append(len(polygons))
    starts = np.cumsum([0, *map(len, polygons)])
    objects_at = np.array(ends, dtype=np.int64)
    try:
        points = np.fromiter(chain.from_iterable(polygons), dtype=np.float64, count=int(starts[-1]))
        wrong = np.flatnonzero(~(np.abs(points) <= LARGEST))  # NaN among them
        polygon = np.searchsorted(starts, wrong[0], side="right") - 1 if len(wrong) else None
    except (ValueError, TypeError):
        polygon = next(i for i, part in enumerate(polygons) if not _is_numeric(part))
    if polygon is not None:
        owner = objects[int(np.searchsorted(objects_at, polygon, side="right")) - 1]
        value = next(x for x in polygons[polygon] if not _is_numeric([x]))
        raise ValueError(
            f"{path}: the mask of object {owner.get('id')!r} has {value!r} in a polygon, which is no number of pixels"
        )
    names = np.array([repr(one.get("id")) for one in objects], dtype=np.str_)
    shapes = Shapes(
        points=points, polygons=starts, objects=objects_at, lengths=bytes(lengths), runs=runs, names=names, path=path
    )
    return shapes, broken


def bounds(shape: Any, where: str) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of polygons or run lengths.

    Raises:
        ValueError: for what is no shape, in a sentence that begins with ``where``.
    """
    if isinstance(shape, Mapping):
        left, top, width, height = map(float, import_coco().toBbox(_encode(shape, None, where)))
        return left, top, left + width, top + height
    parts = [part for part in _polygons(shape, where) if len(part) % 2 == 0]
    if not any(parts) or not all(map(_is_numeric, parts)):
        raise ValueError(f"{where} has no corners that a box could be taken from")
    points = np.array([float(x) for part in parts for x in part]).reshape(-1, 2)
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())  # type: ignore[return-value]


def find_area(shape: Any) -> float:
    """Pixels of polygons or run lengths; NaN where there are none, or none that can be read."""
    if isinstance(shape, Mapping):
        try:
            return float(import_coco().area(_encode(shape, None, "")))
        except (ValueError, ImportError):
            return float("nan")
    if not isinstance(shape, (list, tuple)):
        return float("nan")
    total = 0.0
    for part in shape:
        if isinstance(part, (list, tuple)) and len(part) >= CORNERS and len(part) % 2 == 0 and _is_numeric(part):
            x, y = np.array([float(value) for value in part]).reshape(-1, 2).T
            total += abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    return total or float("nan")


def _as_text(counts: Any) -> str:
    """pycocotools' own run lengths are bytes."""
    if isinstance(counts, bytes):
        return counts.decode()
    raise ValueError(f"run lengths of type {type(counts).__name__}")


def _polygons(shape: Any, where: str) -> list[Sequence[float]]:
    """A list of polygons, or one polygon by itself, as a list."""
    if not isinstance(shape, (list, tuple)):
        raise ValueError(f"{where} is neither polygons nor run lengths ({str(shape)[:50]!r})")
    parts = [shape] if shape and not isinstance(shape[0], (list, tuple)) else list(shape)
    for part in parts:
        if not isinstance(part, (list, tuple)):
            raise ValueError(f"{where} has {part!r} among its polygons")
    return parts


def as_number(value: Any) -> float:
    """A number of pixels, from text too.

    Raises:
        ValueError: for what is none, with the value alone as its message.
    """
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if abs(number) <= LARGEST:
            return number
    raise ValueError(repr(value))


def _is_numeric(values: Sequence[Any]) -> bool:
    try:
        return all(abs(as_number(value)) <= LARGEST for value in values)
    except ValueError:
        return False


def _encode(lengths: Mapping[str, Any], size: tuple[int, int] | None, where: str) -> Any:
    """Compressed run lengths, checked before anything of their size is made."""
    try:
        height, width = (int(side) for side in lengths["size"])
        counts = lengths["counts"]
        if size is not None and (height, width) != size:
            raise ValueError(f"it is of {height} x {width} pixels, its image of {size[0]} x {size[1]}")
        packed = counts.encode() if isinstance(counts, str) else counts
        runs = unpack(packed) if isinstance(packed, bytes) else [int(run) for run in counts]
        # pycocotools reads on beyond runs that are too short, and gives whatever lies there.
        if min(runs, default=0) < 0 or sum(runs) != height * width:
            raise ValueError(f"its run lengths come to {sum(runs)} pixels of {height} x {width}")
        if isinstance(packed, bytes):
            return dict(size=[height, width], counts=packed)
        return import_coco().frPyObjects(dict(size=[height, width], counts=runs), height, width)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{where} cannot be decoded ({error})") from None
