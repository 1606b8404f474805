"""Tensors side by side in one, so that an operation takes one, not fifty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NONE = -1  # in place of a rank


def pack(tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[int]]:
    """All numbers of the tensors as one flat tensor; and rank and sizes of each, one after another."""
    layout: list[int] = []
    for tensor in tensors:
        layout += [NONE] if tensor is None else [tensor.dim(), *tensor.shape]
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None]), layout


def shapes_of(layout: Sequence[int]) -> list[Sequence[int] | None]:
    """Those of the tensors, None where there is none."""
    shapes: list[Sequence[int] | None] = []
    offset = 0
    while offset < len(layout):
        rank = layout[offset]
        shapes.append(None if rank == NONE else layout[offset + 1 : offset + 1 + rank])
        offset += 1 + max(rank, 0)
    return shapes


def shape_of(layout: Sequence[int], index: int) -> Sequence[int]:
    """That of one of the tensors, which is there."""
    offset = 0
    for _ in range(index):
        offset += 1 + max(layout[offset], 0)
    return layout[offset + 1 : offset + 1 + layout[offset]]


def unpack(packed: Tensor, layout: Sequence[int]) -> list[Tensor | None]:
    """The tensors as views of the flat one."""
    shapes = shapes_of(layout)
    parts = iter(packed.split([math.prod(shape) for shape in shapes if shape is not None]))
    return [None if shape is None else next(parts).view(*shape) for shape in shapes]
