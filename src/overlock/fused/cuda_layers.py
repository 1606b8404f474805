"""The fused network on CUDA: where channels are scaled by image, the scales go into the 1x1 convolutions.

Each form has the parts of the folded module under their names, and is that module itself where the kernels cannot run
(conditions.py). What is left in each are operations on single numbers, which ``torch.compile`` joins.
"""

from __future__ import annotations

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from overlock.blocks import BasicBlock
from overlock.fused.conditions import triton_applies
from overlock.fused.cuda_operators import filter_and_scale, scaled_pointwise
from overlock.layers import Aggregator, ConvFFN


def excitation(se: SqueezeExcite, x: Tensor) -> Tensor:
    """What squeeze-excite multiplies the channels of images (B, C, H, W) by, (B, C)."""
    pooled = x.mean((2, 3), keepdim=True)
    return se.gate(se.fc2(se.act(se.fc1(pooled)))).flatten(1)


def _take_parts(form: nn.Module, module: nn.Module) -> None:
    nn.Module.__init__(form)
    for name, part in module.named_children():
        form.add_module(name, part)


class FusedConvFFN(ConvFFN):
    """(B, C, H, W) -> (B, C, H, W): two products, and between them one pass over the hidden map."""

    def __init__(self, ffn: ConvFFN):
        _take_parts(self, ffn)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The ConvFFN of ``x``, its channels multiplied by ``scale`` (B, C) first where that is given."""
        local = self.local.get_submodule("conv")
        assert isinstance(local, nn.Conv2d)
        assert local.bias is not None
        if not triton_applies(x, local.weight):
            return super().forward(x if scale is None else x * scale[:, :, None, None])
        hidden = self.expand(x) if scale is None else scaled_pointwise(x, scale, self.expand)
        hidden, response = filter_and_scale(hidden, local.weight, local.bias, self.norm.weight, self.norm.eps)
        return scaled_pointwise(hidden, response, self.project)


class FusedBasicBlock(BasicBlock):
    """(B, C, H, W) -> (B, C, H, W): squeeze-excite goes into the ConvFFN's first product."""

    def __init__(self, block: BasicBlock):
        _take_parts(self, block)
        self.ffn = FusedConvFFN(block.ffn)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        branch = self.large_kernel(self.norm(x))
        return self.residual(x, self.ffn(branch, excitation(self.se, branch)))


class FusedAggregator(Aggregator):
    """(B, C, H, W) -> (B, Cout, H, W): squeeze-excite goes into the projection."""

    def __init__(self, aggregator: Aggregator):
        _take_parts(self, aggregator)

    def forward(self, features: Tensor, query: Tensor, context: Tensor) -> Tensor:
        mixed = self.mixer(features, query, context) + self.large_kernel(features)
        gated = mixed * self.gate_act(self.gate(features))
        assert isinstance(self.proj, nn.Conv2d)  # folded
        return scaled_pointwise(gated, excitation(self.se, mixed), self.proj)
