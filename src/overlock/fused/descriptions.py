"""The parts of the network, described as their classes build them (in the words of structure.py).

First the layers, then what can be folded, then the folded blocks and stages that our kernels for the CPU do.
"""

from __future__ import annotations

from timm.layers import DropPath, LayerNorm2d
from timm.layers.activations import Sigmoid
from torch import nn

from overlock.blocks import BasicBlock, ContMixBlock, DynamicBlock
from overlock.blocks.dynamic_block import ContextUpdate, SelfMixer
from overlock.fused.structure import Reason, absent, alternating, anything, each, kind, one_of
from overlock.layers import (
    GDSA,
    AffineScale,
    Aggregator,
    BatchNorm2d,
    ContMix,
    ConvFFN,
    ConvNorm,
    DilatedRepConv,
    GlobalResponseNorm,
    LocalConv,
    NormConv,
)
from overlock.layers.conv_ffn import FoldedResidual, Residual, ScaledResidual
from overlock.layers.depthwise_conv import DepthwiseConv
from overlock.layers.gdsa import SqueezeExcite
from overlock.network.base_net import BlockStack, Stem
from overlock.network.focus_net import FocusStage
from overlock.network.heads import AuxiliaryHead

WEIGHT, BIAS = ("weight",), ("bias",)
BOTH = WEIGHT + BIAS
STATISTICS = ("running_mean", "running_var")


# Settings of convolutions


def _size_kept(conv: nn.Conv2d) -> dict[str, object]:
    """Zeros around the map, as many as keep its size at stride 1."""
    size, stride, odd = conv.kernel_size[0], conv.stride[0], conv.kernel_size[0] | 1
    return dict(
        kernel_size=(odd, odd), stride=(stride, stride), padding=(size // 2, size // 2), dilation=(1, 1),
        padding_mode="zeros",
    )  # fmt: skip


def _of_all_channels(conv: nn.Conv2d) -> dict[str, object]:
    return _size_kept(conv) | dict(groups=1)


def _of_each_channel(conv: nn.Conv2d) -> dict[str, object]:
    return _size_kept(conv) | dict(stride=(1, 1), groups=conv.in_channels, out_channels=conv.in_channels)


def _of_each_position(conv: nn.Conv2d) -> dict[str, object]:
    return _of_all_channels(conv) | dict(kernel_size=(1, 1), stride=(1, 1))


def _three_wide(conv: nn.Conv2d) -> dict[str, object]:
    return _of_each_channel(conv) | dict(kernel_size=(3, 3))


def _dilated(conv: nn.Conv2d) -> dict[str, object]:
    rate = conv.dilation[0]
    padding = rate * (conv.kernel_size[0] // 2)
    return _of_each_channel(conv) | dict(padding=(padding, padding), dilation=(rate, rate))


# Layers

IDENTITY = kind(nn.Identity)
GELU = kind(nn.GELU, expected=lambda _: dict(approximate="none"))
SILU = kind(nn.SiLU)
SIGMOID = kind(nn.Sigmoid, Sigmoid)
NO_DROP = kind(nn.Identity, DropPath)  # the same in evaluation

CONVOLUTION = kind(nn.Conv2d, tensors=WEIGHT, optional=BIAS, expected=_of_all_channels)
POINTWISE = kind(nn.Conv2d, tensors=WEIGHT, optional=BIAS, expected=_of_each_position)
DEPTHWISE = kind(nn.Conv2d, DepthwiseConv, tensors=WEIGHT, optional=BIAS, expected=_of_each_channel)
PROJECTION = kind(nn.Conv2d, tensors=BOTH, expected=_of_each_position)
LARGE_KERNEL = kind(nn.Conv2d, DepthwiseConv, tensors=BOTH, expected=_of_each_channel)
LOCAL_CONV = kind(nn.Conv2d, DepthwiseConv, tensors=BOTH, expected=_three_wide)
LINEAR = kind(nn.Linear, tensors=BOTH)
AFFINE_SCALE = kind(AffineScale, tensors=BOTH)
LAYER_NORM = kind(LayerNorm2d, tensors=BOTH)
RESPONSE_NORM = kind(GlobalResponseNorm, tensors=BOTH)
BATCH_NORM = kind(
    nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm, tensors=BOTH + STATISTICS, optional=("num_batches_tracked",)
)


# What can be folded, where its own parts are folded already


def _why_wider(module: DilatedRepConv) -> Reason:
    size = module.large.kernel_size[0]
    for name, branch in module.branches.items():
        assert isinstance(branch, DepthwiseConv)
        if branch.dilation[0] * (branch.kernel_size[0] - 1) + 1 > size:
            return f"has a branch {name} wider than its large kernel"
    return None


_BRANCHES = one_of(
    each(nn.ModuleDict, kind(DepthwiseConv, tensors=BOTH, expected=_dilated)),
    kind(nn.ModuleDict),
)
FOLDABLE_REPCONV = one_of(
    kind(DilatedRepConv, parts=dict(large=DEPTHWISE, norm=BATCH_NORM, branches=_BRANCHES), rule=_why_wider),
    kind(DilatedRepConv, parts=dict(large=DEPTHWISE, norm=IDENTITY, branches=kind(nn.ModuleDict))),
)
FOLDABLE_LOCAL_CONV = kind(
    LocalConv, tensors=BOTH, expected=lambda conv: dict(kernel_size=(3, 3), groups=conv.in_channels)
)
_CONV = kind(nn.Conv2d, DepthwiseConv, tensors=WEIGHT, optional=BIAS)
FOLDABLE_CONV_NORM = kind(ConvNorm, parts=dict(conv=_CONV, norm=BATCH_NORM))
FOLDABLE_NORM_CONV = kind(NormConv, parts=dict(norm=BATCH_NORM, conv=PROJECTION))
FOLDABLE_FFN = kind(
    ConvFFN, parts=dict(expand=anything, local=anything, norm=RESPONSE_NORM, project=PROJECTION)
)  # fmt: skip
_RESIDUAL = kind(Residual, ScaledResidual, FoldedResidual, optional=BOTH)
FOLDABLE_UPDATE = kind(ContextUpdate, parts=dict(alpha=_RESIDUAL, beta=AFFINE_SCALE))

# The bias of a residual goes into the last convolution of its branch; nothing may lie between the two.
_FFN = kind(ConvFFN, parts=dict(expand=anything, local=anything, norm=anything, project=PROJECTION))
FOLDABLE_BASIC_BLOCK = kind(
    BasicBlock,
    parts=dict(
        local=anything, norm=anything, large_kernel=anything, se=anything, ffn=_FFN, drop_path=NO_DROP,
        residual=_RESIDUAL,
    ),
)  # fmt: skip
_AGGREGATOR = kind(
    Aggregator,
    parts=dict(
        mixer=anything, large_kernel=anything, se=anything, gate=anything, gate_act=anything, proj=PROJECTION
    ),
)  # fmt: skip
_MIXER = one_of(
    kind(GDSA, parts=dict(fusion=anything, aggregator=_AGGREGATOR)),
    kind(SelfMixer, parts=dict(aggregator=_AGGREGATOR)),
)
_MIXER_PARTS = dict(
    local1=anything, norm1=anything, mixer=_MIXER, residual1=_RESIDUAL, local2=anything, norm2=anything, ffn=_FFN,
    residual2=_RESIDUAL, drop_path=NO_DROP,
)  # fmt: skip
FOLDABLE_DYNAMIC_BLOCK = kind(DynamicBlock, parts=_MIXER_PARTS | dict(context_update=anything))
FOLDABLE_CONTMIX_BLOCK = kind(ContMixBlock, parts=_MIXER_PARTS)
FOLDABLE_AUXILIARY_HEAD = kind(AuxiliaryHead, parts=dict(norm=BATCH_NORM, global_pool=anything, fc=LINEAR))


# What our kernels for the CPU do, folded


def _why_other_settings(module: nn.Module) -> Reason:
    """An operation takes one eps, and one set of ContMix's hyper-parameters, for all its blocks."""
    eps = {part.eps for part in module.modules() if isinstance(part, (LayerNorm2d, GlobalResponseNorm))}
    mixes = [part for part in module.modules() if isinstance(part, ContMix)]
    settings = {(mix.kernel_size, mix.scale, mix.region_grid) for mix in mixes}
    if len(eps) > 1:
        return f"has norms of several eps: {sorted(eps)}"
    return f"has ContMix of several settings: {sorted(settings)}" if len(settings) > 1 else None


def _as_its_tables(mix: ContMix) -> dict[str, object]:
    groups, size = mix.rpb_large.shape[0], (mix.rpb_large.shape[1] + 1) // 2
    small = None if mix.rpb_small is None else (mix.rpb_small.shape[1] + 1) // 2
    return dict(groups=groups, kernel_size=size, small_kernel=small, small_taps=0 if small is None else small**2)


RESIDUAL = one_of(kind(Residual), kind(FoldedResidual, tensors=WEIGHT))
SQUEEZE_EXCITE = kind(
    SqueezeExcite,
    expected=lambda _: dict(add_maxpool=False),
    parts=dict(fc1=PROJECTION, bn=IDENTITY, act=GELU, fc2=PROJECTION, gate=SIGMOID),
)
CONV_FFN = kind(
    ConvFFN,
    parts=dict(
        expand=PROJECTION,
        local=kind(nn.Sequential, parts=dict(act=GELU, conv=LOCAL_CONV)),
        norm=RESPONSE_NORM,
        project=PROJECTION,
    ),
)
BASIC_BLOCK = kind(
    BasicBlock,
    parts=dict(
        local=LOCAL_CONV, norm=LAYER_NORM, large_kernel=LARGE_KERNEL, se=SQUEEZE_EXCITE, ffn=CONV_FFN,
        drop_path=NO_DROP, residual=RESIDUAL,
    ),
    rule=_why_other_settings,
)  # fmt: skip

CONTMIX = kind(
    ContMix,
    tensors=("rpb_large",),
    optional=("rpb_small",),
    expected=_as_its_tables,
    parts=dict(
        query=PROJECTION, key=PROJECTION, value=one_of(IDENTITY, PROJECTION), kernels=LINEAR, out=PROJECTION
    ),
)  # fmt: skip
AGGREGATOR = kind(
    Aggregator,
    parts=dict(
        mixer=CONTMIX, large_kernel=LARGE_KERNEL, se=SQUEEZE_EXCITE, gate=PROJECTION, gate_act=SILU, proj=PROJECTION
    ),
)  # fmt: skip
FUSION = kind(nn.Sequential, parts=dict(local=LOCAL_CONV, act=GELU, project=PROJECTION, norm=RESPONSE_NORM))
CONTEXT_UPDATE = kind(ContextUpdate, parts=dict(alpha=kind(FoldedResidual, tensors=WEIGHT), beta=AFFINE_SCALE))
_FOLDED_MIXER_PARTS = dict(
    local1=LOCAL_CONV, norm1=LAYER_NORM, residual1=RESIDUAL, local2=LOCAL_CONV, norm2=LAYER_NORM, ffn=CONV_FFN,
    residual2=RESIDUAL, drop_path=NO_DROP,
)  # fmt: skip
DYNAMIC_BLOCK = kind(
    DynamicBlock,
    parts=_FOLDED_MIXER_PARTS
    | dict(
        mixer=kind(GDSA, parts=dict(fusion=FUSION, aggregator=AGGREGATOR)),
        context_update=one_of(absent, CONTEXT_UPDATE),
    ),
    rule=_why_other_settings,
)
CONTMIX_BLOCK = kind(
    ContMixBlock,
    parts=_FOLDED_MIXER_PARTS | dict(mixer=kind(SelfMixer, parts=dict(aggregator=AGGREGATOR))),
    rule=_why_other_settings,
)

STEM = alternating(Stem, CONVOLUTION, GELU)
BLOCK_STACK = kind(
    BlockStack,
    expected=lambda _: dict(dilation=1),
    parts=dict(embed=one_of(STEM, CONVOLUTION), blocks=each(nn.ModuleList, BASIC_BLOCK)),
    rule=_why_other_settings,
)
FOCUS_STAGE = kind(FocusStage, parts=dict(blocks=each(nn.ModuleList, DYNAMIC_BLOCK)), rule=_why_other_settings)
