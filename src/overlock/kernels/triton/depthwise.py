"""Depthwise convolution with a large kernel for CUDA, in Triton; depthwise.py says where it takes cuDNN's place.

Letters: B batch, C channels, H x W the map, K x K the kernel (odd, stride 1, zeros around: the output has the map's
size). M = B C H W numbers.

Each of forward, input gradient and weight gradient takes K^2 M multiply-adds and moves 2 M numbers: with K = 17 in
bfloat16, 72 multiply-adds a byte, so it is arithmetic that counts, on the ordinary float32 units (as a matrix product a
depthwise convolution is mostly zeros). What keeps these busy is reuse in registers: a lane has one channel and 8 x 8
sums, and each step brings them 64 multiply-adds for 16 loads. In the convolution the sums are those of 8 rows x 8
columns of the output; a step is one tap column of one row of the map, whose 8 values serve 8 rows. In the weight
gradient they are 8 x 8 taps, and a step is one position. Price: K + 7 rows of values instead of K, masked, and K
rounded up to a multiple of 8 twice.

Two things make the compiler see it so. A program is one warp, 32 channels: then values, weights and sums all lie one
channel to a lane, and no operand passes through shared memory to reach another lane. And pointers count as unaligned:
wider loads would give a lane several channels, of values and weights differently. The maps are channels last, so that a
warp reads 32 neighbours whatever the shift; others are copied, 2 M numbers against K^2 M multiply-adds.

The input gradient is the convolution with the taps reversed. The weight gradient is split over the rows of the images;
the parts are summed at the end, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE, LANES = 8, 32
PROGRAMS = 2112  # of the weight gradient, where the images have rows for it: 16 warps for each of 132 multiprocessors


@triton.jit(do_not_specialize_on_alignment=["x", "weight"])
def conv_kernel(
    x, weight, bias, out, x_b, x_h, x_w, out_b, out_h, out_w, channels, height, width,
    size: tl.constexpr, reverse: tl.constexpr, has_bias: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: rows x columns positions of a block of channels of one image. ``weight`` is (K^2, C) in float32."""
    program = tl.program_id(0)
    column_blocks, row_blocks, channel_blocks = tl.cdiv(width, columns), tl.cdiv(height, rows), tl.cdiv(channels, block)
    first_column = program % column_blocks * columns
    first_row = program // column_blocks % row_blocks * rows
    channel = program // (column_blocks * row_blocks) % channel_blocks * block + tl.arange(0, block)[None, None, :]
    batch = (program // (column_blocks * row_blocks * channel_blocks)).to(tl.int64)
    known = channel < channels
    row = tl.arange(0, rows)[:, None, None]
    column = first_column + tl.arange(0, columns)[None, :, None]
    reach: tl.constexpr = size // 2

    total = tl.zeros([rows, columns, block], tl.float32)
    for source_row in range(tl.maximum(first_row - reach, 0), tl.minimum(first_row + rows + reach, height)):
        tap_row = source_row + reach - first_row - row  # of each output row
        used = (tap_row >= 0) & (tap_row < size) & known
        tap_row = tl.minimum(tl.maximum(tap_row, 0), size - 1)
        for tap_column in range(size):
            source = column + (tap_column - reach)
            inside = (source >= 0) & (source < width) & known
            values = tl.load(x + batch * x_b + source_row * x_h + source * x_w + channel, mask=inside, other=0.0)
            tap = tap_row * size + tap_column
            if reverse:
                tap = size * size - 1 - tap
            weights = tl.load(weight + tap * channels + channel, mask=used, other=0.0)
            total += values.to(tl.float32) * weights

    if has_bias:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    row += first_row
    target = out + batch * out_b + row * out_h + column * out_w + channel
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < height) & (column < width) & known)


@triton.jit(do_not_specialize_on_alignment=["grad", "x"])
def weight_kernel(
    grad, x, out, grad_b, grad_h, grad_w, x_b, x_h, x_w, batches, channels, height, width, parts,
    size: tl.constexpr, side: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: side x side taps of a block of channels, over every ``parts``-th row of the images."""
    blocks: tl.constexpr = (size + side - 1) // side
    program = tl.program_id(0)
    tap_column = program % blocks * side + tl.arange(0, side)[None, :, None]
    tap_row = program // blocks % blocks * side + tl.arange(0, side)[:, None, None]
    part = program // (blocks * blocks) % parts
    channel = program // (blocks * blocks) // parts * block + tl.arange(0, block)[None, None, :]
    known = channel < channels
    reach: tl.constexpr = size // 2

    total = tl.zeros([side, side, block], tl.float32)
    for item in range(part, batches * height, parts):
        batch = (item // height).to(tl.int64)
        source_row = item % height
        row = source_row + reach - tap_row  # of the output, to which this tap adds this row's values
        used = (row >= 0) & (row < height) & known
        for column in range(width):
            source = column + tap_column - reach
            inside = (source >= 0) & (source < width) & known
            values = tl.load(x + batch * x_b + source_row * x_h + source * x_w + channel, mask=inside, other=0.0)
            grads = tl.load(grad + batch * grad_b + row * grad_h + column * grad_w + channel, mask=used, other=0.0)
            total += values.to(tl.float32) * grads.to(tl.float32)

    target = out + ((part * size + tap_row) * size + tap_column) * channels + channel
    tl.store(target, total, mask=(tap_row < size) & (tap_column < size) & known)


# Triton interprets instead of compiling if TRITON_INTERPRET was set before this module was imported.
INTERPRETED = not isinstance(conv_kernel, triton.JITFunction)


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Reason why the kernels cannot run a convolution, or None."""
    size = weight.shape[-1]
    reason = None
    if not (x.is_cuda or INTERPRETED):
        reason = f"it needs tensors on a CUDA device, not on {x.device.type}"
    elif x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"it takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    elif weight.dtype != x.dtype:
        reason = f"it takes images and weights of one dtype, not {x.dtype} and {weight.dtype}"
    elif tuple(weight.shape) != (x.shape[1], 1, size, size) or size % 2 == 0 or not 7 <= size <= 31:
        reason = f"it takes weights (C, 1, K, K), K odd and 7 to 31, not {tuple(weight.shape)}"
    elif x.numel() == 0:
        reason = "there is nothing to compute"
    return reason


def _on_device(x: Tensor, launch: Callable[[], object]) -> None:
    """Triton launches on the current device, which need not be the tensors'."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            launch()
    else:
        launch()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(3)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """The convolution, or with ``reverse`` the one with the taps reversed. Channels last, in the dtype of ``x``."""
    batch, channels, height, width = x.shape
    together = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(together)
    by_tap = weight.flatten(1).t().float().contiguous()
    blocks = triton.cdiv(height, SIDE) * triton.cdiv(width, SIDE) * triton.cdiv(channels, LANES)

    def launch() -> None:
        conv_kernel[(batch * blocks,)](
            together, by_tap, by_tap if bias is None else bias, out, *_strides(together), *_strides(out),
            channels, height, width, size=weight.shape[-1], reverse=reverse, has_bias=bias is not None,
            rows=SIDE, columns=SIDE, block=LANES, num_warps=1, num_stages=1,
        )  # fmt: skip

    _on_device(x, launch)
    return out


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG001
    """Gradient of the convolution with respect to its input."""
    return convolve(grad, weight, reverse=True)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the convolution with respect to its weight (C, 1, K, K)."""
    batch, channels, height, width = x.shape
    size = weight.shape[-1]
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    programs = triton.cdiv(size, SIDE) ** 2 * triton.cdiv(channels, LANES)
    parts = min(batch * height, triton.cdiv(PROGRAMS, programs))
    out = torch.empty(parts, size * size, channels, dtype=torch.float32, device=x.device)

    def launch() -> None:
        weight_kernel[(programs * parts,)](
            grad, x, out, *_strides(grad), *_strides(x), batch, channels, height, width, parts,
            size=size, side=SIDE, block=LANES, num_warps=1, num_stages=1,
        )  # fmt: skip

    _on_device(x, launch)
    return out.sum(0).t().reshape(weight.shape).to(weight.dtype)
