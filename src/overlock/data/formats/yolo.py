"""Annotation files of YOLO: a text file an image, of boxes and polygons as shares of it, and names in data.yaml."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from overlock.data.files import images_in
from overlock.data.formats.common import Gathering, Part, find_files, read_lines
from overlock.data.image_sizes import read_sizes
from overlock.data.parts import TRAIN_PARTS

NAMES = ("classes.txt", "obj.names")
FARTHEST = 2.0  # shares of the image; what is beyond is no share
BOX = 5  # numbers of a line: the class, the centre and the size


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What data.yaml says, or the names' file."""

    path: Path
    names: dict[int, str]
    content: dict[str, Any]
    keypoints: int = 0
    """Numbers that follow a box."""


def find(root: Path, parts: Sequence[str] | None) -> Part | None:
    """The first part that is there, as data.yaml names it or by its folder; parts are None for a folder without."""
    settings = _find_settings(root)
    if settings is None:
        return None
    base = settings.path.parent
    sources: list[Any] = []
    if parts is None:
        sources = [base / "images", base / "data", base]
    else:
        # data.yaml calls the parts train, val and test, whatever their folders are called.
        keys = [*parts, *(("train",) if set(parts) & set(TRAIN_PARTS) else ())]
        sources += [settings.content[key] for key in keys if settings.content.get(key)]
        sources += [base / "images" / part for part in parts] + [base / part / "images" for part in parts]
    for source in sources:
        entries = source if isinstance(source, list) else [source]
        images = [image for entry in entries for image in _images(settings, entry)]
        if any(_label_of(image).is_file() for image in images):
            return Part(path=settings.path, folder=base, read=partial(_read, settings, images, base))
    return None


def read(path: Path, folder: Path) -> dict[str, Any]:
    """The content of a folder of text files, or of data.yaml's training part, in COCO's form.

    Raises:
        ValueError: for a file that cannot be read or is not of this form, naming it and the line.
    """
    settings = _find_settings(path) or _find_settings(path.parent) or _find_settings(folder)
    if settings is None:
        raise ValueError(f"{path}: beside YOLO's text files data.yaml or classes.txt with the classes' names is needed")
    if path.is_file():
        part = find(path, TRAIN_PARTS)
        if part is None:
            raise ValueError(f"{path}: no images with text files were found for its part 'train'")
        return part.read()
    images = images_in(folder)
    return _read(settings, images, folder, {image: path / f"{image.stem}.txt" for image in images})


def _find_settings(root: Path) -> Settings | None:
    files = [root] if root.is_file() else [root / "data.yaml", root / "data.yml", *find_files(root, ".yaml", ".yml")]
    for path in files:
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            content = yaml.safe_load("\n".join(read_lines(path)))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: is no YAML file ({' '.join(str(error).split())})") from None
        if isinstance(content, dict) and "names" in content:
            return Settings(
                path=path, names=_names(path, content["names"]), content=content, keypoints=_keypoints(content)
            )
    for path in (root / name for name in NAMES):
        if path.is_file() and ((root / "labels").is_dir() or find_files(root, ".txt") != [path]):
            lines = [line.strip() for line in read_lines(path)]
            return Settings(path=path, names=dict(enumerate(line for line in lines if line)), content={})
    return None


def _names(path: Path, given: Any) -> dict[int, str]:
    """Each class's number and name."""
    try:
        pairs = given.items() if isinstance(given, dict) else enumerate(given)
        names = {int(number): str(name) for number, name in pairs}
    except (TypeError, ValueError):
        raise ValueError(f"{path}: names must be a list, or numbers with names, not {given!r}") from None
    if not names or len(set(names.values())) < len(names):
        raise ValueError(f"{path}: names has {'two of the same name' if names else 'none'}; give each class its own")
    return dict(sorted(names.items()))


def _keypoints(content: dict[str, Any]) -> int:
    shape = content.get("kpt_shape")
    return math.prod(shape) if isinstance(shape, list) and all(isinstance(side, int) for side in shape) else 0


def _images(settings: Settings, source: str | Path) -> list[Path]:
    """The images of a folder, or of a text file of their paths; of none where neither is there."""
    base = settings.path.parent
    root = base / str(settings.content.get("path") or "")
    if isinstance(source, Path):
        places = [source]
    else:
        plain = str(source).replace("\\", "/")
        # Roboflow's ../train/images is beside data.yaml all the same.
        places = [root / plain, base / plain, base / plain.replace("../", "")]
    place = next((path for path in places if path.exists()), None)
    if place is None:
        return []
    if place.is_file():
        lines = [line.strip() for line in read_lines(place) if line.strip()]
        return [
            path if (path := place.parent / line).is_file() or not (root / line).is_file() else root / line
            for line in lines
        ]
    return images_in(place)


def _label_of(image: Path) -> Path:
    """The text file of an image: in labels/ where the image is in images/, else beside it."""
    parts = list(image.parts[:-1])
    for i in range(len(parts) - 1, -1, -1):
        if parts[i].lower() == "images":
            parts[i] = "labels"
            break
    return Path(*parts, f"{image.stem}.txt")


def _read(
    settings: Settings, images: Sequence[Path], folder: Path, labels: dict[Path, Path] | None = None
) -> dict[str, Any]:
    gathering, sizes = Gathering(folder), read_sizes(images)
    for image, (width, height) in zip(images, sizes.tolist(), strict=True):
        path = labels[image] if labels else _label_of(image)
        gathering.add_image(image, width, height)
        if not path.is_file():
            gathering.count("images have no text file: they are without objects")
            continue
        if not width:
            gathering.count("images cannot be read: their objects are left out")
            continue
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                _add(gathering, settings, f"{path}, line {number}", line.split(), (width, height))
    return gathering.content(settings.names.values())


def _add(gathering: Gathering, settings: Settings, where: str, words: list[str], size: tuple[int, int]) -> None:
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).rpartition(': ')[2]} is no number") from None
    if not all(abs(number) <= FARTHEST for number in numbers[1:BOX]) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where}: {' '.join(words[1:BOX])} are no shares of the image, from 0 to 1, as YOLO has them")
    label = settings.names.get(int(numbers[0])) if numbers[0].is_integer() else None
    if label is None:
        raise ValueError(
            f"{where}: class {words[0]} is not among those of {settings.path} (0 to {max(settings.names)})"
        )
    values, name = numbers[1:], Path(where.partition(", line")[0]).name + ", line" + where.rpartition(", line")[2]
    width, height = size
    if settings.keypoints and len(numbers) == BOX + settings.keypoints:
        gathering.count("objects have keypoints: their boxes alone are read")
        values = values[:4]
    elif len(numbers) == BOX + 1 or (len(numbers) > BOX + 1 and len(numbers) % 2 == 0):
        gathering.count("lines have a number more, a score or a track: left out")
        values = values[:-1]
    if len(values) == 4:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        if min(w, h) < 0:
            raise ValueError(f"{where}: a box has a negative size")
        gathering.add_object(label, name, box)
    elif len(values) >= 6:
        xs, ys = [v * width for v in values[::2]], [v * height for v in values[1::2]]
        polygon = [v for corner in zip(xs, ys, strict=True) for v in corner]
        gathering.add_object(label, name, [min(xs), min(ys), max(xs), max(ys)], segmentation=[polygon])
    else:
        raise ValueError(f"{where}: has {len(words)} numbers; a box has 5 (class, centre, size), a polygon 7 or more")
