"""Dynamic convolutions, as mixers of Table 7: DyConv, ODConv, Involution, DCNv3, ContMix."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import BatchNorm2d, ContMix, ConvNorm, DilatedRepConv
from overlock.layers.depthwise_conv import DepthwiseConv
from overlock.layers.gdsa import make_squeeze_excite


def between_projections(channels: int, operator: nn.Module) -> nn.Module:
    """1x1 convolution, an operator on each channel, 1x1 convolution: attention has its two projections likewise."""
    return nn.Sequential(nn.Conv2d(channels, channels, 1), operator, nn.Conv2d(channels, channels, 1))


def _convolve_each(x: Tensor, kernels: Tensor) -> Tensor:
    """Depthwise convolution of each image with kernels (B, C, K, K) of its own."""
    size = kernels.shape[-1]
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.reshape(-1, 1, size, size), padding=size // 2,
                 groups=x.shape[0] * x.shape[1])  # fmt: skip
    return y.view_as(x)


class DyConv(nn.Module):
    """Dynamic convolution (arXiv:1912.03458), depthwise: a mixture of kernels, weighted by the whole image.

    (B, C, H, W) -> (B, C, H, W). The softmax has temperature 1, where its paper's falls from 30 to 1 in training.

    Args:
        channels: C.
        kernel_size: K.
        kernels: in the mixture.
        reduction: of the hidden width of what weighs them.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7, kernels: int = 4, reduction: int = 4):
        super().__init__()
        hidden = channels // reduction
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, kernels, 1)
        )
        self.weight = nn.Parameter(torch.empty(kernels, channels, kernel_size, kernel_size))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.attention(x).flatten(1).softmax(dim=1)
        return _convolve_each(x, torch.einsum("bn,nchw->bchw", shares, self.weight))


class ODConv(nn.Module):
    """Omni-dimensional dynamic convolution (arXiv:2209.07947), depthwise.

    A mixture of kernels as in DyConv; besides, each tap and each channel is weighted by the whole image.
    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kernel_size: K.
        kernels: in the mixture.
        reduction: of the hidden width of what weighs; it is 16 at least.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7, kernels: int = 4, reduction: int = 16):
        super().__init__()
        hidden = max(16, channels // reduction)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1, bias=False), BatchNorm2d(hidden), nn.ReLU()
        )
        self.channel = nn.Conv2d(hidden, channels, 1)
        self.spatial = nn.Conv2d(hidden, kernel_size**2, 1)
        self.kernel = nn.Conv2d(hidden, kernels, 1)
        self.weight = nn.Parameter(torch.empty(kernels, channels, kernel_size, kernel_size))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.squeeze(x)
        size = self.weight.shape[-1]
        taps = self.spatial(hidden).sigmoid().view(-1, 1, size, size)
        shares = self.kernel(hidden).flatten(1).softmax(dim=1)
        kernels = torch.einsum("bn,nchw->bchw", shares, self.weight) * taps
        return _convolve_each(x * self.channel(hidden).sigmoid(), kernels)


class Involution(nn.Module):
    """Involution (arXiv:2103.06255): each position makes the kernel of its window, shared by a group's channels.

    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kernel_size: K.
        group_width: channels of a group.
        reduction: of the hidden width of what makes the kernels.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7, group_width: int = 16, reduction: int = 4):
        super().__init__()
        self.groups, self.kernel_size = channels // group_width, kernel_size
        hidden = channels // reduction
        self.reduce = ConvNorm(nn.Conv2d(channels, hidden, 1), hidden)
        self.span = nn.Conv2d(hidden, self.groups * kernel_size**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.span(F.relu(self.reduce(x))).unflatten(1, (self.groups, -1))  # B, G, K^2, H, W
        patches = F.unfold(x, self.kernel_size, padding=self.kernel_size // 2)
        patches = patches.view(x.shape[0], self.groups, -1, self.kernel_size**2, *x.shape[2:])
        return torch.einsum("bgnhw,bgcnhw->bgchw", kernels, patches).flatten(1, 2)


class DCNv3(nn.Module):
    """Deformable convolution v3 (InternImage, arXiv:2211.05778).

    The samples are PyTorch's own: on a CPU they take a fifth of the time of torchvision's deformable convolution, whose
    sum over a channel's own samples is a matrix product of one row.

    Each position says for each group where in the map its K x K samples lie, and how they are weighted; the map is
    zero outside. (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kernel_size: K, also of the depthwise convolution that offsets and weights are made of.
        group_width: channels of a group.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7, group_width: int = 32):
        super().__init__()
        self.kernel_size, self.groups, taps = kernel_size, channels // group_width, kernel_size**2
        self.value = nn.Conv2d(channels, channels, 1)
        self.local = nn.Sequential(DepthwiseConv(channels, kernel_size), LayerNorm2d(channels), nn.GELU())
        self.offset = nn.Conv2d(channels, self.groups * taps * 2, 1)
        self.mask = nn.Conv2d(channels, self.groups * taps, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        shares = self.mask(local).unflatten(1, (self.groups, -1)).softmax(dim=2).flatten(1, 2)
        mixed = sample_windows(self.value(x), self.offset(local), shares, self.kernel_size)
        return self.proj(mixed.to(x.dtype))


def sample_windows(value: Tensor, offset: Tensor, shares: Tensor, kernel_size: int) -> Tensor:
    """The samples of each position, taken from moved places of a map that is zero outside, and their weighted sum.

    Args:
        value: (B, C, H, W), in G groups of channels.
        offset: (B, G * K^2 * 2, H, W): rows and columns, in positions, by which each sample is moved.
        shares: (B, G * K^2, H, W).
        kernel_size: K.

    Returns:
        (B, C, H, W), in float32 at least: places in 16 bits would be a part of a position off.
    """
    batch, _, height, width = value.shape
    taps = torch.arange(kernel_size**2, device=value.device)
    groups = shares.shape[1] // len(taps)
    value, offset, shares = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (value, offset, shares))
    row, column = offset.reshape(batch * groups, len(taps), 2, height, width).unbind(2)
    row = (
        row
        + torch.arange(height, device=value.device)[:, None]
        + (taps // kernel_size - kernel_size // 2)[:, None, None]
    )
    column = column + torch.arange(width, device=value.device) + (taps % kernel_size - kernel_size // 2)[:, None, None]
    places = torch.stack(((2 * column + 1) / width - 1, (2 * row + 1) / height - 1), -1)
    samples = F.grid_sample(
        value.reshape(batch * groups, -1, height, width), places.flatten(1, 2), align_corners=False
    ).unflatten(2, (len(taps), height))  # fmt: skip
    shares = shares.reshape(batch * groups, len(taps), height, width)
    return torch.einsum("gcthw,gthw->gchw", samples, shares).reshape(batch, -1, height, width)


class ContextMixing(nn.Module):
    """What mixes tokens in OverLoCK's dynamic block, without a context of its own, the gate and the last projection.

        y = SE(ContMix(x) + BN(DilatedRepConv(x)))

    (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, *, kernel_size: int = 7):
        super().__init__()
        self.mixer = ContMix(channels, groups=channels // 16, kernel_size=kernel_size, value_proj=True)
        self.large_kernel = ConvNorm(DilatedRepConv(channels, kernel_size), channels)
        self.se = make_squeeze_excite(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.mixer(x) + self.large_kernel(x))
