"""Images with a label for each pixel: pairs of files, as ADE20K has them and most others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from overlock.data.files import IMAGE_SUFFIXES, find_images, read_image
from overlock.data.images import ImageData
from overlock.data.parts import TEST_PARTS, TRAIN_PARTS

IGNORED = 255
LAYOUTS = (  # folders of the images and of the maps
    ("images/{part}", "annotations/{part}"),
    ("images/{part}", "labels/{part}"),
    ("images/{part}", "masks/{part}"),
    ("{part}", "{part}annot"),
    ("{part}/images", "{part}/annotations"),
    ("{part}/images", "{part}/labels"),
    ("{part}/images", "{part}/masks"),
)
CLASSES, ADE_CLASSES = "classes.txt", "objectInfo150.txt"


class LabelMaps:
    """Images in one folder, their label maps as PNG files of the same names in another.

    A map's values are the classes, from 0 on. With ``shift`` they begin at 1, and 0 ('other') is ignored, as in ADE20K.

    Args:
        images: folder of the images, and of folders of them.
        labels: folder of the maps.
        num_classes: values from here on, but for the ignored one, are refused.
        shift: take 1 from each label; 0 is ignored.
        ignore_index: value of pixels that do not count.

    Raises:
        ValueError: for a folder without images, or images without a map.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        *,
        num_classes: int,
        shift: bool = False,
        ignore_index: int = IGNORED,
    ):
        root = Path(images)
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder of images")
        self.images = find_images([root])
        self.maps = [(Path(labels) / path.relative_to(root)).with_suffix(".png") for path in self.images]
        self.num_classes, self.shift, self.ignore_index = num_classes, shift, ignore_index
        absent = [path for path in self.maps if not path.is_file()]
        if absent:
            raise ValueError(
                f"{len(absent)} of the {len(self.maps)} images in {root} have no label map (first: {absent[0]}); maps "
                f"are PNG files with the images' names, and images end in {', '.join(IMAGE_SUFFIXES)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, tv_tensors.Mask]:
        """An image as RGB, and its labels (H, W), the ignored ones 255.

        Raises:
            ValueError: for a file that cannot be read, another size, or a label that is no class, naming the file.
        """
        image, path = read_image(self.images[index]), self.maps[index]
        try:
            with Image.open(path) as file:
                if file.mode not in ("L", "P", "I", "I;16"):
                    raise ValueError(
                        f"{path}: a label map has one number a pixel, this is an image of mode {file.mode}"
                    )
                labels = np.asarray(file).astype(np.int64)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path}: the label map cannot be read ({error})") from None
        if labels.shape != (image.height, image.width):
            height, width = labels.shape
            raise ValueError(
                f"{path}: the label map is of {height} x {width} pixels, its image of {image.height} x {image.width}"
            )
        ignored = labels == self.ignore_index
        if self.shift:
            ignored |= labels == 0
            labels = labels - 1
        wrong = ~ignored & (labels >= self.num_classes)
        if wrong.any():
            found = int(labels[wrong][0]) + self.shift
            raise ValueError(
                f"{path}: a label is {found}, where classes go from {int(self.shift)} to "
                f"{self.num_classes - 1 + self.shift} and {self.ignore_index} is ignored; check num_classes and shift"
            )
        return image, tv_tensors.Mask(torch.from_numpy(np.where(ignored, IGNORED, labels)))


def load_label_maps(
    data: str | Path,
    *,
    train_split: str | None = None,
    val_split: str | None = None,
    classes: str | None = None,
    shift: bool = False,
    ignore_index: int = IGNORED,
) -> ImageData:
    """The parts of a folder of images and label maps to train on and to test on.

    Args:
        data: the folder; see LAYOUTS for where images and maps may lie in it.
        train_split: name of the first part; the usual names are tried unless given.
        val_split: name of the second.
        classes: file of the classes' names, one a line in the order of the labels; else classes.txt in the folder, or
            ADE20K's objectInfo150.txt.
        shift: as in :class:`LabelMaps`.
        ignore_index: likewise.

    Raises:
        ValueError: where there is no such part or no names; and as :class:`LabelMaps`.
    """
    root, names = Path(data), read_names(Path(data), classes)
    settings: dict[str, Any] = dict(num_classes=len(names), shift=shift, ignore_index=ignore_index)
    train = LabelMaps(*_find_part(root, (train_split,) if train_split else TRAIN_PARTS), **settings)
    test = LabelMaps(*_find_part(root, (val_split,) if val_split else TEST_PARTS), **settings)
    return ImageData(classes=names, train=train, test=test)


def load_label_part(
    data: str | Path, *, part: str | None = None, num_classes: int, shift: bool = False, ignore_index: int = IGNORED
) -> LabelMaps:
    """The part to test on alone; arguments and errors as those of :func:`load_label_maps`."""
    where = _find_part(Path(data), (part,) if part else TEST_PARTS)
    return LabelMaps(*where, num_classes=num_classes, shift=shift, ignore_index=ignore_index)


def read_names(root: Path, classes: str | None) -> tuple[str, ...]:
    """The names of the classes, from a file of them, or from the one that the data has.

    Raises:
        ValueError: where there is none, or fewer than two names.
    """
    path = Path(classes) if classes else root / CLASSES
    try:
        if not classes and not path.is_file() and (root / ADE_CLASSES).is_file():
            path = root / ADE_CLASSES
            rows = path.read_text(encoding="utf-8").splitlines()[1:]
            names = tuple(row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip())
        else:
            names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path}: no file of class names, one a line; write one or name it with --classes") from None
    if len(names) < 2:
        raise ValueError(f"{path}: needs at least two names of classes, one a line")
    return names


def _find_part(root: Path, parts: Sequence[str]) -> tuple[Path, Path]:
    """The first folders of images and of maps that are there."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of images and label maps")
    for part in parts:
        for images, maps in LAYOUTS:
            where = root / images.format(part=part), root / maps.format(part=part)
            if where[0].is_dir() and where[1].is_dir():
                return where
    tried = "; ".join(f"{images} and {maps}" for images, maps in LAYOUTS).replace("{part}", "PART")
    raise ValueError(f"{root}: no part {' or '.join(parts)} found; looked for {tried}")
