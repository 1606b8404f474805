"""The networks of the roadmap without dynamic blocks: plain, recurrent, and the three sub-networks of Figure 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from overlock.ablation.frame import Frame
from overlock.blocks import BasicBlock
from overlock.layers.arguments import check_rate
from overlock.network.base_net import BlockStack, Stem, make_embedding
from overlock.network.focus_net import resize_like
from overlock.network.heads import ClassifierHead

MakeBlock = Callable[..., BasicBlock]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths and depths of a network of basic blocks."""

    dims: tuple[int, ...]
    """Channels of stages 1 to 4."""
    depths: tuple[int, ...]
    """Blocks of stages 1 to 4, and of Focus-Net's stages 3 and 4 where there is one."""
    kernel_sizes: tuple[int, ...]
    """Of stages 1 to 4."""
    head_width: int
    """Channels of the classifier's hidden layer."""


class Stages(nn.Module):
    """Stages in a row: the first one after the stem."""

    def __init__(self, stages: Sequence[BlockStack]):
        super().__init__()
        self.stages = nn.ModuleList(stages)


class StageNet(Frame):
    """What the networks below share: their stages are made here, of any block, and the head.

    Args:
        shape: widths and depths.
        make_block: of a stage.
        modules: names of the modules that give the four features.
        in_chans, num_classes, global_pool, stem_stride, drop_rate, drop_path_rate, deploy: as in OverLoCK.
    """

    def __init__(  # noqa: PLR0913 - public keywords, as timm's models have them
        self,
        shape: Shape,
        *,
        make_block: MakeBlock = BasicBlock,
        modules: tuple[str, ...],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
    ):
        check_rate("drop_path_rate", drop_path_rate)
        head = ClassifierHead(
            shape.dims[3], shape.head_width, num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        super().__init__(
            head=head, head_width=head.num_features, widths=shape.dims, modules=modules, in_chans=in_chans,
            num_classes=num_classes, stem_stride=stem_stride,
        )  # fmt: skip
        self.shape, self.stem_stride, self.make_block, self.deploy = shape, stem_stride, make_block, deploy
        self.rates = calculate_drop_path_rates(drop_path_rate, list(shape.depths), stagewise=True)

    def make_stage(self, number: int, place: int | None = None, *, embed: bool = True) -> BlockStack:
        """A stage of Table 1.

        Args:
            number: 1 to 4.
            place: among the depths, where a stage comes twice.
            embed: begin with a stem or embedding.
        """
        i = number - 1
        dims = self.shape.dims
        first: nn.Module = nn.Identity()
        if embed:
            first = make_embedding(dims[i - 1], dims[i]) if i else Stem(self.in_chans, dims[0], self.stem_stride)
        blocks = [
            self.make_block(
                dims[i], kernel_size=self.shape.kernel_sizes[i], scaled=i >= 2, drop_path=rate, deploy=self.deploy
            )
            for rate in self.rates[i if place is None else place]
        ]
        return BlockStack(first, blocks)


class PlainNet(StageNet):
    """Four stages in a row, without an overview. (B, Cin, H, W) -> (B, num_classes)."""

    def __init__(self, shape: Shape, **arguments: Any):
        super().__init__(shape, modules=tuple(f"base_net.stages.{i}" for i in range(4)), **arguments)
        self.base_net = Stages([self.make_stage(number) for number in (1, 2, 3, 4)])

    def features(self, x: Tensor, last: int = 3) -> list[Tensor]:
        features = []
        for i, stage in enumerate(self.base_net.stages):
            if i <= last:
                x = stage(x)
                features.append(x)
        return features


class RecurrentNet(PlainNet):
    """The plain network, whose stages 3 and 4 look twice: what they found is fed back to their input.

    The output of stage 4 is enlarged to that of stage 2, joined with it, and brought back to its channels.
    """

    def __init__(self, shape: Shape, **arguments: Any):
        super().__init__(shape, **arguments)
        self.fusion = nn.Conv2d(shape.dims[1] + shape.dims[3], shape.dims[1], kernel_size=1)

    def features(self, x: Tensor, last: int = 3) -> list[Tensor]:
        features = super().features(x, min(last, 1))
        if last < 2:
            return features
        given = features[1]
        _, _, stage3, stage4 = self.base_net.stages
        found = resize_like(stage4(stage3(given)), given)
        again = stage3(self.fusion(torch.cat([given, found], dim=1)))
        return [*features, again, stage4(again)] if last > 2 else [*features, again]


class OverviewStage(nn.Module):
    """Stage 4 as a quick look. (B, C3, H, W) -> (B, C4, H/2, W/2)."""

    def __init__(self, stage: BlockStack):
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x)


class StaticFocus(nn.Module):
    """Stages 3 and 4 once more, of basic blocks, on features that the overview has gone into."""

    def __init__(self, stage3: BlockStack, stage4: BlockStack):
        super().__init__()
        self.stage3, self.stage4 = stage3, stage4


class DeepStageNet(StageNet):
    """The deep-stage decomposition (DDS) without dynamic blocks: Base-Net, Overview-Net, Focus-Net of basic blocks.

    Args:
        shape: widths and depths.
        feed: give Focus-Net the features of Base-Net beside the overview, joined by a 1x1 convolution; without it a 3x3
            convolution of the overview is all that Focus-Net sees ("w/o feature feed").
    """

    def __init__(self, shape: Shape, *, feed: bool, **arguments: Any):
        modules = ("base_net.stages.0", "base_net.stages.1", "focus_net.stage3", "focus_net.stage4")
        super().__init__(shape, modules=modules, **arguments)
        self.feed = feed
        self.base_net = Stages([self.make_stage(number) for number in (1, 2, 3)])
        self.overview_net = OverviewStage(self.make_stage(4))
        width, overview = shape.dims[2:]
        joined = width + overview if feed else overview
        self.fusion = nn.Conv2d(joined, width, kernel_size=1 if feed else 3, padding=0 if feed else 1)
        self.focus_net = StaticFocus(self.make_stage(3, 4, embed=False), self.make_stage(4, 5))

    def features(self, x: Tensor, last: int = 3) -> list[Tensor]:
        first = self.base_net.stages[0](x)
        second = self.base_net.stages[1](first)
        if last < 2:
            return [first, second]
        base = self.base_net.stages[2](second)
        overview = resize_like(self.overview_net(base), base)
        seen = torch.cat([base, overview], dim=1) if self.feed else overview
        third = self.focus_net.stage3(self.fusion(seen))
        features = [first, second, third]
        return [*features, self.focus_net.stage4(third)] if last > 2 else features
