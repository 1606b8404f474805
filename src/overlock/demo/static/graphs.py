"""A network as the two graphs of the static page: the overview, and the closer look that a context prior guides.

Two, so that the page can put another photo's prior into the second. Both have fixed shapes, of one square image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.analysis.dynamic_kernels import Mixing, record_mixing
from overlock.export.contmix import PlainContMix
from overlock.export.plain import plain_form
from overlock.export.write import OPSET, needs, quietly
from overlock.kernels.torch.reference import make_affinities
from overlock.network import OverLoCK
from overlock.ops import backend

OVERVIEW, FOCUS = "overview.onnx", "focus.onnx"
TOLERANCE = 1e-4
"""Largest difference from PyTorch over the largest number of an output; all is in float32."""


class Overview(nn.Module):
    """Images (1, 3, S, S) to what the closer look starts from.

    Args:
        network: trained, or its plain form.
        aux_head: of the trained network; its auxiliary classifier gives the map, where there is one.

    Returns:
        Base-Net's features (1, C3, H, W), the context prior (1, Cc, H/2, W/2) and a map of the overview: of each class
        by the auxiliary classifier (1, N, H/2, W/2), or how far the prior is from its mean over the photo
        (1, 1, H/2, W/2).
    """

    def __init__(self, network: OverLoCK, aux_head: Any):
        super().__init__()
        self.base_net, self.overview_net, self.aux_head = network.base_net, network.overview_net, aux_head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        overview_net: Any = self.overview_net
        features = self.base_net(images)[-1]
        overview, prior = overview_net(features)
        if self.aux_head is not None:
            maps = class_maps(self.aux_head.fc, self.aux_head.norm(overview))
        else:
            maps = torch.linalg.vector_norm(prior - prior.mean(dim=(2, 3), keepdim=True), dim=1, keepdim=True)
        return features, prior, maps


class Focus(nn.Module):
    """Base-Net's features and a context prior to the classes, and the way there.

    Args:
        network: trained, or its plain form.
        scales: of the affinities of each ContMix of a plain form; nothing of them is given without.

    Returns:
        Logits (1, N), maps of the classes (1, N, H, W), whose means are the logits; then of each ContMix its affinities
        (1, G, H, W, S^2) and the kernels of each size (1, G, H, W, K^2).
    """

    def __init__(self, network: OverLoCK, scales: list[float] | None = None):
        super().__init__()
        self.focus_net, self.head = network.focus_net, network.head
        self.found: list[Tensor] = []
        mixes = [mix for mix in network.focus_net.modules() if isinstance(mix, PlainContMix)]  # type: ignore[union-attr]
        for mix, scale in zip(mixes, scales or [], strict=True):
            mix.parts[0].register_forward_hook(lambda _, inputs, __, scale=scale: self._note_affinities(scale, *inputs))
            for part in mix.parts:
                part.register_forward_hook(self._note_kernels)

    def forward(self, features: Tensor, prior: Tensor) -> tuple[Tensor, ...]:
        focus_net: Any = self.focus_net
        self.found.clear()
        maps = class_maps(self.head.fc, self.head.hidden(focus_net(features, prior)[-1]))
        return maps.mean(dim=(2, 3)), maps, *self.found

    def _note_affinities(self, scale: float, query: Tensor, key: Tensor, _: Tensor) -> None:
        """Which the mixing itself never has: its weights come first."""
        self.found.append(make_affinities(query, key) * scale)

    def _note_kernels(self, part: Any, inputs: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
        query, key, _ = inputs
        self.found.append(part.kernels(query, key).unflatten(2, query.shape[3:]))


def class_maps(classifier: Any, hidden: Tensor) -> Tensor:
    """What each place adds to each class's logit: weights times features (B, C, H, W), class activation mapping.

    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016. The mean over all places is what the
    classifier makes of averaged features.
    """
    return F.conv2d(hidden, classifier.weight[:, :, None, None], classifier.bias)


def write_graphs(network: OverLoCK, images: Tensor, folder: Path) -> None:
    """Write both graphs.

    Args:
        network: trained, in evaluation mode; it stays as it is.
        images: of the shape that the graphs are for, (1, 3, S, S).
        folder: for both files.

    Raises:
        ImportError: without the packages that write and run ONNX.
    """
    needs("onnxscript", "onnx", "onnxruntime")
    scales = [mix.scale for mix in _mixes_of(network)]
    plain: Any = plain_form(network)
    overview, focus = Overview(plain, network.aux_head).eval(), Focus(plain, scales).eval()
    with torch.no_grad():
        features, prior, _ = overview(images)
        seen = focus(features, prior)  # before it is traced, so that positions are constants and no part of the graph
        with quietly():
            _write(overview, (images,), ["images"], ["features", "prior", "maps"], folder / OVERVIEW)
            names = ["logits", "maps", *_names(network)]
            assert len(names) == len(seen)
            _write(focus, (features, prior), ["features", "prior"], names, folder / FOCUS)


def _write(entry: nn.Module, inputs: tuple[Tensor, ...], taken: list[str], given: list[str], path: Path) -> None:
    program = torch.export.export(entry, inputs, strict=False)
    model: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=taken, output_names=given, opset_version=OPSET
    )
    model.save(path, external_data=False)


def _mixes_of(network: OverLoCK) -> list[Any]:
    stages: Any = (network.focus_net.stage3, network.focus_net.stage4)  # type: ignore[union-attr]
    return [block.mixer.aggregator.mixer for stage in stages for block in stage.blocks]


def _names(network: OverLoCK) -> list[str]:
    """Of the outputs of all ContMix layers, in their order."""
    names = []
    for i, mix in enumerate(_mixes_of(network)):
        sizes = 1 if mix.small_kernel is None else 2
        names += [f"affinity{i}", *(f"kernels{i}_{j}" for j in range(sizes))]
    return names


@torch.no_grad()
def record_all(network: OverLoCK, images: Tensor) -> tuple[dict[str, Tensor], list[Mixing]]:
    """What the graphs give, by their outputs' names, computed by the trained network itself, and its mixings."""
    overview, focus = Overview(network, network.aux_head), Focus(network)
    with backend("torch"):
        features, prior, glance = overview(images)
        mixings = record_mixing(network, lambda: network(images))
        logits, maps = focus(features, prior)
    found = {"features": features, "prior": prior, "overview": glance, "logits": logits, "maps": maps}
    for i, mixing in enumerate(mixings):
        found[f"affinity{i}"] = mixing.affinity.flatten(4)
        found |= {f"kernels{i}_{j}": kernels.taps.flatten(4) for j, kernels in enumerate(mixing.kernels)}
    return found, mixings


def check_graphs(network: OverLoCK, photos: Sequence[Tensor], folder: Path) -> tuple[float, list[Mixing]]:
    """How far the written graphs are from PyTorch, at most, over the largest number of each output.

    Args:
        network: trained.
        photos: as the network takes them, (1, 3, S, S) each.
        folder: of :func:`write_graphs`.

    Returns:
        The largest difference, and the network's mixings of the last photo.

    Raises:
        ValueError: where the difference is larger than rounding explains.
    """
    import onnxruntime  # noqa: PLC0415

    overview, focus = (onnxruntime.InferenceSession(folder / name) for name in (OVERVIEW, FOCUS))
    worst = 0.0
    mixings: list[Mixing] = []
    for images in photos:
        expected, mixings = record_all(network, images)
        glance = _run(overview, images=images.numpy())
        look = _run(focus, features=glance["features"], prior=glance["prior"])
        found = {**look, "features": glance["features"], "prior": glance["prior"], "overview": glance["maps"]}
        for name, wanted in expected.items():
            difference = (torch.from_numpy(found[name]) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
            worst = max(worst, float(difference))
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"the graph's {name} differs from PyTorch by {difference:.1e}; {TOLERANCE:.0e} is allowed"
                )
    return worst, mixings


def _run(session: Any, **inputs: Any) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
