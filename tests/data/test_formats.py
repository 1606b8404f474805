"""Objects in the forms of YOLO, Pascal VOC, Labelme and CreateML: the same as in COCO's, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from object_files import WRITERS, write_createml, write_labelme, write_voc, write_yolo
from PIL import ExifTags, Image
from scenes import CLASSES, write_scenes

from overlock.data.detection import load_detection, load_detection_test
from overlock.object_files import ObjectFiles


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("formats") / "scenes", train=3, val=6)


def load(data, form=None, **options):
    files = ObjectFiles(data=str(data), format=form)
    return load_detection(files, files, **options)


def by_name(part):
    """The targets of a part, by the images' last part of their names, and its labels' names."""
    targets = {}
    for i, place in enumerate(part.places):
        _, target = part.read(i)
        stem = part.annotations.files[place].stem.removeprefix("train_").removeprefix("val_")
        targets[stem] = target | dict(labels=[part.classes[label - 1] for label in target["labels"]])
    return targets


def assert_same(data, expected, *, within=1e-4):
    """The same images, objects and classes, whatever the order of the classes."""
    assert sorted(data.classes) == sorted(expected.classes)
    for part, other in ((data.train, expected.train), (data.test, expected.test)):
        found, wanted = by_name(part), by_name(other)
        assert found.keys() == wanted.keys()
        for stem, target in wanted.items():
            assert found[stem]["labels"] == target["labels"]
            assert torch.allclose(found[stem]["boxes"], target["boxes"], atol=within)
            assert torch.allclose(found[stem]["area"], target["area"], rtol=1e-4)
            if "masks" in target:
                assert np.array_equal(found[stem]["masks"], target["masks"])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("form", WRITERS)
def test_the_same_objects_as_in_cocos_form(form, named, scenes, tmp_path):
    written = WRITERS[form](scenes, tmp_path / form)
    data = load(written, form if named else None, masks=False)
    assert_same(data, load(scenes, masks=False))
    assert data.notes == ()


@pytest.mark.parametrize("form", ["yolo", "labelme"])
def test_polygons(form, scenes, tmp_path):
    data = load(WRITERS[form](scenes, tmp_path / form, polygons=True))
    assert_same(data, load(scenes))
    assert data.notes == ()


@pytest.mark.parametrize("form", WRITERS)
def test_blood_cells(form, shared_data, tmp_path):
    """The 364 real images: 4886 boxes in every form."""
    root = tmp_path / "bccd"
    root.mkdir()
    for part in ("train", "val"):
        shutil.copy(shared_data / "bccd" / f"instances_{part}.json", root)
        (root / part).symlink_to(shared_data / "bccd" / part)
    data, expected = load(WRITERS[form](root, tmp_path / form), masks=False), load(root, masks=False)
    assert_same(data, expected, within=1e-3)
    assert sum(len(part.annotations.boxes) for part in (data.train, data.test)) == 2804 + 1137


@pytest.mark.parametrize("form", ["yolo", "voc", "labelme", "createml"])
def test_what_supervision_writes(form, scenes, tmp_path):
    """Another library's files, of boxes: it rounds Pascal VOC's to pixels, and YOLO's to five digits."""
    sv = pytest.importorskip("supervision")
    for part in ("train", "val"):
        content = json.loads((scenes / f"instances_{part}.json").read_text())
        for one in content["annotations"]:
            del one["segmentation"]  # else Pascal VOC's boxes would be those of its masks
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        source = sv.DetectionDataset.from_coco(str(scenes / part), str(tmp_path / f"{part}.json"))
        out = tmp_path / form
        if form == "yolo":
            source.as_yolo(str(out / part / "images"), str(out / part / "labels"), str(out / "data.yaml"))
        elif form == "voc":
            source.as_pascal_voc(str(out / part), str(out / part))
        elif form == "labelme":
            source.as_labelme(str(out / part), str(out / part))
        else:
            source.as_createml(str(out / part), str(out / part / "_annotations.createml.json"))
    assert_same(load(tmp_path / form, masks=False), load(scenes, masks=False), within=0.01)


def test_annotations_of_two_forms_are_told(scenes, tmp_path):
    root = WRITERS["yolo"](scenes, tmp_path / "both")
    shutil.copytree(scenes, root, dirs_exist_ok=True)
    assert any("there are annotations in yolo form too, not read: --format" in note for note in load(root).notes)
    assert not any("form too" in note for note in load(root, "yolo").notes)


def test_annotations_apart_are_recognised(scenes, tmp_path):
    """A folder of files, or a file, with the images elsewhere."""
    expected = load(scenes, masks=False).train
    places = {
        "voc": ("voc/Annotations", "voc/JPEGImages"),
        "yolo": ("yolo/labels/train", "yolo/images/train"),
        "labelme": ("labelme/train", "labelme/train"),
        "createml": ("createml/train/_annotations.createml.json", "createml/train"),
    }
    for form, (labels, images) in places.items():
        written = WRITERS[form](scenes, tmp_path / form)
        if form == "yolo":
            shutil.move(written / "data.yaml", written / "labels" / "data.yaml")
        files = ObjectFiles(data=str(tmp_path), annotations=labels, images=images)
        part = load_detection_test(files, classes=CLASSES, masks=False)
        found = {part.annotations.files[place].stem: part.read(i)[1] for i, place in enumerate(part.places)}
        for stem, target in by_name(expected).items():
            one = found[f"train_{stem}" if form == "voc" else stem]
            assert torch.allclose(one["boxes"], target["boxes"], atol=1e-4)
            assert [CLASSES[label - 1] for label in one["labels"]] == target["labels"]


# YOLO


def test_yolo_without_parts(scenes, tmp_path):
    """images/, labels/ and classes.txt, as Label Studio leaves them: a fifth is held out."""
    root = write_yolo(scenes, tmp_path / "yolo")
    for kind in ("images", "labels"):
        shutil.move(root / kind / "train", tmp_path / kind)
        shutil.rmtree(root / kind)
        shutil.move(tmp_path / kind, root / kind)
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "labels" / "0.txt").unlink()
    data = load(root, background=True)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.test)) == (2, 1)
    assert any("1 images have no text file: they are without objects" in note for note in data.notes)


@pytest.mark.parametrize(
    "text",
    [
        "train: ../train/images\nval: ../valid/images\nnames: [blue, green, red]",  # as Roboflow has it
        "train: train/images\nval: [valid/images]\nnames: {0: blue, 1: green, 2: red}",
        "path: {root}\ntrain: train.txt\nval: valid/images\nnames: [blue, green, red]",
    ],
)
def test_yolo_settings(text, scenes, tmp_path):
    root = write_yolo(scenes, tmp_path / "yolo")
    for kind in ("images", "labels"):
        for old, new in (("train", "train"), ("val", "valid")):
            (root / new).mkdir(exist_ok=True)
            shutil.move(root / kind / old, root / new / kind)
    (root / "train.txt").write_text("".join(f"./train/images/{i}.png\n" for i in range(3)))
    (root / "data.yaml").write_text(text.replace("{root}", str(root)))
    assert_same(load(root, masks=False), load(scenes, masks=False))


def test_yolo_lines_of_other_kinds(scenes, tmp_path):
    """A score or track behind a box or polygon, rotated boxes, keypoints, classes written as numbers with a point."""
    root = write_yolo(scenes, tmp_path / "yolo")
    with (root / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 3]\n")
    rows = [
        "0 0.5 0.5 0.5 0.25 0.9",
        "1.0 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.5",
        "2 0.25 0.25 0.75 0.25 0.75 0.5 0.9",
        "2 0.5 0.5 0.5 0.25 0.1 0.2 2 0.3 0.4 1",
        "",
    ]
    (root / "labels" / "train" / "0.txt").write_text("\r\n".join(rows), encoding="utf-8-sig")
    data = load(root)
    _, target = data.train.read(0)
    wide, flat = [16, 24, 48, 40], [16, 16, 48, 32]
    assert target["boxes"].tolist() == [wide, flat, flat, wide]
    assert target["labels"].tolist() == [1, 2, 3, 3]
    assert target["area"].tolist() == [512, 512, 256, 512]
    for note in ("2 lines have a number more, a score or a track: left out", "1 objects have keypoints"):
        assert any(note in line for line in data.notes)


def test_yolo_shares_are_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (40, 20)).save(tmp_path / part / "a.jpg", exif=exif)
        (tmp_path / part / "a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("train: train\nval: val\nnames: [hen]")
    image, target = load(tmp_path, masks=False).train.read(0)
    assert image.size == (20, 40)
    assert target["boxes"].tolist() == [[5, 10, 15, 30]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "has 4 numbers; a box has 5"),
        ("0 0.5 0.5 wide 0.5", "'wide' is no number"),
        ("0 0.5 0.5 nan 0.5", "no shares of the image"),
        ("0 120 80 40 40", "120 80 40 40 are no shares of the image, from 0 to 1"),
        ("3 0.5 0.5 0.5 0.5", r"class 3 is not among those of .*data.yaml \(0 to 2\)"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5 is not among those"),
        ("0 0.5 0.5 -0.5 0.5", "a box has a negative size"),
    ],
)
def test_yolo_lines_that_are_wrong(line, message, scenes, tmp_path):
    root = write_yolo(scenes, tmp_path / "yolo")
    (root / "labels" / "train" / "1.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(ValueError, match=rf"1\.txt, line 2: .*{message}"):
        load(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\nval: images/val\nnames: 3", "names must be a list"),
        ("train: images/train\nval: images/val\nnames: [a, a]", "names has two of the same name"),
        ("train: [", "is no YAML file"),
    ],
)
def test_yolo_settings_that_are_wrong(text, message, scenes, tmp_path):
    root = write_yolo(scenes, tmp_path / "yolo")
    (root / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.yaml: {message}"):
        load(root)


# Pascal VOC


def test_voc_counted_from_zero(scenes, tmp_path):
    """Where a box begins at 0, no box of the part can count from 1."""
    root = write_voc(scenes, tmp_path / "voc", first=0)
    for name in ("train_0.xml", "val_0.xml"):
        path = root / "Annotations" / name
        more = (
            "<object><name>red</name><bndbox><xmin>0</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        )
        path.write_text(path.read_text().replace("</annotation>", f"{more}</annotation>"))
    data = load(root, masks=False)
    _, target = data.train.read(0)
    _, expected = load(scenes, masks=False).train.read(0)
    assert target["boxes"].tolist() == [*expected["boxes"].tolist(), [0, 3, 9, 9]]
    assert sum("some boxes begin at 0: all are read as counted from 0" in note for note in data.notes) == 1


def test_voc_difficult_objects(scenes, tmp_path):
    """Not learnt from; in tests they stand as crowds do, neither for nor against."""
    root = write_voc(scenes, tmp_path / "voc")
    for name in ("train_0.xml", "val_0.xml"):
        path = root / "Annotations" / name
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
    data = load(root, masks=False)
    assert [len(data.train.read(0)[1]["labels"]), len(data.train.read(1)[1]["labels"])] == [1, 2]
    assert data.test.read(0)[1]["iscrowd"].tolist() == [1, 0]
    assert any("1 objects are marked difficult" in note for note in data.notes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<annotation>", "", "not an annotation file of Pascal VOC's form"),
        ("<name>", "<nome>", "not an annotation file of Pascal VOC's form"),
        ("<xmin>", "<xmin>x", r"object 1 \(.*\) has a box that cannot be read: 'x\d+' is no number of pixels"),
        ("<xmin>", "<xmin>nan</xmin><xmin>", "has a box that cannot be read: 'nan' is no number"),
        ("<annotation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>", "it defines entities"),
    ],
)
def test_voc_files_that_are_wrong(old, new, message, scenes, tmp_path):
    root = write_voc(scenes, tmp_path / "voc")
    path = root / "Annotations" / "train_1.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"train_1\.xml: .*{message}"):
        load(root)


def test_voc_lists_of_what_is_not_there(scenes, tmp_path):
    root = write_voc(scenes, tmp_path / "voc")
    (root / "Annotations" / "train_1.xml").unlink()
    with pytest.raises(ValueError, match=r"train\.txt: 1 of its 3 images have no XML file \(first: .*train_1\.xml"):
        load(root)


# Labelme


def an_image(folder, shapes, **changes):
    """The only image of both parts."""
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(folder / part / "a.png")
        content = dict(shapes=shapes, imagePath="a.png", imageWidth=60, imageHeight=40) | changes
        (folder / part / "a.json").write_text(json.dumps(content))
    return folder


def a_shape(kind, points, **changes):
    return dict(label="hen", points=points, shape_type=kind, group_id=None) | changes


def test_labelme_shapes(tmp_path):
    """Shapes of a group are one object; what has no area is counted."""
    buffer = io.BytesIO()
    Image.fromarray(np.ones((5, 10), bool)).save(buffer, format="png")
    shapes = [
        a_shape("rectangle", [[30, 20], [10, 5]]),
        a_shape("rectangle", [[10, 5], [30, 5], [30, 20], [10, 20]]),
        a_shape("circle", [[30, 20], [40, 20]]),
        a_shape("polygon", [[0, 0], [10, 0], [10, 10], [0, 10]], group_id=1),
        a_shape("polygon", [[20, 0], [30, 0], [30, 10], [20, 10]], group_id=1),
        a_shape("mask", [[40, 30], [49, 34]], mask=base64.b64encode(buffer.getvalue()).decode()),
        a_shape("point", [[3, 3]]),
        a_shape("polygon", [[3, 3], [5, 5]]),
    ]
    data = load(an_image(tmp_path, shapes, imagePath="..\\elsewhere\\a.png"))
    _, target = data.train.read(0)
    assert target["boxes"].tolist() == [
        [10, 5, 30, 20], [10, 5, 30, 20], [20, 10, 40, 30], [0, 0, 30, 10], [40, 30, 50, 35]
    ]  # fmt: skip
    pixels = target["masks"].sum(dim=(1, 2)).tolist()
    assert pixels[:2] == [300, 300]
    assert pixels[2] == pytest.approx(314, abs=8)
    assert pixels[3:] == [200, 50]
    for note in ("1 shapes left out: a point of 1 points has no area", "1 shapes left out: a polygon of 2 points"):
        assert any(note in line for line in data.notes)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([a_shape("polygon", [[1, 2], [3, "x"], [5, 6]])], "shape 1 has points that are no pairs of numbers"),
        ([dict(label="hen", shape_type="polygon")], "shape 1 has no points"),
        ([a_shape("rectangle", [[1, 2], [3, 4]], label=None)], "shape 1 has no label"),
        ([a_shape("mask", [[1, 2], [3, 4]], mask="some")], "the mask of shape 1 cannot be read"),
        ([3], "not an annotation file of Labelme's form"),
    ],
)
def test_labelme_files_that_are_wrong(shapes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        load(an_image(tmp_path, shapes))


def test_labelme_sizes_are_compared(tmp_path):
    shapes = [a_shape("rectangle", [[30, 20], [10, 5]])]
    with pytest.raises(ValueError, match=r"a\.png: the image is of 60 x 40 pixels, .* says 120 x 80"):
        load(an_image(tmp_path, shapes, imageWidth=120, imageHeight=80))


# CreateML


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image=None), "an entry has no image"),
        (dict(annotations=[dict(label="red")]), r"0\.png, object 1, has no coordinates"),
        (dict(annotations=[dict(coordinates={})]), r"0\.png, object 1, has no label"),
        (
            dict(annotations=[dict(label="red", coordinates=dict(x=1, y="y", width=3, height=4))]),
            r"0\.png, object 1, has 'y' among its coordinates",
        ),
    ],
)
def test_createml_files_that_are_wrong(change, message, scenes, tmp_path):
    root = write_createml(scenes, tmp_path / "createml")
    path = root / "train" / "_annotations.createml.json"
    content = json.loads(path.read_text())
    content[0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"_annotations\.createml\.json: {message}"):
        load(root)


def test_files_that_systems_leave_are_nothing(scenes, tmp_path):
    root = write_labelme(scenes, tmp_path / "labelme")
    for name in ("._0.json", ".DS_Store", "Thumbs.db"):
        (root / "train" / name).write_bytes(b"\x00")
    assert_same(load(root, masks=False), load(scenes, masks=False))
