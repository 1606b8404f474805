"""A network by standard operations alone, folded: what every export starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from overlock.export.contmix import Places, PlainContMix
from overlock.export.detectors import PlainHeads, PlainProposals
from overlock.fused.fuse import fuse
from overlock.layers import ContMix, GlobalResponseNorm
from overlock.tasks.cascade import CascadeHeads


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


def plain_form(network: nn.Module, places: Places | None = None) -> nn.Module:
    """A copy of a network for export, in evaluation mode: norms and branches folded, no operators of our own.

    Args:
        network: of which the copy is made.
        places: to forget before each graph but the first.
    """
    return _replace(fuse(network, kernels=False), places or Places())


def _replace(module: nn.Module, places: Places) -> nn.Module:
    for name, part in module.named_children():
        setattr(module, name, _replace(part, places))
    if type(module) is ContMix:
        return PlainContMix(module, places).eval()
    if type(module) is GlobalResponseNorm:
        return PlainResponseNorm(module).eval()
    if type(module) is RegionProposalNetwork:
        return PlainProposals(module).eval()
    if type(module) in (RoIHeads, CascadeHeads):
        return PlainHeads(module).eval()
    return module
