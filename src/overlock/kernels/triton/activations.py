"""GELU for CUDA, and the bias and GELU after a convolution in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.pointwise import by_position

NUMBERS = 2048  # of a program


@triton.jit
def _normal(x):
    """Phi(x), the normal distribution, by an odd polynomial on [-4, 4] that gives 0 and 1 at the ends.

    It is 3.3e-5 off at most, and was fitted to the least of the largest error of x Phi(x).
    """
    y = tl.minimum(tl.maximum(x, -4.0), 4.0)
    z = y * y
    p = 6.7407864e-11 * z - 6.06726092e-09
    p = p * z + 2.44098857e-07
    p = p * z - 5.86094666e-06
    p = p * z + 9.49458918e-05
    p = p * z - 0.00111292244
    p = p * z + 0.00981638674
    p = p * z - 0.0663275942
    p = p * z + 0.39890486
    return 0.5 + y * p


@triton.jit
def gelu(x, exact: tl.constexpr):
    """x Phi(x). For types of 16 bits by a polynomial, 1.3e-4 off at most: float16 rounds so at 0.5."""
    if exact:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return x * _normal(x)


@triton.jit
def gelu_slope(x, exact: tl.constexpr):
    """Derivative of GELU, Phi(x) + x phi(x). For types of 16 bits Phi is the polynomial's."""
    density = x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if exact:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + density
    return _normal(x) + density


@triton.jit
def bias_kernel(
    x, bias, out, rows, channels: tl.constexpr, with_gelu: tl.constexpr, exact: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program: ``tile`` positions of maps whose channels are last."""
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    channel = tl.arange(0, block)[None, :]
    known = (channel < channels) | (channels == block)
    inside = (row < rows)[:, None] & known
    at = row[:, None] * channels + channel
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    if with_gelu:
        values = gelu(values, exact)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def add_bias(x: Tensor, bias: Tensor, with_gelu: bool) -> Tensor:
    """x + bias, or GELU of it, channels last, in the dtype of ``x``.

    Args:
        x: (B, C, H, W), best channels last.
        bias: (C,).
        with_gelu: whether GELU is taken.
    """
    batch, channels, height, width = x.shape
    rows = by_position(x).contiguous()
    out = torch.empty_like(rows)
    block = triton.next_power_of_2(channels)
    tile = max(1, NUMBERS // block)
    with on_device_of(x):
        bias_kernel[(triton.cdiv(len(rows), tile),)](
            rows, bias, out, len(rows), channels=channels, with_gelu=with_gelu,
            exact=x.dtype == torch.float32, tile=tile, block=block, num_warps=4,
        )  # fmt: skip
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)
