"""Depthwise convolution with a large kernel for CUDA, in Triton, where it is faster than cuDNN.

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

import functools
import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

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
    """The convolution, or with ``reverse`` the one with the taps reversed. Layout and dtype of ``x``."""
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
    return _like(out, x)


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
    return _like(out.sum(0).t().reshape(weight.shape).to(weight.dtype), weight)


# ---- cuDNN, and which of the two ------------------------------------------------------------------------------------


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def _cudnn_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: int) -> Tensor:
    padding = [weight.shape[-1] // 2] * 2
    mask = [wanted == 0, wanted == 1, False]
    arguments = (grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], mask)
    return torch.ops.aten.convolution_backward(*arguments)[wanted]


# Each part of the work: ours and cuDNN's, called with (x, weight, bias) or (grad, x, weight).
PARTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "forward": (convolve, _cudnn),
    "input": (input_gradient, functools.partial(_cudnn_backward, wanted=0)),
    "weight": (weight_gradient, functools.partial(_cudnn_backward, wanted=1)),
}
_faster: dict[tuple[object, ...], bool] = {}


def _milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Median time on the device, after two calls to compile and to warm up."""
    times = []
    for repeat in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def choose(x: Tensor, weight: Tensor, part: str = "forward") -> bool:
    """Whether the Triton kernel of a part is the faster one: timed on the device once for each shape, dtype and layout.

    Where nothing can be timed, which is while a CUDA graph is captured, cuDNN is taken unless the answer is known.
    Tracing and export never come here: to them the convolution is one operator.
    """
    if why_not(x, weight) is not None:
        return False
    if not x.is_cuda:
        return True
    key = (part, x.device, x.dtype, tuple(x.shape), x.stride(1) == 1, weight.shape[-1])
    if key not in _faster:
        if torch.cuda.is_current_stream_capturing():
            return False
        grad = torch.randn_like(x)
        arguments = (x, weight, None) if part == "forward" else (grad, x, weight)
        with torch.cuda.device(x.device):
            ours, cudnn = (_milliseconds(functools.partial(run, *arguments)) for run in PARTS[part])
        _faster[key] = ours < cudnn
    return _faster[key]


def _like(result: Tensor, x: Tensor) -> Tensor:
    """``result`` in the memory layout that ``torch.empty_like(x)`` has, as the operators' fakes promise."""
    wanted = torch.empty_like(x, device="meta").stride()
    return result if result.stride() == wanted else torch.empty_like(x).copy_(result)


def _run(part: str, x: Tensor, weight: Tensor, *arguments: Tensor | None) -> Tensor:
    ours, cudnn = PARTS[part]
    result = (ours if choose(x, weight, part) else cudnn)(*arguments)
    return _like(result, weight if part == "weight" else x)


# ---- operators ------------------------------------------------------------------------------------------------------

_operator = torch.library.custom_op(
    "overlock::depthwise_conv2d",
    lambda x, weight, bias: _run("forward", x, weight, x, weight, bias),
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
_operator.register_fake(lambda x, weight, bias: torch.empty_like(x))  # noqa: ARG005
_input_gradient = torch.library.custom_op(
    "overlock::depthwise_conv2d_input_gradient",
    lambda grad, x, weight: _run("input", x, weight, grad, x, weight),
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight) -> Tensor",
)
_input_gradient.register_fake(lambda grad, x, weight: torch.empty_like(x))  # noqa: ARG005
_weight_gradient = torch.library.custom_op(
    "overlock::depthwise_conv2d_weight_gradient",
    lambda grad, x, weight: _run("weight", x, weight, grad, x, weight),
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight) -> Tensor",
)
_weight_gradient.register_fake(lambda grad, x, weight: torch.empty_like(weight))  # noqa: ARG005


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        _input_gradient(grad, x, weight) if wanted[0] else None,
        _weight_gradient(grad, x, weight) if wanted[1] else None,
        grad.sum((0, 2, 3)) if wanted[2] else None,
    )


_operator.register_autograd(_backward, setup_context=_save)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=K // 2, groups=C)`` by the faster of Triton and cuDNN for this shape.

    One operator to ``torch.compile`` and ``torch.export``; the choice is made when it runs. Under autocast it computes
    in the autocast dtype, as convolutions do.

    Args:
        x: (B, C, H, W), any strides; channels last is the fast layout.
        weight: (C, 1, K, K), K odd.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) in the layout of ``x``. Sums are kept in float32.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _operator(x, weight, bias)
