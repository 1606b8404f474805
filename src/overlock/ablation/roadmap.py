"""Table 6: twelve networks from a plain ConvNet to OverLoCK-XT, each of the blocks of the one at its end.

The paper states neither widths nor depths of the rows before the last. Those here reproduce the figures that it prints
for each of them; docs/ablations.md has both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from overlock.ablation.frame import build_alike
from overlock.ablation.static import DeepStageNet, PlainNet, RecurrentNet, Shape
from overlock.blocks import BasicBlock, DynamicBlock
from overlock.layers import GDSA, Aggregator, ConvNorm, DilatedRepConv
from overlock.layers.depthwise_conv import DepthwiseConv
from overlock.network import VARIANTS, OverLoCK, Variant


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of Table 6 or 7 of the paper (arXiv:2502.20087), ImageNet-1K for 120 epochs, ADE20K for 80 000 steps."""

    macs: float
    """Multiply-adds in G at 224 x 224, the paper's FLOPs."""
    params: float
    """Parameters in M."""
    top1: float
    """Accuracy on ImageNet-1K in %."""
    miou: float
    """Mean IoU on ADE20K in %, with UperNet."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network of a table."""

    title: str
    """As the paper has it."""
    build: Callable[..., nn.Module]
    """The network, of timm's keywords and ``size``, one of SIZES."""
    paper: Published | None
    """What the paper prints; None for networks that it does not have."""
    has_aux_head: bool = False
    """Whether it is trained with the auxiliary loss, by the keyword ``aux_head``."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths and depths of the whole roadmap."""

    plain: Shape
    """Of rows 1 to 6."""
    deep_stages: Shape
    """Of the two rows of static sub-networks."""
    variant: Variant
    """Of the last four rows."""


_XT = VARIANTS["overlock_xt"]
_SMALL = replace(
    VARIANTS["overlock_atto"], dims=(24, 40, 64, 80), groups=(4, 5), kernel_sizes=(11, 9, 7, 7), head_width=256
)
SIZES = {
    "paper": Size(
        plain=Shape(
            dims=(56, 112, 304, 400), depths=(2, 2, 9, 4), kernel_sizes=_XT.kernel_sizes, head_width=_XT.head_width
        ),
        deep_stages=Shape(
            dims=(56, 112, 304, 336), depths=tuple(_XT.depths), kernel_sizes=_XT.kernel_sizes, head_width=_XT.head_width
        ),
        variant=_XT,
    ),
    "small": Size(
        plain=Shape(
            dims=(24, 40, 72, 96), depths=(1, 1, 5, 2), kernel_sizes=_SMALL.kernel_sizes, head_width=_SMALL.head_width
        ),
        deep_stages=Shape(
            dims=(24, 40, 72, 80), depths=tuple(_SMALL.depths), kernel_sizes=_SMALL.kernel_sizes,
            head_width=_SMALL.head_width,
        ),
        variant=_SMALL,
    ),
}  # fmt: skip
"""``paper``: XT's. ``small``: about a million parameters and the same proportions, for small images and budgets."""


# Rows 1 to 5: what the basic block has is taken away, last come first gone


class FFN(nn.Sequential):
    """A feed-forward network of two 1x1 convolutions, under the names of the ConvFFN. (B, C, H, W) -> (B, C, H, W).

    It begins with a layer norm, as feed-forward networks do; the ConvFFN has its response norm instead.
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, hidden_channels, kernel_size=1)
        self.act = nn.GELU()
        self.project = nn.Conv2d(hidden_channels, channels, kernel_size=1)


def _plain_kernel(block: BasicBlock) -> nn.Module:
    channels, _, size, _ = cast(DilatedRepConv, block.large_kernel.conv).large.weight.shape
    return ConvNorm(DepthwiseConv(channels, size), channels)


def _nothing(_: BasicBlock) -> nn.Module:
    return nn.Identity()


STEPS: dict[str, Callable[[BasicBlock], nn.Module]] = dict(
    large_kernel=_plain_kernel,
    se=_nothing,
    local=_nothing,
    ffn=lambda block: FFN(block.ffn.expand.in_channels, block.ffn.expand.out_channels),
)
"""Parts of the basic block in the order in which the roadmap adds them, and what stands for each before."""


def _make_block(done: int, channels: int, **arguments: Any) -> BasicBlock:
    """The basic block after so many steps."""
    block = BasicBlock(channels, **arguments)
    for name in list(STEPS)[done:]:
        setattr(block, name, STEPS[name](block))
    return block


def _size(name: str) -> Size:
    if name not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {name!r}")
    return SIZES[name]


def _build_plain(done: int, *, size: str = "paper", **arguments: Any) -> nn.Module:
    return PlainNet(_size(size).plain, make_block=partial(_make_block, done), **arguments)


def _build_recurrent(*, size: str = "paper", **arguments: Any) -> nn.Module:
    return RecurrentNet(_size(size).plain, **arguments)


def _build_deep_stages(feed: bool, *, size: str = "paper", **arguments: Any) -> nn.Module:
    return DeepStageNet(_size(size).deep_stages, feed=feed, **arguments)


# Rows 9 to 12: OverLoCK without what comes later


class UngatedAggregator(nn.Module):
    """An aggregator's parts but for its gate: y = W SE(mixer(x) + DilatedRepConv(x))."""

    def __init__(self, gated: Aggregator):
        super().__init__()
        self.mixer, self.large_kernel, self.se, self.proj = gated.mixer, gated.large_kernel, gated.se, gated.proj

    def forward(self, features: Tensor, query: Tensor, context: Tensor) -> Tensor:
        return self.proj(self.se(self.mixer(features, query, context) + self.large_kernel(features)))


def _dynamic_blocks(network: OverLoCK) -> Iterator[DynamicBlock]:
    for stage in (network.focus_net.stage3, network.focus_net.stage4):
        yield from cast("Iterator[DynamicBlock]", iter(stage.blocks))


def _build_overlock(gate: bool, initial_prior: bool, *, size: str = "paper", **arguments: Any) -> nn.Module:
    network = OverLoCK(_size(size).variant, **arguments)
    for block in _dynamic_blocks(network):
        if not gate:
            mixer = cast(GDSA, block.mixer)
            mixer.aggregator = UngatedAggregator(mixer.aggregator)  # type: ignore[assignment]
        if not initial_prior:
            block.context_update = None
    return network


def _row(title: str, build: Callable[..., nn.Module], *paper: float, has_aux_head: bool = False) -> Row:
    macs, params, top1, miou = paper
    published = Published(macs=macs, params=params, top1=top1, miou=miou)
    return Row(title=title, build=partial(build_alike, build), paper=published, has_aux_head=has_aux_head)


ROADMAP = {
    "plain": _row("PlainNet", partial(_build_plain, 0), 2.5, 15.7, 76.3, 38.8),
    "repconv": _row("w/ Dilated RepConv", partial(_build_plain, 1), 2.5, 15.7, 76.6, 39.3),
    "se": _row("w/ SE", partial(_build_plain, 2), 2.5, 16.0, 77.1, 39.6),
    "local": _row("w/ Local Conv", partial(_build_plain, 3), 2.5, 16.1, 78.0, 40.2),
    "convffn": _row("FFN→ConvFFN (Baseline)", partial(_build_plain, 4), 2.6, 16.3, 78.5, 41.1),
    "recurrent": _row("Recurrent Model", _build_recurrent, 4.4, 16.4, 76.8, 39.5),
    "dds": _row("DDS Model", partial(_build_deep_stages, True), 2.6, 15.6, 79.0, 41.6),
    "no_feed": _row("w/o feature feed", partial(_build_deep_stages, False), 2.7, 16.3, 78.2, 40.0),
    "dynamic": _row("Static→Dynamic", partial(_build_overlock, False, False), 2.6, 15.8, 80.0, 42.9),
    "aux_loss": _row(
        "w/ Aux Loss", partial(_build_overlock, False, False), 2.6, 15.8, 80.2, 43.1, has_aux_head=True
    ),
    "initial_prior": _row(
        "w/ Initial Prior", partial(_build_overlock, False, True), 2.6, 15.8, 80.4, 43.4, has_aux_head=True
    ),
    "gate": _row(
        "w/ Gate (OverLoCK-XT)", partial(_build_overlock, True, True), 2.6, 16.4, 80.8, 43.8, has_aux_head=True
    ),
}  # fmt: skip
"""The rows of Table 6 in its order. The last one is OverLoCK-XT itself."""
