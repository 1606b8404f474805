"""Evaluation counts what a network does."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import timm
import torch
from pictures import COLOURS, make_classes, make_image
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from overlock.checkpoints import Record
from overlock.cli import main
from overlock.data import load_test_data
from overlock.data.images import ImageData, Samples
from overlock.deploy import evaluate_classification as module
from overlock.deploy import models
from overlock.deploy.evaluate_classification import draw_confusion, evaluate_classifier, match_classes, write_per_class
from overlock.export import Spec, runtimes

PREPROCESSING = dict(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", crop_pct=1.0)


class ByColour(nn.Module):
    """Tells blue, green and red apart, and takes some greens for red."""

    num_classes = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, green, blue = x.mean(dim=(2, 3)).unbind(1)
        return torch.stack([red, blue, green - 0.2 * (red > 0.15), -torch.ones_like(red)], dim=1)


@pytest.fixture
def by_colour(monkeypatch):
    """The network as if loaded, with its classes in an order of its own, and one more."""
    record = Record(model="by_colour", classes=("red", "blue", "green", "grey"), preprocessing=PREPROCESSING)
    monkeypatch.setattr(module, "load_network", lambda source, model=None: (ByColour(), record))


def test_counts(by_colour, tmp_path):
    root = make_classes(tmp_path / "data", 6)
    (root / "red" / "0.png").write_bytes(b"")
    result = evaluate_classifier("it", load_test_data(str(root)), batch_size=4, workers=0, device="cpu")
    assert result.images == 17
    assert len(result.unreadable) == 1
    assert result.confusion.sum() == 17
    assert result.confusion[:, 3].sum() == 0
    assert result.top1 == pytest.approx(np.diagonal(result.confusion).sum() / 17)
    assert result.confusion[0].tolist() == [6, 0, 0, 0]
    assert result.confusion[2].tolist() == [0, 0, 5, 0]
    assert result.top5 == 1.0
    assert result.speed > 0
    assert result.recalls()[0] == 1
    write_per_class(result, tmp_path / "classes.csv")
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [(row["class"], row["images"]) for row in rows] == [("blue", "6"), ("green", "6"), ("red", "5")]
    draw_confusion(result, tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").width > 200


def test_no_readable_image(by_colour, tmp_path):
    (tmp_path / "a.png").write_text("nothing")
    data = ImageData(classes=tuple(COLOURS), train=Samples(), test=Samples([(tmp_path / "a.png", 0)]))
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        evaluate_classifier("it", data, workers=0)


def test_other_tasks_are_refused(monkeypatch, tmp_path):
    record = Record(model="overlock_atto", head="upernet", classes=("a",))
    monkeypatch.setattr(module, "load_network", lambda source, model=None: (ByColour(), record))
    with pytest.raises(ValueError, match="it: this is a upernet on overlock_atto, of the task segment"):
        evaluate_classifier("it", load_test_data(str(make_classes(tmp_path / "data", 2))))


def test_classes_are_matched():
    synsets = ImageNetInfo().label_names()
    thousand = tuple(map(str, range(1000)))
    assert match_classes(("b", "a", "c"), ("a", "b")) == [1, 0]
    assert match_classes(thousand, (synsets[7], synsets[3])) == [7, 3]
    assert match_classes(("0", "1"), ("cat", "dog")) == [0, 1]
    with pytest.raises(ValueError, match="the data's class 'dog' is none of the model's 2 classes"):
        match_classes(("cat", "cow"), ("cat", "dog"))


def test_any_model_of_timm(tmp_path, monkeypatch):
    """As if its published weights were fetched."""
    monkeypatch.setattr(models, "build", lambda name, pretrained: timm.create_model(name))
    synsets = ImageNetInfo().label_names()
    for name in synsets[:2]:
        (tmp_path / name).mkdir()
        make_image("red", 0).save(tmp_path / name / "0.png")
    result = evaluate_classifier(
        "test_convnext", load_test_data(str(tmp_path)), workers=0, device="cpu", precision="bf16"
    )
    assert result.images == 2
    assert result.params == sum(p.numel() for p in timm.create_model("test_convnext").parameters())


@pytest.mark.slow
def test_the_weights_of_the_package(default_file, shared_data):
    """What docs/results.md says of them."""
    result = evaluate_classifier(
        str(default_file), load_test_data(str(shared_data / "cifar10")), workers=0, device="cpu"
    )
    assert result.images == 10_000
    assert result.top1 >= 0.88


def test_an_exported_file_is_opened_once(tmp_path, monkeypatch, capsys):
    record = Record(model="overlock_xt", classes=("red", "blue", "green", "grey"), preprocessing=PREPROCESSING)
    spec = Spec(record=record, format="onnx", task="classify", image_size=(8, 8), dynamic=("batch",))
    opened = []

    def open_by_colour(path, threads):
        opened.append(path)
        return spec.to_json(), lambda images: [ByColour()(images)]

    monkeypatch.setitem(runtimes.OPENERS, "onnx", open_by_colour)
    file, root = tmp_path / "by_colour.onnx", make_classes(tmp_path / "data", 2)
    file.touch()
    assert main(["evaluate", str(file), "--data", str(root), "--workers", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == str(file)
    assert opened == [file]
