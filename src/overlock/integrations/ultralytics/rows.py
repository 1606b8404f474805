"""The modules that rows of YOLO files may name. Their first two arguments are channels, which ultralytics fills in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2f, Conv

from overlock import blocks
from overlock.tasks.pyramid import Pyramid
from overlock.weights import load_weights

CHANNELS_A_GROUP = 32
"""Value channels of a group of ContMix, for each kernel size twice the head width of 16 that OverLoCK has."""


class ContMixBlock(nn.Module):
    """ContMix as a residual block: ``[-1, 1, ContMixBlock, [512, 7]]``, of as many channels as come in.

    (B, C, H, W) -> (B, C, H, W).

    Args:
        c1, c2: C, twice; ultralytics scales the row's channels by the width of the model.
        kernel_size: K of the large kernel.
        ffn_ratio: hidden width of the ConvFFN over C.

    Raises:
        ValueError: where more or fewer channels come in.
    """

    def __init__(self, c1: int, c2: int, kernel_size: int = 7, ffn_ratio: int = 4):
        super().__init__()
        if c1 != c2:
            raise ValueError(
                f"ContMixBlock keeps the channels: {c1} come in, so it cannot give {c2}; put a Conv before"
            )
        self.block = _make_block(c2, kernel_size, ffn_ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class C2fContMix(C2f):
    """ultralytics' C2f with ContMix blocks in place of its bottlenecks: ``[-1, 2, C2fContMix, [512, 7]]``.

    (B, c1, H, W) -> (B, c2, H, W).

    Args:
        c1, c2: channels in and out.
        n: blocks.
        kernel_size, ffn_ratio: of each block, as in :class:`ContMixBlock`.
        e: width of the blocks over c2.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, kernel_size: int = 7, ffn_ratio: int = 4, e: float = 0.5):
        super().__init__(c1, c2, 0, e=e)
        self.cv2 = Conv((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(_make_block(self.c, kernel_size, ffn_ratio) for _ in range(n))


class DynamicBlocks(nn.Module):
    """Focus-Net's Dynamic Blocks on features and, behind them, their context, as a Concat joins them.

    ``[[6, 12], 1, Concat, [1]]``, then ``[-1, 2, DynamicBlocks, [512, 13]]``: the first 512 channels are the features
    of layer 6, which are given on; the rest are the context, say of a coarser map enlarged.

    (B, c1, H, W) -> (B, c2, H, W).

    Args:
        c1: channels of features and context.
        c2: channels of the features.
        n: blocks.
        kernel_size: K of the large kernel.

    Raises:
        ValueError: where no channels are left for the context.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, kernel_size: int = 7):
        super().__init__()
        if c1 <= c2:
            raise ValueError(
                f"DynamicBlocks takes features and context joined by Concat: {c2} of {c1} channels are features, so "
                f"that there is no context"
            )
        self.split = [c2, c1 - c2]
        self.blocks = nn.ModuleList(
            blocks.DynamicBlock(c2, c1 - c2, groups=_count_groups(c2), kernel_size=kernel_size, first=i == 0)
            for i in range(n)
        )

    def forward(self, x: Tensor) -> Tensor:
        features, prior = x.split(self.split, dim=1)
        context = prior
        for block in self.blocks:
            features, context = block(features, context, prior)
        return features


class OverLoCKBackbone(nn.Module):
    """OverLoCK's features at strides 8, 16 and 32, projected to one width; :class:`FeatureLevel` picks them.

    ``[-1, 1, OverLoCKBackbone, [512, scale, {n: overlock_nano, s: overlock_xt}]]``. Images are those of YOLO, from 0
    to 1; the backbone takes off ImageNet's mean and deviation by itself.

    (B, 3, H, W) -> three times (B, c2, H / stride, W / stride).

    Args:
        c1: channels of the images.
        c2: channels of each map.
        scale: size of the YOLO model, which ultralytics puts for the word ``scale``.
        models: name of the backbone for each scale.
        weights: file of weights for each scale, the authors' or yours; random weights where there is none.

    Raises:
        ValueError: for a scale without a backbone.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        c1: int,
        c2: int,
        scale: str,
        models: Mapping[str, str],
        weights: Mapping[str, str] | None = None,
    ):
        super().__init__()
        if scale not in models:
            raise ValueError(
                f"no backbone for scale {scale!r} of the YOLO model; the row has {', '.join(models)}: name the file "
                f"with one, as in yolo11{next(iter(models), 'n')}-overlock.yaml"
            )
        network = timm.create_model(models[scale], in_chans=c1)
        mean, deviation = (_for_channels(network.pretrained_cfg[name], c1) for name in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)
        self.pyramid = Pyramid(network)
        if weights and scale in weights:
            load_weights(self.pyramid, weights[scale])
        widths = [int(level["num_chs"]) for level in self.pyramid.feature_info[1:]]
        self.projections = nn.ModuleList(Conv(width, c2, 1) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.pyramid((x - self.mean) / self.deviation)[1:]
        return [project(features) for project, features in zip(self.projections, maps, strict=True)]


class FeatureLevel(nn.Module):
    """One of the maps of a backbone: ``[0, 1, FeatureLevel, [512, 1]]``, of as many channels as the backbone's row.

    Args:
        c1, c2: channels of the maps, twice.
        index: 0, 1 or 2 for strides 8, 16 and 32.

    Raises:
        ValueError: where the channels are others than the backbone's.
    """

    def __init__(self, c1: int, c2: int, index: int):
        super().__init__()
        if c1 != c2:
            raise ValueError(f"FeatureLevel must have the {c1} channels of the backbone that it picks from, got {c2}")
        self.index = index

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[self.index]


def _make_block(channels: int, kernel_size: int, ffn_ratio: int) -> blocks.ContMixBlock:
    return blocks.ContMixBlock(
        channels, groups=_count_groups(channels), kernel_size=kernel_size, ffn_ratio=ffn_ratio
    )  # fmt: skip


def _count_groups(channels: int) -> int:
    """Groups of a width near CHANNELS_A_GROUP that divide the channels as ContMix needs it.

    Raises:
        ValueError: for an odd number of channels.
    """
    if channels % 2:
        raise ValueError(f"ContMix needs an even number of channels, got {channels}")
    most = max(1, channels // CHANNELS_A_GROUP)
    return next(groups for groups in range(most, 0, -1) if channels % (2 * groups) == 0)


def _for_channels(numbers: Any, channels: int) -> Tensor:
    """Mean or deviation as (1, C, 1, 1): ImageNet's for three channels, their average for other numbers of them."""
    row = torch.tensor(numbers)
    row = row if channels == len(row) else row.mean().expand(channels)
    return row.view(1, -1, 1, 1).clone()
