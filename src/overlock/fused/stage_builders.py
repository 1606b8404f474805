"""From the flat parameters of a fused module to the stage whose kernel calls a plan lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from overlock.fused.layer_plans import (
    ContextFusion,
    ContMix,
    ConvFFN,
    Convolution,
    Depthwise,
    LocalConvNorm,
    Pointwise,
    SqueezeExcite,
)
from overlock.fused.packing import unpack
from overlock.fused.parameters import BasicParameters, MixerParameters, Parameters, by_layer
from overlock.fused.stage_plans import Aggregator, BasicBlock, BasicStage, ContextUpdate, MixerBlock, MixerStage


def basic_stage(
    packed: Tensor, layout: Sequence[int], strides: Sequence[int], eps: float, dtype: torch.dtype = torch.float32
) -> BasicStage:
    """Convolutions of some strides, and the basic blocks after them; products in float32 or bfloat16."""
    layers = list(by_layer(unpack(packed, layout)))
    convolutions, blocks = layers[: len(strides)], layers[len(strides) :]
    count = len(BasicParameters._fields)
    return BasicStage(
        [Convolution(*layer.both, stride, dtype) for layer, stride in zip(convolutions, strides, strict=True)],
        [
            _basic_block(BasicParameters._make(blocks[i : i + count]), eps, dtype)
            for i in range(0, len(blocks), count)
        ],
    )  # fmt: skip


def mixer_stage(
    packed: Tensor, layout: Sequence[int], *, context_channels: int, scale: float, region_grid: int, eps: float,
    dtype: torch.dtype = torch.float32,
) -> MixerStage:  # fmt: skip
    """Dynamic blocks, or plug-in ones, of which the context has no channels; products in float32 or bfloat16."""
    layers, count = list(by_layer(unpack(packed, layout))), len(MixerParameters._fields)
    blocks = (MixerParameters._make(layers[i : i + count]) for i in range(0, len(layers), count))
    return MixerStage(
        [_mixer_block(p, context_channels, _contmix(p, scale, region_grid, dtype), eps, dtype) for p in blocks]
    )


def _basic_block(p: BasicParameters, eps: float, dtype: torch.dtype) -> BasicBlock:
    return BasicBlock(
        local=LocalConvNorm(Depthwise(*p.local.both), p.norm.both, eps),
        large=Depthwise(*p.large.both),
        squeeze_excite=SqueezeExcite(p.reduce.both, p.excite.both),
        ffn=_conv_ffn(p.expand, p.hidden, p.response, p.project, eps, dtype),
        residual_scale=_residual_scale(p.residual, p.norm),
    )


def _mixer_block(p: MixerParameters, context_channels: int, mix: ContMix, eps: float, dtype: torch.dtype) -> MixerBlock:
    fusion, update = None, None
    if p.fusion.weight is not None:
        project = Pointwise(*p.fusion_project.both, dtype)
        fusion = ContextFusion(Depthwise(*p.fusion.both), project, p.fusion_norm.both, eps)
    if p.alpha.weight is not None:
        update = ContextUpdate(*(x.flatten().contiguous() for x in (p.alpha.weight, *p.beta.both)))
    aggregator = Aggregator(
        mix=mix, out=Pointwise(*p.out.both, dtype), large=Depthwise(*p.large.both),
        squeeze_excite=SqueezeExcite(p.reduce.both, p.excite.both), gate=Pointwise(*p.gate.both, dtype),
        project=Pointwise(*p.project.both, dtype),
    )  # fmt: skip
    return MixerBlock(
        local1=LocalConvNorm(Depthwise(*p.local1.both), p.norm1.both, eps),
        fusion=fusion,
        aggregator=aggregator,
        residual_scale1=_residual_scale(p.residual1, p.norm1),
        local2=LocalConvNorm(Depthwise(*p.local2.both), p.norm2.both, eps),
        ffn=_conv_ffn(p.expand, p.hidden, p.response, p.ffn_project, eps, dtype),
        residual_scale2=_residual_scale(p.residual2, p.norm2),
        update=update,
        context_channels=context_channels,
    )


def _contmix(p: MixerParameters, scale: float, region_grid: int, dtype: torch.dtype) -> ContMix:
    query_weight, query_bias = (x * scale for x in p.query.both)
    query = Pointwise(query_weight, query_bias, dtype)
    value = None if p.value.weight is None else Pointwise(*p.value.both, dtype)
    tables = [table for table in p.position_biases if table is not None]
    return ContMix(query, Pointwise(*p.key.both, dtype), value, p.kernels.both, tables, region_grid)


def _conv_ffn(
    expand: Parameters, hidden: Parameters, response: Parameters, project: Parameters, eps: float, dtype: torch.dtype
) -> ConvFFN:
    weight, _ = response.both  # the bias is folded into the projection
    return ConvFFN(
        Pointwise(*expand.both, dtype), Depthwise(*hidden.both), weight, eps, Pointwise(*project.both, dtype)
    )


def _residual_scale(residual: Parameters, norm: Parameters) -> Tensor:
    """What a residual keeps of the identity."""
    if residual.weight is None:
        return torch.ones_like(norm.both[0])
    return residual.weight.flatten().contiguous()
