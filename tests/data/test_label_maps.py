"""Pairs of images and label maps: what they say, and what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import make_image
from PIL import Image

from overlock.data.label_folders import pair_folders
from overlock.data.label_maps import LabelMaps
from overlock.data.label_values import IGNORED, LabelForm


@pytest.fixture
def folders(tmp_path):
    images, maps = tmp_path / "images", tmp_path / "maps"
    for name in ("a.jpg", "sub/b.png"):
        path, label = images / name, (maps / name).with_suffix(".png")
        for folder in (path.parent, label.parent):
            folder.mkdir(parents=True, exist_ok=True)
        make_image("red", 0).resize((6, 4)).save(path)
        save_map(label)
    return images, maps


def read_maps(images, maps, **form):
    return LabelMaps(pair_folders(images, maps), LabelForm(**form))


def save_map(path, values=None, mode="L"):
    values = np.arange(24).reshape(4, 6) % 4 if values is None else values
    Image.fromarray(values.astype(np.uint8)).convert(mode).save(path)


def test_labels_as_they_are_and_shifted(folders):
    images, maps = folders
    plain, shifted = (
        read_maps(images, maps, num_classes=4),
        read_maps(images, maps, num_classes=3, reduce_zero_label=True),
    )
    assert len(plain) == 2
    image, labels = plain.read(0)
    assert image.size == (6, 4)
    assert labels[0].tolist() == [0, 1, 2, 3, 0, 1]
    assert shifted.read(1)[1][0].tolist() == [IGNORED, 0, 1, 2, IGNORED, 0]


def test_ignored_labels(folders):
    images, maps = folders
    values = np.full((4, 6), 255)
    values[0] = 11
    save_map(maps / "a.png", values)
    with pytest.raises(ValueError, match=r"a.png: a label is 11, where classes go from 0 to 10 and 255 is ignored"):
        read_maps(images, maps, num_classes=11).read(0)
    labels = read_maps(images, maps, num_classes=256, ignore_index=11).read(0)[1]
    assert labels[0].tolist() == [IGNORED] * 6


def test_palettes_count_as_numbers(folders):
    """The number in the file, not the colour that it stands for."""
    images, maps = folders
    picture = Image.fromarray((np.arange(24).reshape(4, 6) % 3).astype(np.uint8), mode="P")
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.save(maps / "a.png")
    assert read_maps(images, maps, num_classes=3).read(0)[1][0].tolist() == [0, 1, 2, 0, 1, 2]


def spoil_colour(maps):
    make_image("red", 0).resize((6, 4)).convert("RGB").save(maps / "a.png")


def spoil_size(maps):
    save_map(maps / "a.png", np.zeros((5, 6)))


def spoil_file(maps):
    (maps / "a.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_colour, "one number a pixel, this is a picture in colours; name the classes' colours"),
        (spoil_size, "is of 5 x 6 pixels, its image of 4 x 6"),
        (spoil_file, "the label map cannot be read"),
    ],
)
def test_maps_that_cannot_be(folders, spoil, message):
    images, maps = folders
    spoil(maps)
    with pytest.raises(ValueError, match=message) as raised:
        read_maps(images, maps, num_classes=4).read(0)
    assert "a.png" in str(raised.value)


def test_absent_maps_and_folders(folders, tmp_path):
    images, maps = folders
    (maps / "sub" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 images in .* have no label map \(first: .*b.png\)"):
        read_maps(images, maps, num_classes=4)
    with pytest.raises(ValueError, match="no such folder of images"):
        read_maps(tmp_path / "absent", maps, num_classes=4)


def test_camvid(shared_data):
    data = read_maps(shared_data / "camvid" / "val", shared_data / "camvid" / "valannot", num_classes=11)
    assert len(data) == 101
    image, labels = data.read(0)
    assert labels.shape == (image.height, image.width)
    assert set(labels.unique().tolist()) <= {*range(11), IGNORED}
