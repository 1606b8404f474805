"""Every kind of image file becomes the RGB that a person sees."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import make_classes, make_image
from PIL import Image

from overlock.data import find_images, read_image, to_rgb


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 100, 50, 255)
    pixels[0, 1] = (0, 0, 0, 51)  # a fifth black over white
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    got = values(read_image(tmp_path / "a.png"))
    assert got[0, 0].tolist() == [200, 100, 50]
    assert got[0, 1].tolist() == [204, 204, 204]
    assert got[1].tolist() == [[255, 255, 255]] * 2


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 250, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert values(read_image(tmp_path / "a.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_16_bits_keep_their_range(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert values(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_of_0_to_1(tmp_path):
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32), "F").save(tmp_path / "a.tif")
    assert values(read_image(tmp_path / "a.tif"))[0, :, 1].tolist() == [0, 51, 255]


def test_values_of_no_known_range(tmp_path):
    for number, most in enumerate((-5.0, 70000.0, np.nan)):
        Image.fromarray(np.array([[0.0, most]], np.float32), "F").save(tmp_path / f"{number}.tif")
        with pytest.raises(ValueError, match=rf"{number}\.tif: its values go from .* 0 to 65535 can be read; scale it"):
            read_image(tmp_path / f"{number}.tif")
    Image.fromarray(np.array([[0.0, 257.0, 65535.0]], np.float32), "F").save(tmp_path / "a.tif")
    assert values(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 1, 255]


def test_grey_with_transparency_and_other_colours():
    assert values(to_rgb(Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)]))).tolist() == [
        [[224, 224, 224]]
    ]
    for mode in ("YCbCr", "HSV", "RGBX"):
        assert values(to_rgb(Image.new("RGB", (1, 1), (200, 40, 30)).convert(mode)))[0, 0, 0] > 190


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = values(read_image(tmp_path / "a.jpg"))[4, 4]
    assert red > 240
    assert green < 20
    assert blue < 20


def test_turned_upright_by_exif(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "a.jpg")
    assert upright.size == (20, 40)
    assert values(upright)[10, 10, 0] > 240  # the left half is on top now
    assert values(upright)[30, 10, 0] < 20


def test_one_bit_and_grey():
    assert values(to_rgb(Image.new("1", (1, 1), 1))).tolist() == [[[255, 255, 255]]]
    assert values(to_rgb(Image.new("L", (1, 1), 7))).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("content", [b"", b"hello, this is a text"])
def test_names_the_file_that_is_no_image(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: not an image; replace or remove the file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_names_the_file_that_is_cut_short(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    make_image("red", 0, 64).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=rf"a\{suffix}: the image is damaged"):
        read_image(path)


def test_finds_images_below_folders_by_name(tmp_path):
    root = make_classes(tmp_path / "d", 2)
    (root / "notes.txt").write_text("no image")
    (root / "red" / "UPPER.JPG").write_bytes((root / "red" / "0.png").read_bytes())
    found = [str(p.relative_to(tmp_path)) for p in find_images([root, root / "red" / "1.png"])]
    assert found == [
        "d/blue/0.png", "d/blue/1.png", "d/green/0.png", "d/green/1.png", "d/red/0.png", "d/red/1.png",
        "d/red/UPPER.JPG", "d/red/1.png",
    ]  # fmt: skip


def test_missing_and_empty(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such image or folder"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no images in this folder"):
        find_images([tmp_path])
    with pytest.raises(ValueError, match="no such image"):
        read_image(tmp_path / "nowhere.png")
