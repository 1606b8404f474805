"""Where annotations, images and label maps may lie in a folder, and what is said where they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import CLASSES, write_scenes

from overlock.data import label_folders
from overlock.data.colours import read_pixel_classes
from overlock.data.detection import load_detection, load_detection_test
from overlock.data.formats import FORMATS, coco, createml
from overlock.data.label_maps import load_label_maps, load_label_test
from overlock.label_files import LabelFiles
from overlock.object_files import ObjectFiles


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


def load(data, **options):
    names = {name: options.pop(name) for name in ("format", "annotations", "images") if name in options}
    train = ObjectFiles(data=str(data), split=options.pop("train_split", None), **names)
    test = ObjectFiles(data=str(data), split=options.pop("val_split", None), format=train.format)
    return load_detection(train, test, **options)


@pytest.mark.parametrize("layout", COCO_LAYOUTS)
def test_objects(scenes, layout):
    move(scenes, COCO_LAYOUTS[layout])
    data = load(scenes)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.test)) == (3, 2)
    assert len(data.train.read(0)[1]["labels"]) == 2


def test_annotations_without_their_folder(scenes):
    shutil.rmtree(scenes / "val")
    with pytest.raises(ValueError, match=r"2 of its 2 images are not in .*val \(first: 0\.png, 1\.png\)"):
        load(scenes)


def test_chosen_categories_keep_their_order(scenes):
    data = load(scenes, categories=("red", "green"))
    assert data.classes == ("green", "red")
    every = [load(scenes).test.read(i)[1]["labels"].tolist() for i in range(2)]
    chosen = [data.test.read(i)[1]["labels"].tolist() for i in range(2)]
    assert chosen == [[label - 1 for label in labels if label > 1] for labels in every]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(data="nowhere"), "nowhere: no such folder of images and annotations"),
        (dict(train_split="some"), "no annotations found; looked for annotations/instances_some.json"),
        (dict(val_split="some"), "no annotations found; looked for annotations/instances_some.json"),
        (dict(format="voc"), "no annotations found; looked for Annotations/ with ImageSets/Main/train.txt"),
        (dict(annotations="some.json"), "some.json: no such file or folder, here or in"),
        (dict(annotations="instances_train.json", images="some"), "some: no such file or folder, here or in"),
        (dict(categories=["purple"]), "no category 'purple'; there are blue, green, red"),
    ],
)
def test_objects_that_are_not_there(scenes, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"data": scenes, **arguments})


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_parts_of_other_categories(scenes):
    def change(content):
        content["categories"][0]["name"] = "purple"
        for one in content["annotations"]:
            one["category_id"] = 10

    rewrite(scenes / "instances_val.json", change)
    with pytest.raises(ValueError, match=r"categories \(purple, green, red\) are not those of .*'purple' is not to"):
        load(scenes)


def test_a_test_part_of_fewer_categories(scenes):
    """Labels go by name, not by place; what the test part lacks is told."""

    def change(content):
        content["categories"] = [dict(id=7, name="red"), dict(id=9, name="never")]
        content["annotations"] = [
            dict(one, category_id=7) for one in content["annotations"] if one["category_id"] == 30
        ]

    before = [load(scenes).test.read(i)[1] for i in range(2)]
    rewrite(scenes / "instances_val.json", change)
    data = load(scenes)
    assert data.classes == data.test.classes == CLASSES
    for i, target in enumerate(before):
        assert data.test.read(i)[1]["labels"].tolist() == [3] * int((target["labels"] == 3).sum())
    assert any("val.json: 2 of 3 classes have no object here: blue, green" in note for note in data.notes)
    alone = load_detection_test(ObjectFiles(data=str(scenes)), classes=("red", "other"))
    assert alone.category_ids == (7, None)
    assert alone.read(0)[1]["labels"].tolist() == [1] * len(data.test.read(0)[1]["labels"])
    with pytest.raises(ValueError, match=r"none of the classes \(other\) is among its categories \(red, never\)"):
        load_detection_test(ObjectFiles(data=str(scenes)), classes=("other",))


def test_a_fifth_is_held_out_where_there_is_no_test_part(tmp_path):
    root = write_scenes(tmp_path / "scenes", train=10)
    data, again, other = load(root), load(root), load(root, seed=1)
    assert (len(data.train), len(data.test)) == (8, 2)
    ids = [set(part.image_ids) for part in (data.train, data.test)]
    assert not ids[0] & ids[1]
    assert data.test.image_ids == again.test.image_ids != other.test.image_ids
    assert any("no part to test on: 2 of 10 images held out (seed 0)" in note for note in data.notes)
    files = ObjectFiles(data=str(root))
    assert load_detection_test(files, classes=CLASSES).image_ids == data.test.image_ids


def test_annotations_and_images_given_apart(scenes, tmp_path):
    """As Label Studio leaves them: result.json, whose images are in images/."""
    root = tmp_path / "export"
    shutil.copytree(scenes / "train", root / "images")
    content = json.loads((scenes / "instances_train.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"images\\{image['file_name']}"
    (root / "result.json").write_text(json.dumps(content))
    for arguments in (
        dict(data=root),
        dict(data=root, annotations="result.json", images="images"),
        dict(data=root / "images", annotations=str(root / "result.json")),
        dict(data=tmp_path, annotations=str(root / "result.json"), images=str(root / "images"), format="coco"),
    ):
        data = load(**arguments)
        assert (len(data.train), len(data.test)) == (2, 1)
    whole = load_detection_test(ObjectFiles(data=str(root)), classes=CLASSES)
    assert len(whole) == 3
    assert len(load_detection_test(ObjectFiles(data=str(root)), classes=CLASSES, held_out=True)) == 1
    named = ObjectFiles(data=str(scenes), annotations="instances_val.json", images="val")
    assert len(load_detection(ObjectFiles(data=str(root)), named).test) == 2


def test_images_that_no_file_names_are_told(scenes):
    shutil.copy(scenes / "train/0.png", scenes / "train/new.png")
    files = ObjectFiles(data=str(scenes))
    assert f"1 images in {scenes / 'train'} are not in the annotations: left out" in load_detection(files, files).notes


def test_images_in_both_parts_are_told(scenes):
    shutil.copy(scenes / "instances_train.json", scenes / "train" / "again.json")
    test = ObjectFiles(data=str(scenes), annotations="train/again.json", images="train")
    data = load_detection(ObjectFiles(data=str(scenes)), test)
    assert any("3 images are in the parts to train on and to test on, 0.png for one" in note for note in data.notes)


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
    data = load_label_maps(LabelFiles(data=str(scenes)))
    assert data.classes == ("ground", *CLASSES)
    assert (len(data.train), len(data.test)) == (3, 2)
    assert set(data.test.read(0)[1].unique().tolist()) <= {0, 1, 2, 3}


def test_doubtful_pairs_are_told(scenes):
    shutil.copy(scenes / "train/0.png", scenes / "train/0.bmp")
    shutil.copy(scenes / "trainannot/1.png", scenes / "trainannot/1.tif")
    labels = np.asarray(Image.open(scenes / "trainannot/2.png"))
    Image.fromarray(labels + 7).save(scenes / "trainannot/2.png")
    notes = load_label_maps(LabelFiles(data=str(scenes))).notes
    assert "1 label maps are of several images, such as 0.bmp and 0.png" in notes
    assert "1 images have several label maps: of 1.png and 1.tif the first is taken" in notes
    assert any("1 of 4 label maps have values that are no class, such as " in note for note in notes)


def test_names_of_classes(scenes, tmp_path):
    (tmp_path / "mine.txt").write_text("a\n\nb\nc\nd\n")
    assert load_label_maps(LabelFiles(data=str(scenes), classes=str(tmp_path / "mine.txt"))).classes == tuple("abcd")
    (scenes / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"classes\.txt: no file of class names, one a line"):
        load_label_maps(LabelFiles(data=str(scenes)))
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t1\t1\t1\twall", "2\t0.1\t1\t1\t1\tbuilding, edifice"]
    (scenes / "objectInfo150.txt").write_text("\n".join(rows))
    assert read_pixel_classes(scenes / "objectInfo150.txt").names == ("wall", "building")
    (tmp_path / "mine.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"mine\.txt: needs at least two names"):
        read_pixel_classes(tmp_path / "mine.txt")


def test_maps_that_are_not_there(scenes):
    with pytest.raises(ValueError, match="no part some found; looked for images/PART and annotations/PART"):
        load_label_test(LabelFiles(data=str(scenes), val_split="some"), classes=("a", "b"))
    with pytest.raises(ValueError, match="nowhere: no such folder of images and label maps"):
        load_label_test(LabelFiles(data="nowhere"), classes=("a", "b"))


def test_every_layout_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    known = [*FORMATS, *(file for file, _ in (*coco.LAYOUTS, *coco.WHOLE)), createml.FILE]
    known += [folder for layout in label_folders.LAYOUTS for folder in layout]
    known += [folder for layout in label_folders.WHOLE for folder in layout if folder != "."]
    absent = [name for name in known if name.replace("{part}", "PART") not in text]
    assert not absent
