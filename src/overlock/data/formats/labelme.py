"""Annotation files of Labelme: a JSON file an image, of rectangles, polygons, circles and masks."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from overlock.data.coco_masks import as_number
from overlock.data.formats.common import Gathering, ImageFinder, Part, find_files, read_json
from overlock.data.run_lengths import import_coco

FOLDERS = (  # of the JSON files and of the images
    ("{part}", "{part}"),
    ("annotations/{part}", "images/{part}"),
    ("{part}/annotations", "{part}/images"),
    ("labels/{part}", "images/{part}"),
)
WHOLE = ((".", "."), ("annotations", "images"), ("labels", "images"), ("json", "images"))
POLYGONS = ("polygon", "rectangle", "rotation", "quadrilateral")  # some programs give a rectangle four corners
CIRCLE = 64  # corners of a circle's polygon
Shape = dict[str, Any]
Point = tuple[float, float]
Array = np.ndarray[Any, Any]


def find(root: Path, parts: Sequence[str] | None) -> Part | None:
    """The first folder that has a file of this form; parts are None for a folder without."""
    layouts = WHOLE if parts is None else [tuple(x.format(part=part) for x in y) for part in parts for y in FOLDERS]
    for labels, images in layouts:
        path, folder = root / labels, root / images
        first = next(iter(find_files(path, ".json")), None)
        if first is not None and folder.is_dir() and _is_labelme(first):
            return Part(path=path, folder=folder, read=partial(read, path, folder))
    return None


def _is_labelme(path: Path) -> bool:
    try:
        content = read_json(path)
    except ValueError:
        return False
    return isinstance(content, dict) and "shapes" in content


def read(path: Path, folder: Path) -> dict[str, Any]:
    """The content of a folder of files in COCO's form; shapes of one label and group are one object.

    Raises:
        ValueError: for a file that cannot be read or is not of this form, naming it and the shape.
    """
    gathering, finder = Gathering(folder), ImageFinder(folder)
    for file in find_files(path, ".json"):
        entry = read_json(file)
        shapes = entry.get("shapes") if isinstance(entry, dict) else None
        if not isinstance(shapes, list) or not all(isinstance(one, dict) for one in shapes):
            raise ValueError(f"{file}: not an annotation file of Labelme's form (a dict with a list of shapes)")
        size = entry.get("imageWidth"), entry.get("imageHeight")
        gathering.add_image(finder.find(str(entry.get("imagePath") or ""), file), *size)
        groups: dict[Any, list[tuple[int, Shape]]] = {}
        for number, shape in enumerate(shapes, start=1):
            group = shape.get("group_id")
            key = number if group is None else (str(shape.get("label")), str(group))
            groups.setdefault(key, []).append((number, shape))
        for members in groups.values():
            _add(gathering, file, members, size)
    return gathering.content()


def _add(gathering: Gathering, file: Path, members: list[tuple[int, Shape]], size: tuple[Any, Any]) -> None:
    """One object, of one shape or of several."""
    corners: list[Point] = []
    polygons: list[list[float]] = []
    masks: list[tuple[Point, Array]] = []
    first, label = members[0][0], members[0][1].get("label")
    if label is None:
        raise ValueError(f"{file}: shape {first} has no label")
    for number, shape in members:
        kind, points = shape.get("shape_type") or "polygon", _points(file, number, shape)
        if kind == "mask" and points:
            mask = _mask(file, number, shape)
            masks.append((points[0], mask))
            corners += [points[0], (points[0][0] + mask.shape[1], points[0][1] + mask.shape[0])]
            continue
        if kind == "circle" and len(points) == 2:
            points = _circle(*points)
        elif kind == "rectangle" and len(points) == 2:
            (x0, y0), (x1, y1) = points
            points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        elif kind not in POLYGONS or len(points) < 3:
            gathering.count(f"shapes left out: a {kind} of {len(points)} points has no area")
            continue
        corners += points
        polygons.append([value for point in points for value in point])
    if not corners:
        return
    x, y = zip(*corners, strict=True)
    a_box = len(members) == 1 and members[0][1].get("shape_type") == "rectangle"
    more = {} if a_box else dict(segmentation=_join(file, polygons, masks, size) if masks else polygons)
    gathering.add_object(str(label), f"{file.name}, shape {first}", [min(x), min(y), max(x), max(y)], **more)


def _points(file: Path, number: int, shape: Shape) -> list[Point]:
    try:
        return [(as_number(x), as_number(y)) for x, y in shape["points"]]
    except KeyError:
        raise ValueError(f"{file}: shape {number} has no points") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: shape {number} has points that are no pairs of numbers ({error})") from None


def _circle(centre: Point, edge: Point) -> list[Point]:
    radius = math.dist(centre, edge)
    angles = (2 * math.pi * i / CIRCLE for i in range(CIRCLE))
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _mask(file: Path, number: int, shape: Shape) -> Array:
    """(H, W) of 0 and 1, a PNG file in letters."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
            return np.asarray(image.convert("L")) > 0
    except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        raise ValueError(f"{file}: the mask of shape {number} cannot be read ({error})") from None


def _join(
    file: Path, polygons: list[list[float]], masks: list[tuple[Point, Array]], size: tuple[Any, Any]
) -> dict[str, Any]:
    """Polygons and masks in one image as run lengths."""
    coco = import_coco()
    try:
        width, height = (round(as_number(side)) for side in size)
    except ValueError:
        raise ValueError(
            f"{file}: its masks need imageWidth and imageHeight, which are {size[0]} and {size[1]}"
        ) from None
    parts = coco.frPyObjects(polygons, height, width) if polygons else []
    for (x, y), mask in masks:
        whole, left, top = np.zeros((height, width), np.uint8, order="F"), round(x), round(y)
        inside = mask[max(0, -top) : height - top, max(0, -left) : width - left]
        whole[max(0, top) :, max(0, left) :][: inside.shape[0], : inside.shape[1]] = inside
        parts.append(coco.encode(whole))
    return coco.merge(parts)  # type: ignore[no-any-return]
