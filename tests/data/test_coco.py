"""Annotation files in COCO's form: what they say, and what is wrong with them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from pictures import make_image
from PIL import ExifTags, Image
from pycocotools import mask as rle

from overlock.data.annotations import make_annotations
from overlock.data.detection import DetectionImages
from overlock.data.formats import coco

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


def categories(*given):
    one = an_object(category_id=4)
    return content([one, one | dict(category_id=30)]) | dict(categories=list(given))


def sized(**sizes):
    value = content([an_object()], images=((7, "a.png"),))
    value["images"][0] |= sizes
    return value


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        make_image("red", 0).resize(SIZE[::-1]).save(tmp_path / f"{name}.png")
    return tmp_path


def load(path, folder, *, masks=True, classes=None, **options):
    """A file's images, of all its classes unless given."""
    annotations = make_annotations(coco.read(path), path, folder, masks=masks)
    return DetectionImages(annotations, classes=classes or annotations.categories, **options)


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
    data = load(write(folder, content(objects)), folder)
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
        assert (torch.as_tensor(mask) != expected).sum() <= 1  # a polygon's corners are a matter of taste
    _, empty = data.read(1)
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, *SIZE)


def test_training_leaves_out_crowds_and_what_has_no_object(folder):
    objects = [an_object(), an_object(iscrowd=1), an_object(image_id=9, iscrowd=1), an_object(bbox=[3, 3, 0, 5])]
    data = load(write(folder, content(objects)), folder, training=True, masks=False)
    assert len(data) == 1
    _, target = data.read(0)
    assert target["boxes"].tolist() == [[10, 5, 30, 20]]
    assert "masks" not in target


def test_boxes_are_cut_to_the_image(folder):
    objects = [an_object(bbox=[50, 30, 30, 30]), an_object(bbox=[-5, -5, 10, 10]), an_object(bbox=[70, 5, 10, 10])]
    _, target = load(write(folder, content(objects)), folder).read(0)
    assert target["boxes"].tolist() == [[50, 30, 60, 40], [0, 0, 5, 5]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not an annotation file in COCO's form"),
        ("[]", "not an annotation file in COCO's form"),
        ({"images": []}, "not an annotation file in COCO's form"),
        (content([]) | dict(images=None), "not an annotation file in COCO's form .it has no images"),
        (content([]) | dict(annotations=[3]), "not an annotation file in COCO's form .its annotations are no list of"),
        (content([an_object(category_id=99)]), "category 99 of an object is not among its categories .object 1"),
        (content([], images=()), "no image to read"),
        (
            content([], images=((7, "a.png"), (8, "x.png"), (9, "y.png"))),
            r"2 of its 3 images are not in .*x.png, y.png",
        ),
        # Ids
        (content([], images=((7, "a.png"), ("7", "b.png"))), "images a.png and b.png have the same id 7"),
        (content([], images=((7, "a.png"), (9, "a.png"))), "images 7 and 9 are the same file, a.png"),
        (content([], images=((None, "a.png"),)), "an image has no id"),
        (content([], images=((7, None),)), "an image has no file_name"),
        (content([an_object(image_id=None)]), "object 1 has no image_id"),
        (content([an_object(category_id=None)]), "object 1 has no category_id"),
        (content([an_object(image_id="x"), an_object(image_id="y")]), "objects are of images that it does not list"),
        (categories(dict(id=4, name="hen"), dict(id=4, name="egg")), "'hen' and 'egg' have the same id 4"),
        (categories(dict(id=4, name="hen"), dict(id=30, name="hen")), "two categories are called 'hen' .ids 4, 30"),
        (categories(dict(id=4), dict(id=30, name="hen")), "a category has no name"),
        (categories(dict(name="egg"), dict(id=30, name="hen")), "a category has no id"),
        # Numbers
        (content([an_object(bbox=[10, 5, "wide", 15])]), "the box of object 1 has 'wide', which is no number"),
        (content([an_object(bbox=[10, 5, math.nan, 15])]), "the box of object 1 has nan, which is no number"),
        (content([an_object(), an_object(bbox=[10, 5, 1e9, 15])]), "the box of object 2 has 1000000000.0, which is"),
        (content([an_object(bbox=[10, 5, math.inf, 15])]), "the box of object 1 has inf, which is no number"),
        (content([an_object(bbox=[10, 5, None, 15])]), "the box of object 1 has None, which is no number"),
        (content([an_object(bbox=[10, 5, 20])]), r"the box of object 1 is \[10, 5, 20\]; it must be four numbers"),
        (content([an_object(bbox=None)]), "object 1 has no bbox, nor a segmentation"),
        (content([an_object(bbox=[0.1, 0.2, 0.3, 0.4])]), "all boxes lie between 0 and 1, as shares of the image"),
        (content([an_object(area="large")]), "the area of object 1 is 'large', which is no number"),
        (content([an_object(area=-3)]), "the area of object 1 is -3, which is no number"),
        (content([an_object(iscrowd=2)]), "iscrowd of object 1 is 2; it must be 0 or 1"),
        (content([an_object(segmentation="some")]), "the mask of object 1 is neither polygons nor run lengths"),
        (content([an_object(segmentation=[[1, 2, 3, 4, math.nan, 6]])]), "object 1 has nan in a polygon"),
        (
            content([an_object(), an_object(segmentation=[[1, 1, 9, 1, 9, 9], [1, 2, 3, 4, 1e9, 6]])]),
            "object 2 has 1000000000.0 in a polygon",
        ),
        (content([an_object(segmentation=[[1, 2, 3, 4, "x", 6]])]), "the mask of object 1 has 'x' in a polygon"),
        (sized(width="wide"), "the width of image 7 is 'wide', which is no number of pixels"),
        (sized(width=120, height=80), r"a.png: the image is of 60 x 40 pixels, .* says 120 x 80"),
        (sized(width=40, height=60), r"a.png: the image is of 60 x 40 pixels, .* says 40 x 60"),
    ],
)
def test_what_is_wrong_with_a_file(folder, value, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(write(folder, value), folder)
    assert "instances.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent.json: cannot be read \(No such file"):
        load(tmp_path / "absent.json", tmp_path)


def test_only_images_without_objects_to_train_on(folder):
    with pytest.raises(ValueError, match="no image with an object to read"):
        load(write(folder, content([])), folder, training=True)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"counts": "~~~"}, "cannot be decoded"),
        ({"counts": "~~~", "size": [40, 60]}, "cannot be decoded .its run lengths come to"),
        ({"counts": "", "size": [40, 60]}, "cannot be decoded .its run lengths come to 0 pixels"),
        ({"counts": [10, -10, 2400], "size": [40, 60]}, "cannot be decoded .its run lengths come to 2400"),
        ({"counts": [10**18], "size": [40, 60]}, "cannot be decoded .its run lengths come to"),
        ({"counts": [1], "size": [10**9, 10**9]}, "is of 1000000000 x 1000000000 pixels, its image of 40 x 60"),
        ({"counts": [2400], "size": [60, 40]}, "is of 60 x 40 pixels, its image of 40 x 60"),
    ],
)
def test_masks_that_cannot_be(folder, segmentation, message):
    data = load(write(folder, content([an_object(segmentation=segmentation)])), folder)
    with pytest.raises(ValueError, match=message):
        data.read(0)


@pytest.mark.parametrize(("name", "masks"), [("camvid", True), ("bccd", False)])
def test_real_files(shared_data, name, masks):
    data = load(shared_data / name / "instances_val.json", shared_data / name / "val", masks=masks)
    for i in range(3):
        image, target = data.read(i)
        boxes = target["boxes"]
        assert len(boxes) > 0
        assert boxes.max() <= max(image.size)
        if masks:
            for mask, box in zip(target["masks"], boxes, strict=True):
                rows, columns = torch.where(torch.as_tensor(mask))
                tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert [int(x) for x in tight] == box.int().tolist()


def test_numbers_in_text_and_null_as_absent(folder):
    """Ids, sizes, boxes, areas and flags as some exporters write them are those of the plain file."""
    square = [[10, 5, 30, 5, 30, 20, 10, 20]]
    plain = content([an_object(segmentation=square), an_object(category_id=4, image_id=9, iscrowd=1)])
    odd = json.loads(json.dumps(plain))
    odd["images"] = [dict(one, id=str(one["id"]), width=str(one["width"]), height=None) for one in odd["images"]]
    odd["categories"][0]["id"] = "30"
    first, second = odd["annotations"]
    first |= dict(bbox=["10", "5.0", " 20", "15"], image_id=7.0, area=None, iscrowd=None)
    first |= dict(segmentation=[[str(x) for x in square[0]]])
    second |= dict(image_id="9", category_id="4", iscrowd="1", area="300", segmentation=None)
    for text, encoding in ((json.dumps(odd), "utf-8-sig"), (json.dumps(odd), "utf-16")):
        (folder / "odd.json").write_text(text, encoding=encoding)
        for i in range(2):
            _, expected = load(write(folder, plain), folder).read(i)
            _, target = load(folder / "odd.json", folder).read(i)
            assert target.keys() == expected.keys()
            assert target.pop("image_id") == expected.pop("image_id")
            assert all(np.array_equal(target[name], part) for name, part in expected.items())


def test_what_is_left_out_is_counted(folder):
    """Once, with its reason; the others stay."""
    objects = [
        an_object(),
        an_object(bbox=[3, 3, 0, 5]),
        an_object(bbox=[3, 3, 5, -5]),
        an_object(bbox=[70, 5, 10, 10]),
        an_object(bbox=[50, 30, 30, 30]),
        an_object(image_id=8),
        an_object(iscrowd=1),
        an_object(bbox=[3, 3, 0.5, 5]),
    ]
    path = write(folder, content(objects))
    notes = [
        "1 of 8 objects left out: of images that the file does not list",
        "2 of 8 objects left out: their boxes have no area",
        "1 of 8 objects left out: they lie outside of their images",
        "1 of 8 objects stick out of their images: cut there",
        "4 of 4 objects have no mask: their boxes stand for it",
    ]
    tested = load(path, folder)
    assert list(tested.notes) == [*notes, "1 of 2 images have no object", "1 of 2 classes have no object here: egg"]
    assert len(tested.read(0)[1]["labels"]) == 4
    taught = load(path, folder, training=True)
    assert taught.notes[5:8] == (
        "1 of 4 objects left out: crowds are not learnt from",
        "1 of 4 objects left out: they are smaller than a pixel",
        "1 images have no object: left out (--background true keeps them)",
    )
    assert len(taught) == 1
    assert taught.read(0)[1]["boxes"].tolist() == [[10, 5, 30, 20], [50, 30, 60, 40]]
    kept = load(path, folder, training=True, background=True)
    assert [len(kept.read(i)[1]["labels"]) for i in range(2)] == [2, 0]
    assert "1 of 2 images have no object" in kept.notes


def test_what_looks_wrong_is_told(folder):
    """Objects that are there twice, masks beside their boxes, boxes that stick out, crowds alone."""
    beside = [[1, 1, 4, 1, 4, 4]]
    data = load(write(folder, content([an_object(segmentation=beside), an_object(), an_object()])), folder)
    assert {*data.notes} >= {
        "2 of 3 objects are there twice, with the same class and box: kept",
        "1 of 3 objects have a mask that lies outside of their box",
    }
    data = load(write(folder, content([an_object(bbox=[10, 5, 55, 34])])), folder)
    assert any("are the boxes left, top, right, bottom" in note for note in data.notes)
    data = load(write(folder, content([an_object(iscrowd=1)])), folder)
    assert "all objects are crowds: there is none to find" in data.notes


def test_a_sound_file_has_nothing_to_tell(folder):
    square = [[10, 5, 30, 5, 30, 20, 10, 20]]
    objects = [an_object(segmentation=square), an_object(category_id=4, image_id=9, segmentation=square)]
    for training in (True, False):
        assert load(write(folder, content(objects)), folder, training=training).notes == ()


def test_a_broken_polygon_leaves_the_rest(folder):
    """The others of its object stay, and where there are none the box stands for it."""
    square = [10, 5, 30, 5, 30, 20, 10, 20]
    objects = [
        an_object(segmentation=[[1, 2, 3, 4], square]),
        an_object(segmentation=[[]]),
        an_object(segmentation=[[1, 2, 3, 4]]),
        an_object(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        an_object(segmentation=square),  # not in a list of its own
    ]
    data = load(write(folder, content(objects)), folder)
    _, target = data.read(0)
    box = torch.zeros(SIZE, dtype=torch.uint8)
    box[5:20, 10:30] = 1
    assert all(np.array_equal(mask, box) for mask in target["masks"])
    assert "4 polygons have fewer than three corners: left out of their masks" in data.notes
    assert "3 of 5 objects have no mask: their boxes stand for it" in data.notes


@pytest.mark.parametrize("masks", [True, False])
def test_a_box_that_is_absent_is_that_of_the_mask(folder, masks):
    objects = [an_object(bbox=None, segmentation=[[10, 5, 30, 5, 30, 20, 10, 20], [40, 5, 45, 5, 45, 30]])]
    objects += [
        an_object(bbox=[], segmentation=run_lengths(3, 2, 9, 7, compressed=c), area=None) for c in (True, False)
    ]
    _, target = load(write(folder, content(objects)), folder, masks=masks).read(0)
    assert target["boxes"].tolist() == [[10, 5, 45, 30], [2, 3, 7, 9], [2, 3, 7, 9]]
    assert target["area"].tolist() == [300, 30, 30]


def test_an_area_that_is_absent_is_that_of_the_polygon(folder):
    triangle = [[10, 5, 30, 5, 10, 20]]
    objects = [an_object(area=None, segmentation=triangle), an_object(area=None), an_object(area=123.5)]
    _, target = load(write(folder, content(objects)), folder).read(0)
    assert target["area"].tolist() == [150, 300, 123.5]


def test_an_empty_category_of_the_same_name_is_left_out(folder):
    """Roboflow's first category often has a class's name and no object."""
    value = content([an_object(category_id=1)])
    value["categories"] = [dict(id=0, name="hen", supercategory="none"), dict(id=1, name="hen", supercategory="hen")]
    data = load(write(folder, value), folder)
    assert data.classes == ("hen",)
    assert data.category_ids == (1,)
    assert data.read(0)[1]["labels"].tolist() == [1]
    assert "category 0 has the name of another, 'hen', and no object: left out" in data.notes


def test_an_image_listed_twice_is_taken_once(folder):
    data = load(write(folder, content([an_object()], images=((7, "a.png"), (9, "b.png"), (7, "a.png")))), folder)
    assert len(data) == 2
    assert "1 images are listed twice, with the same file: taken once" in data.notes


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])  # the others leave the size, and nothing tells
def test_boxes_follow_an_image_that_is_stored_sideways(folder, orientation):
    """The file's size is that of the stored pixels: boxes and masks are turned with them, to the bit as PIL does."""
    height, width = SIZE
    stored = np.zeros((height, width), np.uint8)
    stored[5:20, 10:31] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(stored).save(folder / "a.png", exif=exif)
    square = [[10, 5, 31, 5, 31, 20, 10, 20]]
    value = content([an_object(bbox=[10, 5, 21, 15], segmentation=square)], images=((7, "a.png"),))
    data = load(write(folder, value), folder)
    image, target = data.read(0)
    seen = torch.from_numpy(np.asarray(image)[..., 0] > 128)
    assert np.array_equal(target["masks"][0], seen)
    rows, columns = torch.where(seen)
    assert target["boxes"][0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert target["boxes"].canvas_size == (image.height, image.width)
    assert any("stored sideways" in note for note in data.notes) == (orientation > 4)


def test_boxes_on_the_upright_image_stay(folder):
    """The file's size is the upright one's."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", SIZE).save(folder / "a.png", exif=exif)  # upright 60 wide and 40 high
    image, target = load(write(folder, content([an_object()], images=((7, "a.png"),))), folder).read(0)
    assert image.size == SIZE[::-1]
    assert target["boxes"].tolist() == [[10, 5, 30, 20]]


def test_a_single_image_of_another_size_is_unreadable_by_itself(folder):
    for name in "cd":
        make_image("red", 0).resize(SIZE[::-1]).save(folder / f"{name}.png")
    images = ((1, "a.png"), (2, "b.png"), (3, "c.png"), (4, "d.png"))
    Image.new("RGB", (30, 20)).save(folder / "c.png")
    data = load(write(folder, content([an_object(image_id=i) for i in range(1, 5)], images=images)), folder)
    with pytest.raises(ValueError, match=r"c.png: the image is of 30 x 20 pixels, .*instances.json says 60 x 40"):
        data.read(2)
    assert data.read(3)[0].size == (60, 40)
