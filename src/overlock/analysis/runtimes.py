"""A network in each runtime that is installed: eager, fused, compiled, ONNX Runtime, OpenVINO.

All compute in float32, with as many threads as PyTorch. Networks are in the form that they are deployed in: branches
merged, channels last. ONNX Runtime and OpenVINO run the files of :mod:`overlock.export`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import timm.utils
import torch
from torch import Tensor, nn

from overlock.checkpoints import Record, build, default_classes, default_preprocessing
from overlock.export import ExportedNetwork, Spec, export_network
from overlock.export.spec import ENDINGS, Format
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
    record: Record


Prepare = Callable[[Forms, Tensor, Path], Call]


class Runtime(NamedTuple):
    """How a network is run."""

    prepare: Prepare
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
    network: Any = build(model).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.abs().max() < TINY and (parameter == parameter.flatten()[0]).all() and parameter.any():
            parameter.fill_(0.1)
    network = network.to(device).to(memory_format=torch.channels_last)
    preprocessing = default_preprocessing(network, in_chans=3)
    record = Record(model=model, classes=default_classes(network.num_classes), preprocessing=preprocessing)
    if model.startswith(PREFIX):
        merged, fused = fuse(network, kernels=False), fuse(network)
        return Forms(plain=network, merged=merged, fused=fused, record=record)
    return Forms(plain=network, merged=timm.utils.reparameterize_model(network), fused=None, record=record)


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


def _exported(kind: Format) -> Prepare:
    """By ``overlock export``, which merges ours itself; the file is written once."""

    def prepare(forms: Forms, images: Tensor, folder: Path) -> Call:
        path = folder / f"network{ENDINGS[kind]}"
        if not path.exists():
            height, width = images.shape[2:]
            spec = Spec(
                record=forms.record, format=kind, task="classify", image_size=(height, width),
                dynamic=("batch",) if len(images) > 1 else (),
            )  # fmt: skip
            export_network(forms.merged if forms.fused is None else forms.plain, spec, path, timed=False)
        exported = ExportedNetwork(path)
        return lambda: exported(images)

    return prepare


RUNTIMES = {
    "eager": Runtime(_eager),
    "fused": Runtime(_fused, ours_only=True),
    "compile": Runtime(_compiled),
    "onnxruntime": Runtime(_exported("onnx"), ("onnx", "onnxscript", "onnxruntime"), cpu_only=True),
    "openvino": Runtime(_exported("openvino"), ("openvino",), cpu_only=True),
}
