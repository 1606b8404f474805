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

from overlock.checkpoints import Record, build, default_classes, default_preprocessing, load_model, load_record
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

    def why_not(self, architecture: str, device: torch.device) -> str | None:
        """Why it cannot run a model of timm's; None where it can be tried."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.ours_only and not architecture.startswith(PREFIX):
            return "for OverLoCK alone"
        return "runs on CPU alone here" if self.cpu_only and device.type != "cpu" else None


def record_of(model: str) -> Record | None:
    """Of a run's folder or file of weights; None of a name of timm's.

    Raises:
        ValueError: for what is no classifier, and a damaged or foreign file.
    """
    if not Path(model).exists():
        return None
    record = load_record(model)
    if record.task != "classify":
        raise ValueError(f"{model}: this is a {record.name}, of the task {record.task}, and not a classifier")
    return record


def architecture_of(model: str) -> str:
    """timm's name of a network."""
    record = record_of(model)
    return model if record is None else record.model


def make_forms(model: str, device: torch.device) -> Forms:
    """A trained network, or by timm's name one with random weights, always the same.

    Raises:
        ValueError: for an unknown model, and a damaged or foreign file.
    """
    network, record = load_model(model) if record_of(model) else _draw_network(model)
    network = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    if record.model.startswith(PREFIX):
        merged, fused = fuse(network, kernels=False), fuse(network)
        return Forms(plain=network, merged=merged, fused=fused, record=record)
    return Forms(plain=network, merged=timm.utils.reparameterize_model(network), fused=None, record=record)


def _draw_network(model: str) -> tuple[nn.Module, Record]:
    """With random weights. Layer scales, which start too near to zero for a comparison of logits, are set to 0.1."""
    torch.manual_seed(0)
    network: Any = build(model)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < TINY and (parameter == parameter.flatten()[0]).all() and parameter.any():
                parameter.fill_(0.1)
    preprocessing = default_preprocessing(network, in_chans=3)
    return network, Record(
        model=model, classes=default_classes(network.num_classes), preprocessing=preprocessing
    )  # fmt: skip


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
