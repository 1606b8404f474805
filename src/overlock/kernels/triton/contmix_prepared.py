"""A call of ContMix as its Triton kernels take it: maps by token, folded keys, a table of biases; and the way back."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.triton.conditions import on_device_of
from overlock.kernels.triton.contmix_kernels import prepare_kernel

PROGRAMS = 1056  # fewer leave a large GPU idle: eight for each of 132 multiprocessors
HELD = 4096  # numbers of one tensor that a program keeps in registers, or twice in shared memory
BLOCK = 64  # taps, and columns of keys, of a program of the preparation


def padded(size: int, least: int = 1) -> int:
    """Next power of two, as tensors of a kernel must be, and at least what a matrix product takes."""
    return max(least, triton.next_power_of_2(size))


def fit(size: int, least: int, numbers: int) -> int:
    """Halve a size of which each takes so many numbers until a program can keep all of them, or to the least."""
    while size > least and size * numbers > HELD:
        size //= 2
    return size


def by_token(x: Tensor) -> Tensor:
    """(B, G, C, H, W) -> (B, G, HW, C): a view where the strides allow, a copy elsewhere."""
    return x.permute(0, 1, 3, 4, 2).flatten(2, 3)


def channels_together(x: Tensor) -> Tensor:
    """As :func:`by_token`, with the channels of a token side by side: what makes one load of several channels."""
    x = by_token(x)
    return x if x.stride(3) == 1 else x.contiguous()


def settle(out: Tensor, by_tokens: Tensor) -> Tensor:
    """``out``, whose numbers a kernel wrote through the view ``by_tokens``; they are copied if it is no view."""
    if by_tokens.data_ptr() != out.data_ptr():
        out.copy_(by_tokens.unflatten(2, out.shape[3:]).permute(0, 1, 4, 2, 3))
    return out


def unit_of(*maps: Tensor) -> int:
    """The most numbers, up to 16, of which all strides of the maps are multiples: what a load can take at once."""
    strides = (zip(x.shape[:3], x.stride(), strict=False) for x in maps)
    return math.gcd(16, *(stride for pairs in strides for size, stride in pairs if size > 1))  # of one, no matter


def strides_of(*maps: Tensor, unit: int) -> list[int]:
    """Strides of batch, group and token of the maps, in units."""
    return [stride // unit for x in maps for stride in x.stride()[:3]]


class Prepared:
    """Inputs of a call, their keys folded: (W_d K^T) Q in place of W_d (K^T Q), so a logit needs D numbers, not S^2.

    Args:
        call: arguments of ``forward``.
        gradients: whether for the backward kernels, which take products over channels: 16 or more of them.
        pitch: entries of a row of taps, of which Kw are taps.
        taps_p: entries of all rows.
    """

    def __init__(self, call: tuple[Any, ...], gradients: bool, pitch: int, taps_p: int):
        query, key, value, weight, bias, rpb, self.kernel_height, self.kernel_width = call
        self.batch, self.groups, self.depth, self.height, self.width = query.shape
        self.channels, self.pairs = value.shape[2], self.batch * self.groups
        self.pitch, self.taps_p = pitch, taps_p
        self.dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        self.exact = self.dtype == torch.float32
        self.query = channels_together(query.to(self.dtype))
        self.key = key.to(self.dtype).contiguous()
        self.value = channels_together(value.to(self.dtype))
        self.weight = weight.contiguous()
        self.sizes = {
            "depth": self.depth, "channels": self.channels, "kernel_height": self.kernel_height,
            "kernel_width": self.kernel_width, "depth_p": padded(self.depth, 16),
            "channels_p": padded(self.channels, 16 if gradients else 8), "taps_p": taps_p, "exact": self.exact,
        }  # fmt: skip
        self.widest = max(self.sizes["depth_p"], self.sizes["channels_p"])
        with self.device():
            self._prepare(bias, rpb)

    def device(self) -> contextlib.AbstractContextManager:
        """Triton launches on the current device, which need not be the tensors'."""
        return on_device_of(self.value)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.value.device)

    def _prepare(self, bias: Tensor | None, rpb: Tensor | None) -> None:
        shape = (self.pairs, self.taps_p, self.sizes["depth_p"])
        self.keys = self.empty(1, *shape) if self.exact else self.empty(2, *shape, dtype=torch.bfloat16)
        self.half = self.keys.stride(0)
        self.table = self.empty(self.groups, self.kernel_height, self.kernel_width, self.taps_p)
        columns = max(BLOCK, self.sizes["depth_p"])
        folds = triton.cdiv(self.taps_p, BLOCK) * triton.cdiv(self.pairs * self.sizes["depth_p"], columns)
        prepare_kernel[(folds + self.groups * self.kernel_height * self.kernel_width,)](
            self.key, self.weight,
            self.weight if bias is None else bias.contiguous(),  # never read where there is none
            self.weight if rpb is None else rpb.contiguous(),
            self.keys, self.table, folds, self.half, self.pairs,
            depth=self.depth, regions=self.key.shape[3],
            kernel_height=self.kernel_height, kernel_width=self.kernel_width,
            pitch=self.pitch, taps_p=self.taps_p, block=BLOCK, columns=columns,
            depth_p=self.sizes["depth_p"], regions_p=padded(self.key.shape[3], 16),
            has_bias=bias is not None, has_rpb=rpb is not None, exact=self.exact, num_warps=4,
        )  # fmt: skip

    def start_backward(self, grad: Tensor) -> None:
        """Set up what the gradient kernels share; the first of them fills log-sum-exp and delta of each token."""
        self.grad = channels_together(grad.to(self.dtype))
        self.lse = self.empty(self.pairs, self.height * self.width)
        self.delta = torch.empty_like(self.lse)
        self.unit = unit_of(self.grad, self.query, self.value)

    def taps(self, x: Tensor) -> Tensor:
        """(..., taps_p) -> (..., Kh, Kw), without the padding."""
        rows = x[..., : self.kernel_height * self.pitch].unflatten(-1, (self.kernel_height, self.pitch))
        return rows[..., : self.kernel_width]

    def unfold_keys(self, grad_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of key (B, G, D, S^2) and weight (N, S^2) from that of the folded keys (BG, taps_p, D)."""
        by_taps = self.taps(grad_keys[..., : self.depth].transpose(1, 2)).flatten(2)  # BG, D, N
        grad_key = (by_taps @ self.weight.float()).view(self.batch, self.groups, self.depth, -1)
        grad_weight = by_taps.flatten(0, 1).t() @ self.key.float().flatten(0, 2)
        return grad_key, grad_weight


def unfold_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of bias (N,) and rpb (G, 2Kh-1, 2Kw-1) from that of the table (G, Kh, Kw, Kh, Kw) of logits by shift.

    With the shift counted as s = win(t) - t + K - 1, a tap n reads the entry s + n: a sum over anti-diagonals.
    """
    rows = _antidiagonals(table.permute(0, 2, 4, 1, 3))
    return table.sum((0, 1, 2)).flatten(), _antidiagonals(rows.permute(0, 3, 1, 2))


def _antidiagonals(x: Tensor) -> Tensor:
    """(..., K, K) -> (..., 2K - 1): rows lengthened by K and read as rows of 2K - 1 have moved one more step each."""
    size = x.shape[-1]
    skewed = F.pad(x, (0, size)).flatten(-2)[..., : size * (2 * size - 1)]
    return skewed.unflatten(-1, (size, 2 * size - 1)).sum(-2)
