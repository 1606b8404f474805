"""Annotation files of Pascal VOC: an XML file an image, and perhaps lists of the images of each part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from overlock.data.coco_masks import as_number
from overlock.data.formats.common import Gathering, ImageFinder, Part, find_files, read_lines

SIDES = ("xmin", "ymin", "xmax", "ymax")
IMAGES = ("JPEGImages", "images", "Images")
FOLDERS = (  # of the XML files and of the images
    ("{part}", "{part}"),
    ("{part}/Annotations", "{part}/JPEGImages"),
    ("{part}/annotations", "{part}/images"),
    ("Annotations/{part}", "JPEGImages/{part}"),
    ("annotations/{part}", "images/{part}"),
)
WHOLE = (("Annotations", "JPEGImages"), ("annotations", "images"), ("Annotations", "images"), (".", "."))


def find(root: Path, parts: Sequence[str] | None) -> Part | None:
    """The first part that is there, by its list in ImageSets/Main or by its folder; parts are None for a folder
    without."""
    for base in (root, *sorted(root.glob("VOC[0-9]*")), *sorted(root.glob("VOCdevkit/VOC[0-9]*"))):
        images = next((base / name for name in IMAGES if (base / name).is_dir()), None)
        lists = [base / "ImageSets" / "Main" / f"{part}.txt" for part in parts or ()]
        chosen = next((path for path in lists if path.is_file()), None)
        if chosen is not None and images is not None:
            return _part(base / "Annotations", images, chosen)
        layouts = WHOLE if parts is None else [tuple(x.format(part=part) for x in y) for part in parts for y in FOLDERS]
        for labels, folder in layouts:
            if find_files(base / labels, ".xml") and (base / folder).is_dir():
                return _part(base / labels, base / folder, None)
    return None


def _part(path: Path, folder: Path, chosen: Path | None) -> Part:
    return Part(path=path, folder=folder, read=partial(read, path, folder, chosen))


def read(path: Path, folder: Path, chosen: Path | None = None) -> dict[str, Any]:
    """The content of a folder of files in COCO's form.

    Boxes count pixels from 1, and their last one is within, as Pascal VOC has it; where a box begins at 0, they are
    taken to count from 0, and to end before their last. Difficult objects become crowds: they are not learnt from, and
    count neither for nor against a detector.

    Args:
        path: the folder.
        folder: of the images.
        chosen: list of the images to take, a name a line; all unless given.

    Raises:
        ValueError: for a file that cannot be read or is not of this form, naming it and the object.
    """
    files = find_files(path, ".xml")
    if chosen is not None:
        names = [line.split()[0] for line in read_lines(chosen) if line.split()]
        files = [path / f"{name}.xml" for name in names]
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise ValueError(
                f"{chosen}: {len(absent)} of its {len(files)} images have no XML file (first: {absent[0]})"
            )
    gathering, finder = Gathering(folder), ImageFinder(folder)
    zero = False
    for file in files:
        root = _parse(file)
        size = [root.findtext(f"size/{name}") for name in ("width", "height")]
        gathering.add_image(finder.find((root.findtext("filename") or "").strip(), file), *size)
        for number, one in enumerate(root.iter("object"), start=1):
            zero |= _add(gathering, file, number, one)
    content = gathering.content()
    if zero:
        content["notes"].append("some boxes begin at 0: all are read as counted from 0, not from 1 as Pascal VOC does")
    else:
        for one in content["annotations"]:
            left, top, width, height = one["bbox"]
            one["bbox"] = [left - 1, top - 1, width + 1, height + 1]
            if "segmentation" in one:
                one["segmentation"] = [[value - 1 for value in part] for part in one["segmentation"]]
    return content


def _parse(file: Path) -> ElementTree.Element:
    try:
        text = file.read_bytes()
        if b"<!ENTITY" in text:  # could be made to swell without end
            raise ValueError("it defines entities")
        root = ElementTree.fromstring(text)
        if root.tag != "annotation":
            raise ValueError(f"it begins with <{root.tag}>")
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"{file}: not an annotation file of Pascal VOC's form ({error})") from None
    return root


def _add(gathering: Gathering, file: Path, number: int, one: ElementTree.Element) -> bool:
    """Whether the object, one with an area, begins at 0."""
    label, where = (one.findtext("name") or "").strip(), f"{file}: object {number}"
    if not label:
        raise ValueError(f"{where} has no name")
    more: dict[str, Any] = {}
    try:
        corners = [
            [as_number(x.text) for x in polygon.iter() if x is not polygon] for polygon in one.findall("polygon")
        ]
        if corners:
            more["segmentation"] = corners
        if one.find("bndbox") is not None:
            box = [as_number((one.findtext(f"bndbox/{side}") or "").strip()) for side in SIDES]
        elif any(corners):
            x, y = [v for part in corners for v in part[::2]], [v for part in corners for v in part[1::2]]
            box = [min(x), min(y), max(x), max(y)]
        else:
            raise ValueError("no bndbox")
    except ValueError as error:
        raise ValueError(f"{where} ({label}) has a box that cannot be read: {error} is no number of pixels") from None
    if (one.findtext("difficult") or "0").strip() == "1":
        more["iscrowd"] = 1
        gathering.count("objects are marked difficult: not learnt from, and without weight in tests")
    gathering.add_object(label, f"{file.name}, object {number}", box, **more)
    return min(box) <= 0 and box[0] != box[2] and box[1] != box[3]
