"""Both of PyTorch's ONNX exporters, their graphs run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import timm
import torch
from helpers import images, randomise, relative_error, tiny
from timm.utils.onnx import onnx_export
from torch import nn

import overlock

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

TOLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""Whether PyTorch tells of the exporter that is built on torch.export."""
needs_told = pytest.mark.skipif(not TOLD, reason="needs PyTorch 2.8")
exporters = pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=needs_told)])


@contextlib.contextmanager
def quietly():
    """Without the exporters' reports and warnings of what a trace fixes."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def export(module: nn.Module, size: tuple[int, ...], file, *, dynamo: bool) -> None:
    with quietly():
        torch.onnx.export(module, (images(*size),), file, dynamo=dynamo, external_data=False)


def assert_same(file, module: nn.Module, *sizes: tuple[int, ...]) -> None:
    """ONNX Runtime gives what PyTorch gives."""
    session = runtime.InferenceSession(file)
    for size in sizes:
        x = images(*size, seed=1)
        with torch.no_grad():
            expected = module(x)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        actual = session.run([], {session.get_inputs()[0].name: x.numpy()})
        for ours, wanted in zip(actual, expected, strict=True):
            assert ours.shape == wanted.shape
            assert relative_error(torch.from_numpy(ours), wanted) < 1e-4


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=[needs_told, pytest.mark.slow])])
def test_as_timm_exports(dynamo, tmp_path):
    """timm's function, its model and its size of images; the batch stays free."""
    model = randomise(timm.create_model("overlock_atto", exportable=True, num_classes=10))
    with quietly():
        onnx_export(
            model, str(tmp_path / "model.onnx"), batch_size=2, check_forward=True, use_dynamo=dynamo
        )  # fmt: skip
    assert_same(tmp_path / "model.onnx", model, (2, 3, 224, 224), (3, 3, 224, 224))


@pytest.mark.slow
@needs_told
def test_dynamic_height_and_width(tmp_path):
    """One graph for all images whose maps are no smaller than the kernels."""
    model = randomise(tiny())
    with quietly():
        onnx_export(
            model, str(tmp_path / "model.onnx"), batch_size=2, input_size=(3, 256, 224), use_dynamo=True,
            dynamic_size=True,
        )  # fmt: skip
    assert_same(tmp_path / "model.onnx", model, (2, 3, 256, 224), (1, 3, 288, 353))


FORMS = {
    "fused": lambda: overlock.fuse(randomise(tiny())),
    "fused without kernels": lambda: overlock.fuse(randomise(tiny()), kernels=False),
    "output stride 16": lambda: randomise(tiny(output_stride=16)),
    "features": lambda: randomise(timm.create_model("overlock_atto", features_only=True, out_indices=(1, 2))),
}


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=[needs_told, pytest.mark.slow])])
@pytest.mark.parametrize("form", FORMS)
def test_other_forms(form, dynamo, tmp_path):
    """Maps larger than the kernels, and smaller ones, which are enlarged."""
    model = FORMS[form]()
    export(model, (1, 3, 160, 96), tmp_path / "model.onnx", dynamo=dynamo)
    assert_same(tmp_path / "model.onnx", model, (1, 3, 160, 96))


@exporters
@pytest.mark.parametrize("size", [(14, 9), (5, 9), (20, 41)], ids=str)
def test_contmix(size, dynamo, tmp_path):
    """Maps that no grid of regions divides evenly: regions overlap, and differ in size."""
    mix = randomise(overlock.ContMix(8, groups=2))
    export(mix, (2, 8, *size), tmp_path / "mix.onnx", dynamo=dynamo)
    assert_same(tmp_path / "mix.onnx", mix, (2, 8, *size))


@needs_told
def test_contmix_of_any_size(tmp_path):
    """One graph for all maps no smaller than the kernel."""
    mix = randomise(overlock.ContMix(8, groups=2))
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with quietly():
        torch.onnx.export(
            mix, (images(2, 8, 14, 9),), tmp_path / "mix.onnx", dynamo=True, dynamic_shapes=(any_size,),
            external_data=False,
        )  # fmt: skip
    assert_same(tmp_path / "mix.onnx", mix, (2, 8, 14, 9), (3, 8, 20, 41))


def test_other_exports_keep_the_operators():
    """torch.export does, outside of an export to ONNX."""
    program = torch.export.export(randomise(overlock.ContMix(8, groups=2)), (images(2, 8, 14, 9),), strict=False)
    assert {"overlock.contmix.default", "overlock.region_centres.default"} <= {
        str(n.target) for n in program.graph.nodes
    }
