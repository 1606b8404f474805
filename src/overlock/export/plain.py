"""A network by standard operations alone, folded: what every export starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import Conv2dNormActivation

from overlock.export.contmix import Places, PlainContMix
from overlock.export.detectors import PlainHeads, PlainProposals
from overlock.fused.fuse import fuse
from overlock.layers import ContMix, GlobalResponseNorm
from overlock.tasks.cascade import CascadeHeads

Forms = dict[type[nn.Module], Callable[[Any], nn.Module]]


class PlainResponseNorm(nn.Module):
    """A folded :class:`overlock.layers.GlobalResponseNorm`, whose bias is the next convolution's.

    (B, C, H, W) -> (B, C, H, W).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: GlobalResponseNorm):
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach().view(1, -1, 1, 1))
        self.register_buffer("bias", norm.bias.detach().view(1, -1, 1, 1))
        self.has_bias = bool(norm.bias.any())

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        y = x * (1 + self.weight * (norms / (norms.mean(dim=1, keepdim=True) + self.eps)))
        return y + self.bias if self.has_bias else y


class PlainLayerNorm(nn.Module):
    """A :class:`timm.layers.LayerNorm2d` by sums and products of maps.

    (B, C, H, W) -> (B, C, H, W). OpenVINO has convolutions' results channels last. A norm of the last dimension,
    which takes a transpose before and after it, would have it copy the map four times.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: LayerNorm2d):
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach().view(1, -1, 1, 1))
        self.register_buffer("bias", norm.bias.detach().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(dim=1, keepdim=True)
        variance = apart.square().mean(dim=1, keepdim=True)
        return apart * (variance + self.eps).rsqrt() * self.weight + self.bias


def plain_form(network: nn.Module, places: Places | None = None, *, norms_by_maps: bool = False) -> nn.Module:
    """A copy of a network for export, in evaluation mode: norms and branches folded, no operators of our own.

    Args:
        network: of which the copy is made.
        places: to forget before each graph but the first.
        norms_by_maps: have layer norms by sums and products of maps, which OpenVINO is faster in.
    """
    shared = places or Places()
    forms: Forms = {
        ContMix: lambda mix: PlainContMix(mix, shared), GlobalResponseNorm: PlainResponseNorm,
        Conv2dNormActivation: _without_norm, RegionProposalNetwork: PlainProposals, RoIHeads: PlainHeads,
        CascadeHeads: PlainHeads,
    }  # fmt: skip
    return _replace(fuse(network, kernels=False), forms | ({LayerNorm2d: PlainLayerNorm} if norms_by_maps else {}))


def _replace(module: nn.Module, forms: Forms) -> nn.Module:
    for name, part in module.named_children():
        setattr(module, name, _replace(part, forms))
    form = forms.get(type(module))
    return module if form is None else form(module).eval()


def _without_norm(layers: Conv2dNormActivation) -> nn.Module:
    """With the batch norm folded; torch.export would ask it whether there are regions, which is known later."""
    parts = list(layers)
    if [type(part) for part in parts[:2]] != [nn.Conv2d, nn.BatchNorm2d]:
        return layers
    return nn.Sequential(fuse_conv_bn_eval(parts[0], parts[1]), *parts[2:])
