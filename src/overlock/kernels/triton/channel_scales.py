"""What scales the channels of each image, for CUDA: squeeze-excite and the response norm, from sums over the map.

Letters: B batch, C channels, R hidden channels of squeeze-excite, HW positions. Maps are channels last.

A first kernel sums a piece of an image's positions, so that one image fills a large GPU too; a second adds the pieces
up in a fixed order and makes the scales. No sum has two owners.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.pointwise import MULTIPROCESSORS, by_position

NUMBERS = 4096  # of a step of a program's loop
SMALLEST = 32  # positions of a piece


@triton.jit
def sum_kernel(
    x, other, sums, positions, pieces, x_m, other_m, channels: tl.constexpr, unit: tl.constexpr,
    squares: tl.constexpr, products: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: a piece of an image. ``sums`` is (B, pieces, C): of numbers, their squares, or x * other."""
    image = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    length = tl.cdiv(positions, pieces)
    last = tl.minimum((piece + 1) * length, positions)
    channel = tl.arange(0, block)[None, :]
    known = (channel < channels) | (channels == block)
    total = tl.zeros([tile, block], tl.float32)
    for first in range(piece * length, last, tile):
        position = first + tl.arange(0, tile)
        source = x + (image * positions + position)[:, None] * (x_m * unit) + channel
        inside = (position < last)[:, None] & known
        values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        if products:
            source = other + (image * positions + position)[:, None] * (other_m * unit) + channel
            total += values * tl.load(source, mask=inside, other=0.0).to(tl.float32)
        else:
            total += values * values if squares else values
    target = sums + (image * pieces + piece) * channels + tl.arange(0, block)
    tl.store(target, tl.sum(total, 0), mask=tl.arange(0, block) < channels)


@triton.jit
def excite_kernel(
    sums, first_weight, first_bias, second_weight, second_bias, out, pieces, positions,
    channels: tl.constexpr, hidden: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """One program: sigmoid(W_2 GELU(W_1 mean + b_1) + b_2) of an image."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    known = channel < channels
    mean = tl.zeros([block], tl.float32)
    for piece in range(pieces):
        mean += tl.load(sums + (image * pieces + piece) * channels + channel, mask=known, other=0.0)
    mean /= positions
    total = tl.load(second_bias + channel, mask=known, other=0.0).to(tl.float32)
    for first in range(0, hidden, chunk):
        unit = first + tl.arange(0, chunk)
        there = (unit < hidden)[:, None] & known[None, :]
        weight = tl.load(first_weight + unit[:, None] * channels + channel[None, :], mask=there, other=0.0)
        inner = tl.sum(weight.to(tl.float32) * mean[None, :], 1)
        inner += tl.load(first_bias + unit, mask=unit < hidden, other=0.0).to(tl.float32)
        inner = 0.5 * inner * (1 + tl.erf(inner * 0.7071067811865476))
        weight = tl.load(second_weight + channel[None, :] * hidden + unit[:, None], mask=there, other=0.0)
        total += tl.sum(weight.to(tl.float32) * inner[:, None], 0)
    tl.store(out + image * channels + channel, tl.sigmoid(total).to(out.dtype.element_ty), mask=known)


@triton.jit
def response_kernel(sums, weight, out, pieces, eps, channels: tl.constexpr, block: tl.constexpr):
    """One program: the response norm's scales of an image, 1 + weight * n / (mean of n over the channels + eps)."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    known = channel < channels
    total = tl.zeros([block], tl.float32)
    for piece in range(pieces):
        total += tl.load(sums + (image * pieces + piece) * channels + channel, mask=known, other=0.0)
    norms = tl.sqrt(total)
    mean = tl.sum(norms, 0) / channels + eps
    scale = 1 + tl.load(weight + channel, mask=known, other=0.0).to(tl.float32) * (norms / mean)
    tl.store(out + image * channels + channel, scale.to(out.dtype.element_ty), mask=known)


@triton.jit
def rescale_kernel(
    x, scale, other, term, out, rows, positions, x_m, other_m, term_b,
    channels: tl.constexpr, unit: tl.constexpr, has_other: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: x * scale + other * term of some positions, or x * scale + term; scale and term by image."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    image = row // positions  # of 32 bits: dividing 64 would take longer than all else
    row = row.to(tl.int64)
    channel = tl.arange(0, block)[None, :]
    known = (channel < channels) | (channels == block)
    inside = (row < rows)[:, None] & known
    values = tl.load(x + row[:, None] * (x_m * unit) + channel, mask=inside, other=0.0).to(tl.float32)
    values *= tl.load(scale + image[:, None] * channels + channel, mask=inside, other=0.0).to(tl.float32)
    terms = tl.load(term + image[:, None] * term_b + channel, mask=inside, other=0.0).to(tl.float32)
    if has_other:
        terms *= tl.load(other + row[:, None] * (other_m * unit) + channel, mask=inside, other=0.0).to(tl.float32)
    values += terms
    tl.store(out + row[:, None] * channels + channel, values.to(out.dtype.element_ty), mask=inside)


def _step(*maps: Tensor) -> dict[str, int]:
    """Sizes of a step over positions with all their channels, of maps by position."""
    channels = maps[0].shape[1]
    block = triton.next_power_of_2(channels)
    unit = 8 if all(rows.stride(0) % 8 == 0 for rows in maps) else 1
    return {"channels": channels, "unit": unit, "tile": max(1, NUMBERS // block), "block": block}


def _sums(x: Tensor, *, squares: bool = False, times: Tensor | None = None) -> Tensor:
    """(B, C, H, W) -> (B, pieces, C) in float32."""
    batch, channels, height, width = x.shape
    rows, positions = by_position(x), height * width
    others = rows if times is None else by_position(times)
    pieces = max(1, min(triton.cdiv(2 * MULTIPROCESSORS, batch), positions // SMALLEST))
    sums = torch.empty(batch, pieces, channels, dtype=torch.float32, device=x.device)
    step = _step(rows, others)
    sum_kernel[(batch * pieces,)](
        rows, others, sums, positions, pieces, rows.stride(0) // step["unit"], others.stride(0) // step["unit"],
        **step, squares=squares, products=times is not None, num_warps=4,
    )  # fmt: skip
    return sums


def _rescale(x: Tensor, scale: Tensor, other: Tensor | None, term: Tensor) -> Tensor:
    """x * scale + other * term, or + term without other, channels last; maps (B, C, H, W), numbers (B, C)."""
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=x.dtype, device=x.device)
    rows = by_position(x)
    others = rows if other is None else by_position(other)
    step = _step(rows, others)
    rescale_kernel[(triton.cdiv(len(rows), step["tile"]),)](
        rows, scale, others, term, out, len(rows), height * width, rows.stride(0) // step["unit"],
        others.stride(0) // step["unit"], term.stride(0), **step, has_other=other is not None, num_warps=4,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def excitation(
    x: Tensor, first_weight: Tensor, first_bias: Tensor, second_weight: Tensor, second_bias: Tensor
) -> Tensor:
    """What squeeze-excite multiplies the channels of images by, (B, C, H, W) -> (B, C).

    Args:
        x: (B, C, H, W), best channels last.
        first_weight, first_bias: (R, C, 1, 1) and (R,), of the layer before GELU.
        second_weight, second_bias: (C, R, 1, 1) and (C,), of the layer before the sigmoid.
    """
    out = x.new_empty(x.shape[:2])
    block = triton.next_power_of_2(x.shape[1])
    with on_device_of(x):
        sums = _sums(x)
        excite_kernel[(len(x),)](
            sums, first_weight.contiguous(), first_bias, second_weight.contiguous(), second_bias, out,
            sums.shape[1], x.shape[2] * x.shape[3], channels=x.shape[1], hidden=len(first_weight), block=block,
            chunk=max(1, min(16, 2 * NUMBERS // block)), num_warps=8,
        )  # fmt: skip
    return out


def response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The response norm of a map, channels last. See :func:`overlock.ops.response_norm`."""
    batch, channels = x.shape[:2]
    scale = torch.empty(batch, channels, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        sums = _sums(x, squares=True)
        response_kernel[(batch,)](
            sums, weight, scale, sums.shape[1], eps, channels=channels, block=triton.next_power_of_2(channels),
            num_warps=4,
        )  # fmt: skip
        return _rescale(x, scale, None, bias.expand_as(scale))


def sum_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b (B, C, H, W) over the maps, (B, C) in float32."""
    with on_device_of(a):
        return (_sums(a, squares=True) if a is b else _sums(a, times=b)).sum(1)


def scale_and_add(a: Tensor, scale: Tensor, b: Tensor | None, other: Tensor) -> Tensor:
    """a * scale + b * other, or + other without b, in the dtype of ``a``; maps (B, C, H, W), numbers (B, C)."""
    with on_device_of(a):
        return _rescale(a, scale.contiguous(), b, other if other.stride(1) == 1 else other.contiguous())
