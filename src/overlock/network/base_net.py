"""Base-Net: low- and mid-level features, stages 1 to 3 (Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from overlock.blocks import BasicBlock
from overlock.layers import ConvNorm
from overlock.layers.checkpointing import checkpoint_block
from overlock.network.space_to_batch import batch_to_space, space_to_batch
from overlock.network.variants import Variant

torch.fx.wrap("space_to_batch")
torch.fx.wrap("batch_to_space")

STEM_STRIDES = {4: (2, 1, 2, 1), 2: (2, 1, 1, 1), 1: (1, 1, 1, 1)}


def make_embedding(in_channels: int, out_channels: int, stride: int = 2, dilation: int = 1) -> ConvNorm:
    """Overlapping embedding between stages: 3x3 convolution and batch norm."""
    conv = nn.Conv2d(
        in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )  # fmt: skip
    return ConvNorm(conv, out_channels)


class Stem(nn.Sequential):
    """Four 3x3 convolutions, batch-normed, GELU between them. (B, Cin, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 4):
        if stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride must be one of {sorted(STEM_STRIDES)}, got {stride}")
        widths = (in_channels, channels // 2, channels // 2, channels, channels)
        layers: list[nn.Module] = []
        for i, step in enumerate(STEM_STRIDES[stride]):
            layers += [make_embedding(widths[i], widths[i + 1], step), nn.GELU()]
        super().__init__(*layers[:-1])


class BlockStack(nn.Module):
    """An embedding and the basic blocks after it, dilated or not. (B, Cin, H, W) -> (B, C, H', W')."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], dilation: int = 1):
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.dilation = dilation
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        embedded = x
        if self.dilation > 1:
            x = space_to_batch(x, self.dilation)
        for block in self.blocks:
            x = checkpoint_block(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
        return x if self.dilation == 1 else batch_to_space(x, self.dilation, embedded)


class BaseNet(nn.Module):
    """Stem and three stages of basic blocks.

    Args:
        variant: a row of Table 1.
        in_chans: channels of the images.
        stem_stride: 4, or 2 or 1 for small images.
        dilation: of stage 3, 1, or 2 where its embedding is to keep the size.
        drop_path: stochastic depth rates, one list a stage.
        deploy: build the Dilated RepConvs merged.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        in_chans: int,
        stem_stride: int,
        dilation: int,
        drop_path: Sequence[Sequence[float]],
        deploy: bool,
    ):
        super().__init__()
        dims, dilations = variant.dims, (1, 1, dilation)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(variant.base_depths):
            if i == 0:
                embed: nn.Module = Stem(in_chans, dims[0], stem_stride)
            else:
                embed = make_embedding(dims[i - 1], dims[i], stride=2 // dilations[i])
            blocks = [
                BasicBlock(
                    dims[i],
                    kernel_size=variant.kernel_sizes[i],
                    scaled=i == 2,
                    drop_path=drop_path[i][j],
                    deploy=deploy,
                )
                for j in range(depth)
            ]
            self.stages.append(BlockStack(embed, blocks, dilations[i]))

    def forward(self, x: Tensor, stages: int = 3) -> list[Tensor]:
        """Images (B, Cin, H, W) to the outputs of the first stages, strides 4, 8 and 16 with the default stem."""
        features: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i < stages:
                x = stage(x)
                features.append(x)
        return features
