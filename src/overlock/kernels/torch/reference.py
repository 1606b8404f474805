"""ContMix's dynamic convolution in plain PyTorch: the definition that every backend is held to.

Letters: B batch, G groups, D query and key channels of a group, C value channels of a group, H x W the map,
S^2 region centres, K x K the kernel, N = K^2 its taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_starts(size: int, kernel_size: int, device: torch.device | None = None) -> Tensor:
    """First row (or column) of each token's window: centred, and shifted at the borders to lie inside the map."""
    return (torch.arange(size, device=device) - kernel_size // 2).clamp(0, size - kernel_size)


def window_rows(size: int, kernel_size: int, device: torch.device | None = None) -> Tensor:
    """The rows (or columns) of each token's window, (size, kernel_size)."""
    return window_starts(size, kernel_size, device)[:, None] + torch.arange(kernel_size, device=device)


def enlarged(height: int, width: int, least: int) -> list[int] | None:
    """Size of a map with a side below ``least``, for the mixing; None for others.

    The order of the float operations decides the cut to an integer.
    """
    if min(height, width) >= least:
        return None
    if height < width:
        return [least, int(least / height * width)]
    return [int(least / width * height), least]


def average_regions(x: Tensor, height: int, width: int) -> Tensor:
    """``F.adaptive_avg_pool2d`` of maps (..., H, W) as two matrix products, of which ONNX knows any size."""
    exact = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows, columns = (averages(x.shape[dim], parts, exact) for dim, parts in ((-2, height), (-1, width)))
    return (rows @ exact @ columns.transpose(0, 1)).to(x.dtype)


def averages(size: int, parts: int, like: Tensor) -> Tensor:
    """A matrix (parts, size) that averages over the regions of a dimension, which overlap where they do not divide it.

    A position p belongs to the regions i with i size / parts < p + 1 and p < (i + 1) size / parts. The matrix has the
    dtype and device of another tensor.
    """
    position, region = torch.arange(size, device=like.device), torch.arange(parts, device=like.device)[:, None]
    inside = ((region * size < (position + 1) * parts) & (position * parts < (region + 1) * size)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rpb: Tensor | None,
    kernel_height: int,
    kernel_width: int,
) -> Tensor:
    """Section 3.2 as written, one gather: needs a value copy of N times the map, so it is for small maps and checks.

    For each token t and tap n, with win(t) the token's window and rel the offset of the tap from the token:

        A[t]    = query[t] . key                    affinity to the S^2 region centres
        L[t, n] = weight[n] . A[t] + bias[n] + rpb[rel(t, n)]
        out[t]  = sum over n of softmax(L[t])[n] * value[win(t) + n]

    Shapes and the meaning of the arguments are those of :func:`overlock.ops.contmix`; here the kernel is already cut to
    the map, so that ``kernel_height <= H`` and ``kernel_width <= W``. Every operation is differentiable, so autograd
    gives the reference gradients, and works with symbolic sizes.
    """
    # Not torch.promote_types: an export of torch 2.6 that holds its call cannot be read back.
    dtype, exact = value.dtype, torch.float64 if value.dtype == torch.float64 else torch.float32
    kernels = make_kernels(
        query.to(exact), key.to(exact), weight.to(exact), bias, rpb, kernel_height, kernel_width
    )  # fmt: skip
    height, width = value.shape[-2:]
    rows = window_rows(height, kernel_height, value.device)
    columns = window_rows(width, kernel_width, value.device)
    windows = value.to(exact)[..., rows[:, None, :, None], columns[None, :, None, :]]  # B, G, C, H, W, Kh, Kw
    return torch.einsum("bghwn,bgchwn->bgchw", kernels, windows.flatten(5)).to(dtype)


def make_kernels(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """The kernels alone, (B, G, H, W, N), in the dtype of the query, key and weight."""
    (height, width), device, exact = query.shape[-2:], query.device, query.dtype
    logits = torch.einsum("bghws,ns->bghwn", make_affinities(query, key), weight)
    if bias is not None:
        logits = logits + bias.to(exact)
    if rpb is not None:
        rows, columns = window_rows(height, kernel_height, device), window_rows(width, kernel_width, device)
        offset_rows = rows - torch.arange(height, device=device)[:, None] + kernel_height - 1
        offset_columns = columns - torch.arange(width, device=device)[:, None] + kernel_width - 1
        table = rpb.to(exact)[:, offset_rows[:, None, :, None], offset_columns[None, :, None, :]]  # G, H, W, Kh, Kw
        logits = logits + table.flatten(3)
    return logits.softmax(dim=-1)


def make_affinities(query: Tensor, key: Tensor) -> Tensor:
    """Of each token to the region centres: (B, G, H, W, S^2)."""
    return torch.einsum("bgdhw,bgds->bghws", query, key)
