"""The forms of annotations of objects: COCO's, YOLO's, Pascal VOC's, Labelme's and CreateML's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from overlock.data.annotations import Annotations, make_annotations
from overlock.data.formats import coco, createml, labelme, pascal_voc, yolo
from overlock.data.formats.common import Part, find_files, read_json
from overlock.data.parts import TEST_PARTS, TRAIN_PARTS
from overlock.object_files import ObjectFiles

FORMATS: MappingProxyType[str, Any] = MappingProxyType(
    dict(coco=coco, createml=createml, yolo=yolo, voc=pascal_voc, labelme=labelme)
)


def holds_objects(files: ObjectFiles) -> bool:
    """Whether there are annotations of objects to train on, in any of the forms."""
    return Path(files.data).is_dir() and any(_find(files, parts) is not None for parts in (TRAIN_PARTS, None))


def read_parts(train: ObjectFiles, test: ObjectFiles, *, masks: bool) -> tuple[Annotations, Annotations | None]:
    """The parts to train on and to test on, the second None where there is none.

    Raises:
        ValueError: where there is nothing to train on, or no part of a name that was given; and as
            :func:`overlock.data.annotations.make_annotations`.
    """
    parts: Sequence[str] | None = TRAIN_PARTS
    first = _find(train, parts)
    if first is None and not train.split:
        first, parts = _find(train, None), None
    if first is None:
        raise _nothing(train, TRAIN_PARTS)
    given = test.annotations or test.split or not train.annotations
    second = _find(test, TEST_PARTS) if given else None
    if second is None and test.split:
        raise _nothing(test, TEST_PARTS)
    return _read(first, masks, _tell_others(first, train, parts)), None if second is None else _read(second, masks)


def read_part(files: ObjectFiles, *, masks: bool) -> tuple[Annotations, str]:
    """A part to test on, and what it is: 'test', or without one the 'whole' of a folder without parts, or 'train'.

    Raises:
        ValueError: as :func:`read_parts`.
    """
    tried: list[tuple[str, Sequence[str] | None]] = [("test", TEST_PARTS)]
    if not files.split:
        tried += [("train", TRAIN_PARTS), ("whole", None)]
    for kind, parts in tried:
        part = _find(files, parts)
        if part is not None:
            return _read(part, masks, _tell_others(part, files, parts)), "whole" if files.annotations else kind
    raise _nothing(files, TEST_PARTS)


def _read(part: Part, masks: bool, notes: Sequence[str] = ()) -> Annotations:
    content = part.read()
    content["notes"] = [*notes, *content.get("notes", ())]
    return make_annotations(content, part.path, part.folder, masks=masks)


def _tell_others(part: Part, files: ObjectFiles, parts: Sequence[str] | None) -> list[str]:
    """A note of other forms in which there are annotations too."""
    if files.annotations or files.format:
        return []
    names, found = (files.split,) if files.split else parts, []
    for name, form in FORMATS.items():
        try:
            other = form.find(Path(files.data), names)
        except ValueError:  # of a form that is not read
            continue
        if other is not None and other.path != part.path:
            found.append(name)
    return [f"there are annotations in {' and '.join(found)} form too, not read: --format chooses"] if found else []


def _find(files: ObjectFiles, parts: Sequence[str] | None) -> Part | None:
    """The first form that is there; of a part of any of the usual names, or of the one that was asked for."""
    if files.annotations:
        return _given(files)
    root = Path(files.data)
    if not root.exists():
        raise ValueError(f"{root}: no such folder of images and annotations")
    names = (files.split,) if files.split else parts
    forms = [FORMATS[files.format]] if files.format else list(FORMATS.values())
    return next((part for form in forms if (part := form.find(root, names)) is not None), None)


def _given(files: ObjectFiles) -> Part:
    """Annotations and images that were named, from here or from the data folder."""
    path, folder = (_existing(files, name) for name in (files.annotations, files.images or files.data))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    read: Callable[..., dict[str, Any]] = FORMATS[files.format or _recognise(path)].read
    return Part(path=path, folder=folder, read=lambda: read(path, folder))


def _existing(files: ObjectFiles, name: str | None) -> Path:
    path = Path(str(name))
    inside = Path(files.data) / path
    if not path.exists() and not inside.exists():
        raise ValueError(f"{path}: no such file or folder, here or in {files.data}")
    return path if path.exists() else inside


def _recognise(path: Path) -> str:
    """The form of a file, or of a folder of files."""
    if path.is_file():
        if path.suffix in (".yaml", ".yml"):
            return "yolo"
        return "createml" if isinstance(read_json(path), list) else "coco"
    for suffix, form in ((".xml", "voc"), (".json", "labelme"), (".txt", "yolo")):
        if find_files(path, suffix):
            return form
    raise ValueError(
        f"{path}: no annotations in this folder; they end in .xml (Pascal VOC), .json (Labelme) or .txt (YOLO)"
    )


def _nothing(files: ObjectFiles, parts: Sequence[str]) -> ValueError:
    names = (files.split,) if files.split else parts
    forms = {
        "coco": ", ".join(layout.format(part=name) for name in names[:1] for layout, _ in coco.LAYOUTS),
        "createml": f"{names[0]}/{createml.FILE}",
        "yolo": "data.yaml or classes.txt with images/ and labels/",
        "voc": f"Annotations/ with ImageSets/Main/{names[0]}.txt, or {names[0]}/ with XML files",
        "labelme": f"{names[0]}/ with JSON files",
    }
    tried = "; ".join(places for form, places in forms.items() if files.format in (None, form))
    part = f"part {' or '.join(names)}: " if files.split or files.format else ""
    return ValueError(f"{files.data}: {part}no annotations found; looked for {tried}")
