"""Table 7: eight token mixers in one frame, a network like Swin-T's whose embeddings overlap.

The paper words the frame's embeddings as not overlapping. Its figures come out with overlapping ones alone, for all of
the mixers that have settings of their own; docs/ablations.md has both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from overlock.ablation.attention import NeighbourhoodAttention, Outlook, ShiftedWindow
from overlock.ablation.dynamic import ContextMixing, DCNv3, DyConv, Involution, ODConv, between_projections
from overlock.ablation.frame import Frame, build_alike
from overlock.ablation.roadmap import FFN, Published, Row
from overlock.layers import DilatedRepConv
from overlock.layers.arguments import check_rate, make_drop_path
from overlock.network.base_net import BlockStack, make_embedding

Maker = Callable[[int, int], nn.Module]
"""Makes a mixer, (B, C, H, W) -> (B, C, H, W), given C and the number of its block in the stage, from 0."""
STEM_STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}
SHAPES = {
    "paper": ((64, 128, 256, 512), (2, 2, 6, 2)),
    "small": ((32, 64, 128, 192), (1, 1, 2, 1)),
}
"""Widths and depths of the four stages."""


class Stem(nn.Sequential):
    """Two 3x3 convolutions, batch-normed. (B, Cin, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        if stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride must be one of {sorted(STEM_STRIDES)}, got {stride}")
        first, second = STEM_STRIDES[stride]
        half = channels // 2
        super().__init__(
            make_embedding(in_channels, half, first), nn.GELU(), make_embedding(half, channels, second)
        )  # fmt: skip


class MixerLayer(nn.Module):
    """x = x + mixer(LN(x)), then x = x + FFN(x), which has a layer norm too. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.mixer = mixer
        self.ffn = FFN(channels, 4 * channels)
        self.drop_path = make_drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x)))
        return x + self.drop_path(self.ffn(x))


class MixerNet(Frame):
    """The frame: four stages of layers that differ in their mixer alone. (B, Cin, H, W) -> (B, num_classes).

    Args:
        make: of the mixers.
        size: one of SHAPES.
        in_chans, num_classes, global_pool, stem_stride, drop_rate, drop_path_rate, deploy: as in OverLoCK.

    Raises:
        ValueError: for an argument that cannot be meant.
    """

    def __init__(  # noqa: PLR0913 - public keywords, as timm's models have them
        self,
        make: Maker,
        *,
        size: str = "paper",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
    ):
        if size not in SHAPES:
            raise ValueError(f"size must be one of {', '.join(SHAPES)}, got {size!r}")
        check_rate("drop_path_rate", drop_path_rate)
        dims, depths = SHAPES[size]
        head = ClassifierHead(dims[3], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        super().__init__(
            head=head, head_width=dims[3] * head.global_pool.feat_mult(), widths=dims,
            modules=("stages.0", "stages.1", "stages.2", "norm"), in_chans=in_chans, num_classes=num_classes,
            stem_stride=stem_stride,
        )  # fmt: skip
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            BlockStack(
                make_embedding(dims[i - 1], dims[i]) if i else Stem(in_chans, dims[0], stem_stride),
                [MixerLayer(dims[i], make(dims[i], j), rate) for j, rate in enumerate(rates[i])],
            )
            for i in range(4)
        )
        self.norm = LayerNorm2d(dims[3], eps=1e-6)
        if deploy:
            for module in self.modules():
                if isinstance(module, DilatedRepConv):
                    module.reparameterize()

    def features(self, x: Tensor, last: int = 3) -> list[Tensor]:
        features = []
        for i, stage in enumerate(self.stages):
            if i <= last:
                x = stage(x)
                features.append(x)
        return [*features[:-1], self.norm(features[-1])] if last > 2 else features


def make_row(make: Maker, title: str, paper: Published | None = None) -> Row:
    """The network of a mixer.

    Args:
        make: of the mixers.
        title: in tables.
        paper: what Table 7 prints of it.
    """
    return Row(title=title, build=partial(build_alike, partial(MixerNet, make)), paper=paper)


def _row(title: str, make: Maker, *paper: float) -> Row:
    macs, params, top1, miou = paper
    return make_row(make, title, Published(macs=macs, params=params, top1=top1, miou=miou))


MIXERS = {
    "dyconv": _row("DyConv", lambda c, _: between_projections(c, DyConv(c)), 1.7, 12.5, 77.5, 36.3),
    "odconv": _row("ODConv", lambda c, _: between_projections(c, ODConv(c)), 1.7, 13.8, 77.9, 36.7),
    "involution": _row("Involution", lambda c, _: between_projections(c, Involution(c)), 1.9, 12.2, 78.3, 37.5),
    "volo": _row("VOLO", lambda c, _: Outlook(c), 2.3, 14.1, 75.5, 35.6),
    "dcnv3": _row("DCNv3", lambda c, _: DCNv3(c), 2.6, 16.3, 78.7, 37.5),
    "window": _row("Shifted Window", lambda c, i: ShiftedWindow(c, shift=3 * (i % 2)), 2.2, 13.6, 78.4, 37.4),
    "natten": _row("Natten", lambda c, _: NeighbourhoodAttention(c), 2.2, 13.6, 78.6, 38.1),
    "contmix": _row("ContMix (Ours)", lambda c, _: ContextMixing(c), 2.2, 13.1, 78.8, 39.0),
}
"""The rows of Table 7 in its order."""
