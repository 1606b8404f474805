"""Small scenes made for the tests: squares of three colours on grey, with their boxes, masks and label maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pictures import COLOURS
from PIL import Image

CLASSES = tuple(COLOURS)
SIZE = 64


def make_scene(seed: int, size: int = SIZE) -> tuple[Image.Image, np.ndarray, list[dict[str, Any]]]:
    """An image, its label map (0 is the ground, 1 to 3 the colours) and its objects in COCO's form, without ids."""
    draw = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 120) + draw.integers(-20, 21, (size, size, 3))
    labels, objects = np.zeros((size, size), np.uint8), []
    half = size // 2
    for corner in draw.permutation(4)[:2].tolist():  # each in a quarter of its own
        side = int(draw.integers(half // 2, half - 4))
        top, left = (half * (corner // 2) + 2, half * (corner % 2) + 2)
        label = int(draw.integers(1, 4))
        pixels[top : top + side, left : left + side] = COLOURS[CLASSES[label - 1]]
        labels[top : top + side, left : left + side] = label
        right, bottom = left + side, top + side
        objects.append(
            dict(
                category_id=10 * label, bbox=[left, top, side, side], area=side * side, iscrowd=0,
                segmentation=[[left, top, right, top, right, bottom, left, bottom]],
            )
        )  # fmt: skip
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), labels, objects


def write_scenes(root: Path, **counts: int) -> Path:
    """Scenes in COCO's form and as label maps: ``train=8`` writes instances_train.json, train/ and trainannot/."""
    (root).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(("ground", *CLASSES)))
    for number, (part, count) in enumerate(counts.items()):
        (root / part).mkdir()
        (root / f"{part}annot").mkdir()
        images, annotations = [], []
        for i in range(count):
            image, labels, objects = make_scene(1000 * number + i)
            image.save(root / part / f"{i}.png")
            Image.fromarray(labels).save(root / f"{part}annot" / f"{i}.png")
            images.append(dict(id=i, file_name=f"{i}.png", height=image.height, width=image.width))
            annotations += [dict(one, id=len(annotations) + k, image_id=i) for k, one in enumerate(objects)]
        categories = [dict(id=10 * label, name=name) for label, name in enumerate(CLASSES, start=1)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f"instances_{part}.json").write_text(json.dumps(content))
    return root
