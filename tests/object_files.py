"""Scenes in COCO's form written in the other forms of annotations, exactly and without any of the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape


def parts_of(root: Path) -> Iterator[tuple[str, list[tuple[dict[str, Any], list[dict[str, Any]]]], list[str]]]:
    """Each part's name, its images with their objects (``label`` and its place ``number`` added), and the classes."""
    for path in sorted(root.glob("instances_*.json")):
        content = json.loads(path.read_text())
        names = {one["id"]: one["name"] for one in sorted(content["categories"], key=lambda one: one["id"])}
        objects: dict[int, list[dict[str, Any]]] = {one["id"]: [] for one in content["images"]}
        for one in content["annotations"]:
            label = names[one["category_id"]]
            objects[one["image_id"]].append(one | dict(label=label, number=list(names.values()).index(label)))
        yield path.stem.split("_")[1], [(one, objects[one["id"]]) for one in content["images"]], list(names.values())


def write_yolo(root: Path, out: Path, *, polygons: bool = False) -> Path:
    """images/PART, labels/PART and data.yaml."""
    for part, images, classes in parts_of(root):
        shutil.copytree(root / part, out / "images" / part)
        (out / "labels" / part).mkdir(parents=True)
        for image, objects in images:
            width, height, lines = image["width"], image["height"], []
            for one in objects:
                left, top, w, h = one["bbox"]
                numbers = [(left + w / 2) / width, (top + h / 2) / height, w / width, h / height]
                if polygons:
                    (corners,) = one["segmentation"]
                    numbers = [x / (height if i % 2 else width) for i, x in enumerate(corners)]
                lines.append(" ".join(map(repr, [one["number"], *numbers])))
            stem = Path(image["file_name"]).stem
            (out / "labels" / part / f"{stem}.txt").write_text("".join(f"{line}\n" for line in lines))
        names = "".join(f"  {i}: {name}\n" for i, name in enumerate(classes))
        (out / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return out


def write_voc(root: Path, out: Path, *, first: int = 1) -> Path:
    """Annotations, JPEGImages and ImageSets/Main; pixels counted from 1 (the last within) or from 0 (beyond)."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (out / folder).mkdir(parents=True)
    for part, images, _ in parts_of(root):
        stems = []
        for image, objects in images:
            stem = f"{part}_{Path(image['file_name']).stem}"
            name = stem + Path(image["file_name"]).suffix
            stems.append(stem)
            shutil.copy(root / part / image["file_name"], out / "JPEGImages" / name)
            rows = "".join(
                f"<object><name>{escape(one['label'])}</name><difficult>{one.get('iscrowd', 0)}</difficult><bndbox>"
                f"<xmin>{x + first}</xmin><ymin>{y + first}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
                "</bndbox></object>"
                for one in objects
                for x, y, w, h in [one["bbox"]]
            )
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}</filename>{size}{rows}</annotation>"
            (out / "Annotations" / f"{stem}.xml").write_text(text)
        (out / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(stems))
    return out


def write_labelme(root: Path, out: Path, *, polygons: bool = False) -> Path:
    """PART/ with an image and a JSON file each."""
    for part, images, _ in parts_of(root):
        shutil.copytree(root / part, out / part)
        for image, objects in images:
            shapes = []
            for one in objects:
                left, top, w, h = one["bbox"]
                points = [[left, top], [left + w, top + h]]
                if polygons:
                    (corners,) = one["segmentation"]
                    points = [list(pair) for pair in zip(corners[::2], corners[1::2], strict=True)]
                kind = "polygon" if polygons else "rectangle"
                shapes.append(dict(label=one["label"], points=points, shape_type=kind, group_id=None, flags={}))
            content = dict(
                version="5.5.0", flags={}, shapes=shapes, imagePath=image["file_name"], imageData=None,
                imageHeight=image["height"], imageWidth=image["width"],
            )  # fmt: skip
            (out / part / Path(image["file_name"]).with_suffix(".json")).write_text(json.dumps(content))
    return out


def write_createml(root: Path, out: Path) -> Path:
    """PART/ with _annotations.createml.json."""
    for part, images, _ in parts_of(root):
        shutil.copytree(root / part, out / part)
        entries = []
        for image, objects in images:
            boxes = [
                dict(label=one["label"], coordinates=dict(x=x + w / 2, y=y + h / 2, width=w, height=h))
                for one in objects
                for x, y, w, h in [one["bbox"]]
            ]
            entries.append(dict(image=image["file_name"], annotations=boxes))
        (out / part / "_annotations.createml.json").write_text(json.dumps(entries))
    return out


WRITERS = dict(yolo=write_yolo, voc=write_voc, labelme=write_labelme, createml=write_createml)
