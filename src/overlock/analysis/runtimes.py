"""A network in each runtime that is installed: eager, fused, compiled, ONNX Runtime, OpenVINO.

All compute in float32, with as many threads as PyTorch. Networks are in the form that they are deployed in: branches
merged, channels last. ONNX Runtime and OpenVINO read one ONNX file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import timm.utils
import torch
from torch import Tensor, nn

from overlock.checkpoints.record import build
from overlock.fused.fuse import fuse

PREFIX = "overlock_"
TINY = 1e-3
Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Forms:
    """A network in the forms that the runtimes take."""

    plain: nn.Module
    """As it is built."""
    merged: nn.Module
    """Its branches merged, of plain PyTorch layers."""
    fused: nn.Module | None
    """By :func:`overlock.fuse`; None for networks that are not ours."""


class Runtime(NamedTuple):
    """How a network is run."""

    prepare: Callable[[Forms, Tensor, Path], Call]
    """Given its forms, images (B, 3, H, W), and a folder for files: the call that gives logits (B, classes)."""
    packages: tuple[str, ...] = ()
    """That it needs."""
    ours_only: bool = False
    cpu_only: bool = False

    def why_not(self, model: str, device: torch.device) -> str | None:
        """Why it cannot run a model; None where it can be tried."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.ours_only and not model.startswith(PREFIX):
            return "for OverLoCK alone"
        return "runs on CPU alone here" if self.cpu_only and device.type != "cpu" else None


def make_forms(model: str, device: torch.device) -> Forms:
    """A model of timm's with random weights, always the same.

    Layer scales start so near to zero that blocks would not count in a comparison of logits; they are set to 0.1.

    Raises:
        ValueError: for an unknown model.
    """
    torch.manual_seed(0)
    network = build(model).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.abs().max() < TINY and (parameter == parameter.flatten()[0]).all() and parameter.any():
            parameter.fill_(0.1)
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if model.startswith(PREFIX):
        return Forms(plain=network, merged=fuse(network, kernels=False), fused=fuse(network))
    return Forms(plain=network, merged=timm.utils.reparameterize_model(network), fused=None)


def _eager(forms: Forms, images: Tensor, _: Path) -> Call:
    return _inference(forms.merged, images)


def _fused(forms: Forms, images: Tensor, _: Path) -> Call:
    assert forms.fused is not None
    return _inference(forms.fused, images)


def _compiled(forms: Forms, images: Tensor, _: Path) -> Call:
    """In one graph; of ours the fused form, as elsewhere."""
    return _inference(torch.compile(forms.fused or forms.merged, fullgraph=True), images)


def _inference(module: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    images = images.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        with torch.inference_mode():
            return module(images)

    return call


def _onnxruntime(forms: Forms, images: Tensor, folder: Path) -> Call:
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    file = _export(forms.merged, images, folder)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(forms: Forms, images: Tensor, folder: Path) -> Call:
    import openvino  # noqa: PLC0415

    settings = dict(
        PERFORMANCE_HINT="LATENCY", INFERENCE_PRECISION_HINT="f32", INFERENCE_NUM_THREADS=torch.get_num_threads()
    )  # fmt: skip
    compiled = openvino.Core().compile_model(str(_export(forms.merged, images, folder)), "CPU", settings)
    array = images.numpy()
    return lambda: torch.from_numpy(compiled(array)[0])


def _export(network: nn.Module, images: Tensor, folder: Path) -> Path:
    """The network as an ONNX file, written once, and whole or not at all."""
    file, partial = folder / "network.onnx", folder / "partial.onnx"
    if not file.exists():
        torch.onnx.export(copy.deepcopy(network), (images,), str(partial), dynamo=True, external_data=False)
        partial.replace(file)
    return file


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters and compilers say to programmers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


RUNTIMES = {
    "eager": Runtime(_eager),
    "fused": Runtime(_fused, ours_only=True),
    "compile": Runtime(_compiled),
    "onnxruntime": Runtime(_onnxruntime, ("onnx", "onnxscript", "onnxruntime"), cpu_only=True),
    "openvino": Runtime(_openvino, ("onnx", "onnxscript", "openvino"), cpu_only=True),
}
