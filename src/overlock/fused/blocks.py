"""The blocks of the fused network on CPU: one operation where its kernels run, elsewhere the folded blocks.

Blocks that come one after another are one operation too. Between two of them, Python would find nothing of its own in
the caches, which took a third of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from overlock.blocks import BasicBlock, DynamicBlock
from overlock.fused import stage_operators as ops
from overlock.fused.flat_parameters import Packed
from overlock.fused.layers import convolutions_of
from overlock.network.base_net import BlockStack
from overlock.network.focus_net import FocusStage


class FusedBasicBlocks(Packed):
    """(B, C, H, W) -> (B, C', H', W').

    Args:
        module: of the embedding and the blocks; of one of these.
        embed: a convolution, or several with GELU between them.
        blocks: basic blocks, at least one, with the same hyper-parameters.
    """

    def __init__(self, module: nn.Module, embed: nn.Module | None, blocks: Sequence[Any]):
        convolutions = [] if embed is None else convolutions_of(embed)
        layers = [layer for block in blocks for layer in _basic_layers(block)]
        super().__init__(module, ops.parameters_of([*convolutions, *layers]))
        self.strides = [convolution.stride[0] for convolution in convolutions]
        self.eps = blocks[0].norm.eps

    @classmethod
    def of_stack(cls, stack: BlockStack) -> FusedBasicBlocks:
        return cls(stack, stack.embed, list(stack.blocks))

    @classmethod
    def of_block(cls, block: BasicBlock) -> FusedBasicBlocks:
        return cls(block, None, [block])

    def forward(self, x: Tensor) -> Tensor:
        if ops.kernels_apply([x, self.packed]):
            return ops.basic_stack(x, self.packed, self.layout, self.strides, self.eps)
        return self.plain(x)


def _basic_layers(block: Any) -> ops.BasicLayers:
    ffn = block.ffn
    return ops.BasicLayers(
        local=block.local, norm=block.norm, large=block.large_kernel, reduce=block.se.fc1, excite=block.se.fc2,
        expand=ffn.expand, hidden=ffn.local.conv, response=ffn.norm, project=ffn.project, residual=block.residual,
    )  # fmt: skip


class _FusedMixers(Packed):
    def __init__(self, module: nn.Module, blocks: Sequence[Any]):
        layers = [layer for block in blocks for layer in _mixer_layers(block)]
        super().__init__(module, ops.parameters_of(layers))
        mix = blocks[0].mixer.aggregator.mixer
        self.kernel_size, self.scale, self.region_grid = mix.kernel_size, mix.scale, mix.region_grid
        self.eps = blocks[0].norm1.eps

    def _mixed(self, x: Tensor, context: Tensor | None = None, prior: Tensor | None = None) -> Tensor | None:
        """The operation's result, where it applies; not to maps that are to be enlarged."""
        inputs = [y for y in (x, context, prior) if y is not None]
        if min(x.shape[2:]) < self.kernel_size or not ops.kernels_apply([*inputs, self.packed]):
            return None
        return ops.mixer_stack(
            x, context, prior, self.packed, self.layout, self.scale, self.region_grid, self.eps
        )  # fmt: skip


def _mixer_layers(block: Any) -> ops.MixerLayers:
    aggregator, ffn = block.mixer.aggregator, block.ffn
    mix, fusion, update = aggregator.mixer, getattr(block.mixer, "fusion", None), getattr(block, "context_update", None)
    return ops.MixerLayers(
        alpha=getattr(update, "alpha", None), beta=getattr(update, "beta", None), local1=block.local1,
        norm1=block.norm1, fusion=getattr(fusion, "local", None), fusion_project=getattr(fusion, "project", None),
        fusion_norm=getattr(fusion, "norm", None), query=mix.query, key=mix.key, value=mix.value, kernels=mix.kernels,
        out=mix.out, large=aggregator.large_kernel, reduce=aggregator.se.fc1, excite=aggregator.se.fc2,
        gate=aggregator.gate, project=aggregator.proj, residual1=block.residual1, local2=block.local2,
        norm2=block.norm2, expand=ffn.expand, hidden=ffn.local.conv, response=ffn.norm, ffn_project=ffn.project,
        residual2=block.residual2, rpbs=ops.Parameters(mix.rpb_small, mix.rpb_large),
    )  # fmt: skip


class FusedContMixBlock(_FusedMixers):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: Any):
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

    def __init__(self, module: nn.Module, blocks: Sequence[Any]):
        super().__init__(module, blocks)
        self.split = blocks[0].split

    @classmethod
    def of_stage(cls, stage: FocusStage) -> FusedDynamicBlocks:
        return cls(stage, list(stage.blocks))

    @classmethod
    def of_block(cls, block: DynamicBlock) -> FusedDynamicBlocks:
        return cls(block, [block])

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self._mixed(x, context, prior)
        if mixed is None:
            return self.plain(x, context, prior)
        features, context = mixed.split(self.split, dim=1)
        return features, context
