"""The blocks of the network as programs of kernels, for images (B, H, W, C) in float32 on CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from overlock.kernels.numba.channel_statistics import (
    excite_images,
    pieces_of,
    response_scale,
    scale_by_response,
    sum_up,
)
from overlock.kernels.numba.contmix import map_pieces, prepare
from overlock.kernels.numba.contmix_kernels import mix
from overlock.kernels.numba.depthwise import GELU_AFTER, GELU_BEFORE, SQUARES, SUMS, depthwise
from overlock.kernels.numba.expand_filter import expand_and_filter, plan
from overlock.kernels.numba.gemm import (
    GATED,
    GELU,
    RESIDUAL,
    SCALED,
    SILU,
    cut,
    pack_weight,
    pack_windows,
    product,
    spans_of,
)
from overlock.kernels.numba.gemm_microkernel import DEPTH
from overlock.kernels.numba.layer_norm import average_regions, join, local_and_norm
from overlock.kernels.numba.plan import Place, Program, input_place
from overlock.kernels.numba.simd import LANES

ENOUGH_TOKENS = 512  # of a piece of a map in ContMix, for the key that is folded anew for each not to count


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
    def pieces(self) -> int:
        """Of an image, one for each thread, where there are fewer images than threads.

        All kernels cut the rows alike, as far as they can: most of what a thread reads is then in its own cache, not in
        that of another core. It saves up to a hundredth of XT's time at 512 x 512 on two cores.
        """
        return min(-(-torch.get_num_threads() // self.batch), max(1, self.height // 4))


class Product:
    """A 1x1 convolution."""

    def __init__(self, weight: Tensor, bias: Tensor):
        weight = weight.flatten(1)
        self.width, self.depth = weight.shape
        self.packed = pack_weight(weight, bias)

    def add(
        self, program: Program, rows: int, x: Place, out: Place, *, stride: int | None = None, after: int = 0,
        scale: Place | None = None, tokens: int = 1, gate: Place | None = None, other: Place | None = None,
        share: Tensor | None = None,
    ) -> None:  # fmt: skip
        """out = rows of x, times ``scale`` of their image of some ``tokens``, times a gate; + share * other."""
        steps = after | (SCALED if scale else 0) | (GATED if gate else 0) | (RESIDUAL if other else 0)
        pieces = cut(rows, -(-self.depth // DEPTH), self.width)
        share = self.packed if share is None else share
        program.call(
            product, pieces[0] * pieces[1], x, scale or x, gate or x, self.packed, other or x, share, out,
            rows, self.depth, self.width, tokens, stride or self.depth, self.depth, self.width, self.width, steps,
            *pieces, 0, 0, 0, 0, 0, 0, DEPTH,
        )  # fmt: skip


class Convolution:
    """A convolution of all channels, with as much padding as keeps the size at stride 1."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int):
        self.width, self.channels, self.size, _ = weight.shape
        self.stride, self.packed = stride, pack_windows(weight, bias)

    def shrunk(self, size: Size) -> Size:
        return Size(size.batch, (size.height - 1) // self.stride + 1, (size.width - 1) // self.stride + 1)

    def add(self, program: Program, size: Size, x: Place, out: Place, steps: int = 0) -> None:
        rows, depth, (span, chunk) = (
            self.shrunk(size).rows,
            self.packed.shape[1] - 1,
            spans_of(self.channels, self.size),
        )
        pieces = cut(rows, -(-depth // chunk), self.width)
        program.call(
            product, pieces[0] * pieces[1], x, x, x, self.packed, x, self.packed, out, rows, depth, self.width,
            1, 0, 0, self.width, self.width, steps, *pieces, size.height, size.width, self.channels, self.size,
            self.stride, span, chunk,
        )  # fmt: skip


class Filter:
    """A depthwise convolution."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight = weight[:, 0].permute(1, 2, 0).contiguous()
        self.bias = bias.contiguous()

    def add(
        self, program: Program, size: Size, x: Place, out: Place, steps: int = 0, sums: Place | None = None
    ) -> None:
        """The sums are (B, pieces, C), of one piece where the filter writes over what it reads."""
        kernel_size, _, channels = self.weight.shape
        pieces = 1 if out == x else size.pieces
        program.call(
            depthwise, size.batch * pieces * -(-channels // LANES), x, self.weight, self.bias, out, sums or x, *size,
            channels, kernel_size, steps, pieces, 1,
        )  # fmt: skip


class LocalNorm:
    """A local convolution and the layer norm of its result."""

    def __init__(self, local: Filter, norm: tuple[Tensor, Tensor], eps: float):
        self.local, self.norm = local, [x.contiguous() for x in norm]
        self.eps = torch.tensor([eps])

    def add(self, program: Program, size: Size, x: Place, out: Place, normed: Place) -> None:
        channels = self.norm[0].numel()
        pieces = max(1, min(-(-2 * torch.get_num_threads() // size.batch), size.height // 4))
        program.call(
            local_and_norm, size.batch * pieces, x, self.local.weight, self.local.bias, *self.norm, self.eps,
            out, normed, *size, channels, pieces,
        )  # fmt: skip


class Excite:
    """The scale of a channel attention."""

    def __init__(self, reduce: tuple[Tensor, Tensor], expand: tuple[Tensor, Tensor]):
        self.parameters = [x.flatten(1).contiguous() if x.dim() > 1 else x.contiguous() for x in (*reduce, *expand)]

    def add(self, program: Program, size: Size, sums: Place, scale: Place, parts: int = 1) -> None:
        width, channels = self.parameters[0].shape
        program.call(
            excite_images, size.batch, sums, *self.parameters, scale, size.batch, size.tokens, channels,
            parts, width,
        )  # fmt: skip


class FeedForward:
    """A ConvFFN."""

    def __init__(self, expand: Product, local: Filter, norm_weight: Tensor, eps: float, project: Product):
        self.expand, self.local, self.project = expand, local, project
        self.norm_weight, self.eps = norm_weight.contiguous(), torch.tensor([eps])

    def add(
        self, program: Program, size: Size, x: Place, out: Place, *, other: Place, share: Tensor,
        scale: Place | None = None,
    ) -> None:  # fmt: skip
        """out = share * other + ConvFFN(scale * x)."""
        width = self.expand.width
        hidden, response = program.room(size.rows, width), program.room(size.batch, width)
        planned = plan(*size, self.expand.packed.numel())
        pieces, band = planned or (1, 0)
        squares = program.room(size.batch, pieces, width)
        if planned:
            program.call(
                expand_and_filter, size.batch * pieces, x, scale or x, self.expand.packed, self.local.weight,
                self.local.bias, hidden, squares, *size, self.expand.depth, width, SCALED if scale else 0, pieces, band,
            )  # fmt: skip
        else:
            self.expand.add(program, size.rows, x, hidden, scale=scale, tokens=size.tokens)
            self.local.add(program, size, hidden, hidden, GELU_BEFORE | SQUARES, squares)
        arguments = (squares, self.norm_weight, self.eps, response)
        program.call(response_scale, size.batch, *arguments, size.batch, width, pieces)
        self.project.add(
            program, size.rows, hidden, out, scale=response, tokens=size.tokens, other=other, share=share
        )  # fmt: skip


class BasicBlock:
    """x = x + conv3x3(x);   x = share * x + ConvFFN(SE(conv(LN(x))))"""

    def __init__(self, local: LocalNorm, large: Filter, excite: Excite, ffn: FeedForward, share: Tensor):
        self.local, self.large, self.excite, self.ffn, self.share = local, large, excite, ffn, share

    def add(self, program: Program, size: Size, x: Place, out: Place) -> None:
        """Of x and out (B, H, W, C)."""
        kept, channels = program.numbers, self.share.numel()
        normed, filtered = program.room(size.rows, channels), program.room(size.rows, channels)
        sums, scale = program.room(size.batch, size.pieces, channels), program.room(size.batch, channels)
        self.local.add(program, size, x, out, normed)
        self.large.add(program, size, normed, filtered, SUMS, sums)
        self.excite.add(program, size, sums, scale, size.pieces)
        self.ffn.add(program, size, filtered, out, other=out, share=self.share, scale=scale)
        program.numbers = kept


class BasicStack:
    """Convolutions with GELU between them, and basic blocks after them; there may be none of either."""

    def __init__(self, convolutions: list[Convolution], blocks: list[BasicBlock]):
        self.convolutions, self.blocks = convolutions, blocks

    def shrunk(self, size: Size) -> Size:
        for convolution in self.convolutions:
            size = convolution.shrunk(size)
        return size

    def program(self, size: Size) -> Program:
        """Of an input and an output (B, H, W, C)."""
        program, x, out, small = Program(), input_place(0), input_place(1), self.shrunk(size)
        inner = len(self.blocks) - (not self.convolutions)  # maps between the parts
        held = [program.room(small.rows, self.blocks[0].share.numel()) for _ in range(min(inner, 2))]
        outs = [held[i % 2] for i in range(inner)] + [out]
        kept = program.numbers
        for i, convolution in enumerate(self.convolutions, start=1):
            size, before = convolution.shrunk(size), size
            last = i == len(self.convolutions)
            to = outs[0] if last else program.room(size.rows, convolution.width)
            convolution.add(program, before, x, to, 0 if last else GELU)
            x = to
        program.numbers = kept
        for block, to in zip(self.blocks, outs[len(outs) - len(self.blocks) :], strict=True):
            block.add(program, small, x, to)
            x = to
        return program.compile()


class Mix:
    """ContMix without its last projection."""

    def __init__(
        self, query: Product, key: Product, value: Product | None, kernels: tuple[Tensor, Tensor], rpbs: list[Tensor],
        region_grid: int,
    ):  # fmt: skip
        self.query, self.key, self.value, self.region_grid = query, key, value, region_grid
        self.groups, self.sizes = rpbs[0].shape[0], [(rpb.shape[1] + 1) // 2 for rpb in rpbs]
        taps = [k * k for k in self.sizes]
        kinds = zip(kernels[0].split(taps), kernels[1].split(taps), rpbs, self.sizes, strict=True)
        self.kernels = [prepare(w, b, rpb, self.groups, k, k) for w, b, rpb, k in kinds]

    def add(
        self, program: Program, size: Size, features: Place, channels: int, query: Place, context: Place, stride: int,
        out: Place,
    ) -> None:  # fmt: skip
        """Mix features (T, channels) guided by tokens of a stride."""
        width, regions = self.query.width, self.region_grid**2
        queries, keys = program.room(size.rows, width), program.room(size.batch, regions, width)
        centres = program.room(size.batch, regions, self.key.depth)
        self.query.add(program, size.rows, query, queries, stride=stride)
        program.call(
            average_regions, size.batch * regions, context, centres, *size, self.key.depth, stride,
            self.region_grid,
        )  # fmt: skip
        self.key.add(program, size.batch * regions, centres, keys)
        values = features
        if self.value is not None:
            values = program.room(size.rows, channels)
            self.value.add(program, size.rows, features, values)
        part, depth = channels // len(self.sizes), width // self.groups
        maps = size.batch * self.groups
        pieces = max(map_pieces(maps, size.tokens), min(size.pieces, size.tokens // ENOUGH_TOKENS))
        of_queries = (size.tokens * width, depth, 1, width)
        of_values = (size.tokens * channels, part // self.groups, 1, channels)
        of_keys = (regions * width, depth, 1, width)
        for i, (k, kernels) in enumerate(zip(self.sizes, self.kernels, strict=True)):
            sizes = (size.batch, self.groups, depth, part // self.groups, size.height, size.width, k, k)
            program.call(
                mix, maps * pieces, queries, keys, values + i * part, *kernels, out + i * part, *sizes, regions,
                pieces, *of_queries, *of_values, *of_values, *of_keys,
            )  # fmt: skip


class Fusion:
    """The features of GDSA, made of features and context side by side."""

    def __init__(self, local: Filter, project: Product, norm: tuple[Tensor, Tensor], eps: float):
        self.local, self.project, self.norm = local, project, [x.contiguous() for x in norm]
        self.eps = torch.tensor([eps])

    def add(self, program: Program, size: Size, x: Place, held: Place, out: Place) -> None:
        """Over x (T, C + Cc) with room for as much in ``held``, into out (T, C)."""
        width, pieces = self.project.width, pieces_of(size.batch, size.tokens)
        squares = program.room(size.batch, pieces, width)
        self.local.add(program, size, x, held, GELU_AFTER)
        self.project.add(program, size.rows, held, out)
        sizes = (size.batch, size.tokens, width, pieces)
        program.call(sum_up, size.batch * pieces, out, squares, *sizes, 1)
        program.call(scale_by_response, size.batch * pieces, out, *self.norm, out, squares, self.eps, *sizes, pieces)


class Update(NamedTuple):
    """The context flow: share * context + weight * prior + bias."""

    share: Tensor
    weight: Tensor
    bias: Tensor


class MixerBlock:
    """The dynamic block, and its plug-in form over one map, which has no fusion.

        y = x + conv3x3(x);   y = share * y + W (SE(out(mix(f)) + conv(f)) * SiLU(gate f)),   f = fusion(LN(y))
        y = y + conv3x3(y);   y = share * y + ConvFFN(LN(y))
    """  # fmt: skip

    def __init__(
        self, *, local1: LocalNorm, fusion: Fusion | None, mix: Mix, out: Product, large: Filter, excite: Excite,
        gate: Product, project: Product, share1: Tensor, local2: LocalNorm, ffn: FeedForward, share2: Tensor,
        update: Update | None, context_channels: int,
    ):  # fmt: skip
        self.local1, self.fusion, self.mix, self.out, self.large = local1, fusion, mix, out, large
        self.excite, self.gate, self.project, self.share1 = excite, gate, project, share1
        self.local2, self.ffn, self.share2, self.update = local2, ffn, share2, update
        self.context_channels = context_channels
        self.ones = torch.ones_like(share1)

    def add(self, program: Program, size: Size, inputs: list[Place], strides: tuple[int, ...], out: Place) -> None:
        """Of inputs x (T, C), context and prior (T, Cc each) with tokens of some strides, and out (T, C + Cc).

        Without a context, of x and out alone.
        """
        begin, (x, *others) = program.numbers, inputs
        width = self.gate.width + self.context_channels
        held, normed = program.room(size.rows, width), program.room(size.rows, width)
        kept = program.numbers
        if others:
            self._join(program, size, inputs, strides, held)
            x = held
        self.local1.add(program, size, x, out, normed)
        self._aggregate(program, size, held, normed, out)
        program.numbers = kept
        self.local2.add(program, size, out, held, normed)
        self.ffn.add(program, size, normed, out, other=held, share=self.share2)
        program.numbers = begin

    def _join(self, program: Program, size: Size, inputs: list[Place], strides: tuple[int, ...], out: Place) -> None:
        update, pieces = self.update or (self.ones,) * 3, max(1, size.rows // 64)
        program.call(
            join, pieces, *inputs, *update, out, size.rows, self.gate.width,
            self.context_channels, *strides, self.update is not None, pieces,
        )  # fmt: skip

    def _aggregate(self, program: Program, size: Size, held: Place, normed: Place, out: Place) -> None:
        """The first branch from its layer norm on, added to ``out``; ``held`` and ``normed`` may be written over."""
        channels, width = self.gate.width, self.gate.width + self.context_channels
        features, context, local = normed, normed, program.room(size.rows, channels)
        if self.fusion is not None:
            features, context, local = local, normed + channels, normed
            self.fusion.add(program, size, normed, held, features)
        self.mix.add(program, size, features, channels, normed, context, width, held)
        gate, pieces = program.room(size.rows, channels), pieces_of(size.batch, size.tokens)
        sums, scale = program.room(size.batch, pieces, channels), program.room(size.batch, channels)
        self.gate.add(program, size.rows, features, gate, after=SILU)
        self.large.add(program, size, features, local)
        mixed = features
        self.out.add(program, size.rows, held, mixed, other=local, share=self.ones)
        sizes = (size.batch, size.tokens, channels, pieces)
        program.call(sum_up, size.batch * pieces, mixed, sums, *sizes, 0)
        self.excite.add(program, size, sums, scale, pieces)
        self.project.add(
            program, size.rows, mixed, out, scale=scale, tokens=size.tokens, gate=gate, other=out, share=self.share1
        )  # fmt: skip


class MixerStack:
    """Mixer blocks one after another; the context of one goes on to the next, the prior is the same for all."""

    def __init__(self, blocks: list[MixerBlock]):
        self.blocks = blocks

    def program(self, size: Size, strides: tuple[int, ...]) -> Program:
        """Of inputs as those of a block, with tokens of some strides, and an output (T, C + Cc)."""
        program, inputs = Program(), [input_place(i) for i in range(len(strides))]
        channels = self.blocks[0].gate.width
        width = channels + self.blocks[0].context_channels
        held = [program.room(size.rows, width) for _ in self.blocks[1:3]]
        outs = [held[i % 2] for i in range(len(self.blocks) - 1)] + [input_place(len(strides))]
        for block, out in zip(self.blocks, outs, strict=True):
            block.add(program, size, inputs, strides, out)
            if len(strides) > 1:
                inputs, strides = [out, out + channels, inputs[2]], (width, width, strides[2])
            else:
                inputs = [out]
        return program.compile()
