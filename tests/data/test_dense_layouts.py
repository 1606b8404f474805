"""Where annotations, images and label maps may lie in a folder, and what is said where they do not."""

from __future__ import annotations

import json
import shutil

import pytest
from scenes import CLASSES, write_scenes

from overlock.data.coco import load_coco, load_coco_part
from overlock.data.label_maps import load_label_maps, load_label_part, read_names


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path / "scenes", train=3, val=2)


def move(root, names):
    for old, new in names.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / old, root / new)


COCO_LAYOUTS = {
    "as COCO": {
        "instances_train.json": "annotations/instances_train2017.json", "train": "train2017",
        "instances_val.json": "annotations/instances_val2017.json", "val": "val2017",
    },
    "as COCO, with a folder of all images": {
        "instances_train.json": "annotations/instances_train.json", "train": "images/train",
        "instances_val.json": "annotations/instances_val.json", "val": "images/val",
    },
    "beside the folders": {},
    "within the folders": {
        "instances_train.json": "train/_annotations.coco.json",
        "instances_val.json": "valid/_annotations.coco.json", "val/0.png": "valid/0.png", "val/1.png": "valid/1.png",
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", COCO_LAYOUTS)
def test_objects(scenes, layout):
    move(scenes, COCO_LAYOUTS[layout])
    data = load_coco(scenes)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.test)) == (3, 2)
    assert len(data.train.read(0)[1]["labels"]) == 2


def test_annotations_without_their_folder(scenes):
    shutil.rmtree(scenes / "val")
    with pytest.raises(ValueError, match=r"2 of its 2 images are not in .*val \(first: 0\.png, 1\.png\)"):
        load_coco(scenes)


def test_chosen_categories_keep_their_order(scenes):
    data = load_coco(scenes, categories=("red", "green"))
    assert data.classes == ("green", "red")
    every = [load_coco(scenes).test.read(i)[1]["labels"].tolist() for i in range(2)]
    chosen = [data.test.read(i)[1]["labels"].tolist() for i in range(2)]
    assert chosen == [[label - 1 for label in labels if label > 1] for labels in every]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(data="nowhere"), "nowhere: no such folder of images and annotations"),
        (dict(train_split="some"), "no annotations found; looked for annotations/instances_some.json"),
        (dict(categories=["purple"]), "no category 'purple'; there are blue, green, red"),
    ],
)
def test_objects_that_are_not_there(scenes, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_coco(**{"data": scenes, **arguments})


def test_parts_of_other_categories(scenes):
    content = json.loads((scenes / "instances_val.json").read_text())
    content["categories"][0]["name"] = "purple"
    (scenes / "instances_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"its categories \(purple, green, red\) are not those of"):
        load_coco(scenes)
    assert load_coco_part(scenes, part="val").classes == ("purple", "green", "red")


MAP_LAYOUTS = {
    "as ADE20K": {
        "train": "images/training", "trainannot": "annotations/training",
        "val": "images/validation", "valannot": "annotations/validation",
    },
    "as CamVid": {},
    "by part": {"train": "train/images", "trainannot": "train/masks", "val": "val/images", "valannot": "val/masks"},
}  # fmt: skip


@pytest.mark.parametrize("layout", MAP_LAYOUTS)
def test_label_maps(scenes, layout):
    names = MAP_LAYOUTS[layout]
    if layout == "by part":
        move(scenes, {"train": "a", "val": "b"})
        names = {"a": "train/images", "b": "val/images", "trainannot": "train/masks", "valannot": "val/masks"}
    move(scenes, names)
    data = load_label_maps(scenes)
    assert data.classes == ("ground", *CLASSES)
    assert (len(data.train), len(data.test)) == (3, 2)
    assert set(data.test.read(0)[1].unique().tolist()) <= {0, 1, 2, 3}


def test_names_of_classes(scenes, tmp_path):
    (tmp_path / "mine.txt").write_text("a\n\nb\n")
    assert read_names(scenes, str(tmp_path / "mine.txt")) == ("a", "b")
    (scenes / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"classes\.txt: no file of class names, one a line"):
        load_label_maps(scenes)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t1\t1\t1\twall", "2\t0.1\t1\t1\t1\tbuilding, edifice"]
    (scenes / "objectInfo150.txt").write_text("\n".join(rows))
    assert read_names(scenes, None) == ("wall", "building")
    (tmp_path / "mine.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"mine\.txt: needs at least two names"):
        read_names(scenes, str(tmp_path / "mine.txt"))


def test_maps_that_are_not_there(scenes):
    with pytest.raises(ValueError, match="no part some found; looked for images/PART and annotations/PART"):
        load_label_part(scenes, part="some", num_classes=4)
    with pytest.raises(ValueError, match="nowhere: no such folder of images and label maps"):
        load_label_part("nowhere", num_classes=4)
