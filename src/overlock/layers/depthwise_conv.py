"""Depthwise convolution, the spatial half of every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overlock.ops import depthwise_conv2d

torch.fx.wrap("depthwise_conv2d")


class DepthwiseConv(nn.Conv2d):
    """Depthwise K x K convolution that keeps the size, by the fastest kernels. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel_size: int, *, dilation: int = 1, bias: bool = True):
        padding = dilation * (kernel_size // 2)
        super().__init__(
            channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])
