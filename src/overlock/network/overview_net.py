"""Overview-Net: a quick look at the whole image, and the context prior it gives (Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from overlock.blocks import BasicBlock
from overlock.network.base_net import BlockStack, make_embedding
from overlock.network.variants import Variant


class OverviewNet(nn.Module):
    """One light stage on Base-Net's output; its channels reduced to a quarter are the context prior P(0)."""

    def __init__(self, variant: Variant, *, drop_path: Sequence[float], deploy: bool):
        super().__init__()
        channels = variant.dims[3]
        blocks = [
            BasicBlock(channels, kernel_size=variant.kernel_sizes[3], scaled=True, drop_path=rate, deploy=deploy)
            for rate in drop_path
        ]
        self.stage = BlockStack(make_embedding(variant.dims[2], channels), blocks)
        self.reduce = nn.Conv2d(channels, variant.context_dim, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Base-Net's output (B, C3, H, W) to the overview (B, C4, H/2, W/2) and the prior (B, C4 / 4, H/2, W/2)."""
        overview = self.stage(x)
        return overview, self.reduce(overview)
