"""Overview-Net: a quick look at the whole image, and the context prior it gives (Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from overlock.blocks import BasicBlock
from overlock.network.base_net import BlockStack, make_embedding
from overlock.network.variants import Variant


class OverviewNet(nn.Module):
    """One light stage on Base-Net's output; its channels reduced to a quarter are the context prior P(0).

    Args:
        variant: a row of Table 1.
        dilation: of stage 3 and of this one, the same or doubled; doubled where its embedding is to keep the size.
        drop_path: stochastic depth rates.
        deploy: build the Dilated RepConvs merged.
    """

    def __init__(self, variant: Variant, *, dilation: tuple[int, int], drop_path: Sequence[float], deploy: bool):
        super().__init__()
        channels = variant.dims[3]
        blocks = [
            BasicBlock(channels, kernel_size=variant.kernel_sizes[3], scaled=True, drop_path=rate, deploy=deploy)
            for rate in drop_path
        ]
        embed = make_embedding(variant.dims[2], channels, 2 * dilation[0] // dilation[1], dilation[0])
        self.stage = BlockStack(embed, blocks, dilation[1])
        self.reduce = nn.Conv2d(channels, variant.context_dim, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Base-Net's output (B, C3, H, W) to the overview (B, C4, H/2, W/2) and the prior (B, C4 / 4, H/2, W/2).

        Both have the size of the input where the embedding keeps it.
        """
        overview = self.stage(x)
        return overview, self.reduce(overview)
