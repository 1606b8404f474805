"""Label maps in the forms that people have them: a loader sees the same labels in each, or says what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import CLASSES, write_scenes

from overlock.data.colours import TABLES, read_pixel_classes
from overlock.data.label_folders import pair_folders
from overlock.data.label_maps import LabelMaps, load_label_maps, load_label_test
from overlock.data.label_values import IGNORED, LabelForm
from overlock.label_files import LabelFiles
from overlock.tasks.segmentation import segmentation_loss

NAMES = ("ground", *CLASSES)
COLOURS = np.array([[0, 0, 0], [0, 0, 255], [0, 255, 0], [255, 0, 10]], np.uint8)


@pytest.fixture
def scenes(tmp_path):
    root = write_scenes(tmp_path / "plain", train=3, val=2)
    for path in root.glob("*annot/*.png"):  # some pixels that do not count, and a class more than the scenes may have
        labels = np.array(Image.open(path))
        labels[:2], labels[-4:] = 255, np.arange(4)[:, None]
        Image.fromarray(labels).save(path)
    return root


def load(root: Path, **settings):
    return load_label_maps(LabelFiles(data=str(root), **settings))


def labels_of(source) -> list[torch.Tensor]:
    return [source.read(place)[1].as_subclass(torch.Tensor) for place in range(len(source))]


def rewrite(source: Path, target: Path, layout, save) -> Path:
    """The scenes in another form.

    Args:
        source: as CamVid's.
        target: new folder.
        layout: part and name to the paths of image and map below it.
        save: writes a map, given its values and its path.
    """
    for part in ("train", "val"):
        for path in sorted((source / part).iterdir()):
            image, map_ = (target / name for name in layout(part, path.stem))
            for place in (image, map_):
                place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, image)
            save(np.array(Image.open(source / f"{part}annot" / f"{path.stem}.png")), map_)
    (target / "classes.txt").write_text("\n".join(NAMES))
    return target


def save_numbers(labels, path):
    Image.fromarray(labels).save(path)


def save_palette(labels, path):
    image = Image.fromarray(labels, mode="P")
    image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(path)


def save_16_bits(labels, path):
    Image.fromarray(labels.astype(np.uint16)).save(path)


def save_grey_rgb(labels, path):
    Image.fromarray(np.repeat(labels[..., None], 3, axis=2)).save(path)


def save_colours(labels, path):
    table = np.zeros((256, 3), np.uint8)
    table[:4], table[255] = COLOURS, (224, 224, 192)
    Image.fromarray(table[labels]).save(path)


FORMS = {
    "suffix": (lambda part, name: (f"images/{part}/{name}.png", f"masks/{part}/{name}_mask.png"), save_numbers),
    "palette": (lambda part, name: (f"{part}/images/{name}.jpg", f"{part}/masks/{name}.PNG"), save_palette),
    "sixteen bits": (lambda part, name: (f"{part}/{name}.png", f"{part}_labels/{name}_L.png"), save_16_bits),
    "grey as RGB": (lambda part, name: (f"{part}/{name}.png", f"{part}_masks/{name}.tif"), save_grey_rgb),
    "in one folder": (lambda part, name: (f"{part}/{name}.jpg", f"{part}/{name}_mask.png"), save_numbers),
    "one folder, one name": (lambda part, name: (f"{part}/{name}.jpg", f"{part}/{name}.png"), save_numbers),
    "other endings": (
        lambda part, name: (f"img_dir/{part}/{name}_sat.jpg", f"ann_dir/{part}/{name}_mask.png"), save_16_bits
    ),
    "Cityscapes": (
        lambda part, name: (
            f"leftImg8bit/{part}/aachen/a_{name}_leftImg8bit.png",
            f"gtFine/{part}/aachen/a_{name}_gtFine_labelTrainIds.png",
        ),
        save_numbers,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(scenes, tmp_path, form):
    expected, got = load(scenes), load(rewrite(scenes, tmp_path / "other", *FORMS[form]))
    assert (len(got.train), len(got.test), got.classes) == (3, 2, NAMES)
    for part in ("train", "test"):
        for one, other in zip(labels_of(getattr(expected, part)), labels_of(getattr(got, part)), strict=True):
            assert torch.equal(one, other)
    assert int(labels_of(got.train)[0].min()) == IGNORED


@pytest.mark.parametrize(
    "table", ["name r g b\n{}", "# CVAT\n{}", "{}"], ids=["with a head", "with a comment", "bare"]
)  # fmt: skip
def test_colours_by_a_table(scenes, tmp_path, table):
    root = rewrite(
        scenes, tmp_path / "other", lambda part, name: (f"{part}/{name}.png", f"{part}annot/{name}.png"), save_colours
    )
    separator = ":" if "CVAT" in table else ","
    lines = [f"{name}{separator}{r},{g},{b}" for name, (r, g, b) in zip(NAMES, COLOURS.tolist(), strict=True)]
    (root / "classes.txt").write_text(table.format("\n".join([*lines, f"other{separator}224,224,192"])))
    got = load(root)
    assert got.classes == (*NAMES, "other")
    for one, other in zip(labels_of(load(scenes).train), labels_of(got.train), strict=True):
        assert torch.equal(torch.where(one == IGNORED, 4, one), other)
    (root / "classes.txt").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"\.png: 1 of its 5 colours are of no class \(first: 224 224 192\), as .*classes\.txt"
    ):
        load(root)
    (root / "classes.txt").write_text("\n".join(NAMES))
    with pytest.raises(ValueError, match=r"picture in colours; name the classes' colours .* --colours voc"):
        load(root)


def make_voc(scenes, root: Path) -> Path:
    def layout(part, name):
        return f"JPEGImages/{part}_{name}.jpg", f"SegmentationClass/{part}_{name}.png"

    base = rewrite(scenes, root / "VOCdevkit" / "VOC2012", layout, save_palette)
    (base / "classes.txt").unlink()
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part, count in (("train", 3), ("val", 2)):
        names = "".join(f"{part}_{number}\n" for number in range(count))
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(names)
    return root


def test_pascal_voc(scenes, tmp_path):
    """Lists of the parts, indices of the palette, and the names of its classes."""
    data = load(make_voc(scenes, tmp_path / "voc"))
    assert data.classes == TABLES["voc"].names
    assert [path.stem for path in data.test.images] == ["val_0", "val_1"]
    for one, other in zip(labels_of(load(scenes).train), labels_of(data.train), strict=True):
        assert torch.equal(one, other)
    assert any(
        "no pixel in the label maps to train on is of 17 of the classes: boat, bottle" in note for note in data.notes
    )


def test_colours_of_voc():
    """As its development kit has them."""
    table = dict(zip(TABLES["voc"].names, TABLES["voc"].colours, strict=True))
    assert table["aeroplane"] == (128, 0, 0)
    assert table["bottle"] == (128, 0, 128)
    assert table["person"] == (192, 128, 128)
    assert table["tvmonitor"] == (0, 64, 128)
    pixels = np.array([[[128, 0, 0], [224, 224, 192], [0, 64, 128]]], np.uint8)
    assert TABLES["voc"].look_up(pixels, ignored=IGNORED).tolist() == [[1, IGNORED, 20]]


def test_ids_of_cityscapes(scenes, tmp_path):
    """Those that are scored become 0 to 18, the others do not count."""
    ids = np.array([7, 26, 33, 3], np.uint8)

    def save(labels, path):
        Image.fromarray(np.where(labels == 255, 0, ids[labels % 4]).astype(np.uint8)).save(path)

    def layout(part, name):
        stem = f"{part}/aachen/a_{name}"
        return f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"

    root = rewrite(scenes, tmp_path / "other", layout, save)
    (root / "classes.txt").unlink()
    data = load(root)
    assert data.classes == TABLES["cityscapes"].names
    trained = torch.tensor([0, 13, 18, IGNORED])
    for one, other in zip(labels_of(load(scenes).train), labels_of(data.train), strict=True):
        assert torch.equal(torch.where(one == IGNORED, IGNORED, trained[one]), other)


def make_binary(root: Path, values=(0, 255), *, mode="L", suffix=".png", count=5) -> Path:
    """Squares on a ground, without parts."""
    for number in range(count):
        square = np.zeros((8, 10), bool)
        square[2 : 4 + number % 3, 3:6] = True
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(np.uint8(200 * square)[..., None], 3, axis=2)).save(root / "images" / f"{number}.jpg")
        image = Image.fromarray(np.where(square, values[1], values[0]).astype(np.uint8))
        (image.convert("1") if mode == "1" else image).save(root / "masks" / f"{number}{suffix}")
    (root / "classes.txt").write_text("ground\nsquare")
    return root


def test_masks_of_0_and_255(tmp_path):
    root = make_binary(tmp_path / "binary")
    with pytest.raises(ValueError, match=r"values 0 and 255 alone, and 255 is the ignored label; .* --labels 0,255"):
        load(root)
    data = load(root, labels="0,255")
    assert labels_of(data.train)[0].unique().tolist() == [0, 1]
    assert int(sum((labels == 1).sum() for labels in labels_of(data.train) + labels_of(data.test))) == 42
    turned = load(root, labels="255,0")
    assert torch.equal(labels_of(turned.train)[0], 1 - labels_of(data.train)[0])
    assert load(root, labels="0,1").train.read(0)[1].unique().tolist() == [IGNORED, 0]
    with pytest.raises(
        ValueError, match=r"4 of 4 label maps have values that are no class, such as 255 .*: --labels 0,255"
    ):
        load(root, ignore_index=7)


def test_masks_of_one_bit(tmp_path):
    for labels in (None, "0,1", "0,255"):
        data = load(make_binary(tmp_path / str(labels), mode="1"), labels=labels)
        assert labels_of(data.train)[0].unique().tolist() == [0, 1]


def test_the_mend_for_other_values(tmp_path):
    root = make_binary(tmp_path / "grey", (0, 128))
    with pytest.raises(ValueError, match=r"such as 128 \(the values there are 0, 128\), .* classes: --labels 0,128"):
        load(root)
    root = make_binary(tmp_path / "shifted", (0, 2))
    (root / "masks" / "0.png").unlink()
    (root / "images" / "0.jpg").unlink()
    (root / "classes.txt").write_text("a\nb\nc")
    assert load(root).classes == ("a", "b", "c")
    (root / "classes.txt").write_text("a\nb")
    with pytest.raises(ValueError, match="these values may be the classes: --labels 0,2"):
        load(root)


def test_masks_that_lose_values(tmp_path):
    with pytest.raises(ValueError, match=r"0\.jpg: a label map must not be a \.jpg file, whose compression changes"):
        load(make_binary(tmp_path, suffix=".jpg"), labels="0,255")


def test_labels_that_cannot_be(tmp_path):
    root = make_binary(tmp_path)
    for text in ("0", "0,x", "1,1", "0,-1", ""):
        with pytest.raises(ValueError, match="labels must be the pixel values of two or more classes"):
            load(root, labels=text)
    with pytest.raises(ValueError, match="labels names 3 values, but there are 2 classes: ground, square"):
        load(root, labels="0,1,2")


def test_maps_of_images_that_exif_turns(tmp_path):
    """A map drawn on the stored pixels is turned with its image; one drawn on the upright image stays."""
    stored = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for orientation, upright in ((6, np.rot90(stored, -1)), (8, np.rot90(stored)), (5, stored.T)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(10 * stored).convert("RGB").save(tmp_path / "images" / "a.jpg", exif=exif, quality=100)
        for drawn in (stored, np.ascontiguousarray(upright)):
            Image.fromarray(drawn).save(tmp_path / "masks" / "a.png")
            pairs = pair_folders(tmp_path / "images", tmp_path / "masks")
            image, labels = LabelMaps(pairs, LabelForm(num_classes=12)).read(0)
            assert labels.tolist() == upright.tolist()
            assert abs(np.asarray(image)[..., 0].astype(int) - 10 * upright).max() < 8


def test_maps_without_an_image_are_told(scenes):
    Image.new("L", (4, 4)).save(scenes / "trainannot" / "more.png")
    assert any(
        "trainannot: 1 label maps have no image and are left out (first: more.png)" in n for n in load(scenes).notes
    )


def test_nothing_counts(scenes):
    for path in (scenes / "valannot").iterdir():
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)
    with pytest.raises(
        ValueError, match=r"valannot: no pixel of 2 label maps is of a class, all are ignored .* are 255"
    ):
        load(scenes)
    with pytest.raises(ValueError, match="all are ignored"):
        load_label_test(LabelFiles(data=str(scenes)), classes=NAMES)


def test_the_table_of_pixels(scenes):
    for path in (scenes / "valannot").iterdir():
        labels = np.zeros((64, 64), np.uint8)
        labels[:16] = 3
        Image.fromarray(labels).save(path)
    notes = load(scenes).notes
    (table,) = (note for note in notes if "share of pixels" in note)
    assert "3 of 3 and 2 of 2 label maps" in table
    (row,) = (line for line in table.splitlines() if f" {CLASSES[2]} " in line)
    assert row.split()[-2] == "25.00"
    assert any(f"to test on is of 2 of the classes: {CLASSES[0]}, {CLASSES[1]}" in note for note in notes)


def test_a_few_wrong_maps_end_nothing(scenes):
    """They are skipped and counted as a run goes on."""
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(scenes / "trainannot" / "0.png")
    data = load(scenes)
    with pytest.raises(ValueError, match=r"0\.png: a label is 77"):
        data.train.read(0)


def test_a_share_is_held_out(tmp_path):
    root = make_binary(tmp_path, (0, 1), count=10)
    data = load(root)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert not set(data.train.images) & set(data.test.images)
    assert any("no part to test on, so 2 of the images are held out" in note for note in data.notes)
    again = load_label_test(LabelFiles(data=str(root)), classes=data.classes, held_out=True)
    assert again.images == data.test.images
    assert len(load_label_test(LabelFiles(data=str(root)), classes=data.classes)) == 10
    other = load_label_maps(LabelFiles(data=str(root)), seed=1)
    assert other.test.images != data.test.images


def test_a_share_of_the_training_part_is_held_out(scenes):
    shutil.rmtree(scenes / "val")
    data = load(scenes)
    assert (len(data.train), len(data.test)) == (2, 1)
    with pytest.raises(ValueError, match=r"a part to train on and none to test on; .* --held_out"):
        load_label_test(LabelFiles(data=str(scenes)), classes=NAMES)


def test_classes_of_the_model_and_of_the_data(scenes):
    files = LabelFiles(data=str(scenes))
    assert load_label_test(files, classes=NAMES).notes == ()
    with pytest.raises(ValueError, match="its classes are in another order, the model's are"):
        load_label_test(files, classes=NAMES[::-1])
    with pytest.raises(ValueError, match=r"classes\.txt: its classes are 4, the model's are a, b"):
        load_label_test(files, classes=("a", "b"))
    assert "called otherwise" in load_label_test(files, classes=tuple("abcd")).notes[0]


def test_class_255_of_many_counts(tmp_path):
    """In maps of 16 bits with 300 classes, whose ignored value is another, 255 is a class like any."""
    labels = np.arange(300, dtype=np.uint16).reshape(10, 30)
    labels[0, 0] = 65535
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (30, 10)).save(tmp_path / "images" / "a.png")
    Image.fromarray(labels).save(tmp_path / "masks" / "a.png")
    form = LabelForm(num_classes=300, ignore_index=65535)
    _, got = LabelMaps(pair_folders(tmp_path / "images", tmp_path / "masks"), form).read(0)
    assert got[0, 0] == IGNORED
    assert torch.equal(got.flatten()[1:], torch.arange(1, 300))
    logits = torch.randn(1, 300, 1, 1)
    assert segmentation_loss(logits, torch.full((1, 1, 1), 255)) > 0
    assert segmentation_loss(logits, torch.full((1, 1, 1), IGNORED)) == 0


def test_tables_that_cannot_be(tmp_path):
    path = tmp_path / "classes.txt"
    for text, message in (
        ("a 0 0 0\nb", "'b' has no colour, and other classes have"),
        ("a 0 0 0\nb 0 0 0", "two classes have the same colour"),
        ("a\na", "the class 'a' is there twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pixel_classes(path)
    path.write_text("\ufefftraffic light 250 170 30\nroad 1 2 3\n")
    assert read_pixel_classes(path).names == ("traffic light", "road")
    roboflow = tmp_path / "_classes.csv"
    roboflow.write_text("Pixel Value, Class\n0, background\n1, cat\n")
    assert read_pixel_classes(roboflow).names == ("background", "cat")


def test_what_systems_leave_beside_maps(scenes):
    (scenes / "train" / "._0.png").write_bytes(b"no image")
    (scenes / "trainannot" / ".DS_Store").write_bytes(b"x")
    (scenes / "train" / "@eaDir").mkdir()
    (scenes / "train" / "@eaDir" / "0.png").write_bytes(b"no image")
    assert len(load(scenes).train) == 3


def test_camvid_in_other_forms(shared_data, tmp_path):
    """Five images of each part of the real one, seen in the same way in each form."""
    source = tmp_path / "source"
    for part in ("train", "val"):
        for path in sorted((shared_data / "camvid" / part).iterdir())[:5]:
            for folder, name in ((part, path.name), (f"{part}annot", f"{path.stem}.png")):
                (source / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(shared_data / "camvid" / folder / name, source / folder / name)
    names = (shared_data / "camvid" / "classes.txt").read_text()
    (source / "classes.txt").write_text(names)
    expected = [*labels_of(load(source).train), *labels_of(load(source).test)]
    for number, (layout, save) in enumerate(FORMS.values()):
        other = rewrite(source, tmp_path / str(number), layout, save)
        (other / "classes.txt").write_text(names)
        data = load(other)
        got = [*labels_of(data.train), *labels_of(data.test)]
        assert all(torch.equal(one, two) for one, two in zip(expected, got, strict=True))
