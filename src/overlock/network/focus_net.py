"""Focus-Net: a second, close look at Base-Net's features, guided by the context prior (Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.blocks import DynamicBlock
from overlock.layers.checkpointing import checkpoint_block
from overlock.network.base_net import make_embedding
from overlock.network.space_to_batch import batch_to_space, space_to_batch
from overlock.network.variants import Variant

torch.fx.wrap("space_to_batch")
torch.fx.wrap("batch_to_space")


@torch.fx.wrap
def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map bilinearly to the height and width of another."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class FocusStage(nn.Module):
    """Dynamic blocks of one resolution; the context flows from block to block beside the features."""

    def __init__(self, blocks: Sequence[DynamicBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, context = checkpoint_block(block, x, context, prior)
            else:
                x, context = block(x, context, prior)
        return x, context


class FocusNet(nn.Module):
    """Stages 3 and 4 once more, now of dynamic blocks.

    The prior is resized to stage 3's map, where it is both the first context and the prior of every block; stage 4
    starts from the running context, embedded like the features, and takes the prior as it is.

    Args:
        variant: a row of Table 1.
        dilation: of stages 3 and 4, the same or doubled; doubled where the embeddings between are to keep the size.
        drop_path: stochastic depth rates, one list a stage.
        deploy: build the Dilated RepConvs merged.
    """

    def __init__(
        self, variant: Variant, *, dilation: tuple[int, int], drop_path: Sequence[Sequence[float]], deploy: bool
    ):
        super().__init__()
        self.dilation, self.step = dilation[0], dilation[1] // dilation[0]  # of stage 3, and of stage 4 in its maps
        dims, context_dim = variant.dims[2:], variant.context_dim
        stages = [
            FocusStage(
                [
                    DynamicBlock(
                        dims[i],
                        context_dim,
                        groups=variant.groups[i],
                        kernel_size=variant.kernel_sizes[2 + i],
                        first=i == j == 0,
                        drop_path=drop_path[i][j],
                        deploy=deploy,
                    )
                    for j in range(depth)
                ]
            )
            for i, depth in enumerate(variant.focus_depths)
        ]
        self.stage3, self.stage4 = stages
        self.embed_features = make_embedding(dims[0], dims[1], 2 // self.step)
        self.embed_context = make_embedding(context_dim, context_dim, 2 // self.step)

    def forward(self, x: Tensor, prior: Tensor, last: bool = True) -> list[Tensor]:
        """Look again.

        Args:
            x: Base-Net's output (B, C3, H, W).
            prior: context prior (B, Cc, H/2, W/2), or (B, Cc, H, W) where the embeddings keep the size.
            last: go on to stage 4.

        Returns:
            Features and context side by side after stage 3, (B, C3 + Cc, H, W), and after stage 4,
            (B, C4 + Cc, H/2, W/2) or (B, C4 + Cc, H, W).
        """
        given = x
        x, prior = space_to_batch(x, self.dilation), space_to_batch(prior, self.dilation)
        # Stage 3 is used to a prior as smooth as a coarse one enlarged.
        prior_here = resize_like(prior[:, :, :: self.step, :: self.step], x)
        x, context = self.stage3(x, prior_here, prior_here)
        features = [batch_to_space(torch.cat([x, context], dim=1), self.dilation, given)]
        if last and self.stage4 is not None:
            x, context = self.embed_features(x), self.embed_context(context)
            embedded = x
            x, context = space_to_batch(x, self.step), space_to_batch(context, self.step)
            prior = space_to_batch(prior, self.step)
            x, context = self.stage4(x, context, prior)
            x = batch_to_space(torch.cat([x, context], dim=1), self.step, embedded)
            features.append(batch_to_space(x, self.dilation, given))
        return features

    def prune_last(self) -> None:
        """Drop stage 4 and the embeddings to it."""
        self.stage4 = self.embed_features = self.embed_context = None  # type: ignore[assignment]
