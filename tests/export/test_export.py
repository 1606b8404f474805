"""Exported files by their own runtimes give what PyTorch gives."""

from __future__ import annotations

import pytest
import torch
from helpers import images, randomise, relative_error, tiny
from torch import nn

import overlock
from overlock.checkpoints import Record
from overlock.export import ExportedNetwork, Spec, export_network
from overlock.export.contmix import PlainContMix
from overlock.export.plain import plain_form

PACKAGES = dict(onnx=("onnxscript", "onnxruntime"), openvino=("openvino",), executorch=("executorch",))
RECORD = Record(
    model="overlock_atto",
    classes=tuple("abcde"),
    preprocessing=dict(
        input_size=(3, 224, 224), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=1.0
    ),
)


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
    assert relative_error(PlainContMix(mix)(x), mix(x)) < 1e-5


def test_a_plain_network_has_standard_operators_alone():
    program = torch.export.export(plain_form(randomise(tiny())), (images(1, 3, 224, 224),), strict=False)
    assert {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"} == {"aten"}


@pytest.mark.parametrize("form", ["onnx", "openvino", "torch-export"])
def test_one_file_for_batches_and_sizes(form, tmp_path):
    exported, report = export(tmp_path, format=form, dynamic=("batch", "size"))
    assert {one.shape for one in report.agreements} == {(1, 3, 224, 224), (1, 3, 288, 256), (3, 3, 261, 314)}
    assert exported.spec.record == RECORD
    assert exported.spec.smallest_image == 193
    with pytest.raises(ValueError, match="from 193 pixels on, got 160"):
        exported(images(1, 3, 160, 200))
