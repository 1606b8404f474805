"""What the page takes as a photo, and what a link may say."""

from __future__ import annotations

import pytest
from pictures import make_image
from PIL import Image

pytest.importorskip("gradio")

from overlock.cli import main
from overlock.demo.uploads import SIDE, read_photo
from overlock.demo.visit import OWN, ZEROS, View

PHOTOS = ("cat.jpg", "dog & bird.jpg")


def test_photos_are_bounded(tmp_path):
    Image.new("RGB", (3000, 1500)).save(tmp_path / "wide.jpg")
    assert read_photo(tmp_path / "wide.jpg", max_pixels=4_500_000).image.size == (SIDE, SIDE // 2)
    with pytest.raises(ValueError, match=r"wide.jpg has 3000 x 1500 pixels, more than the 4 million"):
        read_photo(tmp_path / "wide.jpg", max_pixels=4_000_000)


def test_damaged_files(tmp_path):
    make_image("red", 0, size=200).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"^cut.jpg: the image is damaged"):
        read_photo(tmp_path / "cut.jpg", max_pixels=10**6)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"^empty.jpg is no image"):
        read_photo(tmp_path / "empty.jpg", max_pixels=10**6)


@pytest.mark.parametrize(
    "view",
    [
        View(photo="cat.jpg"),
        View(photo="dog & bird.jpg", point=(0.0, 1.0), block=3, prior="cat.jpg"),
        View(photo="cat.jpg", point=(0.25, 0.755), prior=ZEROS),
    ],
)
def test_links_hold_a_view(view):
    from urllib.parse import parse_qsl

    assert View.of_query(dict(parse_qsl(view.as_query()[1:])), PHOTOS) == view


def test_links_that_mean_nothing():
    query = dict(photo="../etc/passwd", x="nan", y="-7", block="-1", prior="nobody")
    assert View.of_query(query, PHOTOS) == View(photo="cat.jpg", point=(0.5, 0.0), block=0, prior=OWN)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--port 0", "--port must be at least 1"),
        ("--checkpoint none.safetensors", "none.safetensors"),
        ("--photos nowhere", "nowhere: no such image or folder"),
    ],
)
def test_command(line, told, capsys):
    assert main(["demo", *line.split()]) == 2
    assert told in capsys.readouterr().err
