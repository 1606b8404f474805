"""Depthwise convolution, alone and with its residual, and their gradients, in plain PyTorch.

Images are (B, C, H, W), weights (C, 1, K, K) with K odd, biases (C,); the results have the size of the images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    reach = weight.shape[3] // 2 * dilation
    return F.conv2d(x, weight, bias, padding=(reach, reach), dilation=(dilation, dilation), groups=weight.shape[0])


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return _gradients(grad, x, weight, dilation, (True, False, False))[0]


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return _gradients(grad, x, weight, dilation, (False, True, False))[1]


def local_conv(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """a + conv(a), with a = GELU(x) or x itself."""
    x = F.gelu(x) if gelu else x
    return x + convolve(x, weight, bias, 1)


def local_gradients(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`local_conv` with respect to x, weight and bias."""
    of_a, of_weight, of_bias = _gradients(grad, F.gelu(x) if gelu else x, weight, 1, (True, True, True))
    of_a = of_a + grad
    return torch.ops.aten.gelu_backward(of_a, x) if gelu else of_a, of_weight, of_bias


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias, those that are wanted."""
    channels, padding = x.shape[1], [weight.shape[3] // 2 * dilation] * 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [channels], [1, 1], padding, [dilation] * 2, False, [0, 0], channels, list(wanted)
    )
