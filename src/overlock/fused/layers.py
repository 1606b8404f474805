"""The layers of the fused network on CPU: the same arithmetic in fewer passes, over channels_last maps.

All take and give images (B, C, H, W), or one image (C, H, W) as ``nn.Conv2d`` does.
"""

from __future__ import annotations

from torch import Tensor, nn

from overlock.fused import layer_operators as ops
from overlock.fused.conditions import kernels_apply
from overlock.fused.flat_parameters import Packed
from overlock.fused.parameters import Parameters, in_order
from overlock.fused.stage_operators import basic_stack
from overlock.kernels.numba.contmix import to_images


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


class Pointwise(nn.Module):
    """1x1 convolution as a matrix product, weight (Cout, Cin)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = _frozen(conv.weight.flatten(1))
        self.bias = None if conv.bias is None else _frozen(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self(x[None])[0]
        return to_images(ops.linear(x.permute(0, 2, 3, 1), self.weight, self.bias))


class Depthwise(nn.Module):
    """Depthwise convolution, weight (K, K, C), and GELU after it where ``gelu`` is set."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = _frozen(conv.weight[:, 0].permute(1, 2, 0))
        self.bias = _frozen(conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias)
        self.gelu = False

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self(x[None])[0]
        return ops.depthwise(x, self.weight, self.bias, self.gelu)


class ConvStack(Packed):
    """Convolutions of all channels, and GELU between them: one operation where its kernels run."""

    def __init__(self, layers: nn.Module):
        convolutions = convolutions_of(layers)
        super().__init__(layers, in_order(Parameters(layer.weight, layer.bias) for layer in convolutions))
        self.strides = [convolution.stride[0] for convolution in convolutions]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self(x[None])[0]
        if kernels_apply(x, self.packed):
            return basic_stack(x, self.packed, self.layout, self.strides, 0.0, self.in_bf16)
        return self.plain(x)


def convolutions_of(layers: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in layers.modules() if isinstance(layer, nn.Conv2d)]
