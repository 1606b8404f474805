"""Masks of objects as run lengths: a few kilobytes each, where the pixels of a large image would take megabytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from overlock.extras import needing

Array = np.ndarray[Any, Any]


def import_coco() -> Any:
    """pycocotools' functions of masks. Raises ImportError, saying what to install, without it."""
    with needing("masks need pycocotools", "detect"):
        from pycocotools import mask  # noqa: PLC0415
    return mask


class Masks:
    """The masks of an image's objects, each decoded when it is asked for.

    To be used like an array (N, H, W) of booleans: by its length and ``shape``, by number, in a loop, and as a whole by
    ``numpy.asarray``, which takes N x H x W bytes. It is no ``Sequence``: what passes batches on goes through those,
    and would decode every mask.

    Args:
        size: height and width of the image.
        runs: of each mask the lengths of its runs, of pixels outside and inside by turns, outside first, down the
            columns from left to right: COCO's run lengths.
    """

    dtype = np.dtype(bool)

    def __init__(self, size: tuple[int, int], runs: Sequence[Array] = ()):
        self.size, self.runs = size, list(runs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, H, W."""
        return (len(self.runs), *self.size)

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Masks: ...
    def __getitem__(self, index: int | slice) -> Array | Masks:
        if isinstance(index, slice):
            return Masks(self.size, self.runs[index])
        runs = self.runs[index]
        inside = np.arange(len(runs)) % 2 == 1
        return np.repeat(inside, runs).reshape(self.size[::-1]).T

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = np.zeros(self.shape, dtype=bool)
        for i, mask in enumerate(self):
            whole[i] = mask
        return whole if dtype is None else whole.astype(dtype)

    def areas(self) -> list[int]:
        """Pixels of each mask."""
        return [int(runs[1::2].sum()) for runs in self.runs]

    def to_coco(self) -> list[dict[str, Any]]:
        """COCO's compressed form, {'size': [H, W], 'counts': bytes} each.

        Raises:
            ImportError: without pycocotools.
        """
        coco = import_coco()
        return [coco.frPyObjects(dict(size=list(self.size), counts=runs.tolist()), *self.size) for runs in self.runs]


def encode(part: Array, corner: tuple[int, int], size: tuple[int, int]) -> Array:
    """The run lengths of a mask.

    Args:
        part: (h, w) of booleans, outside of which nothing is the object's.
        corner: its top and left in the image.
        size: height and width of the image.
    """
    (top, left), (height, width) = corner, size
    edges = np.diff(np.pad(part.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # (w, h + 1)
    columns, rows = np.nonzero(edges == 1)
    starts = (left + columns) * height + top + rows
    columns, rows = np.nonzero(edges == -1)
    ends = (left + columns) * height + top + rows
    apart = starts[1:] != ends[:-1]  # else a run goes on from the foot of a column at the head of the next
    starts, ends = starts[np.r_[True, apart][: len(starts)]], ends[np.r_[apart, True][: len(ends)]]
    turns = np.stack([starts, ends], axis=1).ravel()
    return np.diff(np.r_[0, turns, height * width])


def unpack(counts: bytes) -> list[int]:
    """The run lengths in COCO's compressed form: five bits a byte, each run from the third on as its difference to the
    last but one."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def from_tensor(masks: Tensor) -> Masks:
    """The run lengths of masks (N, H, W), whose pixels are the object's where they are not zero."""
    size = (masks.shape[1], masks.shape[2])
    return Masks(size, [encode(mask.cpu().numpy() != 0, (0, 0), size) for mask in masks])


def empty(size: tuple[int, int]) -> Masks:
    """No masks, of an image of this height and width."""
    return from_tensor(torch.zeros(0, *size))
