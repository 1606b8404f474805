"""A Dilated RepConv in training, for CUDA: N depthwise convolutions, each batch-normed, and their sum.

Letters: N branches, B batch, C channels, M = B H W positions. Maps are channels last; z_n is a branch's result.

    y = sum over n of  s_n (z_n - mean_n) + shift_n,    s_n = scale_n / sqrt(variance_n + eps)

Module by module, a batch norm reads a map twice and writes one, and each sum reads two and writes one: 6 N maps are
moved between the convolutions and y. Here it is 2 N, the statistics and then the sum of all. So are the gradients: with
a dot for sums over all positions,

    grad_z_n = s_n (g - mean of g - (z_n - mean_n) (g . (z_n - mean_n)) / (M (variance_n + eps)))

is a g + b z_n + c with numbers a, b, c for each channel. The sums are one pass, all grad_z_n another, and the branches'
input gradients are added up by the convolutions themselves. Variances are sums of squared distances from a number of
the map, so that a large mean costs no digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton import conditions, depthwise, small_filters
from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.pointwise import MULTIPROCESSORS, by_position

TILE, BLOCK = 32, 64  # positions and channels of a program
WAVES = 8  # programs for each multiprocessor that sum over positions


@triton.jit
def sum_kernel(
    results, centre, grad, sums, rows, parts, channels: tl.constexpr, has_grad: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: a branch's sums over every ``parts``-th tile of positions, with d = z - ``centre`` (N, C).

    ``sums`` is (N, parts, 2, C): of d and d d, or with ``has_grad`` of g and g d.
    """
    blocks: tl.constexpr = (channels + block - 1) // block
    index = tl.program_id(0) % blocks * block + tl.arange(0, block)
    channel = index[None, :]
    known = (channel < channels) | (channels % block == 0)
    part = tl.program_id(0) // blocks % parts
    branch = tl.program_id(0) // (blocks * parts)
    results += branch.to(tl.int64) * rows * channels
    middle = tl.load(centre + branch * channels + channel, mask=known, other=0.0)
    ones = tl.zeros([tile, block], tl.float32)
    products = tl.zeros([tile, block], tl.float32)
    for first in range(part * tile, rows, parts * tile):
        row = first + tl.arange(0, tile)
        inside = (row < rows)[:, None] & known
        at = row.to(tl.int64)[:, None] * channels + channel
        apart = tl.load(results + at, mask=inside, other=0.0).to(tl.float32) - middle
        if has_grad:
            values = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        else:
            apart = tl.where(inside, apart, 0.0)
            values = apart
        ones += values
        products += values * apart
    target = sums + (branch * parts + part) * 2 * channels + index
    tl.store(target, tl.sum(ones, 0), mask=index < channels)
    tl.store(target + channels, tl.sum(products, 0), mask=index < channels)


@triton.jit
def _places(rows, channels: tl.constexpr, tile: tl.constexpr, block: tl.constexpr):
    """A program's channels, which of them exist, its places in a map, and which of these exist."""
    blocks: tl.constexpr = (channels + block - 1) // block
    channel = (tl.program_id(0) % blocks * block + tl.arange(0, block))[None, :]
    known = (channel < channels) | (channels % block == 0)
    row = tl.program_id(0) // blocks * tile + tl.arange(0, tile)
    inside = (row < rows)[:, None] & known
    at = row.to(tl.int64)[:, None] * channels + channel
    return channel, known, at, inside


@triton.jit
def add_kernel(
    results, factor, shift, out, rows, count: tl.constexpr, channels: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: the sum over branches of z * factor (N, C), plus shift (C,), of some positions and channels."""
    channel, known, at, inside = _places(rows, channels, tile, block)
    total = tl.load(shift + channel, mask=known, other=0.0).broadcast_to(tile, block)
    for n in tl.static_range(count):
        values = tl.load(results + at, mask=inside, other=0.0).to(tl.float32)
        total += values * tl.load(factor + n * channels + channel, mask=known, other=0.0)
        results += rows.to(tl.int64) * channels
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    results, grad, factors, out, rows, count: tl.constexpr, channels: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: a g + b z + c for each branch, of some positions and channels; ``factors`` is (3, N, C)."""
    channel, known, at, inside = _places(rows, channels, tile, block)
    values = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    for n in tl.static_range(count):
        source = factors + n * channels + channel
        of_grad = tl.load(source, mask=known, other=0.0)
        of_result = tl.load(source + count * channels, mask=known, other=0.0)
        constant = tl.load(source + 2 * count * channels, mask=known, other=0.0)
        result = tl.load(results + at, mask=inside, other=0.0).to(tl.float32)
        total = values * of_grad + result * of_result + constant
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
        results += rows.to(tl.int64) * channels
        out += rows.to(tl.int64) * channels


def why_not(x: Tensor, taps: Tensor, *call: object) -> str | None:
    """Reason why the kernels cannot run a call, forward or backward, or None."""
    reason = conditions.why_not(x, taps)
    if reason is not None:
        return reason
    sizes, dilations = (
        numbers for numbers in call if isinstance(numbers, list | tuple) and isinstance(numbers[0], int)
    )
    reach = max(r * (k - 1) + 1 for k, r in zip(sizes, dilations, strict=True))
    if reach > depthwise.LARGEST:
        return f"it takes branches that reach over {depthwise.LARGEST} positions, not {reach}"
    return "32 images have more numbers than 32 bits can count" if x[0].numel() >= depthwise.LARGEST_IMAGE else None


def _tiles(channels: int) -> dict[str, int]:
    return {"channels": channels, "tile": TILE, "block": min(BLOCK, triton.next_power_of_2(channels))}


def _sums(kept: Tensor, centre: Tensor, grad: Tensor | None) -> Tensor:
    """(2, N, C): over all positions, of z - centre and its square, or of g and g (z - centre)."""
    count, channels = centre.shape
    rows = kept[0].numel() // channels
    sizes = _tiles(channels)
    blocks = triton.cdiv(channels, sizes["block"])
    parts = min(triton.cdiv(rows, TILE), triton.cdiv(WAVES * MULTIPROCESSORS, count * blocks))
    sums = torch.empty(count, parts, 2, channels, dtype=torch.float32, device=kept.device)
    with on_device_of(kept):
        sum_kernel[(count * parts * blocks,)](
            kept, centre, kept if grad is None else grad, sums, rows, parts, has_grad=grad is not None, **sizes,
            num_warps=4,
        )  # fmt: skip
    return sums.sum(1).transpose(0, 1)


def _filters(taps: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """(T, C) -> (C, 1, k, k) of each branch."""
    parts = taps.to(dtype).split([k * k for k in sizes])
    return [part.t().unflatten(1, (1, k, k)) for part, k in zip(parts, sizes, strict=True)]


def forward(
    x: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, sizes: Sequence[int], dilations: Sequence[int], eps: float
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """See overlock.ops.repconv."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    kept = x.new_empty(len(sizes), batch, height, width, channels)
    for result, weight, dilation in zip(kept, _filters(taps, sizes, x.dtype), dilations, strict=True):
        depthwise.convolve(x, weight, None, dilation, out=result.permute(0, 3, 1, 2))
    rows = batch * height * width
    centre = kept[:, 0, height // 2, width // 2].float().contiguous()
    ones, squares = _sums(kept, centre, None) / rows
    mean, variance = centre + ones, squares - ones * ones
    factor = scale * torch.rsqrt(variance + eps)
    out = torch.empty(batch, height, width, channels, dtype=x.dtype, device=x.device)
    tiles = _tiles(channels)
    programs = triton.cdiv(rows, TILE) * triton.cdiv(channels, tiles["block"])
    with on_device_of(x):
        add_kernel[(programs,)](
            kept, factor, (shift - mean * factor).sum(0), out, rows, count=len(sizes), **tiles, num_warps=4
        )
    return out.permute(0, 3, 1, 2), [kept], mean, variance


def backward(
    grad: Tensor, x: Tensor, taps: Tensor, scale: Tensor, kept: Sequence[Tensor], mean: Tensor, variance: Tensor,
    sizes: Sequence[int], dilations: Sequence[int], eps: float, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, taps, scale and shift; x and taps only where they are wanted."""
    results, channels = kept[0], x.shape[1]
    grads = by_position(grad.to(x.dtype)).contiguous()
    rows = len(grads)
    of_shift, products = _sums(results, mean, grads)
    inverse = torch.rsqrt(variance + eps)
    of_grad = scale * inverse
    of_result = -of_grad * inverse * inverse * products / rows
    constant = -of_grad * of_shift / rows - of_result * mean
    of_x, of_taps = x.new_empty(0), taps.new_empty(0)
    if any(wanted):
        of_results = torch.empty_like(results)
        tiles = _tiles(channels)
        programs = triton.cdiv(rows, TILE) * triton.cdiv(channels, tiles["block"])
        with on_device_of(x):
            gradient_kernel[(programs,)](
                results, grads, torch.stack((of_grad, of_result, constant)), of_results, rows, count=len(sizes),
                **tiles, num_warps=4,
            )  # fmt: skip
        maps = [of_result.permute(0, 3, 1, 2) for of_result in of_results]
        filters = _filters(taps, sizes, x.dtype)
        if wanted[0]:
            of_x = _input_gradient(maps, filters, dilations)
        if wanted[1]:
            of_taps = torch.cat(
                [
                    _taps_gradient(of_map, x, weight, dilation)
                    for of_map, weight, dilation in zip(maps, filters, dilations, strict=True)
                ]
            )
    return of_x, of_taps, products * inverse, of_shift


def _input_gradient(maps: Sequence[Tensor], filters: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    """The sum of the branches' gradients."""
    total: Tensor | None = None
    for of_map, weight, dilation in zip(maps, filters, dilations, strict=True):
        total = depthwise.convolve(of_map, weight, None, dilation, reverse=True, out=total, adds=total is not None)
    assert total is not None
    return total


def _taps_gradient(of_map: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """(k k, C) in float32."""
    if weight.shape[-1] == 3:
        return small_filters.weight_gradient(of_map, x, dilation)
    return depthwise.weight_gradient(of_map, x, weight.float(), dilation).flatten(1).t()
