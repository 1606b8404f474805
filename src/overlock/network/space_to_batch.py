"""A map as a batch of coarser ones, in which a stage is dilated without a change to its layers."""

from __future__ import annotations

import torch
from torch import Tensor


def space_to_batch(x: Tensor, dilation: int) -> Tensor:
    """Every ``dilation``-th row and column as an image of its own, from each start; memory layout as that of ``x``.

    (B, C, H, W) -> (dilation^2 B, C, H / dilation, W / dilation), rounded up: where the sides are no multiples, the
    last row and column are repeated.
    """
    if dilation == 1:
        return x
    rows, columns = _by_start(x.size(2), dilation, x), _by_start(x.size(3), dilation, x)
    maps = x.index_select(2, rows).index_select(3, columns)
    maps = maps.unflatten(3, (dilation, -1)).unflatten(2, (dilation, -1))  # B, C, start row, H', start column, W'
    return _in_layout_of(x, maps.permute(2, 4, 0, 1, 3, 5).flatten(0, 2))


def batch_to_space(x: Tensor, dilation: int, like: Tensor) -> Tensor:
    """The inverse of :func:`space_to_batch`, to the height and width of another map."""
    if dilation == 1:
        return x
    maps = x.unflatten(0, (dilation, dilation, -1))  # start row, start column, B, C, H', W'
    maps = maps.permute(2, 3, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)
    rows, columns = torch.arange(like.size(2), device=x.device), torch.arange(like.size(3), device=x.device)
    return _in_layout_of(x, maps.index_select(2, rows).index_select(3, columns))  # to export, no slice of unknown size


def _by_start(size: int, dilation: int, like: Tensor) -> Tensor:
    """Rows or columns, those of the first start before those of the next."""
    starts = torch.arange(dilation, device=like.device)[:, None]
    steps = torch.arange((size + dilation - 1) // dilation, device=like.device)
    return (starts + dilation * steps).clamp(max=size - 1).flatten()


def _in_layout_of(like: Tensor, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if like.stride(1) == 1 else x
