"""docs/tutorial.md walked by its text alone: its commands in their order, on small data of the kinds that it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import randomise
from object_files import write_yolo
from pictures import make_classes, make_image
from PIL import Image
from scenes import make_scene, write_scenes

from overlock.checkpoints import MODEL_FILE, Record, save_model
from overlock.cli import main

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "tutorial.md").read_text()
CHAPTERS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE))
SHORT = ["--epochs", "1", "--batch_size", "2", "--runtime.workers", "0", "--model", "overlock_atto"]
"""What trainings are given besides, so that they take seconds; and of each task the size of its images."""
SIZES = {
    "small": ["--image_size", "64"],
    "small_detect": ["--min_size", "64", "--max_size", "64"],
    "small_segment": ["--scale", "[64,64]", "--crop", "64"],
}


def photos(desk: Path) -> None:
    make_classes(desk / "photos", 6)
    (desk / "photos" / "blue").rename(desk / "photos" / "cat")
    (desk / "photos" / "red").rename(desk / "photos" / "dog")
    (desk / "new_photos").mkdir()
    make_image("red", 9).save(desk / "new_photos" / "1.jpg")


def cells(desk: Path) -> None:
    write_yolo(write_scenes(desk / "coco", train=4, val=2), desk / "cells")
    (desk / "new_cells").mkdir()
    make_scene(9)[0].save(desk / "new_cells" / "1.jpg")


def leaves(desk: Path) -> None:
    for folder in ("images", "masks"):
        (desk / "leaves" / folder).mkdir(parents=True)
    for i in range(10):
        image, labels, _ = make_scene(i)
        image.save(desk / "leaves" / "images" / f"{i}.jpg")
        Image.fromarray(np.where(labels > 0, 255, 0).astype(np.uint8)).save(desk / "leaves" / "masks" / f"{i}.png")
    (desk / "leaves" / "classes.txt").write_text("background\nleaf\n")
    (desk / "new_leaves").mkdir()
    make_scene(11)[0].save(desk / "new_leaves" / "1.jpg")


def a_trained_classifier(desk: Path) -> None:
    photos(desk)
    sizes = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    record = Record(
        model="overlock_atto", model_args={"num_classes": 3}, classes=("cat", "dog", "green"), preprocessing=sizes
    )
    save_model(desk / "runs" / "photos" / MODEL_FILE, randomise(record.make_network()).state_dict(), record)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("chapter", "lay_out", "left"),
    [
        ("A classifier of your folders", photos, ["new_photos.csv", "new_photos.png", "report"]),
        ("A detector from YOLO data", cells, ["found/objects.json"]),
        ("A segmenter from binary masks", leaves, ["masks"]),
        ("An int8 file", a_trained_classifier, ["photos_int8.onnx", "int8.csv"]),
    ],
)
def test_walk(chapter, lay_out, left, tmp_path, monkeypatch, capsys):
    for module in ("lightning", "pycocotools", "transformers", "onnxruntime"):
        pytest.importorskip(module)
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^overlock .+$", CHAPTERS[chapter], flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)[1:]
        if "--pretrained" in words:  # downloads weights
            continue
        words += [*SHORT, *SIZES[words[1]]] if words[0] == "train" else []
        words += ["--workers", "0"] if words[0] == "evaluate" else []
        code = main(words)
        assert code == 0, f"{line}: {capsys.readouterr().err}"
    assert all((tmp_path / "runs" / name).exists() for name in left)
