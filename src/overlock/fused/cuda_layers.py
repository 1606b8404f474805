"""The fused network on CUDA: each step between two passes over a map that can be part of one is.

A residual, a gate, and the scales of squeeze-excite and the response norm go into the 1x1 convolution that they stand
beside; a layer norm goes with the local convolution before it. Each form has the parts of the folded module under their
names, and is that module itself where the kernels cannot run (conditions.py).
"""

from __future__ import annotations

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.blocks import BasicBlock, ContMixBlock, DynamicBlock
from overlock.blocks.dynamic_block import MixerBlock, SelfMixer
from overlock.fused.conditions import triton_applies
from overlock.fused.cuda_operators import (
    add_bias,
    excitation,
    filter_and_scale,
    join_context,
    local_gelu,
    local_norm,
    response_norm,
    scaled_pointwise,
)
from overlock.layers import GDSA, Aggregator, ConvFFN
from overlock.layers.conv_ffn import FoldedResidual
from overlock.layers.gdsa import SqueezeExcite
from overlock.network.base_net import Stem


def _take_parts(form: nn.Module, module: nn.Module) -> None:
    """The parts and settings of a module, without its class."""
    nn.Module.__init__(form)
    for name, part in module.named_children():
        form.add_module(name, part)


def _use_products(owner: nn.Module, *names: str) -> None:
    """Give 1x1 convolutions their form."""
    for name in names:
        setattr(owner, name, PointwiseConv(owner.get_submodule(name)))  # type: ignore[arg-type]


def _norm_after(x: Tensor, local: nn.Conv2d, norm: LayerNorm2d) -> tuple[Tensor, Tensor]:
    return local_norm(x, local.weight, local.bias, norm.weight, norm.bias, norm.eps)


def _excitation(se: SqueezeExcite, x: Tensor) -> Tensor:
    return excitation(x, se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias)


def _scale_of(residual: nn.Module) -> Tensor | None:
    return residual.weight.flatten() if isinstance(residual, FoldedResidual) else None  # type: ignore[operator]


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution as a linear layer of the positions, whose product adds the bias; cuDNN's takes a pass more.

    (B, C, H, W) -> (B, Cout, H, W), channels last.
    """

    def __init__(self, conv: nn.Conv2d):
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class BiasedConv(nn.Conv2d):
    """A convolution of all channels, and its bias in a pass that takes GELU too; PyTorch's takes one for each.

    (B, Cin, H, W) -> (B, Cout, H', W').
    """

    def __init__(self, conv: nn.Conv2d):
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        if self.bias is None or not triton_applies(x, self.weight):
            y = super().forward(x)
            return F.gelu(y) if gelu else y
        return add_bias(self._conv_forward(x, self.weight, None), self.bias, gelu)


class FusedStem(Stem):
    """(B, Cin, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, stem: Stem):
        nn.Module.__init__(self)
        for name, part in stem.named_children():
            self.add_module(name, BiasedConv(part) if isinstance(part, nn.Conv2d) else part)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        for layer, after in zip(layers[::2], [*layers[1::2], None], strict=True):
            x = layer(x, gelu=after is not None)
        return x


class FusedConvFFN(ConvFFN):
    """(B, C, H, W) -> (B, C, H, W): two products, and between them one pass over the hidden map."""

    def __init__(self, ffn: ConvFFN):
        _take_parts(self, ffn)
        _use_products(self, "expand")

    def forward(self, x: Tensor) -> Tensor:
        local = self.local.get_submodule("conv")
        if not triton_applies(x, local.weight):  # type: ignore[arg-type]
            return super().forward(x)
        return self.run(x, None, None, None)

    def run(
        self, x: Tensor, scale: Tensor | None, residual: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor:  # fmt: skip
        """The ConvFFN of ``x``, its channels multiplied by ``scale`` (B, C) first, and the residual's sum with it."""
        local = self.local.get_submodule("conv")
        assert isinstance(local, nn.Conv2d)
        hidden = self.expand(x) if scale is None else scaled_pointwise(x, self.expand, scale=scale)
        hidden, response = filter_and_scale(hidden, local.weight, local.bias, self.norm.weight, self.norm.eps)
        return scaled_pointwise(
            hidden, self.project, scale=response, residual=residual, residual_scale=residual_scale
        )  # fmt: skip


class FusedBasicBlock(BasicBlock):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: BasicBlock):
        _take_parts(self, block)
        self.ffn = FusedConvFFN(block.ffn)

    def forward(self, x: Tensor) -> Tensor:
        if not triton_applies(x, self.local.weight):
            return super().forward(x)
        x, branch = _norm_after(x, self.local, self.norm)
        branch = self.large_kernel(branch)
        return self.ffn.run(branch, _excitation(self.se, branch), x, _scale_of(self.residual))  # type: ignore[operator]


class FusedAggregator(Aggregator):
    """(B, C, H, W) -> (B, Cout, H, W)."""

    def __init__(self, aggregator: Aggregator):
        _take_parts(self, aggregator)
        _use_products(self.mixer, "query", "key")

    def forward(self, features: Tensor, query: Tensor, context: Tensor) -> Tensor:
        if not triton_applies(features, self.proj.weight):  # type: ignore[arg-type]
            return super().forward(features, query, context)
        return self.run(features, query, context, None, None)

    def run(
        self, features: Tensor, query: Tensor, context: Tensor, residual: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor:  # fmt: skip
        """The aggregator's output, and the residual's sum with it."""
        assert isinstance(self.proj, nn.Conv2d)
        assert isinstance(self.gate, nn.Conv2d)
        mixed = self.mixer.mix(features, query, context)  # type: ignore[operator]
        mixed = scaled_pointwise(mixed, self.mixer.out, residual=self.large_kernel(features))  # type: ignore[arg-type]
        return scaled_pointwise(
            mixed, self.proj, scale=_excitation(self.se, mixed), gate=scaled_pointwise(features, self.gate, silu=True),
            residual=residual, residual_scale=residual_scale,
        )  # fmt: skip


class FusedGDSA(GDSA):
    """(B, C + Cc, H, W) -> (B, C + Cc, H, W)."""

    def __init__(self, gdsa: GDSA):
        _take_parts(self, gdsa)
        self.split = gdsa.split
        _use_products(self.fusion, "project")
        self.aggregator = FusedAggregator(gdsa.aggregator)

    def run(self, x: Tensor, residual: Tensor, residual_scale: Tensor | None) -> Tensor:
        """The mixer's output, and the residual's sum with it."""
        query, context = x.split(self.split, dim=1)
        local, _, project, norm = self.fusion
        fused = project(local_gelu(x, local.weight, local.bias))
        fused = response_norm(fused, norm.weight, norm.bias, norm.eps)
        assert isinstance(self.aggregator, FusedAggregator)
        return self.aggregator.run(fused, query, context, residual, residual_scale)


class FusedSelfMixer(SelfMixer):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, mixer: SelfMixer):
        _take_parts(self, mixer)
        self.aggregator = FusedAggregator(mixer.aggregator)

    def run(self, x: Tensor, residual: Tensor, residual_scale: Tensor | None) -> Tensor:
        """The mixer's output, and the residual's sum with it."""
        assert isinstance(self.aggregator, FusedAggregator)
        return self.aggregator.run(x, x, x, residual, residual_scale)


class _FusedMixing(MixerBlock):
    """What the forms of both mixer blocks share."""

    def mix(self, x: Tensor) -> Tensor:
        if not triton_applies(x, self.local1.weight):
            return super().mix(x)
        x, branch = _norm_after(x, self.local1, self.norm1)
        x = self.mixer.run(branch, x, _scale_of(self.residual1))  # type: ignore[operator]
        x, branch = _norm_after(x, self.local2, self.norm2)
        return self.ffn.run(branch, None, x, _scale_of(self.residual2))  # type: ignore[operator]


class FusedDynamicBlock(_FusedMixing, DynamicBlock):
    """Features (B, C, H, W), context and prior (B, Cc, H, W) -> features and context."""

    def __init__(self, block: DynamicBlock):
        _take_parts(self, block)
        self.split, self.context_update = block.split, block.context_update
        self.mixer, self.ffn = FusedGDSA(block.mixer), FusedConvFFN(block.ffn)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        if not triton_applies(x, self.local1.weight):
            return super().forward(x, context, prior)
        update = self.context_update
        scales = (None,) * 3 if update is None else (_scale_of(update.alpha), update.beta.weight, update.beta.bias)
        x, context = self.mix(join_context(x, context, prior, *scales)).split(self.split, dim=1)
        return x, context


class FusedContMixBlock(_FusedMixing, ContMixBlock):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: ContMixBlock):
        _take_parts(self, block)
        self.mixer, self.ffn = FusedSelfMixer(block.mixer), FusedConvFFN(block.ffn)  # type: ignore[arg-type]
