"""The blocks of the fused network on CPU: one operation where its kernels run, elsewhere the folded blocks.

Blocks that come one after another are one operation too. Between two of them, Python would find nothing of its own in
the caches, which took a third of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from overlock.blocks import BasicBlock, ContMixBlock, DynamicBlock, MixerBlock
from overlock.fused.conditions import kernels_apply
from overlock.fused.flat_parameters import Packed
from overlock.fused.layers import convolutions_of
from overlock.fused.parameters import BasicParameters, MixerParameters, Parameters, in_order, parameters_of
from overlock.fused.stage_operators import basic_stack, mixer_stack
from overlock.layers import ContMix
from overlock.network.base_net import BlockStack
from overlock.network.focus_net import FocusStage

# Where the layers of folded blocks are found, by the operations' names for them.
BASIC_BLOCK = dict(
    local="local", norm="norm", large="large_kernel", reduce="se.fc1", excite="se.fc2", expand="ffn.expand",
    hidden="ffn.local.conv", response="ffn.norm", project="ffn.project", residual="residual",
)  # fmt: skip
MIXER_BLOCK = dict(
    alpha="context_update.alpha", beta="context_update.beta", local1="local1", norm1="norm1",
    fusion="mixer.fusion.local", fusion_project="mixer.fusion.project", fusion_norm="mixer.fusion.norm",
    query="mixer.aggregator.mixer.query", key="mixer.aggregator.mixer.key", value="mixer.aggregator.mixer.value",
    kernels="mixer.aggregator.mixer.kernels", out="mixer.aggregator.mixer.out", large="mixer.aggregator.large_kernel",
    reduce="mixer.aggregator.se.fc1", excite="mixer.aggregator.se.fc2", gate="mixer.aggregator.gate",
    project="mixer.aggregator.proj", residual1="residual1", local2="local2", norm2="norm2", expand="ffn.expand",
    hidden="ffn.local.conv", response="ffn.norm", ffn_project="ffn.project", residual2="residual2",
)  # fmt: skip


class FusedBasicBlocks(Packed):
    """(B, C, H, W) -> (B, C', H', W').

    Args:
        module: of the embedding and the blocks; of one of these.
        embed: a convolution, or several with GELU between them.
        blocks: basic blocks, at least one, with the same hyper-parameters.
    """

    def __init__(self, module: nn.Module, embed: nn.Module | None, blocks: Sequence[BasicBlock]):
        convolutions = [] if embed is None else convolutions_of(embed)
        layers = [Parameters(convolution.weight, convolution.bias) for convolution in convolutions]
        for block in blocks:
            layers += BasicParameters(**{name: parameters_of(block, path) for name, path in BASIC_BLOCK.items()})
        super().__init__(module, in_order(layers))
        self.strides = [convolution.stride[0] for convolution in convolutions]
        self.eps = blocks[0].norm.eps

    @classmethod
    def of_stack(cls, stack: BlockStack) -> FusedBasicBlocks:
        return cls(stack, stack.embed, cast("list[BasicBlock]", list(stack.blocks)))

    @classmethod
    def of_block(cls, block: BasicBlock) -> FusedBasicBlocks:
        return cls(block, None, [block])

    def forward(self, x: Tensor) -> Tensor:
        if kernels_apply(x, self.packed):
            return basic_stack(x, self.packed, self.layout, self.strides, self.eps, self.in_bf16)
        return self.plain(x)


class _FusedMixers(Packed):
    def __init__(self, module: nn.Module, blocks: Sequence[MixerBlock]):
        layers: list[Parameters] = []
        for block in blocks:
            of_layers = {name: parameters_of(block, path) for name, path in MIXER_BLOCK.items()}
            mix = _mix_of(block)
            layers += MixerParameters(**of_layers, position_biases=Parameters(mix.rpb_small, mix.rpb_large))
        super().__init__(module, in_order(layers))
        mix = _mix_of(blocks[0])
        self.scale, self.region_grid = mix.scale, mix.region_grid
        self.eps = blocks[0].norm1.eps

    def _mixed(self, x: Tensor, context: Tensor | None = None, prior: Tensor | None = None) -> Tensor | None:
        """The operation's result, where it applies."""
        inputs = [y for y in (x, context, prior) if y is not None]
        if not kernels_apply(*inputs, self.packed):
            return None
        return mixer_stack(
            x, context, prior, self.packed, self.layout, self.scale, self.region_grid, self.eps, self.in_bf16
        )  # fmt: skip


def _mix_of(block: MixerBlock) -> ContMix:
    mix = block.get_submodule("mixer.aggregator.mixer")
    assert isinstance(mix, ContMix)
    return mix


class FusedContMixBlock(_FusedMixers):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: ContMixBlock):
        super().__init__(block, [block])

    def forward(self, x: Tensor) -> Tensor:
        mixed = self._mixed(x)
        return self.plain(x) if mixed is None else mixed


class FusedDynamicBlocks(_FusedMixers):
    """Features (B, C, H, W), context and prior (B, Cc, H, W) to features and context of the same shapes.

    Args:
        module: of the blocks, or the only one.
        blocks: dynamic blocks, at least one, with the same hyper-parameters.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[DynamicBlock]):
        super().__init__(module, blocks)
        self.split = blocks[0].split

    @classmethod
    def of_stage(cls, stage: FocusStage) -> FusedDynamicBlocks:
        return cls(stage, cast("list[DynamicBlock]", list(stage.blocks)))

    @classmethod
    def of_block(cls, block: DynamicBlock) -> FusedDynamicBlocks:
        return cls(block, [block])

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self._mixed(x, context, prior)
        if mixed is None:
            return self.plain(x, context, prior)
        features, context = mixed.split(self.split, dim=1)
        return features, context
