"""The commands that look into networks: what they print and write, and one sentence for a fault."""

from __future__ import annotations

import csv
import json

import pytest
from pictures import make_image
from PIL import Image

pytest.importorskip("jsonargparse")  # a machine with a GPU may lack it
from overlock.cli import main


@pytest.fixture
def photos(tmp_path):
    """Two images of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    make_image("red", 0, 48).save(folder / "a.png")
    make_image("blue", 1, 64).resize((64, 40)).save(folder / "b.png")
    return folder


def succeeds(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert err.strip() == ""
    return out


def fails(capsys, *arguments: object) -> str:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_kernels(photos, tmp_path, capsys):
    table, picture = tmp_path / "changes.csv", tmp_path / "kernels.png"
    out = succeeds(capsys, "kernels", photos, "--at", 40, 20, "--save", table, "--save", picture, "--json")
    result = json.loads(out)
    assert [(block["stage"], block["block"]) for block in result["blocks"]] == [(3, 1), (3, 2), (3, 3), (4, 1)] * 4
    assert [block["prior"] for block in result["blocks"][::4]] == ["own", "zeros", "uniform", "other image's"]
    own, *others = ([block["affinity"] for block in result["blocks"][i : i + 4]] for i in range(0, 16, 4))
    assert all(other != own for other in others)
    assert result["blocks"][0]["position"] == [3, 7]  # of the map of 8 x 8, enlarged to 9 x 9; the image is 48 x 48
    for block in result["blocks"]:
        assert [len(kernel) for kernel in block["affinity"]] == [7] * len(block["affinity"])
        for kernels in block["kernels"]:
            assert all(sum(map(sum, taps)) == pytest.approx(1, abs=1e-4) for taps in kernels)
    rows = list(csv.DictReader(table.open()))
    assert {row["prior"] for row in rows} == {"zeros", "uniform", "other image's"}
    assert len(rows) == 3 * (4 * 2 + 2)
    assert all(float(row["mean"]) > 0 for row in rows if row["measure"] != "same_class")
    with Image.open(picture) as drawn:
        assert drawn.width > 1000
    assert "pass --overwrite" in fails(capsys, "kernels", photos, "--save", picture)


def test_kernels_of_one_image(photos, capsys):
    result = json.loads(succeeds(capsys, "kernels", photos / "b.png", "--json"))
    assert [block["prior"] for block in result["blocks"][::4]] == ["own", "zeros", "uniform"]
    assert {row["prior"] for row in result["changes"]} == {"zeros", "uniform"}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(photos, capsys, default_file, precision):
    where = ("--device", "cuda", "--precision", precision, "--json")
    succeeds(capsys, "kernels", photos, *where)
    for field in json.loads(succeeds(capsys, "erf", default_file, "--images", photos, "--sizes", 64, *where)):
        assert 0 < field["50 %"] < 128
    pytest.importorskip("pytorch_grad_cam")
    assert len(json.loads(succeeds(capsys, "cam", photos, "--curves", *where))) == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--at", 48, 5), "lies outside"),
        (("--checkpoint", "resnet18.pth"), "resnet18.pth"),
        (("--image_size", 0), "at least 1, got 0"),
        (("--save", "kernels.txt"), "end the name so"),
        (("--device", "abacus"), "cpu always can"),
    ],
)
def test_faults_of_kernels(photos, capsys, words, told):
    assert told in fails(capsys, "kernels", photos, *words)


def test_erf(photos, tmp_path, capsys, default_file):
    table, picture = tmp_path / "fields.csv", tmp_path / "fields.png"
    words = ("erf", default_file, "--images", photos, "--sizes", 32, 48, "--weights", "both")
    out = succeeds(capsys, *words, "--save", table, "--save", picture, "--json")
    fields = json.loads(out)
    assert [(one["stage"], one["size"]) for one in fields] == [(3, 32), (4, 32), (3, 48), (4, 48)] * 2
    assert sum("untrained" in one["network"] for one in fields) == 4
    for one, row in zip(fields, csv.DictReader(table.open()), strict=True):
        assert one["curve"][0] == 0
        assert one["curve"][-1] == pytest.approx(1)
        assert 0 < one["20 %"] < one["50 %"] < one["99 %"]
        assert float(row["50 %"]) == pytest.approx(one["50 %"], rel=1e-4)
        assert one["± 50 %"] > 0
    with Image.open(picture) as drawn:
        assert drawn.width > 1000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("resnet10", "--weights", "untrained"), "unknown model 'resnet10'"),
        (("vit_tiny_patch16_224", "--weights", "untrained", "--sizes", 64), "does not take images of 64 x 64"),
        (("overlock_atto", "--weights", "untrained", "--stages", 5, "--sizes", 32), "stages are 1 to 4, got 5"),
        (("overlock_atto", "--weights", "untrained", "--sizes", 16), "at least 32 x 32"),
        (("overlock_atto", "--count", 0), "--count must be at least 1"),
    ],
)
def test_faults_of_erf(photos, capsys, words, told):
    assert told in fails(capsys, "erf", *words, "--images", photos)


def test_cam(photos, tmp_path, capsys):
    pytest.importorskip("pytorch_grad_cam")
    boxes, table, picture = (tmp_path / name for name in ("boxes.json", "maps.csv", "maps.jpg"))
    content = dict(
        images=[dict(id=1, file_name="a.png"), dict(id=2, file_name="b.png")], categories=[dict(id=1, name="thing")],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 24, 48])],
    )  # fmt: skip
    boxes.write_text(json.dumps(content))
    words = ("cam", photos, "--boxes", boxes, "--curves", "--target", "cat", "--save", table, "--save", picture)
    rows = json.loads(succeeds(capsys, *words, "--json"))
    assert [row["layer"] for row in rows] == ["overview", "stage3", "stage4"] * 2
    for row in rows[:3]:
        assert row["area_of_boxes"] == pytest.approx(0.5)
        assert 0 <= row["energy_in_boxes"] <= 1
    assert all(row["energy_in_boxes"] is None for row in rows[3:])
    assert all(0 <= row[name] <= 1 for row in rows for name in ("insertion", "deletion"))
    assert {row["target"] for row in rows} == {"cat"}
    assert len(list(csv.DictReader(table.open()))) == 6
    with Image.open(picture) as drawn:
        assert drawn.width > 4 * 224
    assert "means of 2 images" in succeeds(capsys, "cam", photos, "--layers", "stage4", "--precision", "bf16")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--layers", "stage5"), "got 'stage5'"),
        (("--target", "zebra"), "has no such class; it has airplane"),
        (("--method", "magic"), "got 'magic'"),
    ],
)
def test_faults_of_cam(photos, capsys, words, told):
    assert told in fails(capsys, "cam", photos, *words)
