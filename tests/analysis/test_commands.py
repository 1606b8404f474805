"""The commands that look into networks: what they print and write, and one sentence for a fault."""

from __future__ import annotations

import csv
import json

import pytest
from pictures import make_image
from PIL import Image

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
    assert [(block["stage"], block["block"]) for block in result["blocks"]] == [(3, 1), (3, 2), (3, 3), (4, 1)]
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
