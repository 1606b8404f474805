"""The classes of pixels: their names, the colours that stand for them, and the well-known tables of both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

CLASSES, ADE_CLASSES = "classes.txt", "objectInfo150.txt"
FILES = (CLASSES, "class_dict.csv", "_classes.csv", "labelmap.txt", ADE_CLASSES)
Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class PixelClasses:
    """Names of the classes, in the order of the labels, and their colours where there are some."""

    names: tuple[str, ...]
    """A label is a place in them."""
    colours: tuple[Colour, ...] = ()
    """Of the classes, in the same order; none where the label maps have numbers alone."""
    ignored: tuple[Colour, ...] = ()
    """Colours of pixels that do not count."""
    source: str = ""
    """The file or the table that says so."""

    def look_up(self, pixels: NDArray[np.uint8], *, ignored: int) -> NDArray[np.int64]:
        """The labels of pixels.

        Args:
            pixels: (H, W, 3), as RGB.
            ignored: label of those that do not count.

        Raises:
            ValueError: for a colour that is not in the table, naming it.
        """
        codes, places = np.unique(_codes(pixels), return_inverse=True)
        known = dict(zip(_codes(np.array(self.colours)).tolist(), range(len(self.colours)), strict=True))
        known |= dict.fromkeys(_codes(np.array(self.ignored).reshape(-1, 3)).tolist(), ignored)
        strange = [code for code in codes.tolist() if code not in known]
        if strange:
            red, green, blue = strange[0] >> 16, strange[0] >> 8 & 255, strange[0] & 255
            raise ValueError(
                f"{len(strange)} of its {len(codes)} colours are of no class (first: {red} {green} {blue}), as "
                f"{self.source} has them; add them there, or save label maps without blending"
            )
        return np.array([known[code] for code in codes.tolist()], dtype=np.int64)[places].reshape(pixels.shape[:2])


def _codes(colours: NDArray[np.generic]) -> NDArray[np.int64]:
    parts = colours.astype(np.int64)
    codes: NDArray[np.int64] = parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]
    return codes


def _voc_colour(label: int) -> Colour:
    """The bits of a label, three at a time, spread over the three channels from the highest down."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (label >> 3 * place + channel & 1) << 7 - place
    return channels[0], channels[1], channels[2]


_VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CITYSCAPES: dict[str, Colour] = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0), "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180),
    "person": (220, 20, 60), "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100),
    "train": (0, 80, 100), "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""What the files ending in _labelIds have for the classes that are scored."""
# Colours of Cityscapes' other labels, which do not count: the void ones, and classes that are too rare.
_CITYSCAPES_IGNORED: tuple[Colour, ...] = (
    (0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180), (150, 100, 100),
    (150, 120, 90), (0, 0, 90), (0, 0, 110),
)  # fmt: skip
TABLES = MappingProxyType({
    "voc": PixelClasses(
        names=_VOC_NAMES, colours=tuple(_voc_colour(label) for label in range(len(_VOC_NAMES))),
        ignored=((224, 224, 192),), source="Pascal VOC's table",
    ),
    "cityscapes": PixelClasses(
        names=tuple(_CITYSCAPES), colours=tuple(_CITYSCAPES.values()), ignored=_CITYSCAPES_IGNORED,
        source="Cityscapes' table",
    ),
})  # fmt: skip


def read_pixel_classes(path: Path) -> PixelClasses:
    """The classes of a file: a name a line, or names and colours ('road 128 64 128', with commas or without).

    Known besides are ADE20K's ``objectInfo150.txt``, CamVid's ``class_dict.csv`` (name,r,g,b), Roboflow's
    ``_classes.csv`` (pixel value, name) and CVAT's ``labelmap.txt`` (name:r,g,b::).

    Raises:
        ValueError: for a file that cannot be read, fewer than two names, or colours that not every class has.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path}: no file of class names, one a line; write one or name it with --classes") from None
    if path.name == ADE_CLASSES:
        rows: list[tuple[str, Colour | None]] = [(row.split("\t")[-1].split(",")[0].strip(), None) for row in lines[1:]]
    elif path.name == "_classes.csv":
        rows = [(name, None) for name in _by_value(path, lines[1:])]
    else:
        rows = [_parse(line) for line in lines if not line.startswith("#")]
        if rows and rows[0][1] is None and re.fullmatch(r"name\W+r\w*\W+g\w*\W+b\w*", rows[0][0].lower()):
            rows = rows[1:]
    names, colours = tuple(name for name, _ in rows), tuple(colour for _, colour in rows if colour is not None)
    if len(names) < 2:
        raise ValueError(f"{path}: needs at least two names of classes, one a line")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{path}: the class {twice!r} is there twice; give each its own name")
    if colours and len(colours) < len(names):
        plain = next(name for name, colour in rows if colour is None)
        raise ValueError(f"{path}: {plain!r} has no colour, and other classes have; write 'name r g b' in each line")
    if len(set(colours)) < len(colours):
        raise ValueError(f"{path}: two classes have the same colour; give each its own")
    return PixelClasses(names=names, colours=colours, source=str(path))


def _parse(line: str) -> tuple[str, Colour | None]:
    """A name, and a colour where the line ends in three numbers of 0 to 255 (and, in CVAT's form, two colons)."""
    found = re.fullmatch(r"(.*?)[\s,;:]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})(?::.*)?", line)
    numbers = [int(number) for number in found.groups()[1:]] if found else []
    if found is None or max(numbers) > 255:
        return line, None
    return found[1].strip(" ,;:"), (numbers[0], numbers[1], numbers[2])


def _by_value(path: Path, lines: list[str]) -> list[str]:
    """Names in the order of the numbers before them, which must be 0, 1, 2 and so on."""
    known = {}
    for line in lines:
        number, _, name = line.partition(",")
        if not number.strip().isdigit():
            raise ValueError(f"{path}: {line!r} is not a pixel value and the name of its class")
        known[int(number)] = name.strip()
    if sorted(known) != list(range(len(known))):
        raise ValueError(f"{path}: pixel values must go from 0 to {len(known) - 1}, each once")
    return [known[number] for number in range(len(known))]
