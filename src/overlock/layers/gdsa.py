"""GDSA, the gated dynamic spatial aggregator: the token mixer of Focus-Net (Figure 3)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from timm.layers import SqueezeExcite as TimmSqueezeExcite
from torch import Tensor, nn

from overlock.layers.contmix import ContMix
from overlock.layers.conv_ffn import GlobalResponseNorm
from overlock.layers.conv_norm import ConvNorm, NormConv
from overlock.layers.depthwise_conv import DepthwiseConv
from overlock.layers.dilated_repconv import DilatedRepConv


@torch.fx.wrap
def average_channels(x: Tensor, training: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1).

    In training as a sum over a count: the gradient of a sum is a view of a number for each channel, that of a mean a
    map, of a layout that the network's maps do not have. In float16 a sum could overflow.
    """
    if training and x.dtype != torch.float16:
        return x.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    return x.mean(dim=(2, 3), keepdim=True)


class SqueezeExcite(TimmSqueezeExcite):
    """timm's layer, cheaper to train. (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = average_channels(x, self.training)
        if self.add_maxpool:
            pooled = 0.5 * pooled + 0.5 * x.amax(dim=(2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(pooled)))))


def make_squeeze_excite(channels: int) -> SqueezeExcite:
    """Squeeze-excite as both blocks have it."""
    return SqueezeExcite(channels, rd_channels=max(16, channels // 8), act_layer=nn.GELU)


class Aggregator(nn.Module):
    """Dynamic convolution, static large kernel, channel attention and gate, on features already made.

        y = SE(mixer(x) + DilatedRepConv(x)) * SiLU(W_g x),   output = W y

    (B, C, H, W) -> (B, Cout, H, W).

    Args:
        channels: C.
        out_channels: Cout.
        kernel_size: K of the static large kernel.
        mixer: module called with (features, query, context), by default a :class:`ContMix`.
    """

    def __init__(self, channels: int, out_channels: int, *, kernel_size: int, mixer: nn.Module, deploy: bool = False):
        super().__init__()
        self.mixer = mixer
        self.large_kernel = ConvNorm(DilatedRepConv(channels, kernel_size, deploy=deploy), channels)
        self.se = make_squeeze_excite(channels)
        self.gate = ConvNorm(nn.Conv2d(channels, channels, kernel_size=1, bias=False), channels)
        self.gate_act = nn.SiLU()
        self.proj = NormConv(channels, out_channels)

    def forward(self, features: Tensor, query: Tensor, context: Tensor) -> Tensor:
        mixed = self.mixer(features, query, context) + self.large_kernel(features)
        return self.proj(self.se(mixed) * self.gate_act(self.gate(features)))


class GDSA(nn.Module):
    """Gated dynamic spatial aggregator guided by a context (section 3.1).

    Feature-level guidance: features and context are fused into the features that gate, static and dynamic convolution
    work on. (The text gates with the fused map; the released weights agree, and take the fused map as the value too.)
    Weight-level guidance: the dynamic kernels come from the affinity of the features to the context.

    (B, C + Cc, H, W), features and context side by side -> (B, C + Cc, H, W).
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        groups: int,
        kernel_size: int,
        small_kernel: int = 5,
        region_grid: int = 7,
        deploy: bool = False,
    ):
        super().__init__()
        both = channels + context_channels
        self.split = [channels, context_channels]
        self.fusion = nn.Sequential(
            OrderedDict(
                local=ConvNorm(DepthwiseConv(both, kernel_size=3), both),
                act=nn.GELU(),
                project=nn.Conv2d(both, channels, kernel_size=1),
                norm=GlobalResponseNorm(channels),
            )
        )
        mixer = ContMix(
            channels,
            groups=groups,
            kernel_size=kernel_size,
            small_kernel=small_kernel,
            region_grid=region_grid,
            context_channels=context_channels,
        )
        self.aggregator = Aggregator(channels, both, kernel_size=kernel_size, mixer=mixer, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        query, context = x.split(self.split, dim=1)
        return self.aggregator(self.fusion(x), query, context)
