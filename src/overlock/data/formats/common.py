"""What the forms of annotations have in common: a part of a data set as it was found, and the gathering of objects.

The forms are read here, line by line, rather than by the library supervision, which has readers of the same names.
Those make a mask of each polygon of a data set at once, a byte a pixel and object (823 MB for 100 images of 640 x 640
with 20 polygons each, where 4 MB are enough); keep boxes in float32; lose the flags of difficult objects; decode each
image of Pascal VOC for its size; and mostly do not name the file and the line of what is wrong. The tests compare with
what supervision writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlock.data.files import IMAGE_SUFFIXES, is_rubbish, walk_files


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a data set as it was found, still to be read."""

    path: Path
    """The file, or the folder, of the annotations."""
    folder: Path
    """Of the images."""
    read: Callable[[], dict[str, Any]]
    """Gives the content in COCO's form, with ``notes``; raises ValueError naming the file for what cannot be."""


class Gathering:
    """Images and objects in COCO's form, as a reader comes upon them.

    Args:
        folder: that the names of the images are from.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.images: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []
        self.labels: list[str] = []
        self.counts: Counter[str] = Counter()

    def add_image(self, file: Path, width: Any = None, height: Any = None) -> None:
        """The image that the objects to come are of; a size where it is given."""
        name = os.path.relpath(file, self.folder)
        self.images.append(dict(id=len(self.images) + 1, file_name=name, width=width, height=height))

    def add_object(self, label: str, name: str, box: Sequence[float], **more: Any) -> None:
        """An object of the last image.

        Args:
            label: its class.
            name: what messages call it.
            box: left, top, right, bottom, in either order.
            more: segmentation and iscrowd.
        """
        left, right = sorted((box[0], box[2]))
        top, bottom = sorted((box[1], box[3]))
        self.labels.append(label)
        self.objects.append(
            dict(id=name, image_id=len(self.images), bbox=[left, top, right - left, bottom - top], **more)
        )

    def count(self, what: str) -> None:
        """Note something that is told once, with the number of times."""
        self.counts[what] += 1

    def content(self, classes: Iterable[str] | None = None) -> dict[str, Any]:
        """In COCO's form. Categories are the classes in their order, or those of the objects by name."""
        names = sorted(set(self.labels)) if classes is None else list(classes)
        ids = {name: i for i, name in enumerate(names, start=1)}
        for one, label in zip(self.objects, self.labels, strict=True):
            one["category_id"] = ids[label]
        return dict(
            images=self.images,
            annotations=self.objects,
            categories=[dict(id=i, name=name) for name, i in ids.items()],
            notes=[f"{count} {what}" for what, count in self.counts.items()],
        )


def read_json(path: Path) -> Any:
    """The content of a JSON file, in any of Unicode's encodings, with a byte order mark or without.

    Raises:
        ValueError: for a file that cannot be read, or is none.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON file ({error})") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without a byte order mark.

    Raises:
        ValueError: for a file that cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def find_files(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder with these endings, by name; none where it is not there."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.suffix.lower() in suffixes and not is_rubbish(path.name))
    return sorted(path for path in found if path.is_file())


class ImageFinder:
    """Images of a folder and those below it, by what annotation files call them.

    Args:
        folder: of the images.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str, beside: Path) -> Path:
        """The image of a name, as a path from the annotation file or from the folder, else by its last part, else the
        image that is called as the annotation file is; the first of these where there is none."""
        plain = name.replace("\\", "/")
        tried = [beside.parent / plain, self.folder / plain] if plain else []
        for path in tried:
            if path.is_file():
                return Path(os.path.normpath(path))
        last = plain.rpartition("/")[2]
        for key in (last, *(beside.stem + suffix for suffix in IMAGE_SUFFIXES)):
            found = self._inside().get(key.lower(), [])
            if len(found) == 1:
                return found[0]
        return self.folder / (plain or beside.stem)

    def _inside(self) -> dict[str, list[Path]]:
        if self._by_name is None:
            self._by_name = {}
            for path in walk_files(self.folder):
                self._by_name.setdefault(path.name.lower(), []).append(path)
        return self._by_name
