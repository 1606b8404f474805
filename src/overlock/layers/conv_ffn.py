"""The small parts of both blocks: local convolution, ConvFFN with its response norm, and the scaled residual."""

from __future__ import annotations

from collections import OrderedDict

import torch
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm
from torch import Tensor, nn

from overlock.layers.arguments import check_count
from overlock.ops import local_conv, response_norm

torch.fx.wrap("local_conv")
torch.fx.wrap("response_norm")


class LocalConv(nn.Conv2d):
    """Residual 3x3 depthwise convolution: y = a + conv(a), with a = x, or GELU(x) with ``gelu``.

    (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, *, gelu: bool = False):
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return local_conv(x, self.weight, self.bias, self.gelu)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d | nn.Sequential:
        """A plain convolution whose centre tap carries the residual, after GELU where that belongs to it."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, 3, padding=1, groups=self.groups,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        conv.weight.copy_(self.weight)
        conv.weight[:, :, 1, 1] += 1
        conv.bias.copy_(self.bias)  # type: ignore[union-attr,arg-type]
        return nn.Sequential(OrderedDict(act=nn.GELU(), conv=conv)) if self.gelu else conv


class GlobalResponseNorm(TimmGlobalResponseNorm):
    """ConvNeXt V2's response norm: y = x + weight * x * g / mean_over_channels(g) + bias, with g the channel's L2 norm.

    timm's layer, with the norms summed in float32. (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6, channels_last=False)

    def forward(self, x: Tensor) -> Tensor:
        return response_norm(x, self.weight, self.bias, self.eps)


class ConvFFN(nn.Module):
    """Feed-forward network with a local convolution and a response norm on its hidden width (section 3.1).

    (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        check_count("channels", channels)
        check_count("hidden_channels", hidden_channels)
        self.expand = nn.Conv2d(channels, hidden_channels, kernel_size=1)
        self.local = LocalConv(hidden_channels, gelu=True)
        self.norm = GlobalResponseNorm(hidden_channels)
        self.project = nn.Conv2d(hidden_channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        x = self.local(x)
        x = self.norm(x)
        return self.project(x)

    @torch.no_grad()
    def fold(self) -> ConvFFN:
        """Move the response norm's bias into the projection."""
        self.project.bias += self.project.weight.flatten(1) @ self.norm.bias  # type: ignore[operator]
        self.norm.bias.zero_()
        return self


class AffineScale(nn.Module):
    """LayerScale with a bias: y = weight * x + bias for each channel. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, init: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), init))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.view(1, -1, 1, 1), x, self.weight.view(1, -1, 1, 1))


class Residual(nn.Module):
    """identity + branch."""

    def forward(self, identity: Tensor, branch: Tensor) -> Tensor:
        return identity + branch


class ScaledResidual(AffineScale):
    """weight * identity + bias + branch: the released weights scale the identity, not the branch, from stage 3 on."""

    def forward(self, identity: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return torch.addcmul(self.bias.view(1, -1, 1, 1), identity, self.weight.view(1, -1, 1, 1)) + branch


def make_residual(channels: int, scaled: bool) -> Residual | ScaledResidual:
    return ScaledResidual(channels) if scaled else Residual()


class FoldedResidual(nn.Module):
    """weight * identity + branch in one pass; the bias has gone into the branch's last convolution."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.detach().view(1, -1, 1, 1))

    def forward(self, identity: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(branch, identity, self.weight)  # type: ignore[arg-type]


@torch.no_grad()
def fold_residual(residual: nn.Module, last: nn.Conv2d | AffineScale) -> nn.Module:
    """The cheapest form of a residual whose branch ends in ``last``, which takes over the bias."""
    if not isinstance(residual, ScaledResidual):
        return residual
    last.bias += residual.bias  # type: ignore[operator]
    return FoldedResidual(residual.weight)
