"""Objects of every form are written in COCO's, and read from there as they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
from object_files import WRITERS
from pictures import make_classes
from PIL import ExifTags, Image
from scenes import write_scenes
from test_formats import assert_same

from overlock.cli import main
from overlock.data.detection import load_detection
from overlock.object_files import ObjectFiles


def load(root, **options):
    files = ObjectFiles(data=str(root))
    return load_detection(files, files, **options)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "in", train=4, val=2)


def packed(capsys, *arguments) -> str:
    assert main(["pack", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("form", WRITERS)
def test_every_form(form, scenes, tmp_path, capsys):
    polygons = form in ("yolo", "labelme")
    written = WRITERS[form](scenes, tmp_path / form, **(dict(polygons=True) if polygons else {}))
    out = packed(capsys, written, tmp_path / "out")
    data = load(tmp_path / "out", masks=polygons)
    assert_same(data, load(scenes, masks=polygons), within=1e-3)
    assert "instances_train.json: 4 images" in out
    assert data.train.annotations.path == tmp_path / "out/annotations/instances_train.json"
    assert (tmp_path / "out/val").is_dir()


def test_all_that_coco_has(scenes, tmp_path, capsys):
    """Crowds, run lengths, ids of text, images stored sideways; what is left out is told; the same is held out."""
    root = tmp_path / "in"
    (root / "images/more").mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, options in (("a.jpg", {}), ("more/a.jpg", dict(exif=exif)), ("b.png", {})):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "images" / name, **options)
    lengths = dict(size=[20, 30], counts=[100, 5, 495])
    given = dict(
        images=[
            dict(id="one", file_name="a.jpg", width=30, height=20),
            dict(id="two", file_name="more/a.jpg", width=30, height=20),
            dict(id=3, file_name="b.png"),
        ],
        categories=[dict(id=5, name="x"), dict(id=2, name="ÿ")],
        annotations=[
            dict(id=1, image_id="two", category_id=5, bbox=[1, 2, 8, 4.5], area=30),
            dict(id=2, image_id="one", category_id=2, bbox=[5, 0, 1, 5], iscrowd=1, segmentation=lengths),
            dict(id=3, image_id=3, category_id=2, bbox=[5, 0, 0, 5]),
            dict(id=4, image_id=3, category_id=2, bbox=[5, 1, 3, 5]),
        ],
    )
    (root / "result.json").write_text(json.dumps(given))
    out = packed(capsys, root, tmp_path / "out")
    assert "1 of 4 objects left out: their boxes have no area" in out
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir()) == ["b.png", "images_a.jpg", "more_a.jpg"]
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert [one["id"] for one in content["images"]] == ["one", "two", 3]
    assert content["categories"] == [dict(id=2, name="ÿ"), dict(id=5, name="x")]
    assert [one.get("segmentation") for one in content["annotations"]] == [lengths, None, None]
    assert [one["iscrowd"] for one in content["annotations"]] == [1, 0, 0]
    before, after = load(root), load(tmp_path / "out")
    assert after.test.image_ids == before.test.image_ids
    for part, other in ((after.train, before.train), (after.test, before.test)):
        for i in range(len(other)):
            (_, found), (_, wanted) = part.read(i), other.read(i)
            assert all(np.array_equal(found[name], value) for name, value in wanted.items())


def test_what_cannot_be_packed(scenes, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert main(["pack", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "--seed is for images by class; " in refused(scenes, tmp_path / "out", "--seed", 1)
    assert "reads the files of this folder" in refused(scenes, scenes, "--overwrite")
    assert not (tmp_path / "out").exists()
    packed(capsys, scenes, tmp_path / "out")
    assert "not empty" in refused(scenes, tmp_path / "out")
    packed(capsys, scenes, tmp_path / "out", "--overwrite")
    assert "no annotations found" in refused(tmp_path / "out/train", tmp_path / "more", "--format", "voc")
    make_classes(tmp_path / "classes", 3)
    (tmp_path / "classes/red/notes.doc").write_text("no image")
    assert "no image that can be read" in packed(capsys, tmp_path / "classes", tmp_path / "shards")
