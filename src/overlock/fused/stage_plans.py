"""The stages of the fused network as plans of kernel calls, for images (B, H, W, C) in float32 on CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from overlock.fused.layer_plans import (
    ContextFusion,
    ContMix,
    ConvFFN,
    Convolution,
    Depthwise,
    Epilogue,
    LocalConvNorm,
    Pointwise,
    Prologue,
    Size,
    SqueezeExcite,
)
from overlock.kernels.numba.arguments import BufferRef
from overlock.kernels.numba.channel_statistics import channel_sums, token_splits
from overlock.kernels.numba.context import join_context
from overlock.kernels.numba.flags import GELU, SILU, SUM
from overlock.kernels.numba.plan import Plan, input_buffer


class BasicBlock:
    """x = x + conv3x3(x);   x = residual_scale * x + ConvFFN(SE(conv(LN(x))))"""

    def __init__(
        self, local: LocalConvNorm, large: Depthwise, squeeze_excite: SqueezeExcite, ffn: ConvFFN,
        residual_scale: Tensor,
    ):  # fmt: skip
        self.local, self.large, self.squeeze_excite, self.ffn = local, large, squeeze_excite, ffn
        self.residual_scale = residual_scale

    def add(self, plan: Plan, size: Size, x: BufferRef, out: BufferRef) -> None:
        """Of x and out (B, H, W, C)."""
        channels, splits = self.residual_scale.numel(), size.splits
        with plan.scratch():
            normed, filtered = plan.alloc(size.rows, channels), plan.alloc(size.rows, channels)
            sums, scale = plan.alloc(size.batch, splits, channels), plan.alloc(size.batch, channels)
            self.local.add(plan, size, x, out, normed)
            self.large.add(plan, size, normed, filtered, epilogue=SUM, sums=sums)
            self.squeeze_excite.add(plan, size, sums, scale, splits)
            self.ffn.add(
                plan, size, filtered, out, residual=out, residual_scale=self.residual_scale, scale=scale
            )  # fmt: skip


class BasicStage:
    """Convolutions with GELU between them, and basic blocks after them; there may be none of either."""

    def __init__(self, convolutions: list[Convolution], blocks: list[BasicBlock]):
        self.convolutions, self.blocks = convolutions, blocks

    def shrunk(self, size: Size) -> Size:
        for convolution in self.convolutions:
            size = convolution.shrunk(size)
        return size

    def plan(self, size: Size) -> Plan:
        """Of an input and an output (B, H, W, C)."""
        plan, x, out, small = Plan(), input_buffer(0), input_buffer(1), self.shrunk(size)
        inner = len(self.blocks) - (not self.convolutions)  # maps between the parts
        buffers = [plan.alloc(small.rows, self.blocks[0].residual_scale.numel()) for _ in range(min(inner, 2))]
        outs = [buffers[i % 2] for i in range(inner)] + [out]
        with plan.scratch():
            for i, convolution in enumerate(self.convolutions, start=1):
                size, before = convolution.shrunk(size), size
                last = i == len(self.convolutions)
                to = outs[0] if last else plan.alloc(size.rows, convolution.width)
                convolution.add(plan, before, x, to, 0 if last else GELU)
                x = to
        for block, to in zip(self.blocks, outs[len(outs) - len(self.blocks) :], strict=True):
            block.add(plan, small, x, to)
            x = to
        return plan.finish()


class ContextUpdate(NamedTuple):
    """The context flow: alpha * context + beta_weight * prior + beta_bias."""

    alpha: Tensor
    beta_weight: Tensor
    beta_bias: Tensor


class Aggregator(NamedTuple):
    """W (SE(out(mix(f)) + conv(f)) * SiLU(gate f))"""

    mix: ContMix
    out: Pointwise
    large: Depthwise
    squeeze_excite: SqueezeExcite
    gate: Pointwise
    project: Pointwise


@dataclass(frozen=True, kw_only=True, eq=False)
class MixerBlock:
    """The dynamic block, and its plug-in form over one map, which has no fusion.

        y = x + conv3x3(x);   y = residual_scale1 * y + aggregator(f),   f = fusion(LN(y))
        y = y + conv3x3(y);   y = residual_scale2 * y + ConvFFN(LN(y))
    """  # fmt: skip

    local1: LocalConvNorm
    fusion: ContextFusion | None
    aggregator: Aggregator
    residual_scale1: Tensor
    local2: LocalConvNorm
    ffn: ConvFFN
    residual_scale2: Tensor
    update: ContextUpdate | None
    context_channels: int

    @property
    def channels(self) -> int:
        return self.aggregator.gate.width

    @cached_property
    def ones(self) -> Tensor:
        return torch.ones_like(self.residual_scale1)

    @property
    def width(self) -> int:
        """Of the block's result."""
        return self.channels + self.context_channels

    def add(self, plan: Plan, size: Size, inputs: list[BufferRef], strides: tuple[int, ...], out: BufferRef) -> None:
        """Of inputs x (T, C), context and prior (T, Cc each) with tokens of some strides, and out (T, C + Cc).

        Without a context, of x and out alone.
        """
        with plan.scratch():
            buffer, normed = plan.alloc(size.rows, self.width), plan.alloc(size.rows, self.width)
            x = inputs[0]
            if len(inputs) > 1:
                self._join(plan, size, inputs, strides, buffer)
                x = buffer
            with plan.scratch():
                self.local1.add(plan, size, x, out, normed)
                self._aggregate(plan, size, buffer, normed, out)
            self.local2.add(plan, size, out, buffer, normed)
            self.ffn.add(plan, size, normed, out, residual=buffer, residual_scale=self.residual_scale2)

    def _join(
        self, plan: Plan, size: Size, inputs: list[BufferRef], strides: tuple[int, ...], out: BufferRef
    ) -> None:  # fmt: skip
        features, context, prior = inputs
        update = self.update or ContextUpdate(self.ones, self.ones, self.ones)
        plan.add(
            join_context, max(1, size.rows // 64), features=features, context=context,
            prior=None if self.update is None else prior, **update._asdict(), out=out, tokens=size.rows,
            channels=self.channels, context_channels=self.context_channels, features_stride=strides[0],
            context_stride=strides[1], prior_stride=strides[2],
        )  # fmt: skip

    def _aggregate(self, plan: Plan, size: Size, buffer: BufferRef, normed: BufferRef, out: BufferRef) -> None:
        """The first branch from its layer norm on, added to ``out``; ``buffer`` and ``normed`` may be written over."""
        channels, parts = self.channels, self.aggregator
        features, context, local = normed, normed, plan.alloc(size.rows, channels)
        if self.fusion is not None:
            features, context, local = local, normed + channels, normed
            self.fusion.add(plan, size, normed, buffer, features)
        parts.mix.add(plan, size, features, channels, normed, context, self.width, buffer)
        gate, splits = plan.alloc(size.rows, channels), token_splits(size.batch, size.tokens)
        sums, scale = plan.alloc(size.batch, splits, channels), plan.alloc(size.batch, channels)
        parts.gate.add(plan, size.rows, features, gate, epilogue=Epilogue(SILU))
        parts.large.add(plan, size, features, local)
        mixed = features
        parts.out.add(plan, size.rows, buffer, mixed, epilogue=Epilogue(0, local, self.ones))
        plan.add(
            channel_sums, size.batch * splits, x=mixed, sums=sums, batch=size.batch, tokens=size.tokens,
            channels=channels, splits=splits, epilogue=SUM,
        )  # fmt: skip
        parts.squeeze_excite.add(plan, size, sums, scale, splits)
        parts.project.add(
            plan, size.rows, mixed, out, prologue=Prologue(scale, size.tokens, gate),
            epilogue=Epilogue(0, out, self.residual_scale1),
        )  # fmt: skip


class MixerStage:
    """Mixer blocks one after another; the context of one goes on to the next, the prior is the same for all."""

    def __init__(self, blocks: list[MixerBlock]):
        self.blocks = blocks

    def plan(self, size: Size, strides: tuple[int, ...]) -> Plan:
        """Of inputs as those of a block, with tokens of some strides, and an output (T, C + Cc)."""
        plan, inputs = Plan(), [input_buffer(i) for i in range(len(strides))]
        channels, width = self.blocks[0].channels, self.blocks[0].width
        buffers = [plan.alloc(size.rows, width) for _ in self.blocks[1:3]]
        outs = [buffers[i % 2] for i in range(len(self.blocks) - 1)] + [input_buffer(len(strides))]
        for block, out in zip(self.blocks, outs, strict=True):
            block.add(plan, size, inputs, strides, out)
            if len(strides) > 1:
                inputs, strides = [out, out + channels, inputs[2]], (width, width, strides[2])
            else:
                inputs = [out]
        return plan.finish()
