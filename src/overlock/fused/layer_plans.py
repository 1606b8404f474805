"""The layers of the fused network as kernel calls of a plan, for images (B, H, W, C) in float32 on CPU.

Each holds its parameters as the kernels read them; ``add`` puts its calls into a plan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from overlock.kernels.numba.arguments import BufferRef
from overlock.kernels.numba.channel_statistics import (
    channel_sums,
    response_norm,
    response_scale,
    squeeze_excite,
    token_splits,
)
from overlock.kernels.numba.contmix import map_splits, prepare
from overlock.kernels.numba.contmix_kernels import contmix
from overlock.kernels.numba.depthwise import depthwise
from overlock.kernels.numba.expand_filter import expand_and_filter, splits_and_band
from overlock.kernels.numba.flags import GATE, GELU, RESIDUAL, SCALE, SUM_SQUARES
from overlock.kernels.numba.gemm import convolution_matrix, gemm, pack_panels, spans_of, splits_of
from overlock.kernels.numba.gemm_microkernel import KC
from overlock.kernels.numba.layer_norm import local_conv_and_norm
from overlock.kernels.numba.plan import Plan
from overlock.kernels.numba.resample import averaging, enlargement, one_after_another, resample
from overlock.kernels.numba.simd import LANES
from overlock.kernels.torch.reference import enlarged

ENOUGH_TOKENS = 512  # of a split of a map in ContMix, for the key that is folded anew for each not to count


class Size(NamedTuple):
    """Of a batch of maps."""

    batch: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def splits(self) -> int:
        """Of an image, one for each thread, where there are fewer images than threads.

        All kernels cut the rows in the same way, as far as they can: most of what a thread reads is then in its own
        cache, not in that of another core. It saves up to a hundredth of XT's time at 512 x 512 on two cores.
        """
        return min(-(-torch.get_num_threads() // self.batch), max(1, self.height // 4))

    def enlarged(self, least: int) -> Size:
        """Maps with a side below ``least`` enlarged for ContMix."""
        return Size(self.batch, *(enlarged(self.height, self.width, least) or (self.height, self.width)))


class Prologue(NamedTuple):
    """What a GEMM does to its input while it reads it.

    Args:
        scale: for each image and channel.
        tokens: of an image, which share the scale.
        gate: for each number.
    """

    scale: BufferRef | None = None
    tokens: int = 1
    gate: BufferRef | None = None


class Epilogue(NamedTuple):
    """What a GEMM does to its result before it writes it.

    Args:
        activation: SILU, GELU, or 0 for none.
        residual: added for each number.
        residual_scale: for each channel of the residual.
    """

    activation: int = 0
    residual: BufferRef | None = None
    residual_scale: Tensor | None = None


NO_PROLOGUE, NO_EPILOGUE = Prologue(), Epilogue()


class Pointwise:
    """A 1x1 convolution: a GEMM over tokens, in float32 or with weights and tokens rounded to bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32):
        weight = weight.flatten(1)
        self.width, self.depth = weight.shape
        self.panels = pack_panels(weight, bias, dtype)

    def add(
        self, plan: Plan, rows: int, x: BufferRef, out: BufferRef, *, x_stride: int | None = None,
        prologue: Prologue = NO_PROLOGUE, epilogue: Epilogue = NO_EPILOGUE,
    ) -> None:  # fmt: skip
        """out = activation(conv(x * scale * gate) + residual * residual_scale).

        Args:
            plan: takes the call.
            rows: how many tokens.
            x: (rows, depth).
            out: (rows, width).
            x_stride: from one token of x to the next, if that is not their width.
            prologue, epilogue: what is done in the same pass.
        """
        splits = splits_of(rows, -(-(self.panels.shape[1] - 1) // KC), self.width)
        (scale, tokens, gate), (activation, residual, residual_scale) = prologue, epilogue
        unused = self.panels.view(torch.float32)  # is read all the same
        plan.add(
            gemm, splits[0] * splits[1], x=x, scale=scale, gate=gate, weight=self.panels, residual=residual,
            residual_scale=unused if residual_scale is None else residual_scale, out=out, rows=rows,
            depth=self.depth, columns=self.width, tokens=tokens, x_stride=x_stride or self.depth,
            gate_stride=self.depth, residual_stride=self.width, out_stride=self.width,
            prologue=(SCALE if scale else 0) | (GATE if gate else 0),
            epilogue=activation | (RESIDUAL if residual else 0), row_splits=splits[0], panel_splits=splits[1],
            window=0, stride=0, height=0, width=0, channels=0, span=0, chunk=KC,
        )  # fmt: skip


class Convolution:
    """A convolution of all channels, with as much padding as keeps the size at stride 1: a product of its windows."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, dtype: torch.dtype = torch.float32):
        self.width, self.channels, self.size, _ = weight.shape
        matrix = convolution_matrix(weight)
        self.depth, self.stride, self.panels = matrix.shape[1], stride, pack_panels(matrix, bias, dtype)

    def shrunk(self, size: Size) -> Size:
        return Size(size.batch, (size.height - 1) // self.stride + 1, (size.width - 1) // self.stride + 1)

    def add(self, plan: Plan, size: Size, x: BufferRef, out: BufferRef, activation: int = 0) -> None:
        rows, (span, chunk) = self.shrunk(size).rows, spans_of(self.channels, self.size)
        splits = splits_of(rows, -(-(self.panels.shape[1] - 1) // chunk), self.width)
        plan.add(
            gemm, splits[0] * splits[1], x=x, scale=None, gate=None, weight=self.panels, residual=None,
            residual_scale=self.panels.view(torch.float32), out=out, rows=rows, depth=self.depth,
            columns=self.width, tokens=1, x_stride=0, gate_stride=0, residual_stride=0, out_stride=self.width,
            prologue=0, epilogue=activation, row_splits=splits[0], panel_splits=splits[1], window=self.size,
            stride=self.stride, height=size.height, width=size.width, channels=self.channels, span=span, chunk=chunk,
        )  # fmt: skip


class Depthwise:
    """A depthwise convolution."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight = weight[:, 0].permute(1, 2, 0).contiguous()
        self.bias = bias.contiguous()

    def add(
        self, plan: Plan, size: Size, x: BufferRef, out: BufferRef, *, prologue: int = 0, epilogue: int = 0,
        sums: BufferRef | None = None,
    ) -> None:  # fmt: skip
        """The sums are (B, splits, C), of one split where the filter writes over what it reads."""
        kernel_size, _, channels = self.weight.shape
        splits = 1 if out == x else size.splits
        plan.add(
            depthwise, size.batch * splits * -(-channels // LANES), x=x, weight=self.weight, bias=self.bias, out=out,
            sums=sums, before_gelu=None, batch=size.batch, height=size.height, width=size.width, channels=channels,
            kernel_size=kernel_size, dilation=1, prologue=prologue, epilogue=epilogue, splits=splits,
        )  # fmt: skip


class LocalConvNorm:
    """A local convolution and the layer norm of its result."""

    def __init__(self, local: Depthwise, norm: tuple[Tensor, Tensor], eps: float):
        self.local, self.eps = local, eps
        self.weight, self.bias = (x.contiguous() for x in norm)

    def add(self, plan: Plan, size: Size, x: BufferRef, out: BufferRef, normed: BufferRef) -> None:
        splits = max(1, min(-(-2 * torch.get_num_threads() // size.batch), size.height // 4))
        plan.add(
            local_conv_and_norm, size.batch * splits, x=x, filter_weight=self.local.weight,
            filter_bias=self.local.bias, norm_weight=self.weight, norm_bias=self.bias, filtered=out, normed=normed,
            eps=self.eps, batch=size.batch, height=size.height, width=size.width, channels=self.weight.numel(),
            splits=splits,
        )  # fmt: skip


class SqueezeExcite:
    """The scale of a channel attention."""

    def __init__(self, reduce: tuple[Tensor, Tensor], expand: tuple[Tensor, Tensor]):
        self.reduce_weight, self.reduce_bias = reduce[0].flatten(1).contiguous(), reduce[1].contiguous()
        self.expand_weight, self.expand_bias = expand[0].flatten(1).contiguous(), expand[1].contiguous()

    def add(self, plan: Plan, size: Size, sums: BufferRef, scale: BufferRef, splits: int) -> None:
        hidden, channels = self.reduce_weight.shape
        plan.add(
            squeeze_excite, size.batch, sums=sums, reduce_weight=self.reduce_weight, reduce_bias=self.reduce_bias,
            expand_weight=self.expand_weight, expand_bias=self.expand_bias, scale=scale, batch=size.batch,
            tokens=size.tokens, channels=channels, hidden=hidden, splits=splits,
        )  # fmt: skip


class ConvFFN:
    """A feed-forward network with a local convolution and a response norm on its hidden width."""

    def __init__(self, expand: Pointwise, local: Depthwise, norm_weight: Tensor, eps: float, project: Pointwise):
        self.expand, self.local, self.project = expand, local, project
        self.norm_weight, self.eps = norm_weight.contiguous(), eps

    def add(
        self, plan: Plan, size: Size, x: BufferRef, out: BufferRef, *, residual: BufferRef, residual_scale: Tensor,
        scale: BufferRef | None = None,
    ) -> None:  # fmt: skip
        """out = residual_scale * residual + ConvFFN(scale * x)."""
        width = self.expand.width
        hidden, response = plan.alloc(size.rows, width), plan.alloc(size.batch, width)
        fused = splits_and_band(*size, self.expand.panels.nbytes)
        splits, band = fused or (1, 0)
        squares = plan.alloc(size.batch, splits, width)
        if fused:
            plan.add(
                expand_and_filter, size.batch * splits, x=x, scale=scale, weight=self.expand.panels,
                filter_weight=self.local.weight, filter_bias=self.local.bias, out=hidden, sums=squares,
                height=size.height, width=size.width, depth=self.expand.depth, channels=width,
                prologue=SCALE if scale else 0, splits=splits, band=band,
            )  # fmt: skip
        else:
            self.expand.add(plan, size.rows, x, hidden, prologue=Prologue(scale, size.tokens))
            self.local.add(plan, size, hidden, hidden, prologue=GELU, epilogue=SUM_SQUARES, sums=squares)
        plan.add(
            response_scale, size.batch, squares=squares, weight=self.norm_weight, scale=response, eps=self.eps,
            batch=size.batch, channels=width, splits=splits,
        )  # fmt: skip
        self.project.add(
            plan, size.rows, hidden, out, prologue=Prologue(response, size.tokens),
            epilogue=Epilogue(residual=residual, residual_scale=residual_scale),
        )  # fmt: skip


class ContMix:
    """ContMix without its last projection."""

    def __init__(
        self, query: Pointwise, key: Pointwise, value: Pointwise | None, kernels: tuple[Tensor, Tensor],
        rpbs: list[Tensor], region_grid: int,
    ):  # fmt: skip
        self.query, self.key, self.value, self.region_grid = query, key, value, region_grid
        self.groups, self.kernel_sizes = rpbs[0].shape[0], [(rpb.shape[1] + 1) // 2 for rpb in rpbs]
        taps = [k * k for k in self.kernel_sizes]
        kinds = zip(kernels[0].split(taps), kernels[1].split(taps), rpbs, self.kernel_sizes, strict=True)
        self.kernels = [prepare(w, b, rpb, self.groups, k, k) for w, b, rpb, k in kinds]

    def add(
        self, plan: Plan, size: Size, features: BufferRef, channels: int, query: BufferRef, context: BufferRef,
        stride: int, out: BufferRef,
    ) -> None:  # fmt: skip
        """Mix features (T, channels) guided by query and context, tokens of a stride."""
        width, grid, large = self.query.width, self.region_grid, size.enlarged(self.kernel_sizes[-1])
        means, keys = plan.alloc(size.batch, grid**2, self.key.depth), plan.alloc(size.batch, grid**2, width)
        queries, values, mixed = plan.alloc(size.rows, width), features, out
        self.query.add(plan, size.rows, query, queries, x_stride=stride)
        sides = [averaging(side, grid) for side in large[1:]]
        if large != size:
            larger = [enlargement(*pair) for pair in zip(size[1:], large[1:], strict=True)]
            sides = [one_after_another(*pair) for pair in zip(larger, sides, strict=True)]
        _add_resample(plan, size.batch, context, stride, means, self.key.depth, sides)
        self.key.add(plan, size.batch * grid**2, means, keys)
        if self.value is not None:
            values = plan.alloc(size.rows, channels)
            self.value.add(plan, size.rows, features, values)
        if large != size:
            small_queries, small_values = queries, values
            queries, values, mixed = (plan.alloc(large.rows, count) for count in (width, channels, channels))
            _add_resample(plan, size.batch, small_queries, width, queries, width, larger)
            _add_resample(plan, size.batch, small_values, channels, values, channels, larger)
        self._add_mixing(plan, large, queries, keys, values, mixed, channels)
        if large != size:
            smaller = [averaging(*pair) for pair in zip(large[1:], size[1:], strict=True)]
            _add_resample(plan, size.batch, mixed, channels, out, channels, smaller)

    def _add_mixing(
        self, plan: Plan, size: Size, queries: BufferRef, keys: BufferRef, values: BufferRef, out: BufferRef,
        channels: int,
    ) -> None:  # fmt: skip
        """Of values (T, channels), each of the kernels for its part of the channels."""
        width, regions = self.query.width, self.region_grid**2
        part, depth = channels // len(self.kernel_sizes), width // self.groups
        maps = size.batch * self.groups
        splits = max(map_splits(maps, size.tokens), min(size.splits, size.tokens // ENOUGH_TOKENS))
        value_strides = (size.tokens * channels, part // self.groups, 1, channels)
        for i, (kernel_size, kernels) in enumerate(zip(self.kernel_sizes, self.kernels, strict=True)):
            plan.add(
                contmix, maps * splits, queries=queries, keys=keys, values=values + i * part, **kernels,
                out=out + i * part, groups=self.groups, depth=depth, channels=part // self.groups, height=size.height,
                width=size.width, kernel_height=kernel_size, kernel_width=kernel_size, regions=regions, splits=splits,
                query_strides=(size.tokens * width, depth, 1, width), key_strides=(regions * width, depth, 1, width),
                value_strides=value_strides, out_strides=value_strides,
            )  # fmt: skip


def _add_resample(
    plan: Plan, batch: int, x: BufferRef, stride: int, out: BufferRef, channels: int, sides: list[Tensor]
) -> None:  # fmt: skip
    """Of maps x with tokens of a stride, by the matrices of rows and of columns, to out without gaps."""
    rows, columns = sides
    (out_height, height), (out_width, width) = rows.shape, columns.shape
    plan.add(
        resample, batch * out_height * out_width, x=x, rows=rows, columns=columns, out=out, batch=batch,
        height=height, width=width, out_height=out_height, out_width=out_width, channels=channels, stride=stride,
    )  # fmt: skip


class ContextFusion:
    """The features of GDSA, made of features and context side by side."""

    def __init__(self, local: Depthwise, project: Pointwise, norm: tuple[Tensor, Tensor], eps: float):
        self.local, self.project, self.eps = local, project, eps
        self.weight, self.bias = (x.contiguous() for x in norm)

    def add(self, plan: Plan, size: Size, x: BufferRef, filtered: BufferRef, out: BufferRef) -> None:
        """From x (T, C + Cc), by way of a buffer of the same size, to out (T, C)."""
        channels, splits = self.project.width, token_splits(size.batch, size.tokens)
        sizes = dict(batch=size.batch, tokens=size.tokens, channels=channels, splits=splits)
        squares = plan.alloc(size.batch, splits, channels)
        self.local.add(plan, size, x, filtered, epilogue=GELU)
        self.project.add(plan, size.rows, filtered, out)
        plan.add(channel_sums, size.batch * splits, x=out, sums=squares, epilogue=SUM_SQUARES, **sizes)
        plan.add(
            response_norm, size.batch * splits, x=out, weight=self.weight, bias=self.bias, squares=squares, out=out,
            eps=self.eps, **sizes,
        )  # fmt: skip
