"""Annotation files in COCO's form: what they say, and what is wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pictures import make_image
from pycocotools import mask as rle

from overlock.data.coco import CocoImages

SIZE = (40, 60)


def run_lengths(top, left, bottom, right, *, compressed=True):
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    if compressed:
        encoded = rle.encode(mask)
        return {**encoded, "counts": encoded["counts"].decode()}
    flat, counts, value, count = mask.flatten(order="F"), [], 0, 0
    for pixel in flat.tolist():
        if pixel != value:
            counts.append(count)
            value, count = pixel, 0
        count += 1
    return {"counts": [*counts, count], "size": list(SIZE)}


def an_object(**changes):
    one = dict(image_id=7, category_id=30, bbox=[10, 5, 20, 15], area=300, iscrowd=0, segmentation=[])
    return one | changes


def content(annotations, images=((7, "a.png"), (9, "b.png"))):
    return dict(
        images=[dict(id=i, file_name=name, height=SIZE[0], width=SIZE[1]) for i, name in images],
        categories=[dict(id=30, name="hen"), dict(id=4, name="egg")],
        annotations=[dict(one, id=i) for i, one in enumerate(annotations, start=1)],
    )


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        make_image("red", 0).resize(SIZE[::-1]).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder, value):
    path = folder / "instances.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_boxes_masks_and_labels(folder):
    """Labels by the order of the categories' ids; polygons, run lengths of both kinds, and no mask at all."""
    objects = [
        an_object(segmentation=[[10, 5, 30, 5, 30, 20, 10, 20]]),
        an_object(category_id=4, bbox=[2, 3, 5, 6], segmentation=run_lengths(3, 2, 9, 7)),
        an_object(bbox=[1, 1, 4, 4], iscrowd=1, segmentation=run_lengths(1, 1, 5, 5, compressed=False)),
        an_object(),
    ]
    data = CocoImages(write(folder, content(objects)), folder)
    assert data.classes == ("egg", "hen")
    assert len(data) == 2
    image, target = data.read(0)
    assert image.size == SIZE[::-1]
    assert target["boxes"].tolist() == [[10, 5, 30, 20], [2, 3, 7, 9], [1, 1, 5, 5], [10, 5, 30, 20]]
    assert target["labels"].tolist() == [2, 1, 2, 2]
    assert target["iscrowd"].tolist() == [0, 0, 1, 0]
    assert target["image_id"] == 7
    for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        expected = torch.zeros(SIZE, dtype=torch.uint8)
        expected[top:bottom, left:right] = 1
        assert (mask != expected).sum() <= 1  # a polygon's corners are a matter of taste
    _, empty = data.read(1)
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, *SIZE)


def test_training_leaves_out_crowds_and_what_has_no_object(folder):
    objects = [an_object(), an_object(iscrowd=1), an_object(image_id=9, iscrowd=1), an_object(bbox=[3, 3, 0, 5])]
    data = CocoImages(write(folder, content(objects)), folder, training=True, masks=False)
    assert len(data) == 1
    _, target = data.read(0)
    assert target["boxes"].tolist() == [[10, 5, 30, 20]]
    assert "masks" not in target


def test_boxes_are_cut_to_the_image(folder):
    objects = [an_object(bbox=[50, 30, 30, 30]), an_object(bbox=[-5, -5, 10, 10]), an_object(bbox=[70, 5, 10, 10])]
    _, target = CocoImages(write(folder, content(objects)), folder).read(0)
    assert target["boxes"].tolist() == [[50, 30, 60, 40], [0, 0, 5, 5]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not an annotation file in COCO's form"),
        ("[]", "not an annotation file in COCO's form"),
        ({"images": []}, "not an annotation file in COCO's form"),
        (content([an_object(category_id=99)]), "category 99 of an object is not among its categories"),
        (content([], images=()), "no image to read"),
        (
            content([], images=((7, "a.png"), (8, "x.png"), (9, "y.png"))),
            r"2 of its 3 images are not in .*x.png, y.png",
        ),
    ],
)
def test_what_is_wrong_with_a_file(folder, value, message):
    with pytest.raises(ValueError, match=message) as raised:
        CocoImages(write(folder, value), folder)
    assert "instances.json" in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        CocoImages(tmp_path / "absent.json", tmp_path)


def test_only_images_without_objects_to_train_on(folder):
    with pytest.raises(ValueError, match="no image with an object to read"):
        CocoImages(write(folder, content([])), folder, training=True)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4]], "cannot be decoded .a polygon has fewer than three corners"),
        ({"counts": "~~~"}, "cannot be decoded"),
        ({"counts": [2400], "size": [60, 40]}, "is of 60 x 40 pixels, its image of 40 x 60"),
    ],
)
def test_masks_that_cannot_be(folder, segmentation, message):
    data = CocoImages(write(folder, content([an_object(segmentation=segmentation)])), folder)
    with pytest.raises(ValueError, match=message):
        data.read(0)


@pytest.mark.parametrize(("name", "masks"), [("camvid", True), ("bccd", False)])
def test_real_files(shared_data, name, masks):
    data = CocoImages(shared_data / name / "instances_val.json", shared_data / name / "val", masks=masks)
    for i in range(3):
        image, target = data.read(i)
        boxes = target["boxes"]
        assert len(boxes) > 0
        assert boxes.max() <= max(image.size)
        if masks:
            for mask, box in zip(target["masks"], boxes, strict=True):
                rows, columns = torch.where(mask > 0)
                tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert [int(x) for x in tight] == box.int().tolist()
