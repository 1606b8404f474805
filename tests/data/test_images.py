"""Folders by class and the digits, and how they are split."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from pictures import COLOURS, make_classes, make_image
from PIL import Image

from overlock.data import Augmentation, load_data, load_test_data, make_eval_transform, make_train_transform
from overlock.data.datasets import ImageDataset, seed_transforms
from overlock.data.images import Samples, save_examples
from overlock.data.loaders import OnImage

GREY = dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,), interpolation="bicubic", crop_pct=1.0)
RGB = dict(input_size=(3, 24, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), interpolation="bilinear", crop_pct=0.75)


def test_one_folder_is_split_by_class_and_seed(tmp_path):
    root = make_classes(tmp_path, 10)
    data = load_data(str(root), seed=3)
    assert data.classes == tuple(COLOURS)
    assert Counter(label for _, label in data.test) == {0: 2, 1: 2, 2: 2}
    assert len(data.train) == 24
    assert not set(data.train) & set(data.test)
    assert load_data(str(root), seed=3) == data
    assert load_data(str(root), seed=4).test != data.test
    for path, label in data.train + data.test:
        assert path.parent.name == data.classes[label]


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_given_split(tmp_path, held_out):
    make_classes(tmp_path / "train", 3)
    make_classes(tmp_path / held_out, 1)
    data = load_data(str(tmp_path))
    assert {path.parts[-3] for path, _ in data.train} == {"train"}
    assert {path.parts[-3] for path, _ in data.test} == {held_out}
    assert (len(data.train), len(data.test)) == (9, 3)


def test_digits_are_split_by_class():
    data = load_data("digits")
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.classes == tuple("0123456789")
    assert not data.hflip
    counts = Counter(label for _, label in data.test)
    assert min(counts.values()) >= 34
    held_out = {np.asarray(image).tobytes() for image, _ in data.test}
    assert not held_out & {np.asarray(image).tobytes() for image, _ in data.train}


def test_examples_of_digits_are_held_out_images(tmp_path):
    data = load_data("digits")
    files = save_examples(data, tmp_path)
    assert [file.name for file in files] == [f"{i}.png" for i in range(10)]
    for file in files:
        pixels = np.asarray(Image.open(file)).tobytes()
        assert (pixels, int(file.stem)) in {(np.asarray(image).tobytes(), label) for image, label in data.test}


def test_files_need_no_examples(tmp_path):
    data = load_data(str(make_classes(tmp_path / "d", 2)))
    assert save_examples(data, tmp_path / "examples") == []
    assert not (tmp_path / "examples").exists()


def test_a_fifth_of_the_training_part_is_held_out_where_there_is_no_other(tmp_path):
    make_classes(tmp_path / "train", 5)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (12, 3)
    assert data.notes == (f"{tmp_path / 'train'}: there is no part to test on, so 3 of the 15 images are held out",)
    plain = load_data(str(tmp_path / "train"))
    assert (plain.train, plain.test, plain.notes) == (data.train, data.test, ())


def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_data(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="found 0 class folders; at least two"):
        load_data(str(tmp_path))
    make_classes(tmp_path / "one", 3, colours=("red",))
    with pytest.raises(ValueError, match="found 1 class folders"):
        load_data(str(tmp_path / "one"))
    root = make_classes(tmp_path / "empty", 3)
    (root / "yellow").mkdir()
    with pytest.raises(ValueError, match=r"yellow: no images of this class"):
        load_data(str(root))
    with pytest.raises(ValueError, match="class 'blue' has one image"):
        load_data(str(make_classes(tmp_path / "single", 1)))
    make_classes(tmp_path / "no_test" / "train", 2)
    with pytest.raises(ValueError, match="no folder 'val', which val_split names"):
        load_data(str(tmp_path / "no_test"), val_split="val")
    make_classes(tmp_path / "no_test" / "val", 2, colours=("red", "green"))
    (tmp_path / "no_test" / "val" / "yellow").mkdir()
    with pytest.raises(ValueError, match="class 'yellow' of 'val' is not among those to train on"):
        load_data(str(tmp_path / "no_test"))


def test_eval_transform_resizes_crops_and_normalises():
    image = Image.new("RGB", (64, 64), (255, 0, 128))
    out = make_eval_transform(RGB)(image)
    expected = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(RGB["mean"])) / torch.tensor(RGB["std"])
    torch.testing.assert_close(out, expected[:, None, None].expand(3, 24, 24))
    frame = Image.new("RGB", (64, 64), "white")
    frame.paste("black", (8, 8, 56, 56))  # crop_pct 0.75 keeps these 48 pixels
    inside = make_eval_transform(RGB)(frame)[0, 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, -2.5))


def test_grey_input():
    out = make_eval_transform(GREY)(Image.new("RGB", (8, 8), (102, 102, 102)))
    torch.testing.assert_close(out, torch.full((1, 16, 16), (0.4 - 0.5) / 0.25))


@pytest.mark.parametrize("preprocessing", [GREY, RGB])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(rand_augment="rand-m9-mstd0.5-inc1", erasing=1.0), dict(padding=4), dict(color_jitter=0.4)],
)
def test_augmentation_is_random_and_keeps_the_shape(preprocessing, changes):
    torch.manual_seed(0)
    transform = make_train_transform(preprocessing, Augmentation(**changes))
    image = make_image("green", 0, 48)
    first, second = transform(image), transform(image)
    assert first.shape == second.shape == preprocessing["input_size"]
    assert not torch.equal(first, second)


def test_the_strongest_augmentation_works_on_every_image():
    """timm asks Pillow for posterising to no bit at all now and then."""
    transform = make_train_transform(RGB, Augmentation(rand_augment="rand-m10-mstd0.5-inc1-n6"))
    image = make_image("green", 0, 48)
    for seed in range(60):
        seed_transforms(seed)
        assert transform(image).isfinite().all()


def test_mirroring_can_be_switched_off():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 16, 32))
    torch.manual_seed(0)
    for mirror in (False, True):
        transform = make_train_transform(GREY, Augmentation(scale=(1.0, 1.0)), hflip=mirror)
        outs = [transform(image.convert("RGB")) for _ in range(30)]
        mirrored = any(out[0, 8, 0] < out[0, 8, -1] for out in outs)
        assert mirrored == mirror


def test_dataset_reads_files_and_images(tmp_path):
    make_image("red", 0).save(tmp_path / "a.png")
    transform = make_eval_transform(RGB)
    dataset = ImageDataset(Samples([(tmp_path / "a.png", 4), (make_image("red", 0), 5)]), OnImage(transform))
    assert len(dataset) == 2
    (first, label), (second, other) = (dataset[i].content for i in range(2))
    assert torch.equal(first, second)
    assert [label, other] == [4, 5]


def test_what_systems_leave_is_no_class_and_no_image(tmp_path):
    root = make_classes(tmp_path / "d", 5)
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "red/@eaDir", "red/.ipynb_checkpoints"):
        (root / name).mkdir()
        (root / name / "0.png").write_bytes(b"no image")
    for name in ("Thumbs.db", "red/Thumbs.db", "red/._0.png", "red/.DS_Store", "red/desktop.ini"):
        (root / name).write_bytes(b"no image")
    data = load_data(str(root))
    assert data.classes == tuple(COLOURS)
    assert len(data.train) + len(data.test) == 15
    assert data.notes == ()
    assert len(load_test_data(str(root)).test) == 15


def test_files_that_are_no_images_are_told(tmp_path):
    root = make_classes(tmp_path / "d", 5)
    for name in ("a.heic", "b.HEIC", "c.svg", "notes.txt"):
        (root / "red" / name).write_bytes(b"x")
    (root / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (note,) = load_data(str(root)).notes
    assert "4 files are no images that can be read and left out (2 .heic, 1 link to nowhere, 1 .svg)" in note
    assert "convert HEIC to JPEG or PNG" in note


@pytest.mark.parametrize("names", [("Training", "Testing"), ("TRAIN", "Valid"), ("train", "validation")])
def test_parts_in_capitals(tmp_path, names):
    for name in names:
        make_classes(tmp_path / name, 2)
    data = load_data(str(tmp_path))
    assert data.classes == tuple(COLOURS)
    assert (len(data.train), len(data.test)) == (6, 6)


def test_named_parts(tmp_path):
    for name in ("train", "small", "val", "other"):
        make_classes(tmp_path / name, 1 + len(name), seed=len(name))
    data = load_data(str(tmp_path), train_split="small", val_split="other")
    assert {path.parts[-3] for path, _ in data.train + data.test} == {"small", "other"}
    assert {path.parts[-3] for path, _ in load_test_data(str(tmp_path), val_split="other").test} == {"other"}
    with pytest.raises(ValueError, match="there is no folder 'absent', which val_split names"):
        load_data(str(tmp_path), val_split="absent")


def test_a_class_may_be_called_train(tmp_path):
    make_classes(tmp_path, 3)
    (tmp_path / "red").rename(tmp_path / "train")
    assert load_data(str(tmp_path)).classes == ("blue", "green", "train")


def test_a_test_part_may_lack_classes(tmp_path):
    make_classes(tmp_path / "train", 3)
    make_classes(tmp_path / "val", 2, seed=9, colours=("green", "red"))
    data = load_data(str(tmp_path))
    assert [label for _, label in data.test] == [1, 1, 2, 2]
    assert any("no images of 1 of the classes to test on (blue)" in note for note in data.notes)


def test_the_order_of_classes(tmp_path):
    root = make_classes(tmp_path / "d", 3)
    (tmp_path / "names.txt").write_text("red\nblue\ngreen\n")
    data = load_data(str(root), classes=str(tmp_path / "names.txt"))
    assert data.classes == ("red", "blue", "green")
    assert all(path.parent.name == data.classes[label] for path, label in data.train)
    (tmp_path / "names.txt").write_text("red\nblue\n")
    with pytest.raises(ValueError, match=r"names\.txt: 'green' is not in both of the file and the folders"):
        load_data(str(root), classes=str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match=r"digits: classes is .* leave it out"):
        load_data("digits", classes="x")


def test_images_beside_the_classes_are_told(tmp_path):
    root = make_classes(tmp_path / "d", 5)
    make_image("red", 90).save(root / "loose.png")
    assert load_data(str(root)).notes == (f"{root}: 1 images lie beside the folders of classes and are left out",)


def test_the_same_image_twice_is_told(tmp_path):
    make_classes(tmp_path / "train", 3)
    make_classes(tmp_path / "val", 2, seed=50)
    (tmp_path / "train" / "red" / "copy.png").write_bytes((tmp_path / "train" / "blue" / "0.png").read_bytes())
    (tmp_path / "val" / "green" / "9.png").symlink_to(tmp_path / "train" / "green" / "1.png")
    notes = load_data(str(tmp_path)).notes
    assert any("1 images stand in two classes" in note and "'blue' and 'red'" in note for note in notes)
    assert any("1 images to test on are to train on too" in note for note in notes)


def test_class_folders_that_are_links(tmp_path):
    make_classes(tmp_path / "real", 3)
    (tmp_path / "d" / "green").mkdir(parents=True)
    (tmp_path / "d" / "green" / "sub").symlink_to(tmp_path / "real" / "green")
    (tmp_path / "d" / "red").symlink_to(tmp_path / "real" / "red")
    (tmp_path / "real" / "red" / "loop").symlink_to(tmp_path / "real" / "red")
    data = load_data(str(tmp_path / "d"))
    assert (data.classes, len(data.train) + len(data.test)) == (("green", "red"), 6)
