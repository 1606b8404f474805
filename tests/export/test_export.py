"""Exported files by their own runtimes give what PyTorch gives."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from helpers import FEWEST, images, randomise, relative_error, tiny
from pictures import make_classes
from torch import nn
from torch.nn import functional as F

import overlock
from overlock.checkpoints import Record
from overlock.cli import main
from overlock.deploy.classify import DEFAULT_FILE
from overlock.export import ExportedNetwork, Spec, export_network
from overlock.export.contmix import Places, PlainContMix
from overlock.export.parity import PHOTO
from overlock.export.plain import plain_form
from overlock.export.quantise import find_products
from overlock.export.runtimes import OPENERS
from overlock.segmentation import upernet

PACKAGES = dict(onnx=("onnxscript", "onnxruntime"), openvino=("openvino",), executorch=("executorch",))
RECORD = Record(
    model="overlock_atto",
    classes=tuple("abcde"),
    preprocessing=dict(
        input_size=(3, 224, 224), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=1.0
    ),
)
DETECTING = Record(
    model="overlock_atto", head="mask_rcnn", classes=("cat", "dog"),
    model_args=dict(min_size=224, max_size=384, proposals=30, hidden_channels=8, **FEWEST),
)  # fmt: skip


def make_spec(**settings) -> Spec:
    return Spec(**{"record": RECORD, "format": "openvino", "task": "classify", "image_size": (224, 224), **settings})


def export(tmp_path, network: nn.Module | None = None, **settings):
    """The file of a tiny network, and what its export reported."""
    spec = make_spec(**settings)
    for package in PACKAGES.get(spec.format, ()):
        pytest.importorskip(package)
    path = tmp_path / f"model{spec.file_ending}"
    report = export_network(network or randomise(tiny()), spec, path, timed=False)
    return ExportedNetwork(path), report


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (9, 8), (12, 17), (5, 6)], ids=str)
def test_contmix_in_every_form(size):
    """By windows, by rows, and on enlarged maps."""
    mix = overlock.fuse(randomise(overlock.ContMix(8, groups=2, kernel_size=7)), kernels=False)
    x = images(2, 8, *size)
    assert relative_error(PlainContMix(mix, Places())(x), mix(x)) < 1e-5


def test_a_plain_network_has_standard_operators_alone():
    program = torch.export.export(plain_form(randomise(tiny())), (images(1, 3, 224, 224),), strict=False)
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {target.namespace for target in targets} == {"aten"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino", "torch-export"])
def test_one_file_for_batches_and_sizes(form, tmp_path):
    exported, report = export(tmp_path, format=form, dynamic=("batch", "size"))
    assert {one.shape for one in report.agreements} == {(1, 3, 224, 224), (1, 3, 288, 256), (3, 3, 261, 314)}
    assert exported.spec.record == RECORD
    assert exported.spec.smallest_image == 193
    with pytest.raises(ValueError, match="from 193 pixels on, got 160"):
        exported(images(1, 3, 160, 200))


class Pools(nn.Module):
    """Pooled over regions that change with the map, and over all of it, as heads of segmenters do."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d((6, None))

    def forward(self, x):
        x = self.conv(x)
        pools = [F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (2, 3)), self.pool(x).mean(dim=3)]
        return torch.cat([y.flatten(1) for y in pools], dim=1)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_pools_of_any_size(form, tmp_path):
    """The exporter to ONNX would keep the regions of the size that it traces."""
    _, report = export(tmp_path, Pools(), format=form, image_size=(32, 48), dynamic=("batch", "size"))
    assert [one.shape[2:] for one in report.agreements] == [(32, 48), (96, 80), (69, 138)]


@pytest.mark.parametrize("form", ["aoti", "executorch"])
@pytest.mark.slow
def test_one_size(form, tmp_path):
    exported, report = export(tmp_path, format=form, task="features")
    assert {one.output for one in report.agreements} == {0, 1, 2, 3}
    assert len(exported(images(2, 3, 224, 224))) == 4


@pytest.mark.parametrize("form", ["onnx", "openvino", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_pixels_and_features_of_one_size(form, tmp_path):
    """Images that are smaller than the kernels, in a batch that the file does not have."""
    network = randomise(tiny())
    exported, _ = export(
        tmp_path, network, format=form, task="features", image_size=(64, 96), with_preprocessing=True
    )  # fmt: skip
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(RECORD.preprocessing[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    expected = network.forward_intermediates((pixels / 255 - mean) / std, intermediates_only=True)
    for ours, wanted in zip(exported(pixels), expected, strict=True):
        assert relative_error(ours, wanted.detach()) < 1e-4
    with pytest.raises(ValueError, match="64 x 96 pixels, got 96 x 64; export it with --dynamic size"):
        exported(pixels.transpose(2, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(task="detect"), "with --task classify or features, not detect"),
        (dict(task="detect", record=DETECTING, dynamic=("batch",)), "leave batch out of --dynamic"),
        (dict(task="detect", record=DETECTING, format="aoti"), "takes --format onnx, openvino, torch-export, not aoti"),
        (dict(task="detect", record=DETECTING, precision="fp16"), "takes --precision fp32, not fp16"),
        (dict(task="segment"), "with --task classify or features, not segment"),
        (dict(format="onnx", precision="bf16"), "--format onnx takes --precision fp32 or int8, not bf16"),
        (dict(format="executorch", dynamic=("size",)), "leave size out of --dynamic"),
        (dict(dynamic=("size",), smallest_image=300), "images from 300 pixels on"),
    ],
)
def test_refused_in_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**settings)


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr("overlock.export.parity.TOLERANCES", dict(fp32=0.0))
    with pytest.raises(ValueError, match="differs from PyTorch by"):
        export(tmp_path, Pools(), image_size=(32, 48))
    assert not list(tmp_path.iterdir())


def test_foreign_files(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "foreign.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"foreign.onnx: not a file of overlock export"):
        ExportedNetwork(tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"missing.onnx: no such exported file"):
        ExportedNetwork(tmp_path / "missing.onnx")


def test_wrong_commands(capsys):
    assert main(["export", "default", "--format", "onnx", "--dynamic", "batch,depth"]) == 2
    assert "--dynamic must be batch, size or batch,size, got 'depth'" in " ".join(capsys.readouterr().err.split())
    assert main(["benchmark", "default", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_commands(tmp_path, capsys, monkeypatch):
    """A file is exported, predicts as its checkpoint does, and is timed beside it."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("OVERLOCK_BACKEND", "torch")  # without compiling kernels
    file, photo = tmp_path / "model.xml", str(PHOTO)
    assert main(["export", "default", "--format", "openvino", "--output", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreements"][0]["difference"] < 1e-4
    shown = []
    for checkpoint in (str(DEFAULT_FILE), str(file)):
        assert main(["predict", photo, "--checkpoint", checkpoint, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out)[0])
    assert shown[0]["labels"] == shown[1]["labels"]
    table, opened = tmp_path / "speed.csv", []
    opener = OPENERS["openvino"]
    monkeypatch.setitem(OPENERS, "openvino", lambda *words: opened.append(words) or opener(*words))
    data = make_classes(tmp_path / "data" / "val", 2, colours=("red", "green")).parent
    for colour, name in (("red", "airplane"), ("green", "frog")):
        (data / "val" / colour).rename(data / "val" / name)
    words = ("--rounds", "2", "--data", str(data), "--save", str(table))
    assert main(["benchmark", str(file), "default", *words]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [row["runtime"] for row in rows] == ["openvino", "pytorch"]
    assert rows[0]["top1"] == rows[1]["top1"] != ""
    assert len(opened) == 1  # for both the timing and the accuracy


@pytest.mark.slow
def test_by_onnx_runtime_alone(tmp_path, capsys, monkeypatch):
    """The lines in docs/export.md give the class that the command gives."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("OVERLOCK_BACKEND", "torch")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (command,) = re.findall(r"`overlock (export default .* --with_preprocessing .*)`", text)
    (code,) = re.findall(r"^```python\n(import json.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert main(command.split()) == 0
    copyfile(PHOTO, "cat.jpg")
    names: dict[str, Any] = {}
    exec(compile(code, "export.md", "exec"), names)
    capsys.readouterr()
    assert main(["predict", "cat.jpg", "--json"]) == 0  # by the same network
    assert names["label"] == json.loads(capsys.readouterr().out)[0]["labels"][0]


@pytest.mark.slow
def test_int8_covers_the_dense_products(tmp_path):
    """All convolutions of all channels but those kept; in so small a network the others are a third."""
    pytest.importorskip("nncf")
    spec = make_spec(precision="int8")
    report = export_network(randomise(tiny()), spec, tmp_path / "model.xml", photos=[PHOTO] * 6, timed=False)
    products = find_products(tmp_path / "model.xml", spec)
    dense = [one for one in products if one.is_dense]
    in_float = [one for one in dense[1 if "first" in report.kept_in_float else 0 :] if not one.is_int8]
    assert sum(one.macs for one in in_float) < 0.01 * sum(one.macs for one in dense)
    assert report.int8_share > 0.5
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    with pytest.raises(ValueError, match="more than 4 images to calibrate on, got 1"):
        export_network(randomise(tiny()), spec, tmp_path / "other.xml", timed=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "size", "dynamic"),
    [("openvino", (96, 128), ()), ("onnx", (224, 224), ("batch", "size")), ("openvino", (224, 224), ("size",))],
)
def test_segmenter(form, size, dynamic, tmp_path):
    """The logits of all pixels."""
    pytest.importorskip("transformers")
    record = dataclasses.replace(RECORD, head="upernet", preprocessing=dict(scale=(128, 96)))
    network = randomise(upernet("overlock_atto", num_classes=5, hidden_channels=16, **FEWEST).eval())
    exported, _ = export(
        tmp_path, network, format=form, record=record, task="segment", image_size=size, dynamic=dynamic
    )  # fmt: skip
    assert exported(images(1, 3, *size)).shape == (1, 5, *size)
